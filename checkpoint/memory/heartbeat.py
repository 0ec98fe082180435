"""The heartbeat of one rank: a page of shared memory that its trainer writes and the watchdog of its node reads.

A beat costs a few stores. The file is replaced when a rank starts, so a process of an older generation that still
beats is not heard. Must not know: torch, when a silence is too long, what is done about it.
"""

from __future__ import annotations

import mmap
import os
import statistics
import struct
import time
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

_WORDS = struct.Struct("<9Q")
_MAGIC = int.from_bytes(b"WLBEAT01", "little")
_PHASE, _STEP, _TIME, _MEDIAN = 4, 5, 6, 7
STEPS_REMEMBERED = 31


class Phase(IntEnum):
    """What a rank is busy with: each has its own patience."""

    START = 0
    STEP = 1
    EVAL = 2
    SAVE = 3
    DONE = 4


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank. Units: ns of CLOCK_MONOTONIC; median_ns of a step, 0 as long as unknown."""

    pid: int
    started: int
    generation: int
    phase: Phase
    step: int
    time_ns: int
    median_ns: int
    count: int

    @property
    def silent_s(self) -> float:
        """Seconds since then."""
        return max(time.monotonic_ns() - self.time_ns, 0) / 1e9


class Heartbeat:
    """The trainer's end: a new file at `path`, in place of what an earlier process left there."""

    def __init__(self, path: Path, generation: int) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            pid = os.getpid()
            first = (_MAGIC, pid, process_started(pid) or 0, generation, Phase.START, 0, time.monotonic_ns(), 0, 0)
            os.posix_fallocate(fd, 0, mmap.PAGESIZE)
            os.pwrite(fd, _WORDS.pack(*first), 0)
            self._map = mmap.mmap(fd, mmap.PAGESIZE)
        finally:
            os.close(fd)
        self._words = np.frombuffer(self._map, "<u8")
        self._path = path
        self._steps: deque[int] = deque(maxlen=STEPS_REMEMBERED)
        self._last: tuple[int, int] | None = None  # step, when it was first seen
        os.replace(partial, path)

    def beat(self, phase: Phase, step: int) -> None:
        """Say that this rank lives, what it does and at which step. Blocks: no."""
        now = time.monotonic_ns()
        if phase == Phase.STEP:
            if self._last is not None and step == self._last[0] + 1:
                self._steps.append(now - self._last[1])
                self._words[_MEDIAN] = int(statistics.median(self._steps))
            if self._last is None or step != self._last[0]:
                self._last = (step, now)
        else:
            self._last = None  # what lies between is no step
        # The time goes first: read with the phase before it, it can only make the silence look shorter.
        self._words[_TIME] = now
        self._words[_STEP] = step
        self._words[_PHASE] = phase
        self._words[_MEDIAN + 1] += 1

    def read(self) -> Beat:
        """Return what a reader of the file would see."""
        beat = _beat_of(self._map[: _WORDS.size])
        assert beat is not None
        return beat


def read_heartbeat(path: Path) -> Beat | None:
    """Return the last beat of a rank; None if it never began."""
    try:
        return _beat_of(path.read_bytes()[: _WORDS.size])
    except FileNotFoundError:
        return None


def _beat_of(data: bytes) -> Beat | None:
    if len(data) < _WORDS.size:
        return None
    magic, pid, started, generation, phase, step, time_ns, median_ns, count = _WORDS.unpack(data)
    if magic != _MAGIC or phase not in iter(Phase):
        return None
    return Beat(pid, started, generation, Phase(phase), step, time_ns, median_ns, count)


def process_started(pid: int) -> int | None:
    """Return when a process was created, in clock ticks since boot; None if it is gone, or dead and not waited for.

    A number of a process alone means nothing, because numbers are used again.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Return whether the very process that was created then still runs (a stopped one does)."""
    return pid > 0 and process_started(pid) == started
