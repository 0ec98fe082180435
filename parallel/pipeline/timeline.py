"""When every action of a pipeline ran: simulated by simulate.py or measured, drawn by draw.py.

Must not know: where the times come from, how they are drawn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from windlass.dist.trace import Event
from windlass.parallel.pipeline.action import KINDS, LANES, Action


class Span(NamedTuple):
    """One action of one rank, in seconds. A receive lasts while its data travels, as far as it is posted by then."""

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline: per rank the spans of every lane, in order of their start.

    `idle` is the share of the step in which a rank computes nothing; `peak_in_flight` the most stage activations it
    holds, `peak_bytes` the most memory (empty where nobody counted).
    """

    name: str
    spans: tuple[dict[str, tuple[Span, ...]], ...]
    total_s: float
    idle: tuple[float, ...]
    peak_in_flight: tuple[int, ...]
    peak_bytes: tuple[float, ...] = ()

    @classmethod
    def of(cls, name: str, ranks: Iterable[Sequence[Span]], peak_bytes: tuple[float, ...] = ()) -> Timeline:
        """Sort the spans of every rank into lanes and derive the figures; the step ends with its last span."""
        rows = [sorted(row, key=lambda span: (span.start_s, span.end_s)) for row in ranks]
        spans = tuple(
            {lane: tuple(s for s in row if KINDS[s.action.kind].lane == lane) for lane in LANES} for row in rows
        )
        total = max((span.end_s for row in rows for span in row), default=0.0)
        busy = [sum(span.end_s - span.start_s for span in lanes["compute"]) for lanes in spans]
        return cls(
            name,
            spans,
            total,
            tuple(1.0 - part / total if total else 0.0 for part in busy),
            tuple(peak_in_flight(span.action for span in lanes["compute"]) for lanes in spans),
            peak_bytes,
        )


def peak_in_flight(actions: Iterable[Action]) -> int:
    """Return the most stage activations that a list of actions holds: forwards whose B or W has not run."""
    held = peak = 0
    for action in actions:
        if action.kind == "F":
            held += 1
            peak = max(peak, held)
        elif action.kind in ("B", "W"):
            held -= 1
    return peak


def without_waits(events: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Yield recorded spans with what they took themselves: every wait for a peer is a span on the lane "comm"."""
    spans = [event for event in events if event.phase == "X"]
    waits: list[tuple[float, float]] = []
    for start, duration in sorted((e.start_s, -e.duration_s) for e in spans if e.lane == "comm"):
        if not waits or start >= sum(waits[-1]):  # not inside of another
            waits.append((start, -duration))
    starts = [start for start, _ in waits]
    waited = list(accumulate((duration for _, duration in waits), initial=0.0))
    for event in spans:
        if event.lane != "comm":
            until = event.start_s + event.duration_s
            inside = waited[bisect_left(starts, until)] - waited[bisect_left(starts, event.start_s)]
            yield event, max(0.0, event.duration_s - inside)
