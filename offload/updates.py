"""The part of a step's program that updates records: fetched, updated where the plan says, put back.

Must not know: the walk, rates, tensors, threads.
"""

from __future__ import annotations

from typing import Protocol

from windlass.offload.placement import Chunk, OffloadPlan, UnitPlacement, pages
from windlass.offload.plan_bytes import device_slab_bytes, leaves, slab_bytes
from windlass.offload.program import (
    COMPUTE,
    CPU_UPDATE,
    D2H,
    DEVICE_SLABS,
    DEVICE_UPDATE,
    H2D,
    READ,
    SLABS,
    STAGED,
    WRITE,
    Task,
    gradient_pool,
    once,
)
from windlass.offload.workload import Workload


class Submits(Protocol):
    """Whoever makes the program."""

    plan: OffloadPlan
    work: Workload
    main: tuple[int, ...]

    def add(self, task: Task) -> int: ...


class Updates:
    """Submits the updates of one step. `ends` are the tasks that the end of the step waits for."""

    def __init__(self, program: Submits, step: int) -> None:
        self._program, self._plan, self._work = program, program.plan, program.work
        self.ends: list[int] = []
        self._speculates = self._plan.when == "backward" and self._plan.shadowed
        self._arrived: list[int] = []
        self._rested: dict[int, int] = {}
        self._loads: dict[tuple[int, int], int] = {}
        self._has_read_ahead = False
        arrivals = [u for _, u in self._work.arrivals() if self._plan.units[u].offloaded]
        order = [(u, i) for u in arrivals for i in range(len(self._plan.units[u].chunks))]
        alternates = self._plan.order == "alternate" and not self._speculates
        self._order = order[::-1] if alternates and step % 2 else order
        on_file = [at for at in self._order if self._chunk(at).tier == "nvme"]
        cache = 0 if self._plan.shadowed else min(self._plan.cache, len(on_file))
        self._stays = set(on_file[len(on_file) - cache :])
        # What the last step kept: the records that it updated last.
        self._warm = set(on_file[:cache]) if alternates else self._stays
        self._slab = (("host", "slab", slab_bytes(self._plan)),)
        self._device_slab = (("device", "slab", device_slab_bytes(self._plan)),)
        self._uses: dict[int, list[int]] = {}  # unit -> what uses its gradient's buffer on the device

    def _chunk(self, at: tuple[int, int]) -> Chunk:
        return self._plan.units[at[0]].chunks[at[1]]

    def read_ahead(self) -> None:
        """Begin to fetch all records in the order of their updates; slabs say how far that gets."""
        if self._has_read_ahead:
            return
        self._has_read_ahead = True
        for at in self._order:
            chunk = self._chunk(at)
            if chunk.tier == "nvme" and at not in self._warm:
                size = self._plan.record_bytes(chunk)
                label = f"read {self._name(at)}"
                task = Task(READ, label, self._program.main, num_bytes=size, priority=2, takes=SLABS, holds=self._slab)
                self._loads[at] = self._program.add(task)

    def arrived(self, u: int, rested: int | None) -> None:
        """Note that a unit's gradient is complete, and where it rests from when on; update it now if that is wanted."""
        self._arrived.append(u)
        if rested is not None:
            self._rested[u] = rested
        if self._speculates:
            for i in range(len(self._plan.units[u].chunks)):
                self._update((u, i))

    def finish(self) -> None:
        """Make the updates that waited for the norm."""
        p, device = self._program, COMPUTE
        for _, u in self._work.arrivals():
            unit = self._plan.units[u]
            if not unit.offloaded:
                task = Task(device, f"update {unit.name}", p.main, elements=unit.numel, phase="update")
                p.main = (p.add(task),)
        if not self._speculates:
            for at in self._order:
                self._update(at)
        for u, uses in self._uses.items():
            unit = self._plan.units[u]
            self.ends.append(p.add(Task("", f"used {unit.name}", tuple(uses), gives=gradient_pool(unit.numel))))

    # -- one record --------------------------------------------------------------------------------------------------

    def _update(self, at: tuple[int, int]) -> None:
        unit, chunk = self._plan.units[at[0]], self._chunk(at)
        moves = chunk.update_on == "device" and chunk.tier != "device"
        updated, published = self._on_device(at, unit, chunk) if moves else self._in_place(at, unit, chunk)
        ends = [updated, *published]
        if chunk.tier == "nvme" and at not in self._stays:
            size, label = self._plan.record_bytes(chunk), f"write {self._name(at)}"
            task = Task(WRITE, label, once(ends), num_bytes=size, priority=2, gives=SLABS, frees=self._slab)
            ends = [self._program.add(task)]
        self.ends += ends

    def _fetched(self, at: tuple[int, int]) -> list[int]:
        return [self._loads[at]] if at in self._loads else []

    def _in_place(self, at: tuple[int, int], unit: UnitPlacement, chunk: Chunk) -> tuple[int, list[int]]:
        """Update a record where it is fetched to; return that task and those that publish new parameters."""
        p, plan, size, name = self._program, self._plan, self._plan.record_bytes(chunk), self._name(at)
        here = chunk.tier == "device"
        beside: list[int] = []
        if here and plan.device_record_bytes(unit, chunk):
            beside = [p.add(Task("", f"take {name}", p.main, takes=DEVICE_SLABS, holds=self._device_slab))]
        gradient, gives = (
            self._gradient_on_device(at, unit, chunk, beside) if here else self._gradient_on_host(at, unit, chunk)
        )
        staged = self._staging(unit, chunk)
        needs = once((*p.main, *self._fetched(at), *gradient, *staged))
        casts = 0 if plan.sizes.one_copy or plan.shares_master(unit) else chunk.numel
        copies = 2 * size if plan.shadowed and chunk.tier == "host" else 0
        lane = DEVICE_UPDATE if here else CPU_UPDATE
        task = Task(lane, f"update {name}", needs, 0.0, size, chunk.numel, casts, copies, gives=gives)
        if beside:
            task = task._replace(gives=DEVICE_SLABS, frees=self._device_slab)
        updated = p.add(task)
        if here and leaves(unit) and not plan.keeps_gradients:
            self._uses.setdefault(at[0], []).append(updated)
        return updated, self._publish(unit, chunk, updated, bool(staged))

    def _on_device(self, at: tuple[int, int], unit: UnitPlacement, chunk: Chunk) -> tuple[int, list[int]]:
        """Bring a record to the device, update it there, and bring it back."""
        p, plan, size, name = self._program, self._plan, self._plan.record_bytes(chunk), self._name(at)
        held = self._device_slab
        taken = p.add(Task("", f"take {name}", p.main, takes=DEVICE_SLABS, holds=held))
        staged = self._staging(unit, chunk)
        there = p.add(Task(H2D, f"record {name}", once((taken, *self._fetched(at))), num_bytes=size))
        gradient, _ = self._gradient_on_device(at, unit, chunk, [taken])
        needs = once((there, *gradient))
        updated = p.add(Task(DEVICE_UPDATE, f"update {name}", needs, 0.0, size, chunk.numel))
        if leaves(unit) and not plan.keeps_gradients:
            self._uses.setdefault(at[0], []).append(updated)
        back = Task(D2H, f"record {name}", once((updated, *staged)), num_bytes=size, gives=DEVICE_SLABS, frees=held)
        returned = p.add(back)
        published = self._publish(unit, chunk, returned, bool(staged)) if unit.param != "device" else []
        return returned, published

    def _staging(self, unit: UnitPlacement, chunk: Chunk) -> list[int]:
        """Take host memory for new parameters that pass through it on their way, if they do."""
        plan = self._plan
        moves = chunk.update_on == "device" and chunk.tier != "device"
        casts = unit.param == "device" and not plan.sizes.one_copy and chunk.tier != "device" and not moves
        if casts or (unit.param == "nvme" and not plan.shares_master(unit)):
            return [self._program.add(Task("", f"stage {unit.name}", self._program.main, takes=STAGED))]
        return []

    def _publish(self, unit: UnitPlacement, chunk: Chunk, ready: int, staged: bool) -> list[int]:
        """Send new parameters to where they rest."""
        size, gives = chunk.numel * self._plan.sizes.param, STAGED if staged else ""
        if unit.param == "device" and chunk.tier != "device":
            return [self._program.add(Task(H2D, f"parameters {unit.name}", (ready,), num_bytes=size, gives=gives))]
        if staged:
            task = Task(WRITE, f"write {unit.name}", (ready,), num_bytes=pages(size), priority=2, gives=gives)
            return [self._program.add(task)]
        return []

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _gradient_on_host(self, at: tuple[int, int], unit: UnitPlacement, chunk: Chunk) -> tuple[list[int], str]:
        """Bring a chunk's gradient to host memory; return the tasks, and the pool that its use gives to."""
        p, size = self._program, chunk.numel * self._plan.sizes.reduce
        if not leaves(unit) or not self._plan.keeps_gradients:
            staged = p.add(Task(D2H, f"gradient {unit.name}", p.main, num_bytes=size, takes=STAGED))
            if leaves(unit):
                self._uses.setdefault(at[0], []).append(staged)
            return [staged], STAGED
        rested = self._rested[at[0]]
        if unit.grad == "host":
            return [rested], ""
        label = f"read gradient {unit.name}"
        return [p.add(Task(READ, label, once((*p.main, rested)), num_bytes=pages(size), takes=STAGED))], STAGED

    def _gradient_on_device(
        self, at: tuple[int, int], unit: UnitPlacement, chunk: Chunk, taken: list[int]
    ) -> tuple[list[int], str]:
        """Bring a chunk's gradient to the device, beside its record, if it is not there."""
        p, size = self._program, chunk.numel * self._plan.sizes.reduce
        if not leaves(unit) or not self._plan.keeps_gradients:
            return [], ""
        needs, gives = once((*p.main, self._rested[at[0]], *taken)), ""
        if unit.grad == "nvme":
            read = Task(READ, f"read gradient {unit.name}", needs, num_bytes=pages(size), takes=STAGED)
            needs, gives = (p.add(read),), STAGED
        return [p.add(Task(H2D, f"gradient {unit.name}", needs, num_bytes=size, gives=gives))], ""

    def _name(self, at: tuple[int, int]) -> str:
        return f"{self._plan.units[at[0]].name}/{at[1]}"
