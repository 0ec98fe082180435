"""Spans, instants and counters of one rank: a ring in memory, written as a Chrome trace when asked for.

Totals of busy seconds per lane are kept even when events are not, because the step report needs them.
Must not know: what is being traced. Format: the Trace Event Format of Chromium (chrome://tracing, Perfetto).
"""

from __future__ import annotations

import gzip
import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One thing that happened. Units: seconds of `time.perf_counter`."""

    phase: str  # "X" span, "i" instant, "C" counter
    name: str
    lane: str
    start_s: float
    duration_s: float
    args: dict[str, Any]


class Tracer:
    """Records events of one rank. Disabled, a span costs two clock readings and keeps only the lane's total.

    Units: seconds of `time.perf_counter`; `epoch_s` is the wall clock at its zero, so that ranks line up.
    """

    def __init__(self, *, enabled: bool = False, capacity: int = 200_000) -> None:
        self.enabled = enabled
        self.events: deque[Event] = deque(maxlen=capacity)
        self.busy_s: defaultdict[str, float] = defaultdict(float)
        self.epoch_s = time.time() - time.perf_counter()

    @contextmanager
    def span(self, name: str, lane: str, **args: Any) -> Iterator[None]:
        """Time a block of code on a lane."""
        start = time.perf_counter()
        try:
            yield
        finally:
            duration = time.perf_counter() - start
            self.busy_s[lane] += duration
            if self.enabled:
                self.events.append(Event("X", name, lane, start, duration, args))

    def instant(self, name: str, lane: str, **args: Any) -> None:
        """Mark a moment."""
        if self.enabled:
            self.events.append(Event("i", name, lane, time.perf_counter(), 0.0, args))

    def counter(self, name: str, **values: float) -> None:
        """Record the present value of one or more quantities, drawn as a graph."""
        if self.enabled:
            self.events.append(Event("C", name, name, time.perf_counter(), 0.0, values))

    def take_busy(self) -> dict[str, float]:
        """Return the busy seconds per lane since the last call, and start again from zero."""
        taken = dict(self.busy_s)
        self.busy_s.clear()
        return taken

    def write_chrome(self, path: Path, rank: int) -> None:
        """Write the recorded events as `path` (.json or .json.gz), one process per rank, one row per lane."""
        lanes = {lane: i for i, lane in enumerate(dict.fromkeys(e.lane for e in self.events))}
        out: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}},
            *({"ph": "M", "name": "thread_name", "pid": rank, "tid": i, "args": {"name": n}} for n, i in lanes.items()),
        ]
        for event in self.events:
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
