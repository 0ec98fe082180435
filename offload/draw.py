"""Pictures of an offloaded step: one row per lane, as text for terminals and as SVG for documents.

Spans may be simulated or recorded. Must not know: plans, rates, where the spans come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from windlass.dist.svg import axis, ink, rect, time_unit
from windlass.dist.svg import text as svg_text
from windlass.offload.program import LANES
from windlass.offload.simulate import Span

COLOURS = {
    "compute": "#4878a8",
    "comm": "#8e6bb0",
    "h2d": "#3f9163",
    "d2h": "#a5cf9b",
    "file read": "#e8833a",
    "file write": "#f6bf7c",
    "cpu update": "#b0713a",
    "device update": "#5b7083",
}
OTHER = "#9aa3ad"
BACKWARD = "#7ba3c9"  # backward on the compute lane
LEFT, RIGHT, TOP = 104, 150, 46
ROW, GAP, WIDTH = 24, 8, 1200  # pixels
LETTER = 6.2  # pixels of one letter
THIN = 0.25  # pixels: what is narrower is joined with its neighbours
CSS = "system-ui, -apple-system, Segoe UI, sans-serif"


def ordered_lanes(spans: Sequence[Span]) -> list[str]:
    """Return the lanes that occur: those of the runtime in its order (with those of further drives), then others."""
    found = dict.fromkeys(span.lane for span in spans)
    base = {lane: number for number, lane in enumerate(LANES)}
    return sorted(found, key=lambda lane: (base.get(_kind(lane), len(base)), lane))


def busy_s(spans: Sequence[Span], lane: str) -> float:
    """Return the seconds in which a lane does anything; overlapping spans count once."""
    total, until = 0.0, -math.inf
    for start, end in sorted((s.start_s, s.end_s) for s in spans if s.lane == lane):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def text(spans: Sequence[Span], columns: int = 72) -> str:
    """Draw every lane as a line of text: # where it is busy for most of a column, + for a part of it, . where idle."""
    first, last = _window(spans)
    unit = (last - first) / columns or 1.0
    lines = []
    lanes = ordered_lanes(spans)
    width = max((len(lane) for lane in lanes), default=0)
    for lane in lanes:
        shares = [0.0] * columns
        for span in spans:
            if span.lane == lane:
                _add_shares(shares, (span.start_s - first) / unit, (span.end_s - first) / unit)
        line = "".join("#" if share > 0.66 else "+" if share > 0.05 else "." for share in shares)
        busy = busy_s(spans, lane)
        lines.append(f"{lane:<{width}} |{line}| busy {busy / (last - first or 1.0):4.0%}")
    lines.append(f"{'':<{width}}  0{_seconds(last - first):>{columns - 1}}")
    return "\n".join(lines)


def _add_shares(shares: list[float], start: float, end: float) -> None:
    """Add how much of every column a span covers."""
    for column in range(max(0, int(start)), min(len(shares), math.ceil(end))):
        shares[column] += max(0.0, min(end, column + 1) - max(start, column))


def svg(spans: Sequence[Span], title: str) -> str:
    """Draw every lane as a row of boxes, with its name where it fits, beside a time axis; pointing at one names it."""
    first, last = _window(spans)
    total = (last - first) or 1.0
    scale = WIDTH / total
    parts: list[str] = []
    y = float(TOP)
    for lane in ordered_lanes(spans):
        own = sorted((s for s in spans if s.lane == lane), key=lambda s: (s.start_s, s.end_s))
        parts.append(rect(LEFT, y, WIDTH, ROW, "#f1f3f5"))
        parts.append(svg_text(LEFT - 8, y + ROW / 2 + 4, lane, "end", "#333"))
        parts += _boxes(own, y, first, scale)
        busy = busy_s(own, lane)
        facts = f"busy {busy / total:.1%}, idle {_seconds(total - busy)}"
        parts.append(svg_text(LEFT + WIDTH + 10, y + ROW / 2 + 4, facts, "start", "#333"))
        y += ROW + GAP
    parts += axis(total, scale, LEFT, y)
    whole, tall = LEFT + WIDTH + RIGHT, math.ceil(y + 32)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {tall}" width="{whole}" height="{tall}" '
        f'font-family="{CSS}" font-size="11">'
    )
    caption = f'<text x="{LEFT}" y="24" font-size="15" font-weight="600" fill="#222">{escape(title)}</text>'
    return "\n".join([head, rect(0, 0, whole, tall, "#ffffff"), caption, *parts, "</svg>"]) + "\n"


def _boxes(spans: Sequence[Span], y: float, first: float, scale: float) -> Iterator[str]:
    for start, end, label, colour in _joined(spans, scale):
        x, width = LEFT + (start - first) * scale, max((end - start) * scale, THIN)
        tip = f"{label}: {start - first:.6g} to {end - first:.6g} s"
        yield (
            f'<rect class="lane" x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{ROW}" fill="{colour}" '
            f'stroke="#fff" stroke-width="{min(0.8, width / 6):.2f}"><title>{escape(tip)}</title></rect>'
        )
        if width >= LETTER * len(label) + 4:
            yield svg_text(x + width / 2, y + ROW / 2 + 4, label, "middle", ink(colour))


def _joined(spans: Sequence[Span], scale: float) -> Iterator[tuple[float, float, str, str]]:
    """Yield boxes: spans, where they are too narrow to see several in a row as one."""
    start, end, count, label, colour = 0.0, -math.inf, 0, "", ""
    for span in spans:
        narrow = (span.end_s - span.start_s) * scale < 2 * THIN and (end - start) * scale < 2.0
        if count and narrow and (span.start_s - end) * scale < THIN and _colour(span) == colour:
            end, count = max(end, span.end_s), count + 1
            continue
        if count:
            yield start, end, label if count == 1 else f"{label} and {count - 1} more", colour
        start, end, count, label, colour = span.start_s, span.end_s, 1, span.label, _colour(span)
    if count:
        yield start, end, label if count == 1 else f"{label} and {count - 1} more", colour


def _window(spans: Sequence[Span]) -> tuple[float, float]:
    return min((s.start_s for s in spans), default=0.0), max((s.end_s for s in spans), default=0.0)


def _kind(lane: str) -> str:
    """Return the lane without the number of its drive."""
    return lane.rstrip("0123456789").rstrip()


def _colour(span: Span) -> str:
    if span.lane == "compute" and span.label.startswith("backward"):
        return BACKWARD
    return COLOURS.get(_kind(span.lane), OTHER)


def _seconds(value: float) -> str:
    factor, name = time_unit(value)
    return f"{value * factor:.3g} {name}"
