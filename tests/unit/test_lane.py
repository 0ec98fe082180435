"""Lanes: order, priorities, failures, throttling, and that nothing ever hangs."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.waiting import until
from windlass.dist.errors import OffloadError
from windlass.dist.trace import Tracer
from windlass.offload import lane as lane_module
from windlass.offload.lane import PRIORITY, Lanes


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes(Tracer(enabled=True), watchdog_s=60)
    yield made
    made.close()


class Gate:
    """Keeps a lane busy until it is opened, so that what is queued behind can be looked at."""

    def __init__(self, lanes: Lanes, lane: str) -> None:
        self._open, begun = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            self._open.wait(60)

        self.future = lanes.submit(lane, work, label="gate", priority=0)
        assert begun.wait(60)

    def open(self) -> None:
        self._open.set()


def _raise(error: BaseException) -> Any:
    raise error


# -- order -----------------------------------------------------------------------------------------------------------


def test_a_task_starts_when_all_it_comes_after_is_done_and_has_their_values(lanes: Lanes) -> None:
    gate = Gate(lanes, "file read")
    first = lanes.submit("file read", lambda: 20)
    second = lanes.submit("cpu update", lambda: 2)
    outside: Future[int] = Future()
    total = lanes.submit("h2d", lambda: first.result() + second.result() + outside.result(), after=[first, outside])
    gate.open()
    assert lanes.wait(first) == 20 and not total.done()
    outside.set_result(20)
    assert lanes.wait(total) == 42
    lanes.wait(lanes.all([gate.future, second]))
    lanes.check_idle()


def test_a_lane_takes_the_most_urgent_and_then_the_oldest(lanes: Lanes) -> None:
    gate, order = Gate(lanes, "file write"), []
    made = [
        lanes.submit("file write", lambda n=name: order.append(n), priority=PRIORITY[kind], label=name)  # type: ignore[misc]
        for name, kind in (("s", "snapshot"), ("w1", "write"), ("p1", "prefetch"), ("w2", "write"), ("b", "blocking"))
    ]
    late = lanes.submit("file write", lambda: order.append("p2"), after=[gate.future])
    gate.open()
    lanes.wait(lanes.all([*made, late]))
    assert order == ["b", "p1", "p2", "w1", "w2", "s"]


def test_raising_a_priority_raises_what_the_task_waits_for(lanes: Lanes) -> None:
    gate, order = Gate(lanes, "file read"), []
    names = ["a", "b", "c"]
    reads = [lanes.submit("file read", lambda n=name: order.append(n), label=name) for name in names]  # type: ignore[misc]
    copy = lanes.submit("h2d", lambda: None, after=[reads[2]], label="copy")
    lanes.raise_priority(copy)
    lanes.raise_priority(copy)
    gate.open()
    lanes.wait(lanes.all([*reads, copy]))
    assert order == ["c", "a", "b"]
    lanes.check_idle()


def test_then_runs_at_once_or_in_the_thread_that_completes_the_last(lanes: Lanes) -> None:
    def thread_name() -> str:
        return threading.current_thread().name

    here = lanes.then([lanes.done(1)], thread_name)
    assert here.done() and here.result() == threading.current_thread().name
    gate = Gate(lanes, "d2h")
    there = lanes.then([gate.future], thread_name)
    gate.open()
    assert lanes.wait(there) == "d2h"
    with pytest.raises(OSError, match="disk"):
        lanes.wait(lanes.then([], lambda: _raise(OSError("disk"))))


def test_tasks_record_no_gradients_and_their_threads_end_with_the_process(lanes: Lanes) -> None:
    prepared: list[str] = []
    own = Lanes(Tracer(), workers={"h2d": 2}, prepare=lambda: prepared.append(threading.current_thread().name))
    meet = threading.Barrier(2, timeout=60)

    def work() -> bool:
        meet.wait()
        return torch.is_grad_enabled() or not threading.current_thread().daemon

    assert not any(own.wait(task) for task in [own.submit("h2d", work), own.submit("h2d", work)])
    assert sorted(prepared) == ["h2d", "h2d, thread 2"]
    assert not own.wait(own.then([], torch.is_grad_enabled)) and torch.is_grad_enabled()
    own.close()


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.sets(st.integers(1, 6), max_size=3), st.booleans()),
        min_size=1,
        max_size=25,
    ),
    st.integers(0, 40),
)
@settings(max_examples=40)
def test_every_task_runs_once_after_its_needs_unless_one_of_them_failed(
    rows: list[tuple[int, int, set[int], bool]], fails: int
) -> None:
    lanes, ran, lock = Lanes(Tracer(), watchdog_s=60), [], threading.Lock()
    futures: list[Future[Any]] = []
    needs = [{i - back for back in backs if back <= i} for i, (_, _, backs, _) in enumerate(rows)]
    doomed: set[int] = set()
    for i, (lane, priority, _, inline) in enumerate(rows):
        if i == fails or needs[i] & doomed:
            doomed.add(i)

        def work(i: int = i) -> None:
            with lock:
                assert needs[i] <= set(ran)
                ran.append(i)
            if i == fails:
                raise KeyError(i)

        after = [futures[n] for n in needs[i]]
        if inline:
            futures.append(lanes.then(after, work))
        else:
            futures.append(lanes.submit("abc"[lane], work, after=after, priority=priority))
    for i, future in enumerate(futures):
        assert (type(future.exception(60)) is KeyError) == (i in doomed)
    assert sorted(ran) == sorted(set(range(len(rows))) - doomed | ({fails} & doomed))
    if doomed:
        with pytest.raises(KeyError):
            lanes.check_idle()
    else:
        lanes.check_idle()
    lanes.close()


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_reaches_those_that_depend_on_it_and_every_later_wait(lanes: Lanes) -> None:
    gate, ran = Gate(lanes, "file read"), []
    broken = lanes.submit("file read", lambda: _raise(OSError("bad sector")))
    update = lanes.submit("cpu update", lambda: ran.append("update"), after=[broken])
    write = lanes.submit("file write", lambda: ran.append("write"), after=[lanes.all([update])])
    gate.open()
    with pytest.raises(OSError, match="bad sector"):
        lanes.wait(write)
    independent = lanes.submit("h2d", lambda: ran.append("copy"))
    assert independent.result(60) is None and ran == ["copy"]
    with pytest.raises(OSError, match="bad sector"):
        lanes.wait(independent)
    with pytest.raises(OSError, match="bad sector"):
        lanes.check_idle()
    assert "failed: OSError: bad sector" in lanes.report()


@pytest.mark.parametrize("blocked_first", [True, False])
def test_a_failure_ends_the_wait_for_what_will_never_be_done(lanes: Lanes, blocked_first: bool) -> None:
    never: Future[None] = Future()
    gate = Gate(lanes, "file read")
    lanes.submit("file read", lambda: _raise(OSError("bad sector")))
    if blocked_first:
        threading.Timer(0.05, gate.open).start()
    else:
        gate.open()
    with pytest.raises(OSError, match="bad sector"):
        lanes.wait(never, "a slab")


def test_what_would_end_the_process_in_silence_becomes_an_error(lanes: Lanes) -> None:
    with pytest.raises(OffloadError, match=r"file read 'r' ended its thread's work with SystemExit: 3"):
        lanes.wait(lanes.submit("file read", lambda: _raise(SystemExit(3)), label="r"))


def test_a_thread_that_cannot_be_prepared_is_noticed_at_the_next_wait() -> None:
    lanes = Lanes(Tracer(), prepare=lambda: _raise(RuntimeError("no such device")), watchdog_s=60)
    with pytest.raises(RuntimeError, match="no such device"):
        lanes.wait(lanes.submit("h2d", lambda: None))
    lanes._lanes["h2d"].threads[0].join(60)
    assert "h2d: runs nothing, a thread of it has ended" in lanes.report()
    lanes.close()


def test_long_chains_neither_succeed_nor_fail_by_recursion(lanes: Lanes) -> None:
    for fails in (False, True):
        gate = Gate(lanes, "cpu update")
        last: Future[Any] = lanes.submit("cpu update", lambda f=fails: _raise(OSError("first")) if f else None)  # type: ignore[misc]
        for _ in range(3000):
            last = lanes.then([last], lambda: None)
        gate.open()
        assert type(last.exception(60)) is (OSError if fails else type(None))


def test_a_cancelled_task_fails_only_those_that_need_it(lanes: Lanes) -> None:
    gate = Gate(lanes, "file read")
    prefetch = lanes.submit("file read", lambda: 1, label="ahead")
    other = lanes.submit("file read", lambda: 2)
    assert prefetch.cancel()
    gate.open()
    assert lanes.wait(other) == 2
    with pytest.raises(OffloadError, match="file read 'ahead' was cancelled"):
        lanes.wait(prefetch)
    lanes.wait(gate.future)
    lanes.check_idle()
    with pytest.raises(OffloadError, match="'ahead' was cancelled"):
        lanes.wait(lanes.submit("h2d", lambda: 3, after=[prefetch]))


def test_the_watchdog_says_what_every_lane_does_and_who_waits_for_what() -> None:
    lanes = Lanes(Tracer(), watchdog_s=0.2)
    gate = Gate(lanes, "file read")
    lanes.submit("file read", lambda: None, label="read block 3")
    slab: Future[None] = Future()
    slab.label = "a slab"  # type: ignore[attr-defined]
    copy = lanes.submit("h2d", lambda: None, after=[gate.future, slab], label="copy block 4")
    with pytest.raises(OffloadError) as caught:
        lanes.wait(copy, "parameters of block 4")
    text = str(caught.value)
    assert "parameters of block 4 (h2d 'copy block 4') was not there after 0.2 s (offload.watchdog_s)" in text
    assert re.search(r"file read: runs 'gate' for \d+\.\d s", text) and "queued 'read block 3'" in text
    assert "waiting: h2d 'copy block 4' for file read 'gate', a slab" in text
    gate.open()
    lanes.close()


# -- accounting ------------------------------------------------------------------------------------------------------


def test_counters_tell_busy_bytes_and_stalls_by_lane(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, span = Gate(lanes, "file read"), lanes.tracer.span

    def opening(name: str, lane: str, **args: Any) -> Any:
        if lane == "wait":
            threading.Timer(0.05, gate.open).start()
        return span(name, lane, **args)

    monkeypatch.setattr(lanes.tracer, "span", opening)  # so that the gate opens while it is waited for
    copy = lanes.submit("h2d", lambda: torch.ones(500, 500).sum(), after=[gate.future], num_bytes=640, label="copy")
    lanes.wait(copy, "block 1")
    lanes.wait(copy, "block 1")
    counters = lanes.take_counters()
    assert counters["h2d"].num_tasks == 1 and counters["h2d"].num_bytes == 640 and counters["h2d"].busy_s > 0
    assert counters["h2d"].stalled_s >= 0.05 and counters["file read"].stalled_s == 0
    assert lanes.take_counters() == {}
    (wait,) = (e for e in lanes.tracer.recorded() if e.lane == "wait")
    assert wait.name == "wait block 1" and wait.args == {"for": "h2d", "task": "file read 'gate'"}
    assert [(e.name, e.args) for e in lanes.tracer.recorded() if e.lane == "h2d"] == [("copy", {"bytes": 640})]


def test_what_is_left_at_the_end_of_a_step_is_named(lanes: Lanes) -> None:
    gate = Gate(lanes, "file write")
    with pytest.raises(OffloadError, match=r"1 tasks are not done at the end of the step: file write 'gate'"):
        lanes.check_idle()
    gate.open()
    lanes.wait(gate.future)
    lanes.check_idle()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_throttled_lane_keeps_its_rate_over_many_tasks(workers: int) -> None:
    lanes = Lanes(Tracer(), rates={"d2h": 1e6}, workers={"d2h": workers})
    start = time.perf_counter()
    tasks = [lanes.submit("d2h", lambda: None, num_bytes=5000) for _ in range(40)]
    free = lanes.submit("h2d", lambda: None, num_bytes=10**9)
    lanes.wait(free)  # at the rate of the other lane it would take a quarter of an hour
    lanes.wait(lanes.all(tasks))
    assert time.perf_counter() - start > 0.19
    assert sum(c.num_bytes for c in lanes.take_counters().values()) == 10**9 + 200_000
    lanes.close()


def test_a_throttled_lane_makes_up_for_threads_that_wake_up_late(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes, now, late_s = Lanes(Tracer(), rates={"d2h": 1e6}), [100.0], 0.9 * lane_module.CREDIT_S
    gate = Gate(lanes, "d2h")
    monkeypatch.setattr(lane_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(lanes._closed, "wait", lambda seconds: now.__setitem__(0, now[0] + seconds + late_s))
    tasks = [lanes.submit("d2h", lambda: None, num_bytes=5000) for _ in range(40)]
    gate.open()
    lanes.wait(lanes.all(tasks))
    assert now[0] == pytest.approx(100.0 + 0.2 + late_s)
    monkeypatch.undo()
    lanes.close()


# -- the end ---------------------------------------------------------------------------------------------------------


def test_closing_cancels_what_has_not_begun_and_leaves_behind_what_hangs() -> None:
    lanes = Lanes(Tracer(), rates={"file write": 1.0})
    gate = Gate(lanes, "file read")
    queued = lanes.submit("file read", lambda: 1, label="queued")
    waiting = lanes.submit("h2d", lambda: 2, after=[queued], label="waiting")
    lanes.submit("file write", lambda: None, num_bytes=10**6)  # a million seconds
    caught: list[Exception] = []

    def wait(future: Future[Any]) -> Callable[[], None]:
        def run() -> None:
            try:
                lanes.wait(future)
            except OffloadError as error:
                caught.append(error)

        return run

    threads = [threading.Thread(target=wait(future)) for future in (gate.future, waiting)]
    for thread in threads:
        thread.start()
    until(lambda: len(lanes._waiters) == len(threads))
    start = time.perf_counter()
    lanes.close()
    assert 0.9 < time.perf_counter() - start < 30, "the gate stays shut for longer"
    for thread in threads:
        thread.join(60)
    assert sorted(str(error) for error in caught) == [
        "lanes: closed while file read 'gate' was waited for",
        "lanes: h2d 'waiting' was cancelled before it began",
    ]
    assert queued.cancelled() and waiting.cancelled()
    with pytest.raises(OffloadError, match="'late' was submitted after the lanes were closed"):
        lanes.submit("h2d", lambda: None, label="late")
    gate.open()
    lanes.close()
