"""Which saved boxes a wanted box meets, and whether boxes tile a tensor.

Pure geometry over `Box`, indexed by row-major position so that tensors cut into very many pieces stay cheap.
Must not know: files, ranks, tensors in memory.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from windlass.dist.box import Box, Shape


def flat_span(shape: Shape, box: Box) -> tuple[int, int]:
    """Return the row-major positions of the first and one past the last element of a box that is not empty."""
    low = high = 0
    for extent, offset, size in zip(shape, box.offsets, box.sizes, strict=True):
        low = low * extent + offset
        high = high * extent + offset + size - 1
    return low, high + 1


class PieceIndex:
    """Finds the boxes of one tensor that meet a given box.

    Boxes are sorted by first element; `reach[i]` is the largest end among the first i boxes, which is monotone, so
    two bisections bound the candidates. With flat shards the candidates are exactly the hits.
    """

    def __init__(self, shape: Shape, boxes: Sequence[Box]) -> None:
        self.shape = shape
        spans = sorted((*flat_span(shape, box), i) for i, box in enumerate(boxes))
        self._order = [(i, boxes[i]) for _, _, i in spans]
        self._starts = [low for low, _, _ in spans]
        self._reach = list(accumulate((high for _, high, _ in spans), max))

    def meeting(self, box: Box) -> Iterator[tuple[int, Box]]:
        """Yield (number of the saved box, common block) for every saved box that shares an element with `box`."""
        low, high = flat_span(self.shape, box)
        for i, saved in self._order[bisect_right(self._reach, low) : bisect_left(self._starts, high)]:
            common = saved.intersect(box)
            if common is not None:
                yield i, common


def tiling_problem(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """Return why the boxes do not hold every element exactly once, or None when they do."""
    held = 0
    for box in boxes:
        inside = all(o >= 0 and s > 0 and o + s <= d for o, s, d in zip(box.offsets, box.sizes, shape, strict=True))
        if not inside:
            return f"box {list(box.offsets)}+{list(box.sizes)} lies outside shape {list(shape)}"
        held += box.numel
    index = PieceIndex(shape, boxes)
    for i, box in enumerate(boxes):
        for j, common in index.meeting(box):
            if i != j:
                return f"elements {list(common.offsets)}+{list(common.sizes)} are held twice"
    total = math.prod(shape)
    return None if held == total else f"{held} of {total} elements are held"
