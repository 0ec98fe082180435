"""A run that is asked to end at any moment ends in time, with 0, and with its newest step durable.

Row 18 of the fault matrix: SIGTERM before any worker runs, while workers start, in a step, during validation, while a
checkpoint is being written, between failure and restart, and while a snapshot is being restored.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from tests.fault.commands import commands_of
from tests.fault.memory_runs import Act, Lab, Live
from tests.fault.oracle import BATCH, Told
from tests.waiting import until
from windlass.checkpoint.store import list_checkpoints
from windlass.launch.control_log import read_phases

GRACE_S = 90.0  # what is asked for is that they end by themselves
LONG = ("train.steps=2000", f"recovery.grace_s={GRACE_S:g}")


def ask(live: Live) -> None:
    """Do what SIGTERM to the launcher does."""
    live.stop.asked = 1


def ask_when_met(live: Live) -> None:
    """Do it once the ranks of generation 2 have met: they look for what they go on from, or are restoring it."""

    def wait() -> None:
        until(lambda: any(report["phase"] == "met" for report in read_phases(live.run, 2)))
        ask(live)

    threading.Thread(target=wait, daemon=True).start()


def ask_while_writing(live: Live) -> None:
    """Do it while a checkpoint is half written."""
    until(lambda: any(live.checkpoints.glob(".step-*/*.distcp")))
    assert not any(live.checkpoints.glob("step-*"))
    ask(live)


def newest(told: Told) -> int:
    """Return the step of the newest checkpoint, -1 for none."""
    return max((info.step for info in list_checkpoints(told.run / "checkpoints") if info.problem is None), default=-1)


def last(told: Told) -> int:
    return max((entry["step"] for entry in told.every_step), default=-1)


def check_stopped(told: Told, *, after: int) -> None:
    """Check that a run was stopped in time, after a step, with nothing lost and nothing left."""
    assert (told.code, told.leftovers) == (0, []), told.said
    assert newest(told) == last(told) >= after
    edges = [tuple(entry["samples"]) for entry in told.history]
    assert edges == [(step * BATCH, (step + 1) * BATCH) for step in range(last(told))]


def test_before_any_worker_runs_there_is_nothing_to_save(lab: Lab) -> None:
    told = lab.run(between={1: ask}, settings=LONG)
    assert (told.code, told.leftovers) == (0, []), told.said
    assert not told.of("start") and newest(told) == -1


def test_while_workers_start_there_is_nothing_to_save(lab: Lab) -> None:
    told = lab.run(strikes=[Act(0, ask)], settings=LONG)
    assert (told.code, told.leftovers) == (0, []), told.said
    assert told.of("start") and not told.of("failure")
    assert newest(told) == last(told) <= 1  # nothing, unless the request came late: then the step that it met


@pytest.mark.parametrize("step", [1, 3])
def test_in_a_step_it_is_finished_and_saved(step: int, lab: Lab) -> None:
    check_stopped(lab.run(strikes=[Act(step, ask)], settings=LONG), after=step)


def test_in_a_validation_it_is_finished_and_the_newest_step_saved(lab: Lab) -> None:
    settings = (*LONG, "train.eval_every=1", "train.eval_batches=20")
    check_stopped(lab.run(strikes=[Act(2, ask)], settings=settings), after=2)


def test_while_a_checkpoint_is_written_the_newest_step_becomes_one_too(lab: Lab) -> None:
    settings = (*LONG, "checkpoint.every=2", "checkpoint.bandwidth_bytes_per_s=20000")
    told = lab.run(strikes=[Act(2, ask_while_writing)], settings=settings)
    check_stopped(told, after=3)


@pytest.mark.soak
def test_between_a_failure_and_the_restart_the_snapshots_stay_for_the_next_start(lab: Lab) -> None:
    fault = "kill:train.forward:rank=1:step=4:generation=1"
    told = lab.run(fault=fault, between={2: ask}, settings=LONG)
    assert told.code == 128 + signal.SIGTERM and newest(told) == -1
    assert any("node-0" in left for left in told.leftovers) and "snapshots stay" in told.said


def test_while_a_snapshot_is_restored_it_is_restored_and_saved(lab: Lab) -> None:
    fault = "kill:train.forward:rank=1:step=4:generation=1"
    told = lab.run(fault=fault, between={2: ask_when_met}, settings=LONG)
    check_stopped(told, after=3)
    assert told.restored in ([], [(3, "ram")])


def test_before_an_earlier_launch_s_memory_is_loaded_it_stays_for_the_next_one(lab: Lab) -> None:
    fault = "kill:train.forward:rank=1:step=4:generation=1"
    ended = lab.run(fault=fault, settings=("recovery.max_restarts=0",), keep=True)
    assert ended.code == 128 + signal.SIGKILL and newest(ended) == -1
    told = lab.run(after=ended, between={3: ask}, settings=LONG, keep=True)
    assert told.code == 128 + signal.SIGTERM and newest(told) == -1 and "snapshots stay" in told.said
    told = lab.run(after=told)
    assert (told.code, told.leftovers) == (0, []), told.said
    loaded = [report["step"] for report in read_phases(told.run, 4) if report["phase"] == "loaded"]
    assert loaded == [3, 3]


@pytest.mark.soak
def test_a_signal_to_the_command_itself_is_passed_on_to_its_workers(lab: Lab, tmp_path: Path) -> None:
    with commands_of(lab, tmp_path) as commands:
        run = commands.start("launch.workers=2", steps=2000)
        run.until(2)
        run.process.terminate()
        check_stopped(commands.told(run, timeout_s=GRACE_S), after=2)
