"""The controller with a fleet of no processes: moves, waits, stops, and its own death at any moment."""

from __future__ import annotations

import itertools
import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.controller_doubles import FOUR, Died, Fleet, Group, Stop, controller, records
from windlass.dist.errors import CheckpointError, ConfigError, WorkerError
from windlass.launch.control_log import ControlLog, PhaseLog
from windlass.launch.controller import Controller, Patience, allowed_sizes
from windlass.launch.decide import Limits
from windlass.launch.drill import Strike
from windlass.launch.fleet import Node, Seating
from windlass.launch.supervisor import check_stop


def test_every_generation_is_fenced_before_its_workers_start_and_the_end_is_released(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["kill", "done"])
    assert controller(fleet).run(Stop()) == 0
    assert fleet.fenced == [1, 2] and fleet.released == [True]
    kinds = [r["kind"] for r in ControlLog(tmp_path).records]
    assert kinds[:4] == ["launch", "generation", "decision", "start"]
    assert kinds[4:] == ["generation", "failure", "decision", "start", "complete", "end"]


def test_memory_is_kept_unless_workers_said_that_all_is_durable(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["run"])
    stop = Stop()
    fleet.turn = lambda: setattr(stop, "count", 1)
    assert controller(fleet).run(stop) == 0
    assert fleet.released == [False]


def test_a_run_that_shrank_grows_when_a_node_is_back_and_that_is_no_failure(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["kill", "run", "done"])
    plans = iter([lambda: fleet.change("node-1", alive=True)])

    def come_back() -> None:
        if len(fleet.seatings) == 2:
            next(plans, lambda: None)()

    fleet.turn = come_back
    fence = fleet.fence
    fleet.fence = lambda generation: (fence(generation), generation == 2 and fleet.change("node-1", alive=False))  # type: ignore
    assert controller(fleet, grow_s=0.01).run(Stop()) == 0
    assert [seating.world_size for seating in fleet.seatings] == [4, 2, 4]
    assert len(records(fleet, "failure")) == 1 and records(fleet, "planned")[0]["why"] == "there is room again"


def test_workers_leave_a_node_that_will_be_taken_before_it_is(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["run", "done"])
    fleet.machines.append(Node("node-2", "rack-2", 2))
    fleet.turn = lambda: fleet.change("node-0", drain_deadline=time.time() + 60)
    assert controller(fleet).run(Stop()) == 0
    assert fleet.seatings[1].used == ("node-2", "node-1")
    assert not records(fleet, "failure") and "will be taken away" in records(fleet, "planned")[0]["why"]


def test_it_waits_for_a_replacement_before_it_gives_up(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["kill", "done"])
    turns = itertools.count()

    def later() -> None:
        if fleet.fenced == [1, 2]:
            fleet.change("node-1", alive=next(turns) > 1)

    fleet.turn = later
    fleet.fence = lambda generation: (fleet.fenced.append(generation), later())  # type: ignore[method-assign]
    assert controller(fleet, Limits(4, (4,), 3, replace_s=20)).run(Stop()) == 0
    assert records(fleet, "lost")[0]["nodes"] == ["node-1"]
    assert fleet.seatings[1].world_size == 4


def test_workers_that_miss_the_deadline_are_killed_and_the_newest_snapshot_made_durable(tmp_path: Path) -> None:
    for flushed, code in ((7, 0), (None, 128 + signal.SIGTERM)):
        stop = Stop()
        fleet = Fleet(tmp_path, ["stubborn"], flushed=flushed)
        fleet.turn = lambda stop=stop: setattr(stop, "count", 1)  # type: ignore[misc]
        assert controller(fleet, grace_s=0.3, flush_s=0.1).run(stop) == code


@pytest.mark.parametrize(("complete", "flushed", "code"), [(True, None, 0), (False, 7, 0), (False, None, 143)])
def test_workers_that_end_well_without_a_durable_state_have_it_flushed(
    complete: bool, flushed: int | None, code: int, tmp_path: Path
) -> None:
    stop = Stop()
    fleet = Fleet(tmp_path, ["run"], flushed=flushed)

    def ask_to_stop() -> None:
        if complete and not stop.count:
            ControlLog(tmp_path).append("complete", step=1)
        stop.count = 1

    fleet.turn = ask_to_stop
    assert controller(fleet, grace_s=60.0, flush_s=1.0).run(stop) == code
    assert fleet.released == [complete]


def test_a_stop_while_nothing_runs_ends_without_another_start(tmp_path: Path) -> None:
    stop = Stop()
    fleet = Fleet(tmp_path, ["kill", "done"])
    fleet.fence = lambda generation: setattr(stop, "count", int(generation > 1))  # type: ignore[method-assign]
    assert controller(fleet).run(stop) == 128 + signal.SIGTERM
    assert len(fleet.seatings) == 1


def test_a_new_controller_takes_over_workers_that_run_without_touching_them(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    log.append("launch", launch="one", workers=4)
    log.bump()
    log.append("decision", action="restart", nodes=["node-0"] * 2 + ["node-1"] * 2, why="first start")
    log.append("start", workers=4)
    fleet = Fleet(tmp_path, ["kill", "done"], running=Seating(("node-0",) * 2 + ("node-1",) * 2))
    assert controller(fleet, launch="one").run(Stop()) == 0
    assert fleet.attached == 1 and fleet.fenced == [2]
    assert len(records(fleet, "failure")) == 1


@pytest.mark.parametrize("at", range(1, 16))
def test_a_controller_that_dies_at_any_record_is_replaced_by_one_that_decides_the_same(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = ["kill", "kill", "done"]
    undisturbed = Fleet(tmp_path / "whole", list(plans))
    undisturbed.run.mkdir()
    assert controller(undisturbed, launch="one").run(Stop()) == 0
    fleet = Fleet(tmp_path / "cut", list(plans))
    fleet.run.mkdir()
    count, write = itertools.count(1), ControlLog._write

    def dying(self: ControlLog, fd: int, record: dict[str, Any]) -> dict[str, Any]:
        if next(count) >= at:
            raise Died
        return write(self, fd, record)

    with monkeypatch.context() as patch:
        patch.setattr(ControlLog, "_write", dying)
        try:
            controller(fleet, launch="one").run(Stop())
        except Died:
            fleet.running = None  # its workers died with it
            fleet.plans = plans[len(records(fleet, "failure")) :]
    assert controller(fleet, launch="one").run(Stop()) == 0
    generations = [record["generation"] for record in records(fleet, "generation")]
    assert generations == sorted(set(generations))
    # A decision that was already written down is made again, then it reads "in place".
    whole, cut = ([r["nodes"] for r in records(f, "decision")] for f in (undisturbed, fleet))
    assert [nodes for nodes, _ in itertools.groupby(cut)] == [nodes for nodes, _ in itertools.groupby(whole)]
    assert len(records(fleet, "failure")) <= FOUR.max_restarts


def test_the_sizes_of_a_job_are_those_it_can_be_checked_for() -> None:
    def works(size: int) -> None:
        if size % 2:
            raise ConfigError("the batch cannot be shared")

    assert allowed_sizes(6, 2, works) == (2, 4, 6)
    assert allowed_sizes(6, 0, works) == (6,)


def test_a_controller_that_was_replaced_ends_its_workers(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["run"])
    others = iter([lambda: ControlLog(tmp_path).bump()])
    fleet.turn = lambda: next(others, lambda: None)()
    with pytest.raises(WorkerError, match="another process began generation 2"):
        controller(fleet).run(Stop())
    assert fleet.killed == [4]
    assert fleet.released == [], "nodes are the other one's, and so are workers that run now"


FOUR_SEATS = ["node-0"] * 2 + ["node-1"] * 2


def begun(run: Path, launch: str) -> ControlLog:
    """Write what a controller leaves that was killed while its workers ran."""
    log = ControlLog(run)
    log.append("launch", launch=launch, workers=4)
    log.bump()
    at = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
    log.append("decision", action="restart", nodes=FOUR_SEATS, why="first start", metrics=at)
    log.append("start", workers=4)
    return log


def trained(run: Path, steps: range) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, "step_s": 1.0}) + "\n" for step in steps)


@pytest.mark.parametrize(("flushed", "code"), [(114, 0), (None, 143)])
def test_a_stop_before_the_first_step_of_a_launch_thinks_of_what_an_earlier_one_left_in_memory(
    flushed: int | None, code: int, tmp_path: Path
) -> None:
    begun(tmp_path, "killed")
    trained(tmp_path, range(1, 115))
    for at in ("fence", "workers"):
        stop = Stop()
        fleet = Fleet(tmp_path, ["run"], flushed=flushed)
        if at == "fence":
            fleet.fence = lambda generation, stop=stop: setattr(stop, "count", 1)  # type: ignore[misc]
        else:
            fleet.silent, fleet.turn = True, lambda stop=stop: setattr(stop, "count", 1)  # type: ignore[misc]
        assert controller(fleet, grace_s=60.0, flush_s=1.0).run(stop) == code
        assert fleet.released == [False]


def test_a_stop_before_the_first_step_is_nothing_to_worry_about_if_earlier_launches_ended_well(tmp_path: Path) -> None:
    begun(tmp_path, "well").append("end", code=0)
    log = begun(tmp_path, "complete")
    log.append("complete", step=9)
    stop = Stop()
    fleet = Fleet(tmp_path, [])
    fleet.fence = lambda generation: setattr(stop, "count", 1)  # type: ignore[method-assign]
    assert controller(fleet, grace_s=60.0, flush_s=1.0).run(stop) == 0


def test_a_stop_between_two_generations_comes_before_the_second_so_that_the_first_can_be_made_durable(
    tmp_path: Path,
) -> None:
    begun(tmp_path, "killed")
    fleet = Fleet(tmp_path, [], flushed=7)
    assert controller(fleet, grace_s=60.0, flush_s=1.0).run(Stop(1)) == 0
    assert fleet.fenced == [] and ControlLog(tmp_path).generation == 1


def test_a_new_controller_knows_how_far_the_workers_are_that_it_takes_over(tmp_path: Path) -> None:
    trained(tmp_path, range(1, 51))
    log = begun(tmp_path, "one")
    log.append("failure", what="worker", step=50, message="killed", node="node-0", rank=0, exit_code=137, time=1.0)
    trained(tmp_path, range(51, 501))
    fleet = Fleet(tmp_path, ["kill", "done"], step=500)
    log.bump()
    log.append("decision", action="restart", nodes=FOUR_SEATS, why="in place", metrics=0)
    log.append("start", workers=4)
    fleet.silent, fleet.running = True, Seating(tuple(FOUR_SEATS))
    assert controller(fleet, launch="one").run(Stop()) == 0
    assert [record["step"] for record in records(fleet, "failure")] == [50, 500]


def test_steps_of_workers_that_were_taken_over_are_made_durable_when_they_miss_the_deadline(tmp_path: Path) -> None:
    begun(tmp_path, "one")
    trained(tmp_path, range(1, 501))
    stop = Stop()
    fleet = Fleet(tmp_path, ["stubborn"], running=Seating(tuple(FOUR_SEATS)), silent=True)
    fleet.turn = lambda: setattr(stop, "count", 1)
    assert controller(fleet, launch="one", grace_s=0.3, flush_s=0.1).run(stop) == 128 + signal.SIGTERM


def test_a_failure_says_what_was_restored_and_that_nothing_was_done_since(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["kill", "kill", "kill-silent", "done"])
    phases = iter((0, 0))
    start = fleet.start

    def begin(generation: int, *arguments: Any) -> Group:
        fleet.silent = fleet.plans[0] == "kill-silent"
        if not fleet.silent:
            PhaseLog(tmp_path, generation, 0).mark("loaded", step=next(phases, 0))
        return start(generation, *arguments)

    fleet.start = begin  # type: ignore[method-assign]
    assert controller(fleet, replace(FOUR, crash_loops=9)).run(Stop()) == 0
    assert [(r["step"], r["restored"]) for r in records(fleet, "failure")] == [(1, 0), (2, 0), (2, 2)]


def test_a_full_disk_ends_no_healthy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ControlLog._write

    def full(self: ControlLog, fd: int, record: dict[str, Any]) -> dict[str, Any]:
        if record["kind"] in ("notice", "recovered", "struck", "blow"):
            raise CheckpointError("no space left on device")
        return write(self, fd, record)

    monkeypatch.setattr(ControlLog, "_write", full)
    fleet = Fleet(tmp_path, ["run"])
    said: list[str] = []
    news = iter([["snapshot process replaced"]])
    fleet.tend = lambda: next(news, [])  # type: ignore[method-assign]
    turns = itertools.count()
    fleet.turn = lambda: fleet.group.end() if next(turns) > 30 else None
    strikes = [Strike("rank", "0", 1)]
    log = ControlLog(tmp_path)
    code = Controller(fleet, log, FOUR, Patience(), tmp_path, strikes=strikes, say=said.append).run(Stop())
    assert code == 0 and not records(fleet, "failure")
    assert any("notice is not noted: no space" in text for text in said)
    assert any("snapshot process replaced" in text for text in said)
    assert any("struck is not noted" in text for text in said) and not any("drill" in text for text in said)


def test_a_stop_while_workers_start_does_not_wait_for_them(tmp_path: Path) -> None:
    stop = Stop()
    fleet = Fleet(tmp_path, [])

    def slow(*arguments: Any) -> Group:
        check_stop()
        stop.count = 1
        check_stop()
        raise AssertionError("nobody said that it is to stop")

    fleet.start = slow  # type: ignore[method-assign]
    assert controller(fleet).run(stop) == 0
    assert fleet.released == [False]
    check_stop()  # elsewhere nobody has asked
