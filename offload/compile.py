"""Makes the program of a step: the walk over the model's parts, with everything that offloading puts beside it.

The rules are those of the runtime. Parameters at rest elsewhere are fetched a few parts before their use, chunk by
chunk, once in forward and once in backward except around the turn. A gradient arrives when its reduction is over, which
is noticed when the next one has begun. Records are read ahead, in the order of their updates, from the first gradient
on, as far as there are slabs. A step ends when everything is written.
Must not know: rates, tensors, threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from windlass.offload.placement import OffloadPlan, pages
from windlass.offload.plan_bytes import (
    DEVICE_RECORDS,
    ahead_of,
    gradients_under_way,
    hands_over,
    leaves,
    param_slab_bytes,
    plan_bytes,
    slab_bytes,
    staging_slabs,
)
from windlass.offload.program import (
    COMM,
    COMPUTE,
    D2H,
    DEVICE_SLABS,
    H2D,
    PARAMS,
    READ,
    SLABS,
    STAGED,
    WRITE,
    Hold,
    Program,
    Task,
    gradient_pool,
    once,
)
from windlass.offload.updates import Updates
from windlass.offload.workload import Workload, kept_parts

LAG = 1  # reductions under way before the oldest is waited for


def build_program(plan: OffloadPlan, work: Workload, *, step: int = 1) -> Program:
    """Return the tasks of one step in steady state; the parity of its number matters to the order only."""
    return _Compiler(plan, work, step).build()


def resting_bytes(plan: OffloadPlan, work: Workload) -> dict[str, dict[str, int]]:
    """Return the bytes by tier and class that are there all the time: all but buffers, with the records kept."""
    buffers = {("device", "gather"), ("device", "shard"), ("device", "slab"), ("host", "slab")}
    rest = {
        tier: {name: n for name, n in classes.items() if (tier, name) not in buffers}
        for tier, classes in plan_bytes(plan, work).items()
    }
    if plan.cache:
        rest["host"]["slab"] = plan.cache * slab_bytes(plan)
    return rest


class _Compiler:
    """`main` is what the main thread has come to: the tasks that are done when it submits the next."""

    def __init__(self, plan: OffloadPlan, work: Workload, step: int) -> None:
        self.plan, self.work = plan, work
        self.tasks: list[Task] = []
        self.main: tuple[int, ...] = ()
        self._kept = kept_parts(work, plan.window)
        self._completes: dict[int, list[int]] = {i: [] for i in range(len(work.parts))}
        for part, unit in work.arrivals():
            if unit not in work.parts[part].tiles_backward:
                self._completes[part].append(unit)
        self._reducing: deque[tuple[int, int, bool]] = deque()  # unit, its reduction, whether it is the step's last
        self._reduced: list[int] = []
        self._rested: dict[int, int] = {}  # unit -> when its gradient, or a partial sum of it, is where it rests
        self._updates = Updates(self, step)

    def add(self, task: Task) -> int:
        """Submit a task."""
        self.tasks.append(task)
        return len(self.tasks) - 1

    def build(self) -> Program:
        plan, work = self.plan, self.work
        kept: set[int] = set()
        for m in range(work.num_micro_batches):
            last = m == work.num_micro_batches - 1
            self._phase("forward", m, kept, last)
            self._phase("backward", m, kept, last)
        while self._reducing:
            self._arrive(*self._reducing.popleft())
        self.main = (self.add(Task("", "norm", once((*self.main, *self._reduced)))),)
        self._updates.finish()
        self.add(Task("", "end of step", once((*self.main, *self._rested.values(), *self._updates.ends))))
        pools = {SLABS: plan.slabs, PARAMS: plan.slabs, STAGED: staging_slabs(plan), DEVICE_SLABS: DEVICE_RECORDS}
        pools |= {gradient_pool(numel): count for numel, count in gradients_under_way(plan, work).items()}
        return Program(tuple(self.tasks), pools, resting_bytes(plan, work))

    # -- forward and backward ----------------------------------------------------------------------------------------

    def _phase(self, phase: str, m: int, kept: set[int], last: bool) -> None:
        """Go through the parts once. `kept` are units that stay from forward to backward."""
        work, forward = self.work, phase == "forward"
        order = work.order(forward=forward)
        tiles = _Fetches(self, [(u,) for part in order for u in work.parts[part].tiles(forward=forward)], set())
        used = 0
        fetches = _Fetches(self, [work.parts[i].units for i in order], self._here(order, kept, forward))
        for position, part in enumerate(order):
            fetches.reach(position)
            cost, stays = work.parts[part], forward and part in self._kept
            if stays:
                kept.update(cost.units)
            uses = cost.tiles(forward=forward)
            # What each tile takes of the time is not known; nor is it of what is done without one.
            seconds = (cost.forward_s if forward else cost.backward_s) / (1 + len(uses))
            frees = () if stays else tuple(hold for u in cost.units for hold in self.whole(u))
            self.main = once((*self.main, *fetches.ends(position)))
            for i, u in enumerate(uses):
                self._use_tile(tiles, used, u, seconds, phase)
                if not forward and work.units[u].trainable and u not in uses[i + 1 :]:
                    self._complete(u, m, last)
                used += 1
            needs = self.main
            compute = self.add(Task(COMPUTE, f"{phase} {cost.name}", needs, seconds, frees=frees, phase=phase))
            self.main = (compute,)
            fetches.advance(position)
            for u in self._completes[part] if not forward else ():
                self._complete(u, m, last)

    def _use_tile(self, tiles: _Fetches, position: int, u: int, seconds: float, phase: str) -> None:
        """Compute with a tile when it is there, and let it go."""
        tiles.reach(position)
        needs = once((*self.main, *tiles.ends(position)))
        label = f"{phase} {self.plan.units[u].name}"
        self.main = (self.add(Task(COMPUTE, label, needs, seconds, frees=tuple(self.whole(u)), phase=phase)),)
        tiles.advance(position)

    def _here(self, order: list[int], kept: set[int], forward: bool) -> set[tuple[int, int]]:
        """Return the uses, as (position, unit), for which nothing is brought.

        An earlier part keeps the unit: in forward for all that follow, in backward for the first.
        """
        here: set[tuple[int, int]] = set()
        staying = set(kept)
        for position, part in enumerate(order):
            units = set(self.work.parts[part].units)
            here.update((position, u) for u in units & staying)
            if not forward:
                staying -= units
            elif part in self._kept:
                staying |= units
        kept.clear()
        return here

    def whole(self, u: int) -> list[Hold]:
        """Return what a unit's gathered parameters hold."""
        unit = self.plan.units[u]
        if not self.work.units[u].sharded:
            return []
        return [("device", "gather", unit.numel * self.work.num_shards * self.plan.sizes.param)]

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _complete(self, u: int, m: int, last: bool) -> None:
        """Begin to reduce what a unit's gradient holds after its backward in a micro-batch."""
        unit, facts = self.plan.units[u], self.work.units[u]
        if unit.offloaded:
            self._updates.read_ahead()
        while any(u == waiting for waiting, _, _ in self._reducing):
            self._arrive(*self._reducing.popleft())
        if leaves(unit):
            self.main = (self.add(Task("", f"take {unit.name}", self.main, takes=gradient_pool(unit.numel))),)
            if m > 0:
                self.main = once(self._bring_back(u))
        if facts.whole_gradient and not last:
            return
        reduction = self._reduce(u)
        if not unit.offloaded:
            self._reduced += [reduction] if last else []
            return
        self._reducing.append((u, reduction, last))
        handed_over = leaves(unit) and hands_over(self.plan, self.work)
        while len(self._reducing) > (0 if handed_over else LAG):
            self._arrive(*self._reducing.popleft())

    def _reduce(self, u: int) -> int:
        unit, shards = self.plan.units[u], self.work.num_shards
        size = unit.numel * self.plan.sizes.reduce * (shards - 1)
        return self.add(Task(COMM if size else "", f"reduce {unit.name}", self.main, num_bytes=size))

    def _arrive(self, u: int, reduction: int, last: bool) -> None:
        """Wait for a reduction, and carry the sum to where it rests, or to its updates."""
        unit = self.plan.units[u]
        self.main = once((*self.main, reduction))
        if leaves(unit) and not (last and not self.plan.keeps_gradients):
            self._rest(u)
        if last:
            self._updates.arrived(u, self._rested.get(u))

    def _rest(self, u: int) -> None:
        plan, unit = self.plan, self.plan.units[u]
        name, size = unit.name, plan.sizes.reduce
        pool = gradient_pool(unit.numel)
        if unit.grad == "host":
            task = Task(D2H, f"gradient {name}", self.main, num_bytes=unit.numel * size, gives=pool)
            self._rested[u] = self.add(task)
            return
        writes = []
        for numel in self._pieces(u):
            label = f"gradient {name}"
            staged = self.add(Task(D2H, label, self.main, num_bytes=numel * size, takes=STAGED))
            write = Task(WRITE, f"write {label}", (staged,), num_bytes=pages(numel * size), priority=2, gives=STAGED)
            writes.append(self.add(write))
        self._rested[u] = self.add(Task("", f"rests {name}", tuple(writes), gives=pool))

    def _bring_back(self, u: int) -> list[int]:
        """Bring the sum of earlier micro-batches back to the device. The main thread waits for it."""
        unit, size = self.plan.units[u], self.plan.sizes.reduce
        copies = []
        for numel in self._pieces(u):
            needs, gives = (*self.main, self._rested[u]), ""
            if unit.grad == "nvme":
                task = Task(READ, f"read gradient {unit.name}", needs, num_bytes=pages(numel * size), takes=STAGED)
                needs, gives = (self.add(task),), STAGED
            copies.append(self.add(Task(H2D, f"gradient {unit.name}", needs, num_bytes=numel * size, gives=gives)))
        return copies

    def _pieces(self, u: int) -> list[int]:
        numel, step = self.plan.units[u].numel, self.plan.chunk
        return [min(step, numel - first) for first in range(0, numel, step)]


class _Fetches:
    """Brings the parameters of one phase's parts ahead of their use, stage by stage, as the main thread goes on.

    `here` are the uses, as (position, unit), for which nothing has to be brought.
    """

    def __init__(self, compiler: _Compiler, units: list[tuple[int, ...]], here: set[tuple[int, int]]) -> None:
        self._compiler, self._units, self._here = compiler, units, here
        ahead = ahead_of(compiler.plan)
        # Gathers of what was fetched wait for this rank's part, so they begin behind the work of the present part.
        self._stages: tuple[tuple[Callable[[int, list[int]], list[int]], int, int], ...] = (
            (self._read, ahead[0], 0),
            (self._copy, ahead[1], 0),
            (self._gather_resident, compiler.work.prefetch, 0),
            (self._gather, 0, ahead[2]),
        )
        self._reached = [0] * len(self._stages)  # by stage: parts that it has been begun for
        self._ends: list[dict[int, list[int]]] = [{} for _ in units]  # unit -> what its next stage waits for

    def reach(self, position: int) -> None:
        """Begin what is due when the main thread comes to a part, the nearest part first."""
        self._begin(position, [before for _, before, _ in self._stages])

    def advance(self, position: int) -> None:
        """Begin what is due when the work of a part has been issued."""
        self._begin(position, [after for _, _, after in self._stages])

    def _begin(self, position: int, ahead: list[int]) -> None:
        for q in range(position, min(position + max(ahead) + 1, len(self._units))):
            for number, (stage, *_) in enumerate(self._stages):
                if self._reached[number] == q and q <= position + ahead[number]:
                    self._reached[number] += 1
                    for u in self._units[q]:
                        self._begin_unit(q, u, stage)

    def _begin_unit(self, q: int, u: int, stage: Callable[[int, list[int]], list[int]]) -> None:
        if (q, u) not in self._here:
            self._ends[q][u] = stage(u, self._ends[q].get(u, []))

    def ends(self, position: int) -> list[int]:
        """Return what a part waits for."""
        return [task for tasks in self._ends[position].values() for task in tasks]

    def _extents(self, u: int) -> list[int]:
        """Return the elements of every piece that is fetched as a whole."""
        unit, step = self._compiler.plan.units[u], self._compiler.plan.chunk
        return [min(step, unit.numel - first) for first in range(0, unit.numel, step)]

    def _read(self, u: int, _: list[int]) -> list[int]:
        """Read a unit's parameters into slabs, if they rest on nvme."""
        c, unit = self._compiler, self._compiler.plan.units[u]
        if unit.param != "nvme":
            return []
        holds = (("host", "slab", param_slab_bytes(c.plan)),)
        return [
            c.add(
                Task(
                    READ,
                    f"read {unit.name}",
                    c.main,
                    num_bytes=pages(numel * c.plan.sizes.param),
                    priority=0,
                    takes=PARAMS,
                    holds=holds,
                )
            )
            for numel in self._extents(u)
        ]

    def _copy(self, u: int, reads: list[int]) -> list[int]:
        """Copy a unit's parameters to the device, if they rest elsewhere."""
        c, unit = self._compiler, self._compiler.plan.units[u]
        if unit.param == "device":
            return []
        own = unit.numel * c.plan.sizes.param
        holds = c.whole(u) if c.work.num_shards == 1 else [("device", "shard", own)]
        place = c.add(Task("", f"place for {unit.name}", c.main, holds=tuple(holds)))
        copies = []
        for number, numel in enumerate(self._extents(u)):
            task = Task(H2D, f"fetch {unit.name}", (place,), num_bytes=numel * c.plan.sizes.param, priority=0)
            if reads:
                slab = (("host", "slab", param_slab_bytes(c.plan)),)
                task = task._replace(needs=(place, reads[number]), gives=PARAMS, frees=slab)
            copies.append(c.add(task))
        return copies

    def _gather(self, u: int, copies: list[int]) -> list[int]:
        """Gather a fetched unit from the ranks that share it; the main thread waits for its own part."""
        c, unit = self._compiler, self._compiler.plan.units[u]
        if c.work.num_shards == 1 or unit.param == "device":
            return copies
        c.main = once((*c.main, *copies))
        return [c.add(self._gathering(u)._replace(frees=(("device", "shard", unit.numel * c.plan.sizes.param),)))]

    def _gather_resident(self, u: int, ends: list[int]) -> list[int]:
        """Gather a unit that rests on the devices of the ranks that share it."""
        c, unit = self._compiler, self._compiler.plan.units[u]
        if unit.param != "device" or not c.work.units[u].sharded:
            return ends
        return [c.add(self._gathering(u))]

    def _gathering(self, u: int) -> Task:
        c, unit = self._compiler, self._compiler.plan.units[u]
        size = unit.numel * c.plan.sizes.param * (c.work.num_shards - 1)
        return Task(
            COMM if size else "", f"gather {unit.name}", c.main, num_bytes=size, priority=0, holds=tuple(c.whole(u))
        )
