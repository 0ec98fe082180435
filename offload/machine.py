"""The tiers of one rank at work: lanes, host memory, files and the store over them, built from a plan.

Who trains asks it for buffers and gives it tasks; which policy made the plan it cannot know.
Must not know: layers, what the numbers mean, ranks other than its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.dist.device import Device
from windlass.dist.errors import OffloadError
from windlass.dist.trace import Tracer
from windlass.offload.claim import run_folder
from windlass.offload.commit import newest_commit
from windlass.offload.engines import build_engine
from windlass.offload.lane import LaneCounters, Lanes
from windlass.offload.ledger import TierLedger
from windlass.offload.loans import Loans
from windlass.offload.nvme import Extent, StateFile
from windlass.offload.placement import OffloadPlan, UnitPlacement, pages
from windlass.offload.policy import OffloadConfig
from windlass.offload.slabs import HostMemory, SlabPool
from windlass.offload.store import READ, WRITE, TensorStore, lane_of

TIMELINE = "timeline"  # what a commit says about the succession of starts that it belongs to
DEVICE_RECORDS = 2  # records on the device while they are updated there: one comes or goes while one is updated


@dataclass(frozen=True)
class Drives:
    """Folders on the drives of this host, and how much of the bytes each takes (empty: equal shares).

    `identity` is what must be equal for an earlier run's files to be of use. What they hold is worth keeping if it is
    of `timeline` and newer than `after`, the step that a checkpoint holds; `resume`: whether it is looked at at all.
    """

    paths: Sequence[str] = ()
    weights: Sequence[float] = ()
    identity: str = ""
    rank: int = 0
    resume: bool = False
    timeline: str = ""
    after: int = -1


def state_key(unit: str, chunk: int) -> str:
    """Return the key of one record of optimizer state."""
    return f"{unit}/state/{chunk}"


def param_key(unit: str) -> str:
    """Return the key of a unit's parameters where they rest apart from the master weights."""
    return f"{unit}/param"


def grad_key(unit: str) -> str:
    """Return the key of a unit's reduced gradient."""
    return f"{unit}/grad"


class DeviceMemory:
    """Memory of the device in bytes, booked before it is taken: on a CPU too, so that its budget binds."""

    def __init__(self, ledger: TierLedger, device: torch.device, state: str = "") -> None:
        self._ledger, self._device, self._state = ledger, device, state

    def allocate(self, num_bytes: int, state: str, requester: str) -> torch.Tensor:
        """Return zeroed bytes, (num_bytes,) uint8, booked as `state` unless this memory is for one class only.

        Raises:  TierOutOfMemory if the budget does not hold them
        """
        self._ledger.add("device", self._state or state, num_bytes, requester)
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)


class OffloadMachine:
    """Everything that one rank needs to keep state off its device.

    Where `drives` say so, files that an earlier run of the same identity left are kept; say with `adopt` what counts.
    Raises:  TierOutOfMemory if a budget does not hold what rests on its tier; OffloadError for drives that cannot be
             used
    """

    def __init__(
        self,
        plan: OffloadPlan,
        config: OffloadConfig,
        *,
        device: Device,
        ledger: TierLedger,
        tracer: Tracer,
        drives: Drives,
        warn: Callable[[str], None],
    ) -> None:
        self.plan, self.device, self.ledger, self.adam = plan, device, ledger, config.adam.replace("auto", "torch")
        self.lanes = Lanes(
            tracer,
            rates={lane_of(name, d): rate for name, rate in config.throttle.items() for d in _drives(name, drives)},
            watchdog_s=config.watchdog_s,
            workers={lane_of(name, d): config.io_threads for name in (READ, WRITE) for d in range(len(drives.paths))},
            prepare=device.use,
        )
        self.host = HostMemory(ledger, device, warn=warn)
        self.on_device = DeviceMemory(ledger, device.torch_device)
        self.store = TensorStore(self.lanes)
        self.loans = Loans(self.store, self.lanes)
        self._pools: list[SlabPool] = []
        self.files: list[StateFile] = []
        self._timeline = drives.timeline
        self.adopted = False
        self.finished = False  # what training made is safe elsewhere
        try:
            self._place_records(config, drives, warn)
            self._make_pools()
        except BaseException:
            self.close()
            raise

    # -- building ----------------------------------------------------------------------------------------------------

    def _place_records(self, config: OffloadConfig, drives: Drives, warn: Callable[[str], None]) -> None:
        extents: list[tuple[Extent, str]] = []
        for unit in self.plan.units:
            extents += self._place_unit(unit)
        # What a commit covers: records with a slot to spare, and what nobody ever rewrites.
        frozen = {param_key(u.name) for u in self.plan.units if not u.trainable}
        durable = {e.key for e, _ in extents if e.slots == 2 or e.key in frozen}
        if not extents:
            return
        if not drives.paths:
            needed = sum(e.num_bytes * e.slots for e, _ in extents)
            raise OffloadError(
                f"offload: {needed:,} bytes of this rank are to rest on nvme, but cluster.nvme_paths is empty. Give a "
                "folder on a drive of this host, or another offload.policy"
            )
        weights = drives.weights or [1.0] * len(drives.paths)
        shares = zip(drives.paths, _share_out([e for e, _ in extents], weights), strict=True)
        used = [(path, own) for path, own in shares if own]  # a few records may not do for all drives
        for extent, state in extents:
            self.ledger.add("nvme", state, extent.num_bytes * extent.slots, extent.key)
        identity = {"identity": drives.identity, "shadow": self.plan.shadowed}
        options: dict[str, Any] = {"checksums": config.checksums, "identity": identity, "warn": warn}
        self.store.use_files(self.files)
        for path, own in used:
            file = None
            if drives.resume:
                engine = build_engine(config.engine)
                file = StateFile.reopen(Path(path), drives.rank, own, engine=engine, **options)
            if file is None:
                _check_nothing_lost(run_folder(Path(path), drives.rank, identity), drives)
                engine = build_engine(config.engine)
                file = StateFile.create(Path(path), drives.rank, own, engine=engine, **options)
            self.files.append(file)
        for number, (_, own) in enumerate(used):
            for extent in own:
                self.store.add_file(extent.key, extent.num_bytes, extent.slots, number, durable=extent.key in durable)

    @property
    def durable(self) -> bool:
        """Whether the drives alone hold all that training changes, a whole step at any moment."""
        plan = self.plan
        trained = [u for u in plan.units if u.trainable]
        whole = all(u.chunks and all(c.tier == "nvme" for c in u.chunks) for u in trained)
        return plan.shadowed and whole and all(u.param == "nvme" for u in plan.units if not u.trainable)

    def whole_steps(self) -> dict[int, dict[str, Any]]:
        """Return the steps that an earlier run left whole on all drives of this rank, with what was noted with each."""
        if not self.durable or not self.files:
            return {}
        commits = [{commit.step: commit.extra for commit in file.commits()} for file in self.files]
        common = set.intersection(*(set(c) for c in commits))
        return {step: commits[0][step] for step in common if commits[0][step].get(TIMELINE) == self._timeline}

    def adopt(self, step: int | None) -> None:
        """Take the state of one of `whole_steps` as it is on the drives; None: nothing of an earlier run counts."""
        self.adopted = step is not None
        for file in self.files:
            if step is None:
                file.forget()
            else:
                file.roll_back(step)
                self.store.adopt(file.commits()[0].slots)

    def _place_unit(self, unit: UnitPlacement) -> list[tuple[Extent, str]]:
        """Take host memory for what rests there, and return the extents of what rests on nvme."""
        plan, on_file = self.plan, []
        slots = 2 if plan.shadowed else 1
        for tier, source in (("host", self.host), ("device", self.on_device)):
            here = [(i, c) for i, c in enumerate(unit.chunks) if c.tier == tier]
            total = sum(plan.record_bytes(c) for _, c in here)
            memory = [source.allocate(total, "optimizer", f"{unit.name}/state") for _ in range(slots if here else 0)]
            first = 0
            for i, chunk in here:
                size = plan.record_bytes(chunk)
                self.store.add_host(state_key(unit.name, i), [m[first : first + size] for m in memory])
                first += size
        for i, chunk in enumerate(unit.chunks):
            if chunk.tier == "nvme":
                on_file.append((Extent(state_key(unit.name, i), plan.record_bytes(chunk), slots), "optimizer"))
        rests = [(param_key(unit.name), unit.param, "param", plan.sizes.param)] if self.has_param_record(unit) else []
        if unit.grad != "device" and plan.keeps_gradients:
            rests.append((grad_key(unit.name), unit.grad, "grad", plan.sizes.reduce))
        for key, tier, state, itemsize in rests:
            size = pages(unit.numel * itemsize)
            if tier == "host":
                self.store.add_host(key, [self.host.allocate(size, state, key)])
            else:
                on_file.append((Extent(key, size, 1), state))
        return on_file

    def has_param_record(self, unit: UnitPlacement) -> bool:
        """Return whether a unit's parameters rest off the device in a record of their own."""
        return unit.param != "device" and not self.plan.shares_master(unit)

    def _make_pools(self) -> None:
        plan = self.plan
        chunks = [(u, c) for u in plan.units for c in u.chunks]
        on_nvme = [plan.record_bytes(c) for _, c in chunks if c.tier == "nvme"]
        self.records = self._pool("records", max(on_nvme, default=0), plan.slabs + plan.cache, self.host)
        if self.records is not None:
            self.store.use_slabs(self.records)
        fetched = [u.numel for u in plan.units if u.param == "nvme"]
        size = pages(min(plan.chunk, max(fetched, default=0)) * plan.sizes.param)
        self.params = self._pool("parameters", size, plan.slabs, self.host)
        # A chunk may take two at once: its gradient comes through one, its new parameters leave through another.
        self.staged = self._pool("staging", plan.staging_bytes, 2 * plan.slabs, self.host)
        on_device = [plan.device_record_bytes(u, c) for u, c in chunks]
        self.device_records = self._pool("device records", max(on_device, default=0), DEVICE_RECORDS, self.on_device)

    def _pool(self, name: str, slab_bytes: int, count: int, memory: HostMemory | DeviceMemory) -> SlabPool | None:
        if not slab_bytes:
            return None
        pool = SlabPool(memory, slab_bytes, count, name)
        self._pools.append(pool)
        return pool

    # -- at work -----------------------------------------------------------------------------------------------------

    def check_balanced(self) -> None:
        """Raise OffloadError if a slab or a record is still in use: at the end of a step nothing is under way."""
        self.lanes.check_idle()
        self.store.check_balanced()
        for pool in self._pools:
            pool.check_balanced(kept=len(self.store.kept) if pool is self.records else 0)

    def take_counters(self) -> dict[str, LaneCounters]:
        """Return what every lane did since the last call."""
        return self.lanes.take_counters()

    def close(self) -> None:
        """Drop what has not begun, close files, give memory back. Never waits for a lane.

        Files stay where they hold a whole step that exists nowhere else.
        """
        with ExitStack() as stack:
            stack.callback(self.host.close)
            for file in self.files:
                stack.callback(file.close, remove=self.finished or not self.durable or not file.commits())
            self.lanes.close()

    def __enter__(self) -> OffloadMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_nothing_lost(folder: Path, drives: Drives) -> None:
    """Refuse to write over a step that exists nowhere else, because records are cut otherwise now."""
    left = newest_commit(folder) if drives.resume else None
    if left is not None and left.extra.get(TIMELINE) == drives.timeline and left.step > drives.after:
        raise OffloadError(
            f"{folder} holds step {left.step} of this run, newer than any checkpoint, in records cut otherwise: "
            "offload.chunk, the placement, cluster.nvme_paths, cluster.nvme_weights or the precision changed. Set them "
            "back to go on from there, or delete that folder to give the steps up"
        )


def _drives(lane: str, drives: Drives) -> range:
    """Return the numbers of the lanes of one name: files have one lane per drive."""
    return range(max(1, len(drives.paths))) if lane in (READ, WRITE) else range(1)


def _share_out(extents: Sequence[Extent], weights: Sequence[float]) -> list[list[Extent]]:
    """Give each extent to the drive that has least of its share so far."""
    split: list[list[Extent]] = [[] for _ in weights]
    given = [0.0] * len(weights)
    for extent in extents:
        drive = min(range(len(weights)), key=lambda i: (given[i] + extent.num_bytes) / weights[i])
        split[drive].append(extent)
        given[drive] += extent.num_bytes
    return split
