"""How far a run is, what recoveries took, and the page that tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from windlass.launch.control_log import ControlLog, PhaseLog
from windlass.launch.decide import Failed
from windlass.launch.history import Recovery, StepWatch, describe, goodput, history_page, measure, write_history


def add(run: Path, *entries: dict[str, Any], end: str = "\n") -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n".join(json.dumps(entry) for entry in entries) + end)


def at(second: int) -> str:
    return f"2026-01-01T00:00:{second:02d}+00:00"


FAILED = Failed(1, "worker", 20, "killed by SIGKILL", "node-0", 1, 137, time=100.0)


def recovery(**changes: Any) -> Recovery:
    return Recovery(
        **{"generation": 2, "failed": FAILED, "why": "in place", "fenced": 100.3, "resumed": 100.3} | changes
    )


def phases(run: Path, rank: int, *times: float, step: int = 19) -> None:
    log = PhaseLog(run, 2, rank)
    for phase, when in zip(("imported", "met", "found", "loaded", "first_step"), times, strict=False):
        log.mark(phase, when=when, **({"step": step, "tier": "ram"} if phase == "loaded" else {}))  # type: ignore[arg-type]


def test_the_step_is_the_last_whole_line_since_the_watch_began(tmp_path: Path) -> None:
    watch = StepWatch(tmp_path)
    assert watch.last() == 0
    add(tmp_path, {"step": 1}, {"event": "eval", "step": 9}, {"step": 2})
    assert watch.last() == 2
    add(tmp_path, {"step": 3}, end="")
    assert watch.last() == 2
    add(tmp_path, {"step": 4})  # the line of step 3 was cut off by a kill and then closed by the next start
    assert watch.last() == 2
    add(tmp_path, {"step": 5})
    assert watch.last() == 5
    watch.begin()
    assert watch.last() == 0
    add(tmp_path, {"step": 4})
    assert watch.last() == 4
    began = watch.begin()
    add(tmp_path, {"step": 5})
    another = StepWatch(tmp_path)
    another.begin(began)
    assert another.last() == 5, "whoever takes over looks at what was written since"


def test_seconds_of_the_slowest_rank_add_up_to_the_time_from_the_blow_to_the_first_step(tmp_path: Path) -> None:
    phases(tmp_path, 0, 101.0, 101.5, 101.6, 102.0, 102.5)
    phases(tmp_path, 1, 101.2, 101.4, 101.7, 101.9, 102.5)
    measured = measure(tmp_path, recovery(), struck=[50.0, 99.9, 101.0])
    assert measured.done and measured.restored == 19 and measured.lost == 1
    seconds = {name: round(value, 3) for name, value in measured.seconds.items()}
    assert seconds == {
        "detect": 0.1,
        "fence": 0.3,
        "respawn": 0.9,
        "rendezvous": 0.3,
        "find": 0.2,
        "load": 0.3,
        "first step": 0.5,
    }
    assert measured.total_s == pytest.approx(102.5 - 99.9)


def test_a_recovery_is_not_over_before_the_first_step(tmp_path: Path) -> None:
    assert not measure(tmp_path, recovery()).done
    phases(tmp_path, 0, 101.0, 101.5)
    measured = measure(tmp_path, recovery())
    assert not measured.done and measured.restored is None and measured.lost is None
    assert "not known" in describe(measured)


def test_waiting_for_nodes_is_a_phase_of_its_own(tmp_path: Path) -> None:
    phases(tmp_path, 0, 131.0, 131.5, 131.6, 132.0, 132.5)
    assert measure(tmp_path, recovery(resumed=130.3)).seconds["wait"] == pytest.approx(30.0)


def test_a_recovery_is_told_in_one_block(tmp_path: Path) -> None:
    phases(tmp_path, 0, 101.0, 101.5, 101.6, 102.0, 102.5)
    lines = describe(measure(tmp_path, recovery())).splitlines()
    assert lines[1] == "  failed    rank 1 on node-0 after step 20: killed by SIGKILL"
    assert lines[3] == "  restored  step 19 from ram, 1 step lost"
    assert lines[4].endswith("= 2.50")


def test_goodput_counts_only_steps_that_were_not_done_again(tmp_path: Path) -> None:
    assert goodput(tmp_path) is None
    add(
        tmp_path,
        {"event": "start", "step": 0, "time": at(0)},
        {"step": 1, "step_s": 2.0, "time": at(2)},
        {"step": 2, "step_s": 2.0, "time": at(4)},
        {"event": "start", "step": 1, "time": at(6)},
        {"step": 2, "step_s": 2.0, "time": at(10)},
    )
    assert goodput(tmp_path) == pytest.approx(0.4)


def test_the_page_has_the_totals_and_a_row_for_everything_that_happened(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    log.append("launch", launch="x", workers=2)
    log.append("struck", what="rank", target="1", at=20)
    log.append("failure", what="worker", rank=1, node="node-0", step=20, message="a | b\nc")
    log.bump()
    log.append("lost", nodes=["node-0"])
    log.append("decision", action="restart", nodes=["node-1"], why="node-1 for node-0")
    log.append("recovered", why="", restored=19, tier="ram", lost=1, seconds={"fence": 0.25, "load": 1.0})
    log.append("notice", message="snapshot process of node-1 replaced")
    log.append("end", code=0)
    write_history(tmp_path, log.records)
    page = (tmp_path / "history.md").read_text()
    assert "failures: 1, recovered from: 1" in page and "steps done again: 1" in page
    assert "next new step: 1.2" in page and "goodput: not known" in page
    rows = [line for line in page.splitlines() if line.startswith("| 20")]
    assert len(rows) == 8 and all(row.replace("\\|", "").count("|") == 4 for row in rows)
    told = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in told] == [r["kind"] for r in log.records if r["kind"] != "generation"]


def test_a_recovery_without_reports_of_workers_still_makes_a_page() -> None:
    record = {"kind": "recovered", "time": 0.0, "generation": 2, "restored": None, "tier": "", "lost": None}
    page = history_page([record | {"why": "in place", "seconds": {}}], None)
    assert "recovered from: 1" in page


def test_a_file_that_cannot_be_read_for_a_while_ends_no_run(tmp_path: Path) -> None:
    add(tmp_path, {"step": 1})
    watch = StepWatch(tmp_path)
    add(tmp_path, {"step": 2})
    assert watch.last() == 2
    whole = (tmp_path / "metrics.jsonl").rename(tmp_path / "aside")
    (tmp_path / "metrics.jsonl").symlink_to("metrics.jsonl")  # neither its size nor what it says can be had
    assert watch.last() == 2
    began = watch.begin()
    (tmp_path / "metrics.jsonl").unlink()
    whole.rename(tmp_path / "metrics.jsonl")
    assert began == (tmp_path / "metrics.jsonl").stat().st_size and watch.last() == 0


def test_the_page_tells_of_a_worker_whatever_its_message_holds(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    said = "no file '\udcff'"
    log.append("failure", what="worker", rank=0, node="", step=3, message=said)
    write_history(tmp_path, log.records)
    assert "no file '\\udcff'" in (tmp_path / "history.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "history.jsonl").read_text(encoding="utf-8"))["message"] == said
    assert not list(tmp_path.glob(".history*"))
