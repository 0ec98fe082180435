"""Runs on this machine that lose workers and emulated nodes, with workers that need no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from windlass.dist.errors import DataError, WorkerError
from windlass.launch.control_log import ControlLog
from windlass.launch.controller import Controller, Patience
from windlass.launch.decide import Limits
from windlass.launch.drill import Strike, all_done, outcomes
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.local_fleet import LocalFleet

STEADY = Path(__file__).with_name("steady.py")
ALL = list(range(1, 30))


@dataclass
class Stop:
    """Nobody asks to stop, or somebody does."""

    count: int = 0


@dataclass
class Job:
    """One run of the stand-in."""

    run: Path
    workers: int = 2
    steps: int = 8
    step_s: float = 0.02
    faults: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def launch(
        self,
        *,
        max_restarts: int = 3,
        strikes: Sequence[str] = (),
        nodes: int = 0,
        spares: int = 0,
        sizes: tuple[int, ...] = (),
        stop: Stop | None = None,
        grace_s: float = 60.0,
        grow_s: float = 0.0,
        launch: str = "",
        say: Callable[[str], None] | None = None,
        wrap: Callable[[LocalFleet], Any] = lambda fleet: fleet,
        crash_loops: int = 2,
    ) -> int:
        blows = [Strike.parse(text) for text in strikes]
        payload = {"run": str(self.run), "steps": self.steps, "step_s": self.step_s, "faults": self.faults}
        payload["strikes"] = [blow.step for blow in blows]
        command = WorkerCommand((str(STEADY),), json.dumps(payload).encode())
        fleet = LocalFleet(command, LaunchConfig(workers=self.workers, nodes=nodes, spares=spares))
        limits = Limits(self.workers, sizes, max_restarts, crash_loops=crash_loops)
        controller = Controller(
            wrap(fleet),
            ControlLog(self.run),
            limits,
            Patience(grace_s, grow_s),
            self.run,
            variables={"MARK": "here"},
            strikes=blows,
            launch=launch,
            say=say or self.said.append,
        )
        return controller.run(stop or Stop())

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in ControlLog(self.run).records if record["kind"] == kind]

    def steps_done(self) -> list[int]:
        return [int((self.run / f"state-{rank}").read_text()) for rank in range(self.workers)]

    def seen(self, generation: int, rank: int) -> list[str]:
        return (self.run / f"seen-{generation}-{rank}").read_text().split()


def fault(rank: int, step: int, do: str, generations: Sequence[int] = ALL) -> dict[str, Any]:
    return {"rank": rank, "step": step, "do": do, "generations": list(generations)}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher waits for what every rank has to say, however slowly: for tests in which all end by themselves."""
    monkeypatch.setattr("windlass.launch.controller.REPORT_S", 60.0)


def test_a_killed_worker_is_started_again_in_place_with_all_others(job: Job) -> None:
    job.faults = [fault(1, 4, "kill", [1])]
    assert job.launch() == 0
    assert job.steps_done() == [8, 8]
    (failure,) = job.records("failure")
    assert (failure["rank"], failure["node"], failure["what"]) == (1, "node-0", "worker")
    assert [record["why"] for record in job.records("decision")] == ["first start", "in place"]
    assert job.seen(2, 0) == ["node-0", "2", "here"]
    assert "killed by SIGKILL" in job.said[0]


def test_a_recovery_is_measured_by_phase_and_told_once(job: Job) -> None:
    job.faults = [fault(0, 4, "kill", [1])]
    assert job.launch() == 0
    (recovered,) = job.records("recovered")
    assert recovered["restored"] == 3 and recovered["lost"] == 0 and recovered["tier"] == "ram"
    assert {"fence", "respawn", "load", "first step"} <= set(recovered["seconds"])
    assert all(seconds >= 0 for seconds in recovered["seconds"].values())
    assert sum("recovered" in text for text in job.said) == 1
    assert any("restored  step 3 from ram, 0 steps lost" in text for text in job.said)
    page = (job.run / "history.md").read_text()
    assert "failures: 1, recovered from: 1" in page and "goodput" in page


def test_the_budget_of_restarts_is_kept_and_the_cause_gives_the_exit_code(job: Job) -> None:
    job.faults = [fault(0, step, "kill", [step - 1]) for step in (2, 3, 4, 5)]
    assert job.launch(max_restarts=2) == 128 + signal.SIGKILL
    assert len(job.records("start")) == 3
    assert "recovery.max_restarts = 2 restarts are used up" in job.said[-1]


def test_the_same_step_failing_again_ends_the_run_with_a_report(job: Job, heard: None) -> None:
    job.faults = [fault(1, 3, "raise")]
    assert job.launch(max_restarts=9) == 1
    assert len(job.records("start")) == 2
    assert "suspect the data or the code" in job.said[-1] and "ValueError: a bad batch" in job.said[-1]


def test_a_mistake_that_would_repeat_is_not_tried_again(job: Job) -> None:
    job.faults = [fault(0, 2, "data-error")]
    assert job.launch() == DataError.exit_code
    assert len(job.records("start")) == 1


def test_without_restarts_a_failure_ends_the_run_as_it_always_did(job: Job, heard: None) -> None:
    job.faults = [fault(0, 2, "lost-peer"), fault(1, 2, "raise")]
    assert job.launch(max_restarts=0) == 1
    text = "\n".join(job.said)
    assert "rank 1 failed first: ValueError" in text and "not started again" not in text


def test_a_lost_node_is_replaced_by_a_spare_one(job: Job) -> None:
    job.step_s, job.steps = 0.05, 12
    assert job.launch(nodes=2, spares=1, strikes=["node=1@step=3"]) == 0
    assert [r["why"] for r in job.records("decision")][-1] == "node-2 for node-1"
    assert [job.seen(2, rank)[0] for rank in (0, 1)] == ["node-0", "node-2"]
    assert job.records("lost")[0]["nodes"] == ["node-1"]


def test_without_a_spare_the_run_shrinks_to_an_allowed_size(job: Job) -> None:
    job.step_s, job.steps = 0.05, 12
    assert job.launch(nodes=2, sizes=(1, 2), strikes=["node=0@step=3"]) == 0
    assert job.records("decision")[-1]["why"] == "shrink from 2 to 1 workers"
    assert job.seen(2, 0)[:2] == ["node-1", "1"]


def test_workers_of_a_node_that_is_cut_off_live_on_and_end_with_the_run(job: Job) -> None:
    job.step_s, job.steps = 0.05, 12
    assert job.launch(nodes=2, spares=1, strikes=["zombie=1@step=3"]) == 0
    assert job.records("failure")[0]["what"] == "worker" and job.records("lost")
    assert job.seen(2, 1)[0] == "node-2"


def test_a_drill_makes_every_strike_once_and_tells_what_came_of_it(job: Job) -> None:
    job.step_s, job.steps = 0.05, 16
    strikes = ["rank=1@step=3", "rank=0@step=9"]
    assert job.launch(strikes=strikes) == 0
    records = ControlLog(job.run).since_launch()
    assert all_done([Strike.parse(text) for text in strikes], records)
    found = outcomes(records)
    assert [(o.what, o.decision) for o in found] == [(strikes[0], "in place"), (strikes[1], "in place")]
    made, seen = ([r["time"] for r in job.records(kind)] for kind in ("struck", "failure"))
    assert [o.seconds and o.seconds["detect"] for o in found] == [
        pytest.approx(b - a, abs=0.01) for a, b in zip(made, seen, strict=True)
    ]


def test_a_strike_that_this_fleet_cannot_make_is_reported_and_the_run_goes_on(job: Job) -> None:
    assert job.launch(strikes=["agent=0@step=2"]) == 0
    assert not all_done([Strike.parse("agent=0@step=2")], ControlLog(job.run).since_launch())
    assert "not done" in outcomes(ControlLog(job.run).since_launch())[0].decision


def test_a_node_is_lost_once(job: Job) -> None:
    job.step_s, job.steps = 0.05, 16
    strikes = ["node=1@step=3", "node=1@step=9"]
    assert job.launch(nodes=2, spares=1, strikes=strikes) == 0
    records = ControlLog(job.run).since_launch()
    assert not all_done([Strike.parse(text) for text in strikes], records)
    assert "lost already" in outcomes(records)[1].decision


def test_going_back_is_no_failure_and_uses_no_restart(job: Job) -> None:
    job.faults = [fault(0, 5, "roll-back", [1])]
    assert job.launch(max_restarts=0) == 0
    assert not job.records("failure")
    assert job.records("planned")[0]["why"] == "the loss jumped"
    assert ControlLog(job.run).left() == {1: 3}


def test_a_stop_during_training_is_passed_on_once_and_ends_with_zero(job: Job) -> None:
    job.step_s, job.steps = 0.05, 10_000
    stop = Stop()

    class Asking:
        """A fleet during which somebody asks to stop once all ranks are at work, and so will hear of it."""

        def __init__(self, fleet: LocalFleet) -> None:
            self._fleet = fleet

        def __getattr__(self, name: str) -> Any:
            return getattr(self._fleet, name)

        def tend(self) -> list[str]:
            stop.count = int(all((job.run / f"at-1-1-{rank}").exists() for rank in (0, 1)))
            return self._fleet.tend()

    assert job.launch(stop=stop, wrap=Asking) == 0
    assert not job.records("failure") and max(job.steps_done()) < 10_000


def test_workers_that_do_not_start_count_as_failures(job: Job) -> None:
    class Broken:
        def __init__(self, fleet: LocalFleet) -> None:
            self._fleet = fleet

        def __getattr__(self, name: str) -> Any:
            return getattr(self._fleet, name)

        def start(self, *arguments: Any) -> Any:
            raise WorkerError("node-0 does not answer")

    assert job.launch(max_restarts=5, wrap=Broken) == WorkerError.exit_code
    assert [record["what"] for record in job.records("failure")] == ["start", "start"]


def test_a_controller_started_anew_after_the_end_returns_the_same_code(job: Job) -> None:
    job.faults = [fault(0, 2, "data-error")]
    assert job.launch(launch="one") == DataError.exit_code
    assert job.launch(launch="one") == DataError.exit_code
    assert len(job.records("start")) == 1
    job.faults = []
    assert job.launch(launch="two") == 0
    assert len(job.records("start")) == 2


DRIVER = """
import sys
from pathlib import Path
from tests.fault.test_local_recovery import Job
hangs = {"rank": 0, "step": 20, "do": "hang", "generations": [2]}  # until the driver is killed
job = Job(Path(sys.argv[1]), steps=40, step_s=0.05, faults=[hangs])
job.launch(launch="one", strikes=["rank=1@step=3", "rank=0@step=30"])
"""


def test_a_controller_killed_after_a_recovery_goes_on_with_its_budget_and_drill(job: Job) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(job.run)])
    try:
        until(lambda: bool(job.records("recovered")), 120)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    job.steps, job.step_s = 40, 0.05
    assert job.launch(launch="one", strikes=["rank=1@step=3", "rank=0@step=30"]) == 0
    assert [(r["what"], r["target"]) for r in job.records("struck")] == [("rank", "1"), ("rank", "0")]
    assert len(job.records("launch")) == 1 and len(job.records("failure")) == 2
