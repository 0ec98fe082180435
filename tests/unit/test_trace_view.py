"""`windlass trace`: busy, exposed and stalled seconds of lanes, and the longest waits, from recorded timelines."""

from __future__ import annotations

import json
import random
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.waiting import until
from windlass.dist.errors import ConfigError
from windlass.dist.trace import Event, Tracer
from windlass.launch import cli
from windlass.launch.trace_view import _clipped, _merged, _seconds, _without, view_traces, worst_waits
from windlass.offload.lane import Lanes

Row = tuple[str, str, float, float] | tuple[str, str, float, float, dict[str, object]]

# One step of ten seconds. Reading is hidden by the forward part of block 0 for two seconds of four; then compute waits
# for it, and for a reduction.
STEP: tuple[Row, ...] = (
    ("step 7", "step", 0, 10),
    ("forward", "phase", 0, 10),
    ("forward block 0", "parts", 0, 2),
    ("read block 1", "file read", 0, 4, {"bytes": 4096}),
    ("wait block 1", "wait", 2, 2.5, {"for": "file read", "task": "read block 1"}),
    ("forward block 1", "parts", 4.5, 3),
    ("start reduce_scatter block 1", "comm", 7.5, 0.1),
    ("reduce_scatter block 1", "comm", 8, 1),
    ("update 3", "cpu update", 5, 4),
)


def write(folder: Path, rank: int, rows: tuple[Row, ...] = STEP, step: int = 7, shift_s: float = 0.0) -> Path:
    tracer = Tracer(enabled=True)
    for name, lane, start, duration, *args in rows:
        tracer.events.append(Event("X", name, lane, start + shift_s, duration, dict(*args)))
    path = folder / "traces" / f"timeline_rank{rank}_step{step}.json.gz"
    tracer.write_chrome(path, rank)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(["trace", *arguments])
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def test_lanes_are_measured_against_compute(tmp_path: Path) -> None:
    write(tmp_path, 0)
    (view,) = view_traces(tmp_path)
    close = {"abs": 1e-3}  # timestamps are microseconds since 1970 as floats
    assert (view.rank, view.steps) == (0, (7,)) and view.window_s == pytest.approx(10, **close)
    read, update, comm = view.lane("file read"), view.lane("cpu update"), view.lane("comm")
    assert view.lane("compute").busy_s == pytest.approx(5, **close)
    assert read.busy_s == pytest.approx(4, **close) and read.exposed_s == pytest.approx(2, **close)
    assert read.stalled_s == pytest.approx(2.5, **close) and read.num_bytes == 4096
    assert read.bytes_per_s == pytest.approx(1024, rel=1e-3)
    assert update.exposed_s == pytest.approx(1.5, **close) and update.stalled_s == 0
    assert comm.stalled_s == pytest.approx(1, **close) and comm.exposed_s == pytest.approx(1.1, **close)
    assert view.lane("h2d").busy_s == 0 and {"step", "phase", "wait", "parts"}.isdisjoint(u.lane for u in view.lanes)


def test_what_compute_waits_for_inside_a_part_is_no_compute(tmp_path: Path) -> None:
    rows: tuple[Row, ...] = (
        ("step 7", "step", 0, 4),
        ("0F0", "compute", 0, 4, {"action": "0F0"}),
        ("forward block 0", "parts", 0, 4),
        ("wait tile", "wait", 1, 2, {"lane": "h2d"}),
        ("tile 1", "h2d", 0, 3),
    )
    write(tmp_path, 0, rows)
    (view,) = view_traces(tmp_path)
    assert view.lane("compute").busy_s == pytest.approx(2, abs=1e-3)
    assert view.lane("h2d").exposed_s == pytest.approx(2, abs=1e-3)
    assert view.waits[0].task == "tile 1", "without a name it is the task that ended last"


def test_the_longest_waits_of_all_ranks_say_who_waited_where_for_what(tmp_path: Path) -> None:
    write(tmp_path, 0)
    slow = tuple((r[0], r[1], r[2] * 2, r[3] * 2, *r[4:]) for r in STEP)
    write(tmp_path, 3, slow)  # type: ignore[arg-type]
    waits = worst_waits(view_traces(tmp_path))
    assert [(w.rank, w.step, w.what, w.lane, w.task) for w in waits[:2]] == [
        (3, 7, "block 1", "file read", "read block 1"),
        (0, 7, "block 1", "file read", "read block 1"),
    ]
    assert waits[0].seconds == pytest.approx(5, abs=1e-3) and len(waits) == 4


def test_steps_are_chosen_among_all_windows_and_the_latest_is_the_default(tmp_path: Path) -> None:
    def two(first: int) -> tuple[Row, ...]:
        return tuple(
            row
            for i in range(2)
            for row in ((f"step {first + i}", "step", i * 2, 2), ("forward", "parts", i * 2 + 0.5, 1))
        )

    write(tmp_path, 0, two(2), step=3)
    write(tmp_path, 0, two(9), step=10, shift_s=50)
    assert [view.steps for view in view_traces(tmp_path)] == [(9, 10)]
    (view,) = view_traces(tmp_path, (3, 9))
    assert view.steps == (3, 9) and view.window_s == pytest.approx(4, abs=1e-3)
    assert view.lane("compute").busy_s == pytest.approx(2, abs=1e-3)
    with pytest.raises(ConfigError, match="recorded steps are 2, 3, 9, 10"):
        view_traces(tmp_path, (20, 30))


def test_spans_that_no_step_surrounds_count_as_one(tmp_path: Path) -> None:
    path = write(tmp_path, 2, STEP[2:], step=4)
    (view,) = view_traces(path)
    assert (view.rank, view.steps) == (2, (4,)) and view.window_s == pytest.approx(9, abs=1e-3)


def test_what_lanes_record_is_read_back(tmp_path: Path) -> None:
    tracer = Tracer(enabled=True)
    lanes = Lanes(tracer)
    with tracer.span("step 1", "step"):
        task = lanes.submit(
            "file read", lambda: until(lambda: bool(lanes._waiters)), num_bytes=1 << 20, label="read blocks.3"
        )
        lanes.wait(task, "parameters of blocks.3")
    lanes.close()
    path = tmp_path / "timeline_rank0_step1.json.gz"
    tracer.write_chrome(path, 0)
    (view,) = view_traces(path)
    use, wait = view.lane("file read"), view.waits[0]
    assert use.num_bytes == 1 << 20 and use.stalled_s > 0 and use.exposed_s == use.busy_s
    assert (wait.what, wait.lane, wait.task) == ("parameters of blocks.3", "file read", wait.task)
    assert "read blocks.3" in wait.task


@pytest.mark.parametrize("seed", range(20))
def test_interval_algebra_agrees_with_sets_of_points(seed: int) -> None:
    draw = random.Random(seed)

    def some() -> list[tuple[float, float]]:
        starts = [draw.randrange(40) for _ in range(draw.randrange(8))]
        return [(float(s), float(s + draw.randrange(1, 9))) for s in starts]

    def points(intervals: list[tuple[float, float]]) -> set[float]:
        return {x / 2 for x in range(1, 120, 2) if any(a < x / 2 < b for a, b in intervals)}

    a, b = some(), some()
    left, right = _merged(a), _merged(b)
    assert points(left) == points(a) and _seconds(left) == len(points(a))
    assert points(_without(left, right)) == points(a) - points(b)
    assert points(_clipped(left, right)) == points(a) & points(b)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_table_shows_lanes_shares_and_waits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path, 0)
    picture = tmp_path / "lanes.svg"
    code, out, err = run(capsys, str(tmp_path), "--svg", str(picture))
    assert code == 0, err
    rows = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "step 7: 10 s" in out and "50.0%" in rows["compute"]
    assert all(text in rows["file read"] for text in ("4 s", "40.0%", "2 s", "20.0%", "2.5 s", "25.0%"))
    assert "longest waits" in out and "read block 1" in out
    assert "forward block 1" in "".join(ET.parse(picture).getroot().itertext())


def test_json_holds_the_same_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path, 1)
    code, out, _ = run(capsys, str(tmp_path), "--json", "--rank", "1")
    plain = json.loads(out)
    assert code == 0 and [rank["rank"] for rank in plain["ranks"]] == [1]
    read = next(lane for lane in plain["ranks"][0]["lanes"] if lane["lane"] == "file read")
    assert read["busy_s"] == pytest.approx(4, abs=1e-3) and read["num_bytes"] == 4096
    assert plain["worst_waits"][0]["task"] == "read block 1"


def test_a_run_without_traces_is_told_how_to_record_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, str(tmp_path))
    assert code == 2 and "profiler.start_step=5" in err
    code, _, err = run(capsys, str(tmp_path / "none"))
    assert code == 2 and "is no run folder and no trace file" in err
    write(tmp_path, 0)
    code, _, err = run(capsys, str(tmp_path), "--steps", "1")
    assert code == 2 and "recorded steps are 7" in err
    assert run(capsys, str(tmp_path), "--rank", "5")[0] == 2
    assert run(capsys, str(tmp_path), "--steps", "x")[0] == 2
    broken = tmp_path / "timeline_rank0_step1.json.gz"
    broken.write_bytes(b"no gzip")
    code, _, err = run(capsys, str(broken))
    assert code == 4 and "cannot be read" in err
