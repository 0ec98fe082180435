"""Run a step on paper: when every task of every lane starts and ends, what compute waits for, what each tier holds.

The rules are those of the lanes. A task is ready when all it needs is done, and, where it takes from a pool, when its
turn has come there; what it holds counts from then on. A lane does one task at a time: of those that are ready the most
urgent, then the one submitted first. Both directions of a link slow each other down as measured.
Must not know: tensors, threads, what a task means.
Differs: compute is issued when it runs; a lane over several drives is one of their joint rate.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from windlass.dist.errors import PlanError
from windlass.offload.program import COMPUTE, LANES, Program, Task
from windlass.offload.rates import PARTNER, Rates


class Span(NamedTuple):
    """What a lane did, from when to when. Units: seconds from the start of the step."""

    lane: str
    label: str
    start_s: float
    end_s: float
    num_bytes: int = 0


@dataclass(frozen=True)
class StepTimeline:
    """One step. Seconds by lane: busy; exposed, which is busy while nothing is computed; stalled, in which compute (or
    the end of the step) waits for that lane.

    `forward_s`, `backward_s` and `update_s` add up to `total_s`: a phase lasts from the end of the one before it to the
    end of its last compute. `peaks` are the most bytes by tier and class, `tier_peaks` by tier.
    """

    spans: tuple[Span, ...]
    total_s: float
    forward_s: float
    backward_s: float
    update_s: float
    busy: dict[str, float]
    exposed: dict[str, float]
    stalled: dict[str, float]
    peaks: dict[str, dict[str, int]]
    tier_peaks: dict[str, int]

    @property
    def bound(self) -> str:
        """The lane that is busy longest: what would have to be faster for the step to be."""
        return max(self.busy, key=lambda lane: self.busy[lane], default=COMPUTE)

    @property
    def overlap(self) -> float:
        """Share of what could hide behind compute that does: of copies and updates, at most as long as compute is."""
        other = [lane for lane in self.busy if lane != COMPUTE]
        hideable = sum(min(self.busy[lane], self.busy.get(COMPUTE, 0.0)) for lane in other)
        hidden = sum(self.busy[lane] - self.exposed[lane] for lane in other)
        return hidden / hideable if hideable else 1.0


def simulate(program: Program, rates: Rates, *, comm_per_s: float = 0.0) -> StepTimeline:
    """Return when every task of a step runs.

    Raises:  PlanError if tasks wait for each other in a circle: names the first that cannot start
    """
    return _Run(program, rates, comm_per_s).timeline()


class _Run:
    """The state of a simulation."""

    def __init__(self, program: Program, rates: Rates, comm_per_s: float) -> None:
        self._tasks, self._rates, self._comm_per_s = program.tasks, rates, comm_per_s
        count = len(self._tasks)
        self._starts, self._ends = [-1.0] * count, [-1.0] * count
        self._missing = [len(task.needs) for task in self._tasks]
        self._dependents: list[list[int]] = [[] for _ in range(count)]
        for number, task in enumerate(self._tasks):
            for need in task.needs:
                self._dependents[need].append(number)
        self._free = dict(program.pools)
        self._waiting: defaultdict[str, list[int]] = defaultdict(list)  # pool -> tasks, heap
        self._giver: dict[int, tuple[int]] = {}  # task that waited for a buffer -> the one that gave it
        self._queue: dict[str, list[tuple[int, int]]] = {lane: [] for lane in LANES}
        self._running: dict[str, int] = {}
        self._left: dict[str, float] = {}  # copy lane -> bytes of its task that are still to come
        self._since: dict[str, float] = {}
        self._speed: dict[str, float] = {}
        self._events: list[tuple[float, int, str, int]] = []  # time, order, lane, number of the estimate
        self._estimate: Counter[str] = Counter()
        self._order = 0
        self._held: Counter[tuple[str, str]] = Counter()
        self._tiers: Counter[str] = Counter()
        self.peaks: dict[tuple[str, str], int] = {}
        self.tier_peaks: dict[str, int] = {}
        for tier, classes in program.rest.items():
            for name, num_bytes in classes.items():
                self._hold(tier, name, num_bytes)
        self._go()

    def _hold(self, tier: str, name: str, num_bytes: int) -> None:
        key = tier, name
        self._held[key] += num_bytes
        self._tiers[tier] += num_bytes
        self.peaks[key] = max(self.peaks.get(key, 0), self._held[key])
        self.tier_peaks[tier] = max(self.tier_peaks.get(tier, 0), self._tiers[tier])

    def _go(self) -> None:
        now = 0.0
        ready = [number for number, missing in enumerate(self._missing) if not missing]
        while True:
            self._take(ready, now)
            ready = []
            if not self._events:
                break
            now = self._events[0][0]
            # All that ends at one moment ends before anything starts, so that the most urgent is chosen from all.
            while self._events and self._events[0][0] == now:
                _, _, lane, estimate = heappop(self._events)
                if estimate == self._estimate[lane]:
                    ready += self._end(lane, now)
        if -1.0 in self._ends:
            stuck = self._tasks[self._ends.index(-1.0)]
            raise PlanError(
                f"offload: the step never ends: '{stuck.label}' of lane '{stuck.lane or 'none'}' cannot start. "
                "Its buffers are held by what comes after it; raise offload.slabs"
            )

    def _take(self, ready: list[int], now: float) -> None:
        """Let ready tasks take from their pools and start on their lanes."""
        todo = sorted(ready)  # a heap: pools serve in the order of submission
        while todo:
            number = heappop(todo)
            task = self._tasks[number]
            if task.takes:
                if not self._free[task.takes]:
                    heappush(self._waiting[task.takes], number)
                    continue
                self._free[task.takes] -= 1
            for hold in task.holds:
                self._hold(*hold)
            if task.lane:
                heappush(self._queue[task.lane], (task.priority, number))
            else:
                self._starts[number] = now
                for freed in self._finish(number, now):
                    heappush(todo, freed)
        for lane, queue in self._queue.items():
            if queue and lane not in self._running:
                self._start(lane, heappop(queue)[1], now)

    def _start(self, lane: str, number: int, now: float) -> None:
        task = self._tasks[number]
        self._running[lane], self._starts[number] = number, now
        if lane in PARTNER:
            self._left[lane], self._since[lane] = float(task.num_bytes), now
            self._share(lane, now)
        else:
            self._expect(lane, now + self._seconds(task))

    def _seconds(self, task: Task) -> float:
        match task.lane:
            case "compute":
                return task.seconds + self._rates.device_s(task.elements)
            case "comm":
                return task.num_bytes / self._comm_per_s if self._comm_per_s else 0.0
            case "cpu update":
                return self._rates.update_s(task.elements, task.casts, task.copies)
        return self._rates.device_s(task.elements)

    def _expect(self, lane: str, at: float) -> None:
        self._estimate[lane] += 1
        self._order += 1
        heappush(self._events, (at, self._order, lane, self._estimate[lane]))

    def _share(self, lane: str, now: float) -> None:
        """Work out anew when the tasks of a link's two directions end."""
        pair = [name for name in (lane, PARTNER[lane]) if name in self._running]
        for name in pair:
            if self._since[name] < now:
                self._left[name] -= (now - self._since[name]) * self._speed[name]
            self._since[name] = now
            self._speed[name] = self._rates.together(name) if len(pair) == 2 else self._rates.alone(name)
            self._expect(name, now + max(self._left[name], 0.0) / self._speed[name])

    def _end(self, lane: str, now: float) -> list[int]:
        number = self._running.pop(lane)
        if PARTNER.get(lane) in self._running:
            self._share(lane, now)
        return self._finish(number, now)

    def _finish(self, number: int, now: float) -> list[int]:
        """Note the end of a task; return the tasks that may now take what they need."""
        task = self._tasks[number]
        self._ends[number] = now
        for tier, name, num_bytes in task.frees:
            self._hold(tier, name, -num_bytes)
        ready = []
        if task.gives:
            self._free[task.gives] += 1
            if self._waiting[task.gives]:
                taker = heappop(self._waiting[task.gives])
                self._giver[taker] = (number,)
                ready.append(taker)
        for dependent in self._dependents[number]:
            self._missing[dependent] -= 1
            if not self._missing[dependent]:
                ready.append(dependent)
        return ready

    # -- what came of it ---------------------------------------------------------------------------------------------

    def timeline(self) -> StepTimeline:
        """Return what has run."""
        tasks, starts, ends = self._tasks, self._starts, self._ends
        spans = tuple(
            Span(t.lane, t.label, starts[i], ends[i], t.num_bytes) for i, t in enumerate(tasks) if t.lane in self._queue
        )
        total = max(ends, default=0.0)
        phases = dict.fromkeys(("forward", "backward", "update"), 0.0)
        stalled: defaultdict[str, float] = defaultdict(float)
        clock = 0.0
        compute = [i for i, t in enumerate(tasks) if t.lane == COMPUTE]
        for i in sorted(compute, key=lambda i: (starts[i], i)):
            phases[tasks[i].phase] += ends[i] - clock
            self._blame(i, starts[i] - clock, stalled)
            clock = ends[i]
        phases["update"] += total - clock
        if tasks:
            self._blame(len(tasks) - 1, total - clock, stalled)
        lanes = [lane for lane in LANES if any(span.lane == lane for span in spans)]
        return StepTimeline(
            spans=spans,
            total_s=total,
            forward_s=phases["forward"],
            backward_s=phases["backward"],
            update_s=phases["update"],
            busy={lane: sum(s.end_s - s.start_s for s in spans if s.lane == lane) for lane in lanes},
            exposed={lane: _exposed(spans, lane) for lane in lanes if lane != COMPUTE},
            stalled=dict(stalled),
            peaks=_by_tier(self.peaks),
            tier_peaks=self.tier_peaks,
        )

    def _blame(self, number: int, seconds: float, stalled: defaultdict[str, float]) -> None:
        """Count waiting for the lane whose task came last of those that were needed, or held the buffer that was."""
        if seconds <= 0:
            return
        while causes := [*self._tasks[number].needs, *self._giver.get(number, ())]:
            number = max(causes, key=self._ends.__getitem__)
            waited = any(self._ends[giver] >= self._starts[number] for giver in self._giver.get(number, ()))
            if (lane := self._tasks[number].lane) and not waited:
                stalled[lane] += seconds
                return


def _by_tier(peaks: dict[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    tiers: dict[str, dict[str, int]] = {"device": {}, "host": {}, "nvme": {}}
    for (tier, name), num_bytes in peaks.items():
        if num_bytes:
            tiers[tier][name] = num_bytes
    return tiers


def _exposed(spans: Sequence[Span], lane: str) -> float:
    """Return the seconds in which a lane is busy and nothing is computed."""
    compute = sorted((s.start_s, s.end_s) for s in spans if s.lane == COMPUTE)
    own = sorted((s.start_s, s.end_s) for s in spans if s.lane == lane)
    total = sum(end - start for start, end in own)
    first = 0
    for start, end in own:
        while first < len(compute) and compute[first][1] <= start:
            first += 1
        number = first
        while number < len(compute) and compute[number][0] < end:
            total -= min(end, compute[number][1]) - max(start, compute[number][0])
            number += 1
    return max(total, 0.0)
