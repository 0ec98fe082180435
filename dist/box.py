"""Which box of which global tensor lives where: the vocabulary shared by parallel, checkpoint and model import.

A `Box` is an axis-aligned block of a logical tensor. Flat shards (ZeRO) cut parameters at arbitrary element ranges;
`boxes_of_range` writes such a range as the few boxes that cover it, each contiguous in row-major order.
Must not know: files, process groups, ZeRO stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from windlass.dist.errors import PlanError

Shape = tuple[int, ...]


@dataclass(frozen=True, order=True)
class Box:
    """A block `[offsets, offsets + sizes)` of a tensor. A scalar is the box of empty tuples, one element."""

    offsets: Shape
    sizes: Shape

    @staticmethod
    def whole(shape: Shape) -> Box:
        return Box((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Return the common block, or None when the boxes share no element."""
        low = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        high = tuple(
            min(a + s, b + t) for a, s, b, t in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(h - l for l, h in zip(low, high, strict=True))
        return Box(low, sizes) if all(s > 0 for s in sizes) else None

    def within(self, outer: Box) -> Box:
        """Return this box with offsets counted from the corner of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)


def boxes_of_range(shape: Shape, start: int, stop: int) -> list[Box]:
    """Write the row-major element range `[start, stop)` of a tensor as boxes, in order.

    Each box is contiguous in the flattened tensor, and their flattened order is the range itself, so the n-th box
    begins where the previous one ended. At most `2 * ndim - 1` boxes.
    """
    numel = math.prod(shape)
    if not 0 <= start <= stop <= numel:
        raise PlanError(f"range [{start}, {stop}) lies outside a tensor of shape {shape} with {numel} elements")
    if start == stop:
        return []
    if len(shape) == 0:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    inner = numel // shape[0]
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)

    def in_row(row: int, low: int, high: int) -> list[Box]:
        return [Box((row, *b.offsets), (1, *b.sizes)) for b in boxes_of_range(shape[1:], low, high)]

    if first == last:
        return in_row(first, head, tail)
    out: list[Box] = []
    if head:
        out += in_row(first, head, inner)
        first += 1
    if last > first:
        out.append(Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    if tail:
        out += in_row(last, 0, tail)
    return out


@dataclass(frozen=True)
class ShardSpec:
    """The boxes of one global tensor that one rank holds."""

    name: str
    global_shape: Shape
    dtype: str
    boxes: tuple[Box, ...]

    @property
    def numel(self) -> int:
        return sum(b.numel for b in self.boxes)


class ShardTable:
    """Who holds what: for every tensor name, the boxes of each rank.

    Invariant: after `check()`, the boxes of all ranks cover every element of every tensor exactly once.
    """

    def __init__(self, by_rank: Mapping[int, Iterable[ShardSpec]]) -> None:
        self.by_rank: dict[int, dict[str, ShardSpec]] = {
            rank: {spec.name: spec for spec in specs} for rank, specs in by_rank.items()
        }

    def names(self) -> list[str]:
        return sorted({name for specs in self.by_rank.values() for name in specs})

    def holders(self, name: str) -> Iterator[tuple[int, ShardSpec]]:
        for rank, specs in sorted(self.by_rank.items()):
            if name in specs:
                yield rank, specs[name]

    def check(self) -> None:
        """Raise PlanError unless every element of every tensor is held exactly once."""
        for name in self.names():
            pieces = [(rank, spec, box) for rank, spec in self.holders(name) for box in spec.boxes]
            shapes = {spec.global_shape for _, spec, _ in pieces}
            if len(shapes) != 1:
                raise PlanError(f"tensor '{name}' has different global shapes on different ranks: {sorted(shapes)}")
            total = math.prod(next(iter(shapes)))
            held = sum(box.numel for _, _, box in pieces)
            for i, (rank, _, box) in enumerate(pieces):
                for other_rank, _, other in pieces[i + 1 :]:
                    if box.intersect(other) is not None:
                        raise PlanError(
                            f"tensor '{name}': ranks {rank} and {other_rank} both hold {box.intersect(other)}"
                        )
            if held != total:
                raise PlanError(f"tensor '{name}': {held} of {total} elements are held by some rank")
