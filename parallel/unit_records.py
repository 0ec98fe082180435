"""A unit's master weights and optimizer state in records that rest on any tier, and the chain of tasks of one update.

A chunk is updated where the plan says: its record is fetched, its gradient brought there, the update made, new
parameters sent to where they rest, the record put back. All of it are tasks of lanes; nothing here waits, but for
filling and saving.
Must not know: which policy made the plan, when updates begin, other units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch

from windlass.dist.state import Loan, Piece
from windlass.offload.machine import OffloadMachine, param_key, state_key
from windlass.offload.placement import Chunk, UnitPlacement, pages
from windlass.offload.slabs import Slab
from windlass.offload.store import Lease
from windlass.parallel.gradient_home import GradientHome, GradientView
from windlass.parallel.optim import UpdateKernel
from windlass.parallel.residency import Residency
from windlass.parallel.unit_state import Fill, cut_pieces, fill_range
from windlass.parallel.units import UnitPlan


class StateInRecords:
    """State of the own range in records, chunk by chunk.

    `residency.own` is where parameters rest if that is the device.
    """

    def __init__(
        self,
        plan: UnitPlan,
        placement: UnitPlacement,
        residency: Residency,
        gradient: GradientHome,
        low: int,
        machine: OffloadMachine,
        kernel: UpdateKernel,
        param_dtype: torch.dtype,
        master_dtype: torch.dtype,
    ) -> None:
        self.plan, self.placement, self.gradient = plan, placement, gradient
        self._residency, self._low, self._machine, self._kernel = residency, low, machine, kernel
        self._param_dtype, self._master_dtype = param_dtype, master_dtype
        self._prefixes = ("model", *(f"optimizer.{name}" for name in kernel.config.state_names))
        self._param_record = param_key(placement.name) if machine.has_param_record(placement) else ""

    @property
    def num_chunks(self) -> int:
        """Records of this unit."""
        return len(self.placement.chunks)

    def key(self, index: int) -> str:
        """Return the key of one record."""
        return state_key(self.placement.name, index)

    @property
    def keys(self) -> list[str]:
        """Keys of all records that an update rewrites."""
        own = [self.key(i) for i in range(self.num_chunks)]
        return [*own, self._param_record] if self._param_record else own

    # -- update ------------------------------------------------------------------------------------------------------

    def update(
        self, index: int, fetched: Future[Lease], *, steps: int, lr: float, scale: float, keep: bool
    ) -> Future[None]:
        """Update one chunk; `steps` counts the update from 1, `keep` keeps the record in host memory.

        Returns what is done when record and parameters are where they rest.
        """
        chunk = self.placement.chunks[index]
        make = self._update_on_device if self._moves_to_device(chunk) else self._update_in_place
        return make(index, chunk, fetched, steps=steps, lr=lr, scale=scale, keep=keep)

    def _moves_to_device(self, chunk: Chunk) -> bool:
        return chunk.update_on == "device" and chunk.tier != "device"

    def _update_in_place(
        self, index: int, chunk: Chunk, fetched: Future[Lease], *, steps: int, lr: float, scale: float, keep: bool
    ) -> Future[None]:
        """Update a record where it is fetched to: host memory, or the device if that is where it rests."""
        machine, here = self._machine, chunk.tier == "device"
        beside: Future[Slab] | None = None
        if here:
            if machine.plan.device_record_bytes(self.placement, chunk):
                assert machine.device_records is not None
                beside = machine.device_records.take(f"gradient {self.placement.name}")
            gradient = self.gradient.on_device(chunk, beside)
        else:
            gradient = self.gradient.on_host(chunk)
        staged = self._staging(chunk)

        def work() -> Any:
            fields = self._fields(chunk, fetched.result().ready())
            self._apply(chunk, fields, gradient.result(), steps, lr, scale)
            self._write_parameters(chunk, fields[0], staged)
            if beside is not None:
                machine.device.synchronize()  # the next gradient comes on another stream
                beside.result().give()
            return machine.device.mark() if here else None

        updated = machine.lanes.submit(
            "device update" if here else "cpu update",
            work,
            after=[fetched, gradient, *_taken(staged)],
            num_bytes=machine.plan.record_bytes(chunk),
            label=f"update {self.key(index)}",
        )
        published = self._publish(chunk, fetched, updated, staged)
        put = machine.store.put(self.key(index), fetched, after=[updated, *published], keep=keep)
        return machine.lanes.all([put, *published])

    def _update_on_device(
        self, index: int, chunk: Chunk, fetched: Future[Lease], *, steps: int, lr: float, scale: float, keep: bool
    ) -> Future[None]:
        """Bring a record to the device, update it there, and bring it back."""
        machine, key, size = self._machine, self.key(index), self._machine.plan.record_bytes(chunk)
        assert machine.device_records is not None
        taken = machine.device_records.take(key)
        staged = self._staging(chunk)

        def bring() -> Slab:
            buffer = taken.result()
            machine.device.copy(buffer.bytes[:size], fetched.result().ready(), machine.device.mark())
            return buffer

        there = machine.lanes.submit("h2d", bring, after=[fetched, taken], num_bytes=size, label=f"record {key}")
        gradient = self.gradient.on_device(chunk, taken, size)

        def work() -> Any:
            fields = self._fields(chunk, taken.result().bytes[:size])
            self._apply(chunk, fields, gradient.result(), steps, lr, scale)
            if self.placement.param == "device":
                self._own(chunk).copy_(fields[0])
            return machine.device.mark()

        updated = machine.lanes.submit(
            "device update", work, after=[there, gradient], num_bytes=size, label=f"update {key}"
        )

        def back() -> None:
            buffer, lease = taken.result(), fetched.result()
            machine.device.copy(lease.bytes, buffer.bytes[:size], updated.result())
            buffer.give()
            if self.placement.param != "device":
                self._write_parameters(chunk, self._fields(chunk, lease.bytes)[0], staged)

        returned = machine.lanes.submit(
            "d2h", back, after=[updated, *_taken(staged)], num_bytes=size, label=f"record {key}"
        )
        published = self._publish(chunk, fetched, returned, staged) if self.placement.param != "device" else []
        put = machine.store.put(key, fetched, after=[returned, *published], keep=keep)
        return machine.lanes.all([put, *published])

    def _apply(
        self, chunk: Chunk, fields: list[torch.Tensor], view: GradientView, steps: int, lr: float, scale: float
    ) -> None:
        gradient = view.tensor if scale == 1.0 else view.tensor * scale
        cut = self.plan.decay_end - self._low - chunk.first
        self._kernel.update(fields[0], gradient.to(self._master_dtype), fields[1:], cut=cut, steps=steps, lr=lr)
        view.give()

    def _fields(self, chunk: Chunk, record: torch.Tensor) -> list[torch.Tensor]:
        """Return the master weights and moments inside a record."""
        size, used = self._machine.plan.field_bytes(chunk), chunk.numel * self._master_dtype.itemsize
        starts = range(0, len(self._prefixes) * size, size)
        return [record[at : at + used].view(self._master_dtype) for at in starts]

    # -- new parameters ----------------------------------------------------------------------------------------------

    def _staging(self, chunk: Chunk) -> Future[Slab] | None:
        """Take host memory for new parameters that pass through it on their way, if they do."""
        rests = self.placement.param
        cast_for_device = rests == "device" and self._param_dtype != self._master_dtype and chunk.tier != "device"
        if (rests == "nvme" and self._param_record) or (cast_for_device and not self._moves_to_device(chunk)):
            assert self._machine.staged is not None
            return self._machine.staged.take(f"parameters {self.placement.name}")
        return None

    def _write_parameters(self, chunk: Chunk, master: torch.Tensor, staged: Future[Slab] | None) -> None:
        """Cast new parameters to where they rest, or to where they are on their way from."""
        if staged is not None:
            staged.result().view(self._param_dtype, chunk.numel).copy_(master)
        elif self.placement.param == "host" and self._param_record:
            size = self._param_dtype.itemsize
            memory = self._machine.store.memory(self._param_record)[chunk.first * size :]
            memory[: chunk.numel * size].view(self._param_dtype).copy_(master)
        elif chunk.tier == "device" and self.placement.param == "device":
            self._own(chunk).copy_(master)

    def _publish(
        self, chunk: Chunk, fetched: Future[Lease], ready: Future[Any], staged: Future[Slab] | None
    ) -> list[Future[None]]:
        """Send new parameters to where they rest, where casting them has not done so."""
        machine, name = self._machine, self.placement.name
        if self.placement.param == "device" and chunk.tier != "device":
            target, mark = self._own(chunk), machine.device.mark()

            def send() -> None:
                slab = staged.result() if staged is not None else None
                if slab is None:
                    source = self._fields(chunk, fetched.result().bytes)[0]
                else:
                    source = slab.view(self._param_dtype, chunk.numel)
                machine.device.copy(target, source, mark)
                if slab is not None:
                    slab.give()

            label = f"parameters {name}"
            return [machine.lanes.submit("h2d", send, after=[ready], num_bytes=target.nbytes, label=label)]
        if staged is None:
            return []
        slab, length = staged, pages(chunk.numel * self._param_dtype.itemsize)
        offset = chunk.first * self._param_dtype.itemsize
        written = machine.store.write(
            self._param_record, offset, length, lambda: slab.result().bytes[:length], after=[ready]
        )
        return [machine.lanes.then([written], lambda: slab.result().give())]

    def _own(self, chunk: Chunk) -> torch.Tensor:
        return self._residency.own[chunk.first : chunk.first + chunk.numel]

    # -- the face of a unit's state ----------------------------------------------------------------------------------

    def fill(self, fill: Fill) -> None:
        if self._machine.adopted:
            self.refresh()
            return

        def write(chunk: Chunk, fields: list[torch.Tensor]) -> None:
            for field in fields:
                field.zero_()
            fill_range(self.plan, fill, fields[0], self._low + chunk.first)

        self._rewrite(write, create=True)

    def refresh(self) -> None:
        self._machine.loans.give_back()
        if not self._machine.plan.shares_master(self.placement):
            self._rewrite(lambda chunk, fields: None, create=False)
        else:
            self._residency.publish()

    def _rewrite(self, write: Callable[[Chunk, list[torch.Tensor]], None], *, create: bool) -> None:
        """Go through all records, change them if they are new, and publish their parameters.

        Blocks: host
        """
        machine, store = self._machine, self._machine.store
        self._residency.writable()
        for i, chunk in enumerate(self.placement.chunks):
            fetched = store.create(self.key(i)) if create else store.fetch(self.key(i))
            staged = self._staging(chunk)
            lease = machine.lanes.wait(fetched, self.key(i))
            fields = self._fields(chunk, lease.ready())
            write(chunk, fields)
            if self._moves_to_device(chunk) and self.placement.param == "device":
                self._own(chunk).copy_(fields[0])
                published: list[Future[None]] = []
            else:
                if staged is not None:
                    machine.lanes.wait(staged, "a slab")
                self._write_parameters(chunk, fields[0], staged)
                published = self._publish(chunk, fetched, machine.lanes.done(None), staged)
            machine.lanes.wait(machine.lanes.all(published))
            if create:
                machine.lanes.wait(store.put(self.key(i), fetched))
            else:
                store.drop(lease)
        store.commit()
        self._residency.publish()

    def pieces(self, low: int, high: int, *, write: bool) -> Iterator[Piece]:
        for i, chunk in enumerate(self.placement.chunks):
            for number, prefix in enumerate(self._prefixes):
                loan = Loan(self._master_dtype, self._opener(i, chunk, number, write))
                first = self._low + chunk.first
                yield from cut_pieces(self.plan, prefix, loan, first, low, high, chunk.numel)

    def _opener(self, index: int, chunk: Chunk, number: int, write: bool) -> Callable[[], torch.Tensor]:
        return lambda: self._fields(chunk, self._machine.loans.borrow(self.key(index), write=write))[number]

    def state_bytes(self) -> dict[str, int]:
        return {}

    def set_steps(self, steps: int) -> None:
        for key in self.keys:
            self._machine.store.stamp(key, steps)


class ParametersInRecord:
    """A frozen unit whose parameters rest off the device: nothing updates them.

    What is read or written of them at once is at most a chunk.
    """

    def __init__(
        self, plan: UnitPlan, placement: UnitPlacement, low: int, machine: OffloadMachine, dtype: torch.dtype
    ) -> None:
        self._plan, self._low, self._machine, self._dtype = plan, low, machine, dtype
        self._key = param_key(placement.name)
        step = machine.plan.chunk
        self._parts = [(first, min(step, placement.numel - first)) for first in range(0, placement.numel, step)]

    def _elements(self, first: int, numel: int, *, write: bool) -> torch.Tensor:
        size, loans = self._dtype.itemsize, self._machine.loans
        part = loans.borrow_part(self._key, first * size, pages(numel * size), self._machine.params, write=write)
        return part[: numel * size].view(self._dtype)

    def fill(self, fill: Fill) -> None:
        there = self._machine.adopted and self._machine.store.on_file(self._key)
        for first, numel in self._parts if not there else []:
            fill_range(self._plan, fill, self._elements(first, numel, write=True), self._low + first)
        self.refresh()

    def refresh(self) -> None:
        self._machine.loans.give_back()

    def pieces(self, low: int, high: int, *, write: bool) -> Iterator[Piece]:
        for first, numel in self._parts:
            loan = Loan(self._dtype, self._opener(first, numel, write))
            yield from cut_pieces(self._plan, "model", loan, self._low + first, low, high, numel)

    def _opener(self, first: int, numel: int, write: bool) -> Callable[[], torch.Tensor]:
        return lambda: self._elements(first, numel, write=write)

    def state_bytes(self) -> dict[str, int]:
        return {}

    def set_steps(self, steps: int) -> None:
        """Nothing counts the steps of what is frozen."""


def _taken(staged: Future[Slab] | None) -> list[Future[Slab]]:
    return [] if staged is None else [staged]
