"""Watches the workers of a run until all have ended: the same rules for local processes and Ray actors.

A failed worker ends the run: the others get a moment to report by themselves, then SIGTERM, then SIGKILL.
SIGTERM or SIGINT to the launcher is passed on once, so that workers finish their step, save and end; a second one
kills. Must not know what a worker is: it sees ranks, exits and signals.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import FrameType
from typing import Protocol

from windlass.launch import lines
from windlass.launch.failure import Exit, format_failures, order_failures

REPORT_S = 2.0  # a lost peer is noticed within milliseconds, so every worker that can report has done so by then
ASKED_TO_END = (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT)


class WorkerGroup(Protocol):
    """Workers under way, by rank."""

    num_workers: int

    def wait(self, timeout_s: float) -> list[Exit]:
        """Pass on output and return the workers that ended since the last call, waiting at most `timeout_s`."""

    def send(self, ranks: Collection[int], signum: int) -> None:
        """Send a signal to workers that have not ended. One that SIGKILL does not end counts as ended after a while."""


class StopCount(Protocol):
    """How often somebody asked to stop: the first time saves, the second kills."""

    count: int


class Stopped(Exception):
    """Somebody asked to stop while something was waited for."""


_listening: ContextVar[StopCount | None] = ContextVar("listening", default=None)


@contextmanager
def interruptible(stop: StopCount) -> Iterator[None]:
    """Let whatever the block waits for, however far below, end with Stopped once somebody asks to stop."""
    before = _listening.set(stop)
    try:
        yield
    finally:
        _listening.reset(before)


def check_stop() -> None:
    """Raise Stopped if somebody has asked to stop. For waits, some times a second; elsewhere than in `interruptible`
    nobody has.
    """
    stop = _listening.get()
    if stop is not None and stop.count:
        raise Stopped


class StopRequests:
    """How often the launcher was asked to stop."""

    def __init__(self) -> None:
        self.count = 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1

    @contextmanager
    def listening(self) -> Iterator[StopRequests]:
        """Count SIGTERM and SIGINT while the block runs."""
        previous = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def supervise(
    group: WorkerGroup,
    grace_s: float,
    stop: StopCount,
    *,
    report_s: float | None = None,
    deadline_s: float = math.inf,
    tend: Callable[[bool], bool] = lambda whole: False,
    look_s: float = 0.1,
) -> list[Exit]:
    """Wait until every worker has ended and return how.

    `report_s` is REPORT_S by default. After a request to stop workers have `deadline_s`. `tend` is called every
    `look_s` for whatever else needs care, and told whether all workers still run; once it returns True, they are asked
    to save and end.

    Invariant:   after the first failure all workers have ended within report_s + grace_s and the time a kill takes
    """
    report_s = REPORT_S if report_s is None else report_s
    running = set(range(group.num_workers))
    signalled: set[int] = set()
    exits: list[Exit] = []
    terminate_at = kill_at = float("inf")
    answered = 0
    asked_to_save = False

    def send(signum: int) -> None:
        group.send(running, signum)
        signalled.update(running)

    while running:
        for ended in group.wait(look_s):
            running.discard(ended.rank)
            asked = ended.rank in signalled and ended.failure is None and ended.code in ASKED_TO_END
            exits.append(replace(ended, stopped=asked))
            if ended.code != 0 and not asked:
                terminate_at = min(terminate_at, time.monotonic() + report_s)
        now = time.monotonic()
        if stop.count > answered:
            answered = stop.count
            kill_at = min(kill_at, now + deadline_s)
            if answered > 1:
                send(signal.SIGKILL)
            elif not asked_to_save:  # a second SIGTERM would end them before they have saved
                send(signal.SIGTERM)
        if tend(not exits and not answered) and not asked_to_save and not answered:
            asked_to_save = True
            send(signal.SIGTERM)
        if now >= terminate_at:
            terminate_at, kill_at = float("inf"), min(kill_at, now + grace_s)
            send(signal.SIGTERM)
        if now >= kill_at:
            kill_at = now + 1.0
            send(signal.SIGKILL)
    return exits


def conclude(exits: list[Exit], stop: StopCount) -> int:
    """Print the cause of a failed run, once, and return the exit code of the run."""
    failures = order_failures(exits)
    cut_short = [ended for ended in exits if ended.stopped and ended.code != 0]
    if stop.count and cut_short and all(failure.secondary for failure in failures):
        lines.say("windlass: stopped on request before every worker could save")
        return 128 + signal.SIGTERM
    if not failures:
        return 0
    lines.say(format_failures(exits))
    return failures[0].exit_code
