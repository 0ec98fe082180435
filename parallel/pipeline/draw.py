"""Pictures of a pipeline's step: as text for terminals and errors, as SVG for documents, simulated or measured.

Must not know: schedules, costs. A timeline is all there is to see.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from windlass.dist.errors import PlanError
from windlass.dist.svg import axis, channels, ink, rect
from windlass.dist.svg import text as svg_text
from windlass.dist.trace import Event, read_chrome
from windlass.parallel.pipeline.action import KINDS, LANES, Action
from windlass.parallel.pipeline.timeline import Span, Timeline, without_waits

COLOURS = {
    "F": "#4878a8",
    "B": "#3f9163",
    "I": "#3f9163",
    "W": "#a5cf9b",
    "R": "#9aa3ad",
    "S": "#e8833a",
    "T": "#f6bf7c",
    "EF": "#8e6bb0",
    "EB": "#c3aed6",
}
_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "R": "recompute",
    "S": "vocabulary scores",
    "T": "vocabulary gradient",
    "EF": "embedding",
    "EB": "embedding gradient",
}
STRIP_COLOURS = {"p2p": "#5b7083", "collective": "#b0713a", "copy": "#8d8d8d"}
LATER_STAGE = 0.45  # how much paler a rank's last stage is drawn than its first

LEFT, RIGHT, TOP = 62, 190, 46
BOX, STRIP, ROW_GAP = 26, 5, 10  # pixels
BOX_WIDTH, MAX_WIDTH, MIN_LABEL = 24, 1500, 7


# -- text --------------------------------------------------------------------------------------------------------------


def text_grid(timeline: Timeline, columns: int = 60) -> str:
    """Draw the compute actions of every rank as one line of text, to scale.

    A column is the shortest action, or more if the step would take more than `columns` of them; then the shortest
    actions may be missing from the picture.
    """
    spans = [lanes["compute"] for lanes in timeline.spans]
    shortest = min((s.end_s - s.start_s for row in spans for s in row if s.end_s > s.start_s), default=1.0)
    end = max((s.end_s for row in spans for s in row), default=0.0)
    unit = max(shortest, end / columns)
    several = any(len(_stages(row)) > 1 for row in spans)
    labels = [[_label(s.action, several) for s in row] for row in spans]
    width = max((len(label) for row in labels for label in row), default=1) + 1
    lines = []
    for rank, (row, names) in enumerate(zip(spans, labels, strict=True)):
        line = ""
        for span, label in zip(row, names, strict=True):
            first, last = (round(at / unit) * width for at in (span.start_s, span.end_s))
            if last > first:
                line = line.ljust(first) + label + "-" * (last - first - len(label) - 1) + " "
        facts = f"idle {timeline.idle[rank]:4.0%}, {timeline.peak_in_flight[rank]} in flight"
        lines.append(f"rank {rank:<2} | {line.ljust(round(end / unit) * width)}| {facts}")
    return "\n".join(lines)


def _stages(spans: Iterable[Span]) -> list[int]:
    """Return the stages that a rank holds."""
    return sorted({s.action.place for s in spans if KINDS[s.action.kind].place == "stage"})


def _label(action: Action, with_stage: bool) -> str:
    show = with_stage and KINDS[action.kind].place == "stage"
    return f"{action.place if show else ''}{action.kind}{action.number}"


# -- SVG ---------------------------------------------------------------------------------------------------------------


def svg(timeline: Timeline, title: str, unit: str = "") -> str:
    """Draw a timeline as an SVG document: a row of boxes per rank, transfers as thin strips below it.

    Boxes carry their micro-batch and are paler for a rank's later stages; pointing at one names it. `unit` names the
    unit of time; without it, times are seconds, written as s, ms or us.
    """
    durations = sorted(s.end_s - s.start_s for lanes in timeline.spans for s in lanes["compute"] if s.end_s > s.start_s)
    total = timeline.total_s or 1.0
    typical = durations[len(durations) // 4] if durations else total
    width = max(420.0, min(MAX_WIDTH, BOX_WIDTH * total / typical))
    scale = width / total
    parts: list[str] = []
    y = float(TOP)
    for rank, lanes in enumerate(timeline.spans):
        strips = [(lane, rows) for lane in LANES[1:] for rows in _strips(lanes[lane], scale)]
        height = BOX + STRIP * len(strips)
        parts.append(rect(LEFT, y, width, BOX, "#f1f3f5"))
        parts.append(svg_text(LEFT - 8, y + BOX / 2 + 4, f"rank {rank}", "end", "#333"))
        parts += _boxes(lanes["compute"], y, scale)
        for i, (lane, spans) in enumerate(strips):
            top = y + BOX + STRIP * i + 1
            parts += (_box(s, top, STRIP - 1, scale, STRIP_COLOURS[lane], f"strip {lane}") for s in spans)
        parts.append(svg_text(LEFT + width + 10, y + BOX / 2 + 4, _facts(timeline, rank), "start", "#333"))
        y += height + ROW_GAP
    parts += axis(total, scale, LEFT, y, unit)
    whole = math.ceil(LEFT + width + RIGHT)
    legend, y = _legend(timeline, y + 46, whole)
    parts += legend
    tall = math.ceil(y + 16)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {tall}" width="{whole}" '
        f'height="{tall}" font-family="system-ui, -apple-system, Segoe UI, sans-serif" font-size="11">'
    )
    background = rect(0, 0, whole, tall, "#ffffff")
    caption = f'<text x="{LEFT}" y="24" font-size="15" font-weight="600" fill="#222">{escape(title)}</text>'
    return "\n".join([head, background, caption, *parts, "</svg>"]) + "\n"


def _boxes(spans: Sequence[Span], y: float, scale: float) -> Iterator[str]:
    stages = _stages(spans)
    for span in spans:
        kind = KINDS[span.action.kind]
        pale = LATER_STAGE * stages.index(span.action.place) / max(len(stages) - 1, 1) if kind.place == "stage" else 0.0
        colour = _mix(COLOURS[kind.name], pale)
        yield _box(span, y, BOX, scale, colour, "compute")
        width, label = (span.end_s - span.start_s) * scale, str(span.action.number)
        if width >= MIN_LABEL * len(label) + 2:
            middle = LEFT + (span.start_s + span.end_s) / 2 * scale
            yield svg_text(middle, y + BOX / 2 + 4, label, "middle", ink(colour))


def _strips(spans: Sequence[Span], scale: float) -> list[list[Span]]:
    """Share spans out to as few rows as it takes for none to overlap; those too short to see are left out."""
    rows: list[list[Span]] = []
    for span in spans:
        if (span.end_s - span.start_s) * scale < 0.3:
            continue
        row = next((row for row in rows if row[-1].end_s <= span.start_s), None)
        if row is None:
            rows.append(row := [])
        row.append(span)
    return rows


def _facts(timeline: Timeline, rank: int) -> str:
    held = timeline.peak_in_flight[rank]
    facts = f"idle {timeline.idle[rank]:.1%} · {held} in flight"
    size = timeline.peak_bytes[rank] if timeline.peak_bytes else 0.0
    return f"{facts} · {size / 2**30:.1f} GiB" if size >= 2**20 else facts


def _legend(timeline: Timeline, y: float, width: float) -> tuple[list[str], float]:
    """Explain the colours that occur, in as many lines as it takes; return them and where they end."""
    kinds = {s.action.kind for lanes in timeline.spans for s in lanes["compute"]}
    lanes = {lane for row in timeline.spans for lane in LANES[1:] if any(s.end_s > s.start_s for s in row[lane])}
    entries = [(COLOURS[kind], 12, f"{kind} {_NAMES[kind]}") for kind in COLOURS if kind in kinds]
    entries += [(STRIP_COLOURS[lane], STRIP, lane) for lane in LANES if lane in lanes]
    if max(len(_stages(row["compute"])) for row in timeline.spans) > 1:
        entries.append(("", 0, "paler: later stages of the rank"))
    parts, x = [], float(LEFT)
    for colour, height, text in entries:
        advance = 17 + 6.3 * len(text) + 16
        if x > LEFT and x + advance > width:
            x, y = float(LEFT), y + 18
        if colour:
            parts.append(rect(x, y - 4 - height / 2, 12, height, colour))
        parts.append(svg_text(x + (17 if colour else 0), y, text, "start", "#333"))
        x += advance
    return parts, y


def _box(span: Span, y: float, height: float, scale: float, colour: str, what: str) -> str:
    x, width = LEFT + span.start_s * scale, (span.end_s - span.start_s) * scale
    return (
        f'<rect class="{what}" x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" fill="{colour}" '
        f'stroke="#fff" stroke-width="{min(0.8, width / 6):.2f}"><title>{span.action}: {span.start_s:.6g} to '
        f"{span.end_s:.6g}</title></rect>"
    )


def _mix(colour: str, white: float) -> str:
    return "#" + "".join(f"{round(c + (255 - c) * white):02x}" for c in channels(colour))


# -- measured ----------------------------------------------------------------------------------------------------------


def timeline_from_trace(paths: Sequence[Path], name: str = "measured", step: int | None = None) -> Timeline:
    """Read what a step took from the Chrome traces that the tracer wrote, one file per pipeline rank, in their order.

    Spans with the argument `action` count. What a compute action spends in spans of the lane "comm" is waiting, and is
    drawn as idle time before it. Without `step`, it is the last one that all files hold.

    Raises:  PlanError if a file cannot be read, holds no such step, or no action in it
    """
    events = [read_chrome(path) for path in paths]
    windows = [_steps(spans) for spans in events]
    common = set.intersection(*map(set, windows)) if windows else set()
    if step is None and common:
        step = max(common)
    if step not in common:
        held = ", ".join(map(str, sorted(common))) or "none"
        raise PlanError(
            f"traces {', '.join(map(str, paths))}: step {step} is not in all of them; common steps: {held}. "
            "Record with profiler.start_step set and profiler.all_ranks=true"
        )
    ranks = []
    for path, recorded, window in zip(paths, events, windows, strict=True):
        first, last = window[step]
        spans = _measured([event for event in recorded if first <= event.start_s <= last])
        if not any(KINDS[span.action.kind].lane == "compute" for span in spans):
            raise PlanError(f"trace {path}: step {step} holds no pipeline action; was it recorded by this version?")
        ranks.append(spans)
    start = min(span.start_s for spans in ranks for span in spans)
    return Timeline.of(name, [[Span(a, b - start, e - start) for a, b, e in spans] for spans in ranks])


def _measured(events: Sequence[Event]) -> list[Span]:
    """Return the actions among the spans of one step, compute without its waiting."""
    spans = []
    for event, seconds in without_waits(events):
        if "action" in event.args:
            action, end = Action.parse(event.args["action"]), event.start_s + event.duration_s
            own = seconds if KINDS[action.kind].lane == "compute" else event.duration_s
            spans.append(Span(action, end - own, end))
    return spans


def _steps(events: Iterable[Event]) -> dict[int, tuple[float, float]]:
    """Return the recorded steps with their start and end."""
    steps = (event for event in events if event.lane == "step")
    return {int(event.name.split()[1]): (event.start_s, event.start_s + event.duration_s) for event in steps}
