"""Ranks arranged along named axes. Pure arithmetic, so that meshes of any size can be planned on any machine.

Ranks vary fastest along the last axis, so that inner axes, which talk most, stay within a host. `("dp_replicate",
"dp_shard")` together are the data-parallel axis "dp". "pp" is the outermost: a pipeline sends little, so it is the axis
to lay across slow links or kinds of machines, while every data-parallel group stays within one.
Must not know: process groups, devices, what is cut along an axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from windlass.dist.errors import PlanError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "ulysses")  # outer to inner
VIEWS: dict[str, tuple[str, ...]] = {"dp": ("dp_replicate", "dp_shard"), "world": AXES}


@dataclass(frozen=True)
class ParallelismConfig:
    """Sizes of the mesh axes. `pp x dp_replicate x dp_shard` must equal the world size."""

    pp: int = field(default=1, metadata={"help": "pipeline ranks: each holds some of the blocks", "ge": 1})
    dp_replicate: int = field(default=1, metadata={"help": "replicas of each shard group (hybrid sharding)", "ge": 1})
    dp_shard: int = field(
        default=-1, metadata={"help": "ranks that share one sharded state; -1: all that remain", "ge": -1}
    )
    transport: str = field(
        default="auto",
        metadata={
            "help": "how bytes travel between ranks. auto: shared memory between CPU ranks of one host, else the "
            "process group",
            "choices": ("auto", "shm", "group"),
        },
    )
    timeout_s: float = field(default=600.0, metadata={"help": "longest wait for a peer", "unit": "seconds", "gt": 0})


@dataclass(frozen=True)
class Mesh:
    """Axis sizes, every axis present. One world, many named views."""

    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        unknown = set(self.sizes) - set(AXES)
        if unknown:
            raise PlanError(f"unknown mesh axes {sorted(unknown)}: the axes are {', '.join(AXES)}")
        bad = {axis: size for axis, size in self.sizes.items() if size < 1}
        if bad:
            raise PlanError(f"mesh axes must have at least one rank: {bad}")
        object.__setattr__(self, "sizes", {axis: self.sizes.get(axis, 1) for axis in AXES})

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes.values())

    def size(self, axes: str | tuple[str, ...]) -> int:
        """Return how many ranks lie along one axis, several, or a view such as "dp"."""
        return math.prod(self.sizes[axis] for axis in _flatten(axes))

    def coords(self, rank: int) -> dict[str, int]:
        """Return where a rank lies on every axis."""
        self._check_rank(rank)
        out: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, out[axis] = divmod(rank, self.sizes[axis])
        return {axis: out[axis] for axis in AXES}

    def rank_at(self, coords: Mapping[str, int]) -> int:
        """Return the rank at these coordinates (the inverse of `coords`)."""
        rank = 0
        for axis in AXES:
            if not 0 <= coords[axis] < self.sizes[axis]:
                raise PlanError(f"coordinate {axis}={coords[axis]} is outside the mesh {self}")
            rank = rank * self.sizes[axis] + coords[axis]
        return rank

    def ranks_along(self, axes: str | tuple[str, ...], rank: int) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` only along these axes, itself included, in mesh order."""
        free = _flatten(axes)
        choices = [range(self.sizes[axis]) if axis in free else (c,) for axis, c in self.coords(rank).items()]
        return tuple(self.rank_at(dict(zip(AXES, coords, strict=True))) for coords in itertools.product(*choices))

    def index_along(self, axes: str | tuple[str, ...], rank: int) -> int:
        """Return the place of a rank among `ranks_along`."""
        return self.ranks_along(axes, rank).index(rank)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise PlanError(f"rank {rank} is outside the mesh {self} of {self.world_size} ranks")

    def __str__(self) -> str:
        return " x ".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "of one rank"


def _flatten(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    names = (axes,) if isinstance(axes, str) else axes
    out = [axis for name in names for axis in VIEWS.get(name, (name,))]
    unknown = [axis for axis in out if axis not in AXES]
    if unknown or len(set(out)) != len(out):
        raise PlanError(f"mesh axes {names}: must be distinct names among {', '.join((*AXES, *VIEWS))}")
    return tuple(out)


def plan_mesh(config: ParallelismConfig, world_size: int) -> Mesh:
    """Arrange `world_size` ranks as the configuration asks.

    Raises: PlanError naming the values that would work when the axes do not multiply to the world size.
    """
    pp, replicate, shard = config.pp, config.dp_replicate, config.dp_shard
    if world_size % pp:
        raise PlanError(
            f"parallelism.pp = {pp} does not divide the {world_size} ranks of this job. "
            f"Use one of {_divisors(world_size)}"
        )
    ranks = world_size // pp
    count = f"{ranks} ranks" if pp == 1 else f"{ranks} data-parallel ranks ({world_size} / parallelism.pp = {pp})"
    if ranks % replicate:
        raise PlanError(
            f"parallelism.dp_replicate = {replicate} does not divide the {count} of this job. "
            f"Use one of {_divisors(ranks)}"
        )
    if shard == -1:
        shard = ranks // replicate
    if shard < 1 or replicate * shard != ranks:
        legal = " or ".join(f"{d} x {ranks // d}" for d in _divisors(ranks))
        raise PlanError(
            f"parallelism.dp_replicate x dp_shard = {replicate} x {shard} = {replicate * shard}, but the job has "
            f"{count}. Use {legal}, or dp_shard=-1 for all that remain"
        )
    return Mesh({"pp": pp, "dp_replicate": replicate, "dp_shard": shard})


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
