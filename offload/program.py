"""One training step as tasks: what every lane does, what each task waits for, which buffers it takes.

The rules are those of the runtime. Parameters at rest elsewhere are fetched a few parts of the model before their use,
once in forward and once in backward, except those around the turn. A unit's gradient arrives when its last reduction of
the step is finished, and leaves the device unless it rests there. An update takes a record (through a slab where it
rests on nvme), waits for its gradient and, unless it speculates, for the norm, and is put back; what is read ahead is
bounded by slabs. A step ends when everything is written.
Must not know: rates, tensors, threads. How long it takes is worked out by `simulate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from windlass.offload.placement import Chunk, OffloadPlan, UnitPlacement, pages
from windlass.offload.plan_bytes import (
    GRAD_BUFFERS,
    HOST_GRADIENTS,
    UPDATE_BUFFERS,
    ahead_of,
    bounded_gradients,
    grad_pieces,
    kept_records,
    param_pieces,
    plan_bytes,
    slab_bytes,
    update_buffer_bytes,
)
from windlass.offload.workload import Workload, kept_parts

COMPUTE, COMM, H2D, D2H = "compute", "comm", "h2d", "d2h"
READ, WRITE, CPU_UPDATE, DEVICE_UPDATE = "file read", "file write", "cpu update", "device update"
LANES = (COMPUTE, COMM, H2D, D2H, READ, WRITE, CPU_UPDATE, DEVICE_UPDATE)
COPY_LANES = (H2D, D2H, READ, WRITE)
SLABS, DEVICE_RECORDS, GRADIENTS, STAGED = "slab", "device record", "host gradient", "staged gradient"
_URGENT, _AHEAD, _BEHIND = 0, 1, 2  # compute waits for it; somebody will; nobody does

Hold = tuple[str, str, int]  # tier, class, bytes


class Task(NamedTuple):
    """One thing that a lane does. A task without a lane takes no time: it is where others meet.

    Units:  `seconds` of compute; `num_bytes` over the lane; `elements` updated and `casts` of them cast; `copies` bytes
            read and written by a copy inside host memory
    """

    lane: str
    label: str
    needs: tuple[int, ...]
    seconds: float = 0.0
    num_bytes: int = 0
    elements: int = 0
    casts: int = 0
    copies: int = 0
    priority: int = _AHEAD
    takes: str = ""  # the pool of which it takes one when all it needs is done, first come, first served
    gives: str = ""  # the pool that gets one back when it is done
    holds: tuple[Hold, ...] = ()  # from when it has been taken on
    frees: tuple[Hold, ...] = ()  # when it is done
    phase: str = ""  # of compute: forward, backward, update


@dataclass(frozen=True)
class Program:
    """The tasks of one step, in the order in which they are submitted, and the size of every pool."""

    tasks: tuple[Task, ...]
    pools: dict[str, int] = field(default_factory=dict)
    rest: dict[str, dict[str, int]] = field(default_factory=dict)  # tier -> class -> bytes that no task takes or frees


def step_bytes(program: Program) -> dict[str, int]:
    """Return the bytes that every lane moves in a step; file lanes in whole pages."""
    moved: Counter[str] = Counter()
    for task in program.tasks:
        if task.num_bytes:
            moved[task.lane] += task.num_bytes
    return dict(moved)


def resting_bytes(plan: OffloadPlan, work: Workload) -> dict[str, dict[str, int]]:
    """Return the bytes by tier and class that are there all the time: all but buffers, with the records kept."""
    buffers = {("device", "gather"), ("device", "shard"), ("device", "update"), ("host", "slab")}
    rest = {
        tier: {name: n for name, n in classes.items() if (tier, name) not in buffers}
        for tier, classes in plan_bytes(plan, work).items()
    }
    if kept_records(plan):
        rest["host"]["slab"] = kept_records(plan) * slab_bytes(plan)
    return rest


def build_program(plan: OffloadPlan, work: Workload, *, step: int = 1) -> Program:
    """Return the tasks of one step; step 1 and later are in steady state, their parity matters to the order only."""
    return _Builder(plan, work, step).build()


class _Builder:
    def __init__(self, plan: OffloadPlan, work: Workload, step: int) -> None:
        self._plan, self._work = plan, work
        self._tasks: list[Task] = []
        self._kept = kept_parts(work, plan.window)
        self._arriving: dict[int, list[int]] = {i: [] for i in range(len(work.parts))}
        for part, unit in work.arrivals():
            self._arriving[part].append(unit)
        self._main: tuple[int, ...] = ()  # the last compute task
        self._leaving: list[int] = []  # copies of gradients that leave the device, in their order
        self._partial: dict[int, int] = {}  # unit -> where its partial sum is complete at rest
        self._reduced: dict[int, int] = {}  # unit -> when its gradient of the step is complete on the device
        self._gradient: dict[int, int] = {}  # unit -> when it is where it rests
        self._bounded = bounded_gradients(plan, work)
        self._backwards = plan.order == "alternate" and plan.when == "after" and step % 2 == 1
        self._slab = slab_bytes(plan)
        self._begun: tuple[int, ...] = ()  # the compute task after which the last backward begins

    def build(self) -> Program:
        work = self._work
        kept_units: set[int] = set()
        for m in range(work.num_micro_batches):
            last = m == work.num_micro_batches - 1
            self._phase("forward", m, kept_units)
            self._begun = self._main
            self._phase("backward", m, kept_units, last)
        for u, facts in enumerate(work.units):
            if facts.trainable and facts.whole_gradient:
                self._reduced[u] = self._gradient[u] = self._reduce(u, self._main)
        norm = self.add(Task("", "norm", (*self._reduced.values(), *self._main)))
        ends = [norm, *self._leaving, *self._gradient.values(), *self._updates(norm)]
        self.add(Task("", "end of step", tuple(dict.fromkeys(ends))))
        slabs = self._plan.slabs
        pools = {SLABS: slabs, STAGED: slabs, DEVICE_RECORDS: UPDATE_BUFFERS, GRADIENTS: HOST_GRADIENTS}
        return Program(tuple(self._tasks), pools, resting_bytes(self._plan, work))

    def add(self, task: Task) -> int:
        self._tasks.append(task)
        return len(self._tasks) - 1

    # -- forward and backward ----------------------------------------------------------------------------------------

    def _phase(self, phase: str, m: int, kept: set[int], last: bool = False) -> None:
        """Go through the parts once. `kept` are units that stay from forward to backward."""
        work, forward = self._work, phase == "forward"
        order = (
            list(range(len(work.parts))) if forward else list(range(len(work.parts) - 1, work.first_backward - 1, -1))
        )
        fetches = _Fetches(self, [work.parts[i].units for i in order], set() if forward else kept, ahead_of(self._plan))
        for position, part in enumerate(order):
            fetches.reach(position)
            cost, units = work.parts[part], work.parts[part].units
            own = [u for u in self._arriving[part] if not forward and not work.units[u].whole_gradient]
            leaves = [u for u in own if self._plan.units[u].grad != "device"]
            partial = [self._bring_partial(u) for u in leaves if m > 0]
            needs = [*self._main, *fetches.ends(position)]
            if leaves and len(self._leaving) >= GRAD_BUFFERS:
                needs.append(self._leaving[-GRAD_BUFFERS])
            stays = forward and part in self._kept
            if stays:
                kept.update(units)
            seconds = cost.forward_s if forward else cost.backward_s
            frees = () if stays else tuple(hold for u in units for hold in self.whole(u))
            label = f"{phase} {cost.name}"
            self._main = (self.add(Task(COMPUTE, label, _once(needs), seconds, frees=frees, phase=phase)),)
            for u in own:
                self._arrive(u, partial, last)

    def whole(self, u: int) -> list[Hold]:
        """Return what a unit's gathered parameters hold."""
        unit = self._plan.units[u]
        if not self._work.units[u].sharded or (unit.param == "device" and self._work.num_shards == 1):
            return []
        return [("device", "gather", unit.numel * self._work.num_shards * self._plan.sizes.param)]

    def read(self, u: int, _: list[int]) -> list[int]:
        """Begin to read a unit's parameters into host memory, if they rest on nvme."""
        plan, unit = self._plan, self._plan.units[u]
        if unit.param != "nvme":
            return []
        shared = plan.shares_master(unit)
        size = sum(plan.field_bytes(c) for c in unit.chunks) if shared else sum(param_pieces(plan, unit))
        task = Task(READ, f"read {unit.name}", self._main, num_bytes=size, priority=_URGENT, holds=self._host_slab(u))
        return [self.add(task)]

    def bring(self, u: int, needs: list[int]) -> list[int]:
        """Begin to copy a unit's parameters to the device, if they rest elsewhere."""
        plan, unit = self._plan, self._plan.units[u]
        if unit.param == "device":
            return []
        own = unit.numel * plan.sizes.param
        holds = self.whole(u) if self._work.num_shards == 1 else [("device", "shard", own)]
        frees = self._host_slab(u) if unit.param == "nvme" else ()
        task = Task(H2D, f"bring {unit.name}", _once((*needs, *self._main)), num_bytes=own, priority=_URGENT)
        return [self.add(task._replace(holds=tuple(holds), frees=frees))]

    def gather(self, u: int, needs: list[int]) -> list[int]:
        """Begin to gather a unit from the ranks that share it, if there are several."""
        unit, shards = self._plan.units[u], self._work.num_shards
        if shards == 1 or not self._work.units[u].sharded:
            return needs
        own = unit.numel * self._plan.sizes.param
        frees = () if unit.param == "device" else (("device", "shard", own),)
        task = Task(COMM, f"gather {unit.name}", _once((*needs, *self._main)), num_bytes=own * (shards - 1))
        return [self.add(task._replace(priority=_URGENT, holds=tuple(self.whole(u)), frees=frees))]

    def _host_slab(self, u: int) -> tuple[Hold, ...]:
        return (("host", "slab", pages(self._plan.units[u].numel * self._plan.sizes.param)),)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _bring_partial(self, u: int) -> int:
        """Bring the sum of earlier micro-batches back to the device."""
        plan, unit = self._plan, self._plan.units[u]
        needs = (self._partial[u], *self._main)
        if unit.grad == "nvme":
            size = sum(grad_pieces(plan, unit))
            needs = (self.add(Task(READ, f"read gradient {unit.name}", needs, num_bytes=size, priority=_URGENT)),)
        size = unit.numel * plan.sizes.reduce
        return self.add(Task(H2D, f"bring gradient {unit.name}", needs, num_bytes=size, priority=_URGENT))

    def _reduce(self, u: int, needs: tuple[int, ...]) -> int:
        unit, shards = self._plan.units[u], self._work.num_shards
        if shards == 1:
            return needs[0] if len(needs) == 1 else self.add(Task("", f"reduce {unit.name}", needs))
        size = unit.numel * self._plan.sizes.reduce * (shards - 1)
        return self.add(Task(COMM, f"reduce {unit.name}", needs, num_bytes=size))

    def _arrive(self, u: int, partial: list[int], last: bool) -> None:
        """Reduce a unit's gradient after its backward, and carry it to where it rests."""
        plan, unit = self._plan, self._plan.units[u]
        reduced = at_rest = self._reduce(u, _once((*self._main, *partial)))
        if unit.grad != "device":
            bounded = last and self._bounded and unit.grad == "host" and unit.offloaded
            size = unit.numel * plan.sizes.reduce
            task = Task(
                D2H, f"keep gradient {unit.name}", (reduced,), num_bytes=size, takes=GRADIENTS if bounded else ""
            )
            at_rest = self.add(task)
            self._leaving.append(at_rest)
            if unit.grad == "nvme":
                size = sum(grad_pieces(plan, unit))
                at_rest = self.add(Task(WRITE, f"write gradient {unit.name}", (at_rest,), num_bytes=size))
        if last:
            self._reduced[u], self._gradient[u] = reduced, at_rest
        else:
            self._partial[u] = at_rest

    # -- updates -----------------------------------------------------------------------------------------------------

    def _updates(self, norm: int) -> list[int]:
        """Update every chunk; return what the end of the step waits for."""
        plan, work = self._plan, self._work
        units = [u for _, u in work.arrivals()]
        ends = [self._update_resident(u, norm) for u in units if not plan.units[u].offloaded]
        chunks = [(u, chunk) for u in units for chunk in plan.units[u].chunks]
        if self._backwards:
            chunks.reverse()
        on_file = [i for i, (_, chunk) in enumerate(chunks) if chunk.tier == "nvme"]
        cache = min(kept_records(plan), len(on_file))
        warm, stays = set(on_file[:cache]), set(on_file[len(on_file) - cache :] if cache else ())
        done: dict[int, list[int]] = {u: [] for u in units}
        for i, (u, chunk) in enumerate(chunks):
            if chunk.tier == "device":
                seconds = Task(COMPUTE, f"update {_name(plan.units[u], chunk)}", (norm,), elements=chunk.numel)
                done[u].append(self.add(seconds._replace(phase="update")))
            else:
                done[u] += self._update(u, chunk, norm, cached=i in warm, stays=i in stays)
        for u, finished in done.items():
            bounded = self._bounded and plan.units[u].grad == "host" and plan.units[u].offloaded
            if bounded and not work.units[u].whole_gradient:
                self.add(Task("", f"give gradient {plan.units[u].name}", tuple(finished), gives=GRADIENTS))
            ends += finished
        return ends

    def _update_resident(self, u: int, norm: int) -> int:
        unit = self._plan.units[u]
        needs = _once((norm, self._gradient[u]))
        return self.add(Task(COMPUTE, f"update {unit.name}", needs, elements=unit.numel, phase="update"))

    def _update(self, u: int, chunk: Chunk, norm: int, *, cached: bool, stays: bool) -> list[int]:
        """Fetch one record, update it, put it back; return what is last."""
        plan, unit = self._plan, self._plan.units[u]
        name, on_file, size = _name(unit, chunk), chunk.tier == "nvme", plan.record_bytes(chunk)
        speculates = plan.when == "backward" and plan.shadowed
        go = () if speculates else (norm,)
        lease: tuple[int, ...] = ()
        slab = (("host", "slab", self._slab),) if on_file else ()
        if on_file and not cached:
            task = Task(READ, f"read {name}", self._begun, num_bytes=size, takes=SLABS, holds=slab)
            lease = (self.add(task),)
        shared = plan.shares_master(unit)
        if chunk.update_on == "cpu":
            casts = 0 if plan.sizes.one_copy else chunk.numel
            gradient = self._gradient_of(u, chunk, name, go)
            copies = 2 * size if plan.shadowed and not on_file else 0
            needs = _once((*lease, *gradient, *go))
            task = Task(CPU_UPDATE, f"update {name}", needs, elements=chunk.numel, casts=casts, copies=copies)
            gives = STAGED if unit.grad == "device" else ""
            updated = newest = self.add(task._replace(gives=gives))
            ends = [updated]
            if unit.param == "device":
                ends = [self.add(Task(H2D, f"new {name}", (updated,), num_bytes=chunk.numel * plan.sizes.param))]
        else:
            updated, newest, ends = self._update_on_device(u, chunk, name, lease, go)
        if unit.param == "nvme" and not shared:
            size_param = pages(chunk.numel * plan.sizes.param)
            source = ends[-1] if chunk.update_on == "device" else updated
            ends.append(self.add(Task(WRITE, f"write new {name}", (source,), num_bytes=size_param, priority=_BEHIND)))
        if on_file and not stays:
            ends.append(self.add(Task(WRITE, f"write {name}", (newest,), num_bytes=size, priority=_BEHIND)))
            ends = [self.add(Task("", f"give {name}", tuple(ends), gives=SLABS, frees=slab))]
        return ends

    def _gradient_of(self, u: int, chunk: Chunk, name: str, after: tuple[int, ...]) -> tuple[int, ...]:
        """Bring a chunk's gradient to where it is updated."""
        plan, unit = self._plan, self._plan.units[u]
        size = chunk.numel * plan.sizes.reduce
        on_device = chunk.update_on == "device"
        if unit.grad == "device":
            if on_device:
                return (self._reduced[u],)
            needs = _once((self._reduced[u], *after))
            return (self.add(Task(D2H, f"gradient {name}", needs, num_bytes=size, takes=STAGED)),)
        there = (self._gradient[u],)
        if unit.grad == "nvme":
            there = (self.add(Task(READ, f"read gradient {name}", _once((*there, *after)), num_bytes=pages(size))),)
        return (self.add(Task(H2D, f"gradient {name}", there, num_bytes=size)),) if on_device else there

    def _update_on_device(
        self, u: int, chunk: Chunk, name: str, lease: tuple[int, ...], go: tuple[int, ...]
    ) -> tuple[int, int, list[int]]:
        """Update a record on the device; return the update, when the record is back, and when the parameters are."""
        plan, unit, size = self._plan, self._plan.units[u], self._plan.record_bytes(chunk)
        held = (("device", "update", update_buffer_bytes(plan)),)
        needs = lease or self._begun
        there = self.add(Task(H2D, f"bring {name}", needs, num_bytes=size, takes=DEVICE_RECORDS, holds=held))
        gradient = self._gradient_of(u, chunk, name, (there,))
        updated = self.add(Task(DEVICE_UPDATE, f"update {name}", _once((there, *gradient, *go)), elements=chunk.numel))
        ends = [updated]
        if unit.param != "device" and not plan.shares_master(unit):
            size_param = chunk.numel * plan.sizes.param
            ends = [self.add(Task(D2H, f"new {name}", (updated,), num_bytes=size_param))]
        back = Task(D2H, f"put {name}", (updated,), num_bytes=size, gives=DEVICE_RECORDS, frees=held)
        newest = self.add(back)
        return updated, newest, [newest, *ends]


def _name(unit: UnitPlacement, chunk: Chunk) -> str:
    return f"{unit.name}+{chunk.first}" if len(unit.chunks) > 1 else unit.name


def _once(needs: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(needs))


class _Fetches:
    """Brings the parameters of one phase's parts ahead of their use, stage by stage, as the main thread goes on.

    `kept` are units that are here already; each counts for the first part that reads it.
    """

    def __init__(self, builder: _Builder, units: list[tuple[int, ...]], kept: set[int], ahead: tuple[int, int, int]):
        self._stages = (builder.read, builder.bring, builder.gather)
        self._units, self._kept, self._ahead = units, kept, ahead
        self._reached = [0, 0, 0]  # by stage: parts that it has been begun for
        self._ends: list[dict[int, list[int]]] = [{} for _ in units]  # unit -> what its next stage waits for

    def reach(self, position: int) -> None:
        """Begin what is due when the main thread comes to a part."""
        for number, (stage, ahead) in enumerate(zip(self._stages, self._ahead, strict=True)):
            for q in range(self._reached[number], min(position + ahead + 1, len(self._units))):
                for u in self._units[q]:
                    if number == 0 and u in self._kept:
                        self._kept.discard(u)
                    elif number == 0:
                        self._ends[q][u] = stage(u, [])
                    elif u in self._ends[q]:
                        self._ends[q][u] = stage(u, self._ends[q][u])
                self._reached[number] = q + 1

    def ends(self, position: int) -> list[int]:
        """Return what a part waits for."""
        return [task for tasks in self._ends[position].values() for task in tasks]
