"""Where every record of training state rests and who updates it: a policy applied to the units of one rank. Pure.

A unit's optimizer state is cut into chunks; a chunk's master weights and moments form one record, which is fetched,
updated and put back as a whole. A record starts and ends at a page, so it can go to a file past the page cache.
Must not know: models, ranks, devices, how bytes move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from windlass.dist.errors import PlanError
from windlass.offload.policy import OffloadConfig

PAGE = 4096  # bytes; the unit of unbuffered file I/O
CHUNK_ALIGN = 2048  # elements: a chunk begins at a page in 16-bit formats, too; kernels see the alignment of the whole
TIERS = ("device", "host", "nvme")
PLACES = {"param": TIERS, "grad": TIERS, "optimizer": TIERS, "update_on": ("cpu", "device")}


def pages(num_bytes: int) -> int:
    """Return bytes rounded up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE


@dataclass(frozen=True)
class UnitFacts:
    """What placement needs of a unit on this rank. Units: elements of this rank's part."""

    name: str
    numel: int
    trainable: bool
    whole_gradient: bool = False  # its gradient is reduced once, at the end of the step, and stays on the device
    sharded: bool = True  # whether each rank holds a part of its parameters only, which may rest elsewhere


@dataclass(frozen=True)
class Chunk:
    """Elements [first, first + numel) of a unit's part: one record. `tier` at rest; updated on `update_on`."""

    first: int
    numel: int
    tier: str
    update_on: str  # "cpu" | "device"


@dataclass(frozen=True)
class UnitPlacement:
    """One unit: tier of its parameters at rest, of its reduced gradient until it is used, and its records."""

    name: str
    numel: int
    param: str
    grad: str
    chunks: tuple[Chunk, ...]  # empty: nothing to update, or all of its state stays on the device
    trainable: bool = True

    @property
    def offloaded(self) -> bool:
        """Whether its update goes through records."""
        return bool(self.chunks)


@dataclass(frozen=True)
class Sizes:
    """Bytes of one element by class, and how many states the optimizer keeps beside the master weights."""

    param: int
    reduce: int
    master: int
    num_states: int

    @property
    def one_copy(self) -> bool:
        """Whether master weights and parameters are of one format."""
        return self.param == self.master


@dataclass(frozen=True)
class OffloadPlan:
    """All that the runtime is told: placement, order, and how far it may run ahead.

    Units:  `chunk` elements; `slabs` and `cache` records; `lookahead` and `window` parts of the model
    """

    units: tuple[UnitPlacement, ...]
    sizes: Sizes
    when: str  # "after" | "backward"
    clip: str  # "two_pass" | "speculate"
    order: str  # "arrival" | "alternate"
    cache: int
    lookahead: tuple[int, int, int]
    window: int
    slabs: int
    chunk: int
    keeps_gradients: bool = True  # until the norm is known, or from one micro-batch to the next
    accumulates: bool = True  # gradients of several micro-batches are summed

    def unit(self, name: str) -> UnitPlacement:
        """Return the placement of a unit."""
        return next(u for u in self.units if u.name == name)

    @property
    def shadowed(self) -> bool:
        """Whether records have two slots, so that the committed version is whole at any moment."""
        return self.clip == "speculate"

    def record_bytes(self, chunk: Chunk) -> int:
        """Return the bytes of one record: master weights and moments, each in whole pages."""
        return (1 + self.sizes.num_states) * self.field_bytes(chunk)

    def field_bytes(self, chunk: Chunk) -> int:
        """Return the bytes of the master weights, or of one moment, of a chunk."""
        return pages(chunk.numel * self.sizes.master)

    @property
    def staging_bytes(self) -> int:
        """Return the bytes of one slab for what passes through host memory without resting there; 0: nothing does.

        Parameters cast from the master weights on their way to where they rest, gradients on their way to an update.
        """
        sizes = self.sizes
        passing = [0]
        for unit in self.units:
            for chunk in unit.chunks:
                if chunk.tier != "device" and unit.param != "host" and not sizes.one_copy:
                    passing.append(chunk.numel * sizes.param)
                if unit.param == "nvme" and not self.shares_master(unit):
                    passing.append(chunk.numel * sizes.param)
                rests_apart = unit.grad == "nvme" or not self.keeps_gradients or unit.grad == "device"
                if chunk.tier != "device" and chunk.update_on == "cpu" and rests_apart:
                    passing.append(chunk.numel * sizes.reduce)
            if unit.grad == "nvme":
                passing.append(min(unit.numel, self.chunk) * sizes.reduce)
        return pages(max(passing))

    def device_record_bytes(self, unit: UnitPlacement, chunk: Chunk) -> int:
        """Return the bytes of what comes to the device for an update there: the record, and beside it its gradient."""
        if chunk.update_on != "device":
            return 0
        beside = 0 if unit.grad == "device" or not self.keeps_gradients else pages(chunk.numel * self.sizes.reduce)
        return beside + (0 if chunk.tier == "device" else self.record_bytes(chunk))

    def shares_master(self, unit: UnitPlacement) -> bool:
        """Whether the parameters at rest are the master weights inside the records, not a copy of their own."""
        return self.sizes.one_copy and unit.offloaded and all(c.tier == unit.param for c in unit.chunks)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def plan_offload(
    config: OffloadConfig, units: Sequence[UnitFacts], sizes: Sizes, *, clips: bool = True, accumulates: bool = False
) -> OffloadPlan | None:
    """Apply a policy to the units of one rank, in walk order; None if nothing is offloaded.

    `clips`: gradients are needed again once their norm is known. `accumulates`: over several micro-batches.
    `config.policy` is not auto, and what is negative in it has been planned.
    Raises:  PlanError for a table that names no unit, or a tier that cannot hold what it is asked to
    """
    if not config.active:
        return None
    policy = config.resolved()
    _check_table(config, units)
    optimizer_only = [u for u in units if u.trainable]
    spread = _Spread(config.param_device_share)
    # Updates are interleaved in the order in which gradients arrive: last unit first.
    on_device = _Updates(policy.device_share, config.stride)
    in_host = _Spread(config.host_share)
    rows = {u.name: _row(config, u) for u in units}
    params: dict[str, str] = {}
    for unit in units:
        params[unit.name] = rows[unit.name].get("param", policy.param) if unit.sharded else "device"
        if params[unit.name] != "device" and "param" not in rows[unit.name] and spread.next():
            params[unit.name] = "device"
    chunks: dict[str, tuple[Chunk, ...]] = {}
    for unit in reversed(optimizer_only):
        row = rows[unit.name]
        tier = row.get("optimizer", policy.optimizer)
        cut = []
        for first in range(0, unit.numel, _chunk(config)):
            numel = min(_chunk(config), unit.numel - first)
            rest = "host" if tier == "nvme" and in_host.next() else tier
            where = "device" if rest == "device" else row.get("update_on") or ("device" if on_device.next() else "cpu")
            cut.append(Chunk(first, numel, rest, where))
        stays = params[unit.name] == "device" and all(c.tier == "device" for c in cut)
        chunks[unit.name] = () if stays else tuple(cut)
    placed = []
    for unit in units:
        own = chunks.get(unit.name, ())
        grad = rows[unit.name].get("grad", policy.grad) if own and not unit.whole_gradient else "device"
        placed.append(UnitPlacement(unit.name, unit.numel, params[unit.name], grad, own, unit.trainable))
    return OffloadPlan(
        units=tuple(placed),
        sizes=sizes,
        when=policy.when,
        clip=policy.clip,
        order=policy.order,
        cache=max(policy.cache, 0),
        lookahead=_lookahead(config),
        window=policy.window,
        slabs=config.slabs,
        chunk=_chunk(config),
        keeps_gradients=policy.when == "after" or policy.clip == "two_pass" or clips or accumulates,
        accumulates=accumulates,
    )


def _lookahead(config: OffloadConfig) -> tuple[int, int, int]:
    """Return how far ahead parameters are fetched.

    Tiles are read after units that are used later. Where those were being read without being copied yet, they would
    keep the slabs that the tiles need to get on.
    """
    nvme, host, gather = config.lookahead
    return (min(nvme, host), host, gather) if config.tile else config.lookahead


def _chunk(config: OffloadConfig) -> int:
    return -(-config.chunk // CHUNK_ALIGN) * CHUNK_ALIGN


def _row(config: OffloadConfig, unit: UnitFacts) -> dict[str, str]:
    row: dict[str, str] = {}
    for given in config.table:
        if fnmatchcase(unit.name, given["units"]):
            row |= {key: value for key, value in given.items() if key != "units"}
    return row


def _check_table(config: OffloadConfig, units: Sequence[UnitFacts]) -> None:
    for number, row in enumerate(config.table):
        where = f"offload.table[{number}]"
        if "units" not in row:
            raise PlanError(f"{where}: has no `units`. Give a pattern of unit names, such as units: blocks.*")
        for key, value in row.items():
            if key == "units":
                continue
            if key not in PLACES or value not in PLACES[key]:
                legal = "; ".join(f"{name}: {', '.join(values)}" for name, values in PLACES.items())
                raise PlanError(f"{where}: {key} = '{value}' is not known. Use {legal}")
        matching = [u for u in units if fnmatchcase(u.name, row["units"])]
        if not matching:
            raise PlanError(
                f"{where}: no unit is called '{row['units']}'. The units are {', '.join(u.name for u in units)}"
            )


class _Spread:
    """Chooses a share of a sequence, evenly spread over it (Bresenham's line)."""

    def __init__(self, share: float) -> None:
        self._share, self._count, self._chosen = share, 0, 0

    def next(self) -> bool:
        self._count += 1
        if int(self._count * self._share + 0.5) > self._chosen:
            self._chosen += 1
            return True
        return False


class _Updates:
    """Chooses the updates that are made on the device: every n-th, or a share of them."""

    def __init__(self, share: float, stride: int) -> None:
        self._stride, self._count, self._spread = stride, 0, _Spread(max(share, 0.0))

    def next(self) -> bool:
        self._count += 1
        return self._count % self._stride == 0 if self._stride else self._spread.next()
