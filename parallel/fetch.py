"""Parameters that rest off the device: fetched on use, in steps that begin as the walk comes closer.

    nvme --file read--> slab in host memory --h2d--> own shard on the device --gather--> the whole unit

Every rank fetches only its own shard over its own slow link; the links between devices bring the rest. A single rank
copies from the host straight into the whole unit. Must not know: gradients, optimizers, models.
Source: Rajbhandari et al. 2021, arXiv:2104.07857, sections 5.2 and 6 (bandwidth-centric partitioning, overlap).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from windlass.dist.comm import Group, Pending, Symmetric
from windlass.offload.machine import OffloadMachine, param_key, state_key
from windlass.offload.placement import UnitPlacement, pages
from windlass.offload.slabs import Slab
from windlass.parallel.buffers import Account, BufferPool


class ShardBuffers:
    """Buffers for own shards that were fetched and are about to be gathered, which peers can read; by size.

    Invariant: every rank takes and gives them in the same order, because every rank walks the same stages
    """

    def __init__(self, shards: Group, dtype: torch.dtype, account: Account) -> None:
        self._shards, self._dtype, self._account = shards, dtype, account
        self._free: dict[int, deque[Symmetric]] = {}
        self._made: Counter[int] = Counter()

    def take(self, numel: int) -> Symmetric:
        """Return a buffer that no peer reads any more. Collective of the shard group when one more has to be made."""
        free = self._free.setdefault(numel, deque())
        if not free:
            self._made[numel] += 1
            self._account("shard", numel * self._dtype.itemsize)
            name = f"fetched shard {numel}/{self._made[numel]}"
            return self._shards.symmetric(numel, self._dtype, full=False, name=name)
        buffer = free.popleft()
        buffer.wait_free()
        return buffer

    def give(self, buffer: Symmetric) -> None:
        """Return a buffer whose gather is over on this rank."""
        self._free[buffer.tensor.numel()].append(buffer)


@dataclass(frozen=True)
class _Extent:
    """Where a range of the shard rests: bytes [offset, offset + num_bytes) of a record, from byte `first` of it on."""

    key: str
    offset: int
    first: int
    num_bytes: int


@dataclass(frozen=True)
class _Read:
    """One extent on its way: in host memory once `done` is; `slab` is None if that is where it rests."""

    extent: _Extent
    done: Future[Any]
    slab: Future[Slab] | None


class FetchOnUse:
    """The whole unit exists between `start` and `release`; in between uses, parameters are where the plan says.

    `version` says how often the unit's parameters must have been rewritten by now.
    """

    transient = True

    def __init__(
        self,
        placement: UnitPlacement,
        padded: int,
        dtype: torch.dtype,
        machine: OffloadMachine,
        shards: Group,
        pool: BufferPool,
        buffers: ShardBuffers,
        version: Callable[[], int],
    ) -> None:
        self._placement, self._padded, self._dtype = placement, padded, dtype
        self._machine, self._shards, self._pool, self._buffers = machine, shards, pool, buffers
        self._version = version
        self._label = f"param {placement.name}"
        self._extents = self._find_extents()
        self._reads: list[_Read] | None = None
        self._copies: Future[None] | None = None
        self._shard: Symmetric | None = None
        self._flat: torch.Tensor | None = None
        self._gather: Pending[None] | None = None
        self.own = torch.empty(0, dtype=dtype, device=machine.device.torch_device)  # it does not rest on the device
        self.held_bytes = 0
        self.reach = max(machine.plan.lookahead)

    def _find_extents(self) -> list[_Extent]:
        plan, unit, size = self._machine.plan, self._placement, self._dtype.itemsize
        if plan.shares_master(unit):
            return [
                _Extent(state_key(unit.name, i), 0, c.first * size, c.numel * size) for i, c in enumerate(unit.chunks)
            ]
        starts = range(0, unit.numel, plan.chunk)
        key = param_key(unit.name)
        return [_Extent(key, f * size, f * size, min(plan.chunk, unit.numel - f) * size) for f in starts]

    # -- on the way --------------------------------------------------------------------------------------------------

    def approach(self, distance: int) -> None:
        """Begin to read and copy what is due when the walk is this many parts away."""
        if self._flat is not None:
            return
        leave_nvme, leave_host, _ = self._machine.plan.lookahead
        if distance <= leave_nvme and self._reads is None and self._copies is None:
            self._reads = [self._read(extent) for extent in self._extents]
        if distance <= leave_host and self._copies is None:
            self._copies = self._copy()

    def advance(self, distance: int) -> None:
        """Begin to gather what is due. Blocks: host, until this rank's shard is on the device."""
        if self._flat is None and self._shards.size > 1 and distance <= self._machine.plan.lookahead[2]:
            self.approach(0)
            self._begin_gather()

    def start(self) -> None:
        """Begin to bring the whole unit here. Collective of the shard group, in walk order."""
        self.approach(0)
        self.advance(0)

    def _read(self, extent: _Extent) -> _Read:
        machine = self._machine
        machine.store.check_version(extent.key, self._version())
        if not machine.store.on_file(extent.key):
            return _Read(extent, machine.store.settled(extent.key), None)
        assert machine.params is not None
        slab, length = machine.params.take(self._label), pages(extent.num_bytes)
        done = machine.store.read(extent.key, extent.offset, length, lambda: slab.result().bytes[:length], after=[slab])
        return _Read(extent, done, slab)

    def _copy(self) -> Future[None]:
        """Take the place on the device and begin to copy there, each extent as soon as it is in host memory."""
        machine = self._machine
        if self._shards.size == 1:
            self._flat = self._pool.take(self._padded, self._dtype)
            target = self._flat
        else:
            self._shard = self._buffers.take(self._placement.numel)
            target = self._shard.tensor
        flat, mark = target.view(torch.uint8), machine.device.mark()
        assert self._reads is not None
        copies = []
        for read in self._reads:
            part = flat[read.extent.first : read.extent.first + read.extent.num_bytes]
            copies.append(self._copy_extent(read, part, mark))
        self._reads = None
        return machine.lanes.all(copies, f"fetch {self._placement.name}")

    def _copy_extent(self, read: _Read, part: torch.Tensor, mark: Any) -> Future[None]:
        machine, extent = self._machine, read.extent

        def copy() -> None:
            if read.slab is None:
                memory = machine.store.memory(extent.key)
                machine.device.copy(part, memory[extent.offset : extent.offset + extent.num_bytes], mark)
            else:
                slab = read.slab.result()
                machine.device.copy(part, slab.bytes[: extent.num_bytes], mark)
                slab.give()

        return machine.lanes.submit(
            "h2d", copy, after=[read.done], num_bytes=extent.num_bytes, label=f"fetch {extent.key}"
        )

    def _begin_gather(self) -> None:
        assert self._copies is not None and self._shard is not None
        self._arrive()
        self._flat = self._pool.take(self._padded, self._dtype)
        self._gather = self._shard.gather_into(self._flat, tag="param", label=self._label)

    def _arrive(self) -> None:
        """Wait until everything is on the device. Blocks: host."""
        copies, self._copies = self._copies, None
        if copies is not None:
            if not copies.done():
                self._machine.lanes.raise_priority(copies)
            self._machine.lanes.wait(copies, f"parameters {self._placement.name}")

    # -- the face of a residency -------------------------------------------------------------------------------------

    def ready(self) -> torch.Tensor:
        self.start()
        if self._shards.size == 1:
            self._arrive()
        elif self._gather is not None:
            gather, self._gather = self._gather, None
            gather.wait()
            assert self._shard is not None
            self._buffers.give(self._shard)
            self._shard = None
        assert self._flat is not None
        return self._flat

    def release(self) -> None:
        if self._flat is not None:
            self.ready()
            flat, self._flat = self._flat, None
            self._pool.give(flat)

    def writable(self) -> None:
        """Let go of the unit, also of one that is still on its way. Collective of the shard group if one is."""
        if self._reads is not None or self._copies is not None:
            self.ready()  # what reads it now must be over before it is rewritten
        self.release()

    def publish(self) -> None:
        """What rests was rewritten where it rests."""
