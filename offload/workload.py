"""What one rank does in a step, as offloading sees it: parts in walk order, the units they read, seconds of compute.

The planner, the byte formulas and the program of a step start from this. Must not know: models, tensors, tiers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from windlass.offload.placement import UnitFacts

DEFAULT_WINDOW = 2  # parts at the turn from forward to backward: the head and the last block


@dataclass(frozen=True)
class PartWork:
    """One part of the walk. Units: seconds of one micro-batch; backward with what is recomputed in it.

    Tiles are units that are fetched, used and let go one after another inside the part, in these orders.
    """

    name: str
    units: tuple[int, ...]
    forward_s: float = 0.0
    backward_s: float = 0.0
    tiles_forward: tuple[int, ...] = ()
    tiles_backward: tuple[int, ...] = ()

    @property
    def all_units(self) -> tuple[int, ...]:
        """Units and tiles."""
        return (*self.units, *self.tiles_forward)

    def tiles(self, *, forward: bool) -> tuple[int, ...]:
        """Return the tiles as one phase uses them."""
        return self.tiles_forward if forward else self.tiles_backward


@dataclass(frozen=True)
class Workload:
    """One step of one rank.

    `num_shards` ranks share a unit. `reshard` says which parts keep what they gathered from forward to backward: each
    (none), turnaround (those of the plan's window), never (all). Parameters that rest on the device are gathered
    `prefetch` parts ahead.
    """

    units: tuple[UnitFacts, ...]
    parts: tuple[PartWork, ...]
    state_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    num_shards: int = 1
    num_micro_batches: int = 1
    clips: bool = True
    reshard: str = "turnaround"
    prefetch: int = 1
    comm_per_s: float = 0.0  # bytes/s between the ranks that share units; 0: not known, takes no time

    @property
    def accumulates(self) -> bool:
        """Whether gradients are summed over several micro-batches."""
        return self.num_micro_batches > 1

    @property
    def first_backward(self) -> int:
        """The part at which backward ends: the earliest with something to train."""
        trained = (i for i, part in enumerate(self.parts) if any(self.units[u].trainable for u in part.all_units))
        return next(trained, len(self.parts))

    def order(self, *, forward: bool) -> list[int]:
        """Return the parts in the order of one phase."""
        parts = list(range(len(self.parts)))
        return parts if forward else parts[: self.first_backward - 1 if self.first_backward else None : -1]

    def arrivals(self) -> Iterator[tuple[int, int]]:
        """Yield (part, unit) in the order in which gradients become complete.

        Those of tiles are when backward has used them last, others when the earliest part that reads them is done.
        """
        for i in range(len(self.parts) - 1, self.first_backward - 1, -1):
            tiles = self.parts[i].tiles_backward
            for at, u in enumerate(tiles):
                if self.units[u].trainable and u not in tiles[at + 1 :]:
                    yield i, u
            for u in self.parts[i].units:
                if self.units[u].trainable and not any(u in part.units for part in self.parts[:i]):
                    yield i, u


def kept_parts(work: Workload, window: int) -> set[int]:
    """Return the parts whose parameters stay from forward to backward."""
    count = len(work.parts)
    most = {"each": 0, "turnaround": window or DEFAULT_WINDOW, "never": count}[work.reshard]
    return set(range(max(work.first_backward, count - most), count))


def uniform_workload(
    num_blocks: int,
    block_numel: int,
    *,
    ends_numel: int = 0,
    forward_s: float = 0.0,
    backward_s: float = 0.0,
    num_shards: int = 1,
    num_micro_batches: int = 1,
    clips: bool = True,
    state_names: Sequence[str] = ("exp_avg", "exp_avg_sq"),
) -> Workload:
    """Return a model of equal blocks, with an embedding and a head of `ends_numel` elements each unless that is 0."""
    names = [f"blocks.{i}" for i in range(num_blocks)]
    sizes = [block_numel] * num_blocks
    if ends_numel:
        names, sizes = ["embed", *names, "head"], [ends_numel, *sizes, ends_numel]
    units = tuple(UnitFacts(name, numel, trainable=True) for name, numel in zip(names, sizes, strict=True))
    parts = tuple(
        PartWork(name, (i,), *((forward_s, backward_s) if name.startswith("blocks") else (0.0, 0.0)))
        for i, name in enumerate(names)
    )
    return Workload(units, parts, tuple(state_names), num_shards, num_micro_batches, clips)
