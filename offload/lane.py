"""Lanes: threads that carry out copies, file operations and updates beside compute, each when its inputs are there.

A task starts when everything it comes after is done and its lane is free; of the tasks that could start, a lane takes
the most urgent, of those the one submitted first. Nothing in here ever waits for a lane except `Lanes.wait`.

The first failure is final: what depends on it never runs, and every later wait raises it, whatever it waits for. So a
rank cannot hang on a slab or a record that a failed task would have given back.
Must not know: tiers, records, what a task does.
Source: order and exit rules of the design's section 14.7 on dead-locks.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar

import torch

from windlass.dist.errors import OffloadError
from windlass.dist.trace import Tracer
from windlass.offload.task import (
    FINISHED,
    QUEUED,
    RUNNING,
    WAITING,
    Task,
    as_failure,
    error_of,
    is_over,
    name_of,
    some,
)

T = TypeVar("T")

PRIORITY = {"blocking": 0, "prefetch": 1, "write": 2, "snapshot": 3}
CREDIT_S = 0.002  # how much of a late wake-up a throttled lane may make up for
CLOSE_S = 1.0  # the longest that `close` waits for running tasks


@dataclass
class LaneCounters:
    """What a lane did since the counters were last taken. `stalled_s`: seconds in which somebody waited for it."""

    busy_s: float = 0.0
    stalled_s: float = 0.0
    num_bytes: int = 0
    num_tasks: int = 0


@dataclass
class _Lane:
    """One lane: tasks that could start, most urgent first, and the threads that take them."""

    name: str
    rate: float  # bytes/s, 0: as fast as it goes
    heap: list[tuple[int, int, Task[Any]]] = field(default_factory=list)
    tokens: SimpleQueue[bool] = field(default_factory=SimpleQueue)  # one per entry of the heap; False: end
    running: list[Task[Any]] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    free_at_s: float = 0.0  # when a throttled lane has carried what was given to it


class Lanes:
    """All lanes of one rank; each is made when its name is first used.

    `rates` throttle: a task of n bytes occupies its lane for at least n / rate seconds. `workers` gives lanes more than
    one thread. `prepare` runs once in every new thread, such as to choose a device.
    Units:      rates bytes/s
    Invariant:  safe to use from any thread, also from inside tasks
    """

    def __init__(
        self,
        tracer: Tracer,
        *,
        rates: Mapping[str, float] | None = None,
        watchdog_s: float = 300.0,
        workers: Mapping[str, int] | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.tracer, self.watchdog_s = tracer, watchdog_s
        self._rates, self._workers, self._prepare = dict(rates or {}), dict(workers or {}), prepare
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane] = {}
        self._open: set[Task[Any]] = set()  # submitted and not finished
        self._numbers = count()
        self._counters: defaultdict[str, LaneCounters] = defaultdict(LaneCounters)
        self._waiters: set[threading.Event] = set()
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._num_finished = 0  # tasks so far: whether anything moves at all

    def submit(
        self,
        lane: str,
        work: Callable[[], T],
        *,
        after: Sequence[Future[Any]] = (),
        num_bytes: int = 0,
        label: str = "",
        priority: int = PRIORITY["prefetch"],
    ) -> Task[T]:
        """Have a lane do `work` when all of `after` are done; work takes their values with `result()`.

        Blocks:  no
        Raises:  OffloadError after `close`
        """
        task = Task(lane, work, after, num_bytes, label, priority, next(self._numbers))
        self._begin(task)
        return task

    def then(self, after: Sequence[Future[Any]], work: Callable[[], T], label: str = "then") -> Task[T]:
        """Do something small as soon as all of `after` are done: in the thread that completes the last, or in this one.

        Blocks:  no, apart from `work` itself
        """
        task = Task("", work, after, label=label, number=next(self._numbers))
        self._begin(task)
        return task

    def all(self, futures: Iterable[Future[Any]], label: str = "all of these") -> Task[None]:
        """Return a future that completes when all of these have, or with the first failure among them."""
        task: Task[None] = Task(after=tuple(futures), label=label, number=next(self._numbers))
        self._begin(task)
        return task

    @staticmethod
    def done(value: T) -> Task[T]:
        """Return a future that is done."""
        task: Task[T] = Task(label="done")
        task.state, task.settled = FINISHED, True
        task.set_result(value)
        return task

    def raise_priority(self, future: Future[Any], priority: int = PRIORITY["blocking"]) -> None:
        """Make a task, and what it still waits for, at least this urgent: compute now needs what was fetched ahead."""
        seen: set[int] = set()
        stack = [future]
        with self._lock:
            while stack:
                task = stack.pop()
                if id(task) in seen or not isinstance(task, Task) or task.state not in (WAITING, QUEUED):
                    continue
                seen.add(id(task))
                stack.extend(task.after)
                if task.priority > priority:
                    task.priority = priority
                    if task.state == QUEUED:  # its older entry is passed over when its turn comes
                        self._push(task)

    def wait(self, future: Future[T], what: str = "") -> T:
        """Return the value of a future; the time is booked as a stall of the lane it is on.

        Blocks:  the calling thread, at most `watchdog_s`
        Raises:  the first failure of any lane; OffloadError with a report of all lanes when the watchdog ends the wait,
                 or if the future was cancelled
        """
        if not future.done():
            self._block(future, what)
        self.check_failure()
        try:
            return future.result()
        except CancelledError:
            raise OffloadError(f"lanes: {name_of(future, what)} was cancelled before it began") from None

    def report(self) -> str:
        """Say what every lane runs and has in its queue, and what every other task waits for."""
        now = time.perf_counter()
        with self._lock:
            lines = []
            for lane in self._lanes.values():
                running = ", ".join(f"'{task.label}' for {now - task.since:.1f} s" for task in lane.running)
                queued = [f"'{task.label}'" for _, _, task in sorted(lane.heap, key=_rank) if task.state == QUEUED]
                dead = "" if all(t.is_alive() for t in lane.threads) else ", a thread of it has ended"
                lines.append(f"  {lane.name}: runs {running or 'nothing'}{dead}; queued {some(queued)}")
            waiting = sorted((t for t in self._open if t.state == WAITING), key=lambda t: t.number)
            names = [
                f"{task} for {some([name_of(f) for f in task.after if not is_over(f)], most=3)}" for task in waiting
            ]
            lines.append(f"  waiting: {some(names)}")
            if self._failure is not None:
                lines.append(f"  failed: {type(self._failure).__name__}: {self._failure}")
        return "\n".join(["lanes:", *lines])

    def take_counters(self) -> dict[str, LaneCounters]:
        """Return what every lane did since the last call, and start again from zero."""
        with self._lock:
            taken, self._counters = self._counters, defaultdict(LaneCounters)
        return dict(taken)

    def check_failure(self) -> None:
        """Raise the first failure of any lane, if there was one."""
        if self._failure is not None:
            raise self._failure

    def fail_wait(self, what: str) -> NoReturn:
        """Raise what ends a wait that took longer than `watchdog_s`: OffloadError with a report of all lanes."""
        raise OffloadError(
            f"lanes: {what} was not there after {self.watchdog_s:g} s (offload.watchdog_s)\n{self.report()}"
        )

    def check_idle(self) -> None:
        """Make sure that nothing is left to do, as at the end of a step.

        Raises:  the first failure of any lane; OffloadError naming what is queued, runs or waits
        """
        self.check_failure()
        with self._lock:
            left = sorted(self._open, key=lambda task: task.number)
        if left:
            raise OffloadError(
                f"lanes: {len(left)} tasks are not done at the end of the step: {some([str(t) for t in left])}. "
                f"Every task must be waited for, itself or through another\n{self.report()}"
            )

    def close(self) -> None:
        """Cancel what has not begun and end the threads; a task that runs on for more than a second is left behind.

        Blocks:  at most a second
        """
        self._closed.set()
        with self._lock:
            left = [task for task in self._open if task.state != RUNNING]
            for task in left:
                task.state = FINISHED
                self._open.discard(task)
            lanes = list(self._lanes.values())
            for lane in lanes:
                lane.heap.clear()
                for _ in lane.threads:
                    lane.tokens.put(False)
        for task in left:
            task.cancel()
        self._wake_waiters()
        end = time.perf_counter() + CLOSE_S
        for thread in (thread for lane in lanes for thread in lane.threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.perf_counter()))

    # -- from submission to a queue ------------------------------------------------------------------------------------

    def _begin(self, task: Task[Any]) -> None:
        """Take a task in: note what it waits for, or queue it, or refuse it because that has failed."""
        foreign: list[Future[Any]] = []
        error: BaseException | None = None
        with self._lock:
            if self._closed.is_set():
                raise OffloadError(f"lanes: {task} was submitted after the lanes were closed")
            self._open.add(task)
            task.missing = 1  # so that it cannot start while this goes on
            for future in task.after:
                if isinstance(future, Task) and not future.settled:
                    task.missing += 1
                    future.dependants.append(task)
                elif not future.done():
                    task.missing += 1
                    foreign.append(future)
                else:
                    error = error or error_of(future)
        for future in foreign:
            future.add_done_callback(partial(self._foreign_done, task))
        if self._arrived(task, error):
            self._settle(task)

    def _foreign_done(self, task: Task[Any], future: Future[Any]) -> None:
        error = error_of(future)
        if error is not None:
            self._fail(error)
        if self._arrived(task, error):
            self._settle(task)

    def _arrived(self, task: Task[Any], error: BaseException | None) -> bool:
        """Note that one thing a task waits for is done; return whether this has ended the task itself."""
        with self._lock:
            if task.state != WAITING:
                return False
            if error is None:
                task.missing -= 1
                if task.missing:
                    return False
                task.since = time.perf_counter()
                if task.lane:
                    task.state = QUEUED
                    self._push(task)
                    return False
            task.state = RUNNING
        task.error = error
        value = self._do(task)
        with self._lock:
            self._open.discard(task)
        self._publish(task, value)
        return True

    def _do(self, task: Task[Any]) -> Any:
        """Do the work of a task, unless it was cancelled or has failed before it began."""
        if not task.set_running_or_notify_cancel():
            task.error = error_of(task)
        elif task.error is None and task.work is not None:
            try:
                with torch.no_grad():
                    return task.work()
            except BaseException as error:  # whatever it is, whoever waits must get it
                task.error = as_failure(error, f"{task} ended its thread's work")
        return None

    def _publish(self, task: Task[Any], value: Any) -> None:
        """Make the value or the error of a task known to whoever holds its future."""
        task.state = FINISHED
        if task.cancelled():
            return
        if task.error is None:
            task.set_result(value)
        else:
            self._fail(task.error)
            task.set_exception(task.error)

    def _settle(self, task: Task[Any]) -> None:
        """Tell those that come after a finished task, those after them, and so on: in a loop, as chains are long."""
        finished = [task]
        while finished:
            task = finished.pop()
            with self._lock:
                task.settled = True
                dependants, task.dependants = task.dependants, []
                task.work, task.after = None, ()  # what they hold can be freed
            finished.extend(dependant for dependant in dependants if self._arrived(dependant, task.error))

    def _push(self, task: Task[Any]) -> None:
        """Queue a task; the lock is held."""
        lane = self._lanes.get(task.lane)
        if lane is None:
            lane = self._lanes[task.lane] = _Lane(task.lane, self._rates.get(task.lane, 0.0))
            for i in range(self._workers.get(task.lane, 1)):
                name = f"{task.lane}, thread {i + 1}" if i else task.lane
                thread = threading.Thread(target=self._serve, args=(lane,), name=name, daemon=True)
                lane.threads.append(thread)
                thread.start()
        heappush(lane.heap, (task.priority, task.number, task))
        lane.tokens.put(True)

    # -- the threads ---------------------------------------------------------------------------------------------------

    def _serve(self, lane: _Lane) -> None:
        """Do the tasks of a lane, in its thread, until the lanes are closed."""
        try:
            if self._prepare is not None:
                self._prepare()
            while lane.tokens.get():
                self._perform_next(lane)
        except BaseException as error:  # nobody else would notice that the thread has ended
            self._fail(as_failure(error, f"the thread of lane '{lane.name}' ended"))

    def _perform_next(self, lane: _Lane) -> None:
        with self._lock:
            while lane.heap:
                task = heappop(lane.heap)[2]
                if task.state == QUEUED:  # not begun through a more urgent entry
                    break
            else:
                return
            task.state = RUNNING
            lane.running.append(task)
            start, ready_s = time.perf_counter(), task.since
            task.since = start
        with self.tracer.span(task.label, lane.name, **({"bytes": task.num_bytes} if task.num_bytes else {})):
            value = self._do(task)
            if lane.rate and task.num_bytes:
                self._throttle(lane, task, start, ready_s)
        with self._lock:
            lane.running.remove(task)
            self._num_finished += 1
            self._open.discard(task)
            counters = self._counters[lane.name]
            counters.busy_s += time.perf_counter() - start
            counters.num_bytes += task.num_bytes
            counters.num_tasks += 1
        self._publish(task, value)
        self._settle(task)

    def _throttle(self, lane: _Lane, task: Task[Any], start: float, ready_s: float) -> None:
        """Hold a lane for as long as a slower one would take; a late end is made up for by the next task."""
        with self._lock:
            lane.free_at_s = max(lane.free_at_s, ready_s, start - CREDIT_S) + task.num_bytes / lane.rate
            left = lane.free_at_s - time.perf_counter()
        if left > 0:
            self._closed.wait(left)

    # -- waiting and failing -------------------------------------------------------------------------------------------

    def _block(self, future: Future[Any], what: str) -> None:
        blocker = self._blocker(future)
        lane = getattr(future, "lane", "") or getattr(blocker, "lane", "") or "other"
        name = name_of(future, what)
        woken = threading.Event()
        with self._lock:
            self._waiters.add(woken)
        future.add_done_callback(lambda _: woken.set())
        start = time.perf_counter()
        try:
            with self.tracer.span(f"wait {what or name}", "wait", **{"for": lane, "task": name_of(blocker)}):
                while self._failure is None and not self._closed.is_set():
                    before = self._num_finished
                    if woken.wait(self.watchdog_s):
                        break
                    if self._num_finished == before:  # slow is not stuck
                        self.fail_wait(name)
        finally:
            with self._lock:
                self._waiters.discard(woken)
                self._counters[lane].stalled_s += time.perf_counter() - start
        if self._closed.is_set() and self._failure is None and not future.done():
            raise OffloadError(f"lanes: closed while {name} was waited for")

    def _blocker(self, future: Future[Any]) -> Future[Any]:
        """Return the task that a future really waits for now: not another's end, but its turn or its own."""
        with self._lock:
            while isinstance(future, Task) and future.state == WAITING:
                left = [f for f in future.after if not is_over(f)]
                if not left:
                    break
                future = left[0]
        return future

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = error
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        with self._lock:
            waiters = list(self._waiters)
        for waiter in waiters:
            waiter.set()


def _rank(entry: tuple[int, int, Task[Any]]) -> tuple[int, int]:
    return entry[:2]
