"""Spans, instants and counters of one rank: a ring in memory, written as a Chrome trace when asked for.

Totals of busy seconds per lane are kept even when events are not, because the step report needs them.
Must not know: what is being traced. Format: the Trace Event Format of Chromium (chrome://tracing, Perfetto).
"""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

from windlass.dist.errors import DataError


class Event(NamedTuple):
    """One thing that happened. Units: seconds of `time.perf_counter`."""

    phase: str  # "X" span, "i" instant, "C" counter
    name: str
    lane: str
    start_s: float
    duration_s: float
    args: dict[str, Any]


class _Span:
    """The block of code that is timed; a class, because every action is one and a generator costs more."""

    __slots__ = ("_args", "_lane", "_name", "_start", "_tracer")

    def __init__(self, tracer: Tracer, name: str, lane: str, args: dict[str, Any]) -> None:
        self._tracer, self._name, self._lane, self._args = tracer, name, lane, args

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        tracer, start = self._tracer, self._start
        duration = time.perf_counter() - start
        with tracer.lock:
            tracer.busy_s[self._lane] += duration
            if tracer.enabled:
                tracer.events.append(Event("X", self._name, self._lane, start, duration, self._args))


class Tracer:
    """Records events of one rank, from any thread. Disabled, a span costs two clock readings and keeps only the lane's
    total.

    Units: seconds of `time.perf_counter`; `epoch_s` is the wall clock at its zero, so that ranks line up.
    """

    def __init__(self, *, enabled: bool = False, capacity: int = 200_000) -> None:
        self.enabled = enabled
        self.events: deque[Event] = deque(maxlen=capacity)
        self.busy_s: defaultdict[str, float] = defaultdict(float)
        self.epoch_s = time.time() - time.perf_counter()
        self.lock = threading.Lock()  # two threads may end spans of one lane at the same moment

    def span(self, name: str, lane: str, **args: Any) -> _Span:
        """Time a block of code on a lane."""
        return _Span(self, name, lane, args)

    def instant(self, name: str, lane: str, **args: Any) -> None:
        """Mark a moment."""
        if self.enabled:
            self._append(Event("i", name, lane, time.perf_counter(), 0.0, args))

    def counter(self, name: str, **values: float) -> None:
        """Record the present value of one or more quantities, drawn as a graph."""
        if self.enabled:
            self._append(Event("C", name, name, time.perf_counter(), 0.0, values))

    def take_busy(self) -> dict[str, float]:
        """Return the busy seconds per lane since the last call, and start again from zero."""
        with self.lock:
            taken = dict(self.busy_s)
            self.busy_s.clear()
        return taken

    def recorded(self) -> list[Event]:
        """Return the events so far, while other threads may go on recording."""
        with self.lock:
            return list(self.events)

    def _append(self, event: Event) -> None:
        with self.lock:
            self.events.append(event)

    def write_chrome(self, path: Path, rank: int) -> None:
        """Write the recorded events as `path` (.json or .json.gz), one process per rank, one row per lane."""
        events = self.recorded()
        lanes = {lane: i for i, lane in enumerate(dict.fromkeys(e.lane for e in events))}
        out: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}},
            *({"ph": "M", "name": "thread_name", "pid": rank, "tid": i, "args": {"name": n}} for n, i in lanes.items()),
        ]
        for event in events:
            row = {
                "ph": event.phase,
                "name": event.name,
                "pid": rank,
                "tid": lanes[event.lane],
                "ts": (self.epoch_s + event.start_s) * 1e6,
                "args": event.args,
            }
            out.append(
                row
                | ({"dur": event.duration_s * 1e6} if event.phase == "X" else {"s": "t"} if event.phase == "i" else {})
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"traceEvents": out, "displayTimeUnit": "ms"}, default=str)
        partial = path.with_name(path.name + f".tmp-{os.getpid()}")
        partial.write_bytes(gzip.compress(text.encode(), 4) if path.suffix == ".gz" else text.encode())
        partial.replace(path)


def read_chrome(path: Path) -> list[Event]:
    """Read the spans of a file that `write_chrome` wrote. Units: seconds of the wall clock.

    Raises: DataError if it cannot be read
    """
    try:
        data = path.read_bytes()
        rows = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
        lanes = {row["tid"]: row["args"]["name"] for row in rows if row["ph"] == "M" and row["name"] == "thread_name"}
        return [
            Event("X", row["name"], lanes[row["tid"]], row["ts"] / 1e6, row["dur"] / 1e6, row["args"])
            for row in rows
            if row["ph"] == "X"
        ]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(
            f"trace {path} cannot be read: {type(error).__name__}: {error}. Record it again with profiler.start_step"
        ) from error
