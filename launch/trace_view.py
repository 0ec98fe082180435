"""Recorded steps, read: how busy every lane of every rank was, what compute did not hide, and who waited for it.

Reads the timelines that the profiler writes. Must not know: the engine, what the lanes move.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from windlass.dist.errors import ConfigError
from windlass.dist.trace import Event, read_chrome
from windlass.launch.run_folder import RunFolder
from windlass.offload.simulate import Span

Interval = tuple[float, float]

COMPUTE = ("compute", "parts")  # actions of a pipeline, and the parts that the walk goes through
FRAMES = ("step", "phase", "wait", "parts")  # lanes that surround others, or are shown as another
NUM_WAITS = 5


@dataclass(frozen=True)
class LaneUse:
    """What a lane did in the recorded steps of one rank.

    `busy_s`: it did something; `exposed_s`: while compute did nothing; `stalled_s`: the main thread waited for it.
    `num_bytes`: of the spans that say how many they moved.
    """

    lane: str
    busy_s: float
    exposed_s: float
    stalled_s: float
    num_bytes: int
    num_spans: int

    @property
    def bytes_per_s(self) -> float:
        """Bytes per busy second, 0 if no span says its bytes."""
        return self.num_bytes / self.busy_s if self.busy_s else 0.0


@dataclass(frozen=True)
class Wait:
    """One time that the main thread waited: for which task of which lane."""

    what: str
    rank: int
    step: int
    seconds: float
    lane: str
    task: str


@dataclass(frozen=True)
class RankUse:
    """The recorded steps of one rank; `window_s` is their length together."""

    rank: int
    steps: tuple[int, ...]
    window_s: float
    lanes: tuple[LaneUse, ...]
    waits: tuple[Wait, ...]  # longest first
    spans: tuple[Span, ...]  # of all lanes, to be drawn

    def lane(self, name: str) -> LaneUse:
        """Return one lane's use, all zero if it was never used."""
        return next((use for use in self.lanes if use.lane == name), LaneUse(name, 0.0, 0.0, 0.0, 0, 0))


def view_traces(path: Path, steps: tuple[int, int] | None = None) -> list[RankUse]:
    """Read a run's timelines, or a single one: the steps from the first to the last of `steps`, or the latest window.

    Raises: ConfigError if there is no timeline or none holds such a step; DataError if a file cannot be read
    """
    recorded: defaultdict[int, list[_Recorded]] = defaultdict(list)
    for rank, file in find_timelines(path):
        recorded[rank].append(_Recorded(file, read_chrome(file)))
    views = []
    for rank, files in sorted(recorded.items()):
        chosen = files[-1:] if steps is None else files
        windows = {n: (file, window) for file in chosen for n, window in file.steps.items() if _among(n, steps)}
        if windows:
            views.append(_view(rank, windows))
    if not views:
        held = sorted({n for files in recorded.values() for file in files for n in file.steps})
        raise ConfigError(f"--steps: not recorded in '{path}'. The recorded steps are {', '.join(map(str, held))}.")
    return views


def find_timelines(path: Path) -> list[tuple[int, Path]]:
    """Return the timelines of a run with their ranks, in the order of steps; or the one file that `path` is.

    Raises: ConfigError if there is none
    """
    if path.is_file():
        return [(_place(path)[0], path)]
    folder = RunFolder(path).traces
    found = sorted(folder.glob("timeline_rank*_step*.json.gz"), key=_place)
    if not found:
        what = f"no timeline in '{folder}'" if path.is_dir() else f"'{path}' is no run folder and no trace file"
        raise ConfigError(
            f"{what}. Record one: train with profiler.start_step=5 and profiler.num_steps=3 (profiler.all_ranks=true "
            "for every rank)."
        )
    return [(_place(file)[0], file) for file in found]


def as_json(views: Sequence[RankUse]) -> dict[str, Any]:
    """Return plain data. Units: seconds, bytes, bytes/s"""
    ranks = []
    for view in views:
        lanes = [asdict(use) | {"bytes_per_s": use.bytes_per_s} for use in view.lanes]
        ranks.append({"rank": view.rank, "steps": list(view.steps), "window_s": view.window_s, "lanes": lanes})
    return {"ranks": ranks, "worst_waits": [asdict(wait) for wait in worst_waits(views)]}


def worst_waits(views: Sequence[RankUse], count: int = NUM_WAITS) -> list[Wait]:
    """Return the longest waits of all ranks."""
    return sorted((wait for view in views for wait in view.waits), key=lambda w: -w.seconds)[:count]


class _Recorded:
    """One file: its spans, and the steps that it holds whole."""

    def __init__(self, path: Path, events: list[Event]) -> None:
        self.events = events
        self.steps = {
            int(event.name.removeprefix("step ")): (event.start_s, event.start_s + event.duration_s)
            for event in events
            if event.lane == "step" and event.name.removeprefix("step ").isdecimal()
        }
        if not self.steps and events:  # not from the profiler: all of it counts as the step that its name says
            last = max(event.start_s + event.duration_s for event in events)
            self.steps = {_place(path)[1]: (min(event.start_s for event in events), last)}
        if not self.steps:
            raise ConfigError(f"'{path}': holds no span. Record it again with profiler.start_step.")


def _place(path: Path) -> tuple[int, int]:
    """Return the rank and the step that a file's name says."""
    found = re.search(r"rank(\d+)_step(\d+)", path.name)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _among(step: int, steps: tuple[int, int] | None) -> bool:
    return steps is None or steps[0] <= step <= steps[1]


def _view(rank: int, windows: Mapping[int, tuple[_Recorded, Interval]]) -> RankUse:
    inside = [
        (step, event)
        for step, (file, (start, end)) in sorted(windows.items())
        for event in file.events
        if start <= event.start_s < end
    ]
    intervals = _merged(window for _, window in windows.values())
    by_lane: defaultdict[str, list[Event]] = defaultdict(list)
    for _, event in inside:
        by_lane[event.lane].append(event)
    blocked = _busy([*by_lane["wait"], *by_lane["comm"]])
    compute = _without(_busy([event for lane in COMPUTE for event in by_lane[lane]]), blocked)
    waits = [wait for step, event in inside if (wait := _wait(rank, step, event, by_lane)) is not None]
    stalled: defaultdict[str, float] = defaultdict(float)
    for wait in waits:
        stalled[wait.lane] += wait.seconds
    uses = [LaneUse("compute", _seconds(compute), 0.0, 0.0, 0, sum(len(by_lane[lane]) for lane in COMPUTE))]
    for lane in dict.fromkeys([*by_lane, *stalled]):
        if lane in FRAMES or lane in COMPUTE:
            continue
        events = by_lane.get(lane, [])
        busy = _clipped(_busy(events), intervals)
        num_bytes = sum(int(event.args.get("bytes", 0)) for event in events)
        exposed = _seconds(_without(busy, compute))
        uses.append(LaneUse(lane, _seconds(busy), exposed, stalled[lane], num_bytes, len(events)))
    return RankUse(
        rank,
        tuple(sorted(windows)),
        _seconds(intervals),
        tuple(uses),
        tuple(sorted(waits, key=lambda wait: -wait.seconds)),
        tuple(_spans(inside, intervals[0][0])),
    )


def _wait(rank: int, step: int, event: Event, by_lane: Mapping[str, Sequence[Event]]) -> Wait | None:
    """Return what the main thread waited for in a span. All of "comm" but starting an operation is waiting, too."""
    if event.lane == "comm" and not event.name.startswith("start "):
        return Wait(event.name, rank, step, event.duration_s, "comm", event.name)
    if event.lane != "wait":
        return None
    lane = str(event.args.get("for") or event.args.get("lane") or "other")
    task = str(event.args.get("task") or "") or _ended_last(by_lane.get(lane, ()), event.start_s + event.duration_s)
    return Wait(event.name.removeprefix("wait "), rank, step, event.duration_s, lane, task)


def _ended_last(events: Iterable[Event], before_s: float) -> str:
    """Return the span whose end let a wait end."""
    ended = [(event.start_s + event.duration_s, event.name) for event in events]
    return max((pair for pair in ended if pair[0] <= before_s), default=(0.0, ""))[1]


def _spans(inside: Iterable[tuple[int, Event]], begin_s: float) -> Iterable[Span]:
    """Yield what can be drawn, from the start of the first step."""
    for _, event in inside:
        lane = "compute" if event.lane == "parts" else event.lane
        if lane not in FRAMES:
            start = event.start_s - begin_s
            yield Span(lane, event.name, start, start + event.duration_s, int(event.args.get("bytes", 0)))


# -- intervals: sorted, apart from each other --------------------------------------------------------------------------


def _busy(events: Iterable[Event]) -> list[Interval]:
    return _merged((event.start_s, event.start_s + event.duration_s) for event in events)


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _without(intervals: Sequence[Interval], holes: Sequence[Interval]) -> list[Interval]:
    """Return the intervals less what the holes cover."""
    left: list[Interval] = []
    first = 0
    for start, end in intervals:
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        at = start
        for hole_start, hole_end in holes[first:]:
            if hole_start >= end:
                break
            if hole_start > at:
                left.append((at, hole_start))
            at = max(at, hole_end)
        if at < end:
            left.append((at, end))
    return left


def _clipped(intervals: Sequence[Interval], windows: Sequence[Interval]) -> list[Interval]:
    """Return the part of the intervals that lies in the windows."""
    return _without(intervals, _without(intervals, windows))


def _seconds(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
