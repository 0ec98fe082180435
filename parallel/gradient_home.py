"""Where a unit's reduced gradient is from its reduction to its update: on the device, or on its way off it.

One protocol, two members. The reducer takes the buffer it reduces into; the stepper says when the sum is there; the
update asks for one chunk at a time, in host memory or on the device. Partial sums of micro-batches come back to the
device before more is added, so that sums are formed in the same order wherever they rest.
Must not know: how gradients are summed, optimizers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from windlass.dist.comm import Pending
from windlass.offload.lane import Lanes
from windlass.offload.machine import DeviceMemory, OffloadMachine, grad_key
from windlass.offload.placement import Chunk, UnitPlacement, pages
from windlass.offload.slabs import Slab, SlabPool


@dataclass(frozen=True)
class GradientView:
    """A chunk of a gradient. `give` says that it has been used."""

    tensor: torch.Tensor
    give: Callable[[], None]


class GradientHome(Protocol):
    """The reduced gradient of one unit on this rank."""

    def take(self, *, accumulate: bool) -> torch.Tensor:
        """Return the buffer to reduce into, (shard_numel,), holding the sum so far if that is to be added to."""

    def settled(self, *, last: bool) -> None:
        """Say that a reduction into the buffer is over; `last`: of the step."""

    def rested(self) -> Future[Any]:
        """Return what is done when the sum so far is where it rests, and its buffer is free."""

    def on_host(self, chunk: Chunk) -> Future[GradientView]:
        """Bring one chunk of the finished sum to host memory."""

    def on_device(self, chunk: Chunk, beside: Future[Slab] | None = None, offset: int = 0) -> Future[GradientView]:
        """Bring one chunk of the finished sum to the device, into the buffer `beside` if it is not there.

        Units:  `offset` bytes into the buffer
        """


def _nothing() -> None:
    """Give back what is not lent."""


class StaysOnDevice:
    """The gradient has its place on the device; an update elsewhere gets copies of its chunks."""

    def __init__(self, tensor: torch.Tensor, name: str = "", machine: OffloadMachine | None = None) -> None:
        self._tensor, self._name, self._machine = tensor, name, machine
        self._mark: Any = None

    def take(self, *, accumulate: bool) -> torch.Tensor:
        return self._tensor

    def settled(self, *, last: bool) -> None:
        if self._machine is not None:
            self._mark = self._machine.device.mark()

    def rested(self) -> Future[Any]:
        return Lanes.done(None)

    def on_host(self, chunk: Chunk) -> Future[GradientView]:
        assert self._machine is not None
        return _stage(self._machine, self._name, self._tensor, chunk, self._mark)

    def on_device(self, chunk: Chunk, beside: Future[Slab] | None = None, offset: int = 0) -> Future[GradientView]:
        assert self._machine is not None
        return self._machine.lanes.done(GradientView(_part(self._tensor, chunk), _nothing))


class LeavesDevice:
    """The gradient is formed in a buffer that units use in turn, and rests in host memory or on nvme.

    Where nothing asks for it a second time (`keeps_gradients` of the plan is false), it never rests: its chunks go from
    the buffer to their updates. Without `buffers` it is formed where backward writes it, and handed over (`adopt`).
    """

    def __init__(
        self,
        placement: UnitPlacement,
        dtype: torch.dtype,
        machine: OffloadMachine,
        buffers: GradientBuffers | None,
    ) -> None:
        self._placement, self._dtype, self._machine, self._buffers = placement, dtype, machine, buffers
        self._key = grad_key(placement.name)
        self._buffer: GradientView | None = None
        self._rested: Future[Any] = machine.lanes.done(None)
        self._users = 0  # chunks that are yet to be used from the buffer
        self._lock = threading.Lock()
        self._mark: Any = None
        if buffers is not None:
            buffers.register(placement.numel)

    def take(self, *, accumulate: bool) -> torch.Tensor:
        assert self._buffers is not None
        slab = self._buffers.take(self._placement.numel, self._placement.name)
        self._buffer = GradientView(slab.view(self._dtype, self._placement.numel), slab.give)
        if accumulate:
            back = self._bring_back(self._buffer.tensor)
            self._machine.lanes.wait(back, f"partial gradient of {self._placement.name}")
        return self._buffer.tensor

    def adopt(self, tensor: torch.Tensor) -> Pending[None]:
        """Take over a buffer that holds the finished sum already; return what is done when nobody reads it any more."""
        free: Future[None] = Future()
        self._buffer = GradientView(tensor, lambda: free.set_result(None))
        what = f"the gradient of {self._placement.name} to leave the device"
        return Pending(lambda: self._machine.lanes.wait(free, what), what)

    def settled(self, *, last: bool) -> None:
        assert self._buffer is not None
        self._mark = self._machine.device.mark()
        if last and not self._machine.plan.keeps_gradients:
            self._users = len(self._placement.chunks)
            return
        buffer, self._buffer = self._buffer, None
        # Giving the buffer back is part of it: a skipped step waits for this future and for nothing behind it.
        self._rested = self._machine.lanes.then([self._rest(buffer.tensor)], buffer.give)

    def rested(self) -> Future[Any]:
        return self._rested

    def _rest(self, buffer: torch.Tensor) -> Future[Any]:
        machine, mark, size = self._machine, self._mark, self._dtype.itemsize
        flat = buffer.view(torch.uint8)
        if not machine.store.on_file(self._key):
            target = machine.store.memory(self._key)[: flat.numel()]
            return machine.lanes.submit(
                "d2h",
                lambda: machine.device.copy(target, flat, mark),
                num_bytes=flat.numel(),
                label=f"gradient {self._placement.name}",
            )
        writes = []
        for first, numel in self._pieces():
            view = _stage(machine, self._key, buffer, Chunk(first, numel, "nvme", "cpu"), mark)
            writes.append(self._write(view, first * size, pages(numel * size)))
        return machine.lanes.all(writes)

    def _write(self, view: Future[GradientView], offset: int, num_bytes: int) -> Future[None]:
        machine = self._machine
        assert machine.staged is not None

        def data() -> torch.Tensor:
            whole = view.result().tensor
            return torch.as_strided(
                whole.view(torch.uint8), (num_bytes,), (1,), whole.storage_offset() * whole.itemsize
            )

        written = machine.store.write(self._key, offset, num_bytes, data, after=[view])
        return machine.lanes.then([written], lambda: view.result().give())

    def _bring_back(self, buffer: torch.Tensor) -> Future[Any]:
        copies = []
        for first, numel in self._pieces():
            chunk = Chunk(first, numel, "", "")
            copies.append(self._copy_in(chunk, partial(_part, buffer, chunk)))
        return self._machine.lanes.all(copies)

    def _copy_in(
        self, chunk: Chunk, where: Callable[[], torch.Tensor], after: Sequence[Future[Any]] = ()
    ) -> Future[torch.Tensor]:
        view, machine = self._at_rest(chunk), self._machine
        mark, num_bytes = machine.device.mark(), chunk.numel * self._dtype.itemsize

        def copy() -> torch.Tensor:
            source, target = view.result(), where()
            machine.device.copy(target, source.tensor, mark)
            source.give()
            return target

        label = f"gradient {self._placement.name}"
        return machine.lanes.submit("h2d", copy, after=[view, *after], num_bytes=num_bytes, label=label)

    def _pieces(self) -> list[tuple[int, int]]:
        step, numel = self._machine.plan.chunk, self._placement.numel
        return [(first, min(step, numel - first)) for first in range(0, numel, step)]

    def _at_rest(self, chunk: Chunk) -> Future[GradientView]:
        """Return a chunk in host memory of a gradient that rests off the device."""
        machine, size = self._machine, self._dtype.itemsize
        if not machine.store.on_file(self._key):
            memory = machine.store.memory(self._key)[chunk.first * size : (chunk.first + chunk.numel) * size]
            return machine.lanes.then([self._rested], lambda: GradientView(memory.view(self._dtype), _nothing))
        assert machine.staged is not None
        slab, length = machine.staged.take(self._key), pages(chunk.numel * size)
        read = machine.store.read(
            self._key, chunk.first * size, length, lambda: slab.result().bytes[:length], after=[slab, self._rested]
        )
        return machine.lanes.then([read], lambda: _view(slab.result(), self._dtype, chunk.numel))

    def on_host(self, chunk: Chunk) -> Future[GradientView]:
        if self._buffer is None:
            return self._at_rest(chunk)
        view = _stage(self._machine, self._placement.name, self._buffer.tensor, chunk, self._mark)
        # Once it is in host memory, the buffer has one user less.
        return self._machine.lanes.then([view], lambda: self._used(view.result()))

    def on_device(self, chunk: Chunk, beside: Future[Slab] | None = None, offset: int = 0) -> Future[GradientView]:
        if self._buffer is not None:
            view = GradientView(_part(self._buffer.tensor, chunk), self._one_less)
            return self._machine.lanes.done(view)
        assert beside is not None
        copied = self._copy_in(chunk, lambda: beside.result().view(self._dtype, chunk.numel, offset), [beside])
        return self._machine.lanes.then([copied], lambda: GradientView(copied.result(), _nothing))

    def _used(self, view: GradientView) -> GradientView:
        self._one_less()
        return view

    def _one_less(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            buffer, self._buffer = self._buffer, None
        assert buffer is not None
        buffer.give()


class GradientBuffers:
    """Buffers that gradients on their way off the device use in turn, by size; at most two of a size.

    Invariant: every rank takes them in the same order, because every rank walks the same stages
    """

    def __init__(self, dtype: torch.dtype, machine: OffloadMachine) -> None:
        self._dtype, self._machine = dtype, machine
        self._users: Counter[int] = Counter()
        self._pools: dict[int, SlabPool] = {}

    def register(self, numel: int) -> None:
        """Say that one more unit of this size will take buffers."""
        self._users[numel] += 1

    def build(self) -> None:
        """Allocate for all units that were registered."""
        memory = DeviceMemory(self._machine.ledger, self._machine.device.torch_device, state="grad")
        for numel, users in self._users.items():
            name = f"gradients of {numel} elements"
            self._pools[numel] = SlabPool(memory, numel * self._dtype.itemsize, min(2, users), name)

    def take(self, numel: int, label: str) -> Slab:
        """Return a buffer once nothing reads it any more.

        Blocks:  host, while both are on their way
        """
        return self._machine.lanes.wait(self._pools[numel].take(label), "a gradient buffer")


def _part(tensor: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    return tensor[chunk.first : chunk.first + chunk.numel]


def _view(slab: Slab, dtype: torch.dtype, numel: int) -> GradientView:
    return GradientView(slab.view(dtype, numel), slab.give)


def _stage(machine: OffloadMachine, name: str, tensor: torch.Tensor, chunk: Chunk, mark: Any) -> Future[GradientView]:
    """Copy one chunk from the device into a slab of host memory."""
    assert machine.staged is not None
    source, taken = _part(tensor, chunk), machine.staged.take(f"gradient {name}")

    def copy() -> GradientView:
        view = _view(taken.result(), tensor.dtype, chunk.numel)
        machine.device.copy(view.tensor, source, mark)
        return view

    return machine.lanes.submit("d2h", copy, after=[taken], num_bytes=source.nbytes, label=f"gradient {name}")
