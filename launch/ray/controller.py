"""The actor that keeps a job running, wherever its driver is: Ray starts it again when it is killed.

It holds nothing that matters: decisions are in the control log of the run folder, lines stay with the actors of the
workers until the driver has them. When the driver is gone for `lease_s`, the job is stopped as by SIGTERM. Must not
know how decisions are made.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import ray

from windlass.dist.errors import WindlassError
from windlass.launch.control_log import ControlLog
from windlass.launch.controller import Controller, Patience
from windlass.launch.decide import Limits
from windlass.launch.drill import Strike
from windlass.launch.ray.fleet import RayFleet
from windlass.launch.ray.wishes import Wishes
from windlass.launch.run_folder import RunFolder, RunLock

FAILED = 1
MAX_LINES = 20_000


@dataclass(frozen=True)
class RayJob:
    """Everything a controller needs to run a job, also when it is started anew. `launch` names one start by a user;
    generations begin after `floor`."""

    run: Path
    launch: str
    wishes: Wishes
    limits: Limits
    floor: int = 0
    patience: Patience = field(default_factory=Patience)
    strikes: tuple[Strike, ...] = ()
    lease_s: float = 30.0


@dataclass(frozen=True)
class Shown:
    """One line for people: of `source`, which numbers its lines."""

    source: str
    number: int
    stream: str
    text: str


@dataclass(frozen=True)
class Followed:
    """What a driver gets: lines, where to go on in them, and the exit code once the job has ended."""

    place: tuple[str, int]
    lines: tuple[Shown, ...]
    code: int | None


class Feed:
    """Lines on their way to the driver. Each source's lines are taken once, and kept until the driver has them.

    `place` in the feed is its own name and a count: a driver that comes with the place of another feed, which died,
    gets everything and leaves out what it has.
    """

    def __init__(self) -> None:
        self._name = secrets.token_hex(4)
        self._lines: deque[Shown] = deque(maxlen=MAX_LINES)
        self._end = 0  # lines ever taken
        self._last: dict[str, int] = {}
        self._confirmed: dict[str, int] = {}
        self._changed = threading.Condition()

    def put(self, source: str, number: int, stream: str, text: str) -> None:
        """Take a line, unless it is here already."""
        with self._changed:
            if number <= self._last.get(source, 0):
                return
            self._last[source] = number
            self._lines.append(Shown(source, number, stream, text))
            self._end += 1
            self._changed.notify_all()

    def say(self, stream: str, text: str) -> None:
        """Take a line of our own."""
        self.put(self._name, self._last.get(self._name, 0) + 1, stream, text)

    def confirmed(self, source: str) -> int:
        """Return up to which line of a source the driver has them."""
        return self._confirmed.get(source, 0)

    def take(self, place: tuple[str, int], wait_s: float) -> tuple[tuple[str, int], tuple[Shown, ...]]:
        """Return the lines after a place, waiting at most `wait_s` for one."""
        with self._changed:
            while place[0] == self._name and self._lines and self._end - len(self._lines) < place[1]:
                line = self._lines.popleft()
                self._confirmed[line.source] = line.number
            self._changed.wait_for(lambda: bool(self._lines), wait_s)
            return (self._name, self._end), tuple(self._lines)


class _Printed(io.TextIOBase):
    """Takes the place of stdout or stderr in this actor: what is printed goes to the driver."""

    def __init__(self, feed: Feed, stream: str) -> None:
        self._feed, self._stream, self._rest = feed, stream, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._feed.say(self._stream, line)
        return len(text)


@dataclass
class _Stop:
    count: int = 0


class JobController:
    """Runs one job on a Ray fleet. The work is done by a thread that begins with the actor, whoever started it."""

    def __init__(self, job: RayJob) -> None:
        self._job = job
        self._feed, self._stop = Feed(), _Stop()
        self._code: int | None = None
        self._heard = time.monotonic()
        self._name = ray.get_runtime_context().get_actor_name()
        threading.Thread(target=self._run, daemon=True, name="run").start()
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    def _run(self) -> None:
        code = FAILED
        try:
            out, err = _Printed(self._feed, "stdout"), _Printed(self._feed, "stderr")
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = self._keep_running()
        except WindlassError as error:
            self._feed.say("stderr", f"error: {error}")
            code = error.exit_code
        except Exception as error:  # whatever it is, the driver must hear of it: nobody reads this actor's log
            self._feed.say("stderr", f"error: the controller of the job failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._code = code

    def _keep_running(self) -> int:
        job = self._job
        folder = RunFolder(job.run)
        folder.create()
        with RunLock(folder), RayFleet(job.wishes, self._feed) as fleet:
            log = ControlLog(job.run)
            log.floor = job.floor
            return Controller(
                fleet,
                log,
                job.limits,
                job.patience,
                job.run,
                strikes=job.strikes,
                launch=job.launch,
            ).run(self._stop)

    def _watch(self) -> None:
        """Stop the job when its driver is gone, and end this actor once nobody will ask any more."""
        while True:
            time.sleep(min(1.0, self._job.lease_s / 4))
            if time.monotonic() - self._heard < self._job.lease_s:
                continue
            self._stop.count = max(self._stop.count, 1)
            if self._code is not None:
                ray.kill(ray.get_actor(self._name), no_restart=True)

    def follow(self, place: tuple[str, int], asked_to_stop: int, wait_s: float) -> Followed:
        """Return new lines and the code once there is one; pass on how often the driver was asked to stop."""
        self._heard = time.monotonic()
        self._stop.count = max(self._stop.count, asked_to_stop)
        code = self._code  # read first: when it is there, all lines are
        place, lines = self._feed.take(place, 0.0 if code is not None else wait_s)
        return Followed(place, lines, code)

    def pid(self) -> int:
        """Return the process of this actor."""
        return os.getpid()
