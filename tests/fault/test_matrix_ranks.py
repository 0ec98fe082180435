"""The fault matrix, real processes: workers that are killed.

Row 1   kill -9 of one rank in forward, in backward, between two parts of an update, at the gate
        -> test_a_rank_killed_inside_a_step_costs_at_most_one_step
Row 2   kill -9 of one rank while its snapshot is copied: before, at the first bytes, in the middle, at the end
        -> test_a_rank_killed_while_its_snapshot_is_copied_leaves_the_one_before
Row 3   kill -9 of all ranks at once
        -> test_all_ranks_killed_at_once_go_on_from_memory_without_reading_storage
Row 21  a crash loop
        -> test_a_step_that_always_fails_ends_the_run_with_a_report; that failures with progress between them are none
           is in the test of row 1
"""

from __future__ import annotations

import shutil

import pytest

from tests.fault.memory_runs import Lab, Live, hold, protected
from windlass.dist.errors import WorkerError


def kills(*moments: str, rank: int) -> str:
    """Return faults that kill a rank in steps 3, 5, 7, ... of generations 1, 2, 3, ..."""
    return ",".join(
        f"kill:{moment}:rank={rank}:step={2 * number + 1}:generation={number}"
        for number, moment in enumerate(moments, start=1)
    )


def test_a_rank_killed_inside_a_step_costs_at_most_one_step(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rank 0 finishes the step that it is in, if it can, however slowly: its last one says which that was.
    monkeypatch.setattr("windlass.launch.controller.REPORT_S", 60.0)
    told = lab.run(fault=kills("train.forward", "train.backward", "train.update", "gate.wait", rank=1))
    told.check(lab.undisturbed(), lost=1, restarts=4)
    assert [failure["step"] for failure in told.of("failure")] == [2, 4, 7, 10]
    assert {tier for _, tier in told.restored} == {"ram"}


def test_a_rank_killed_while_its_snapshot_is_copied_leaves_the_one_before(lab: Lab) -> None:
    told = lab.run(fault=kills("snapshot.begin", "snapshot.eager", "snapshot.chunk", "snapshot.filled", rank=0))
    told.check(lab.undisturbed(), lost=1, restarts=4)
    assert told.restored == [(step, "ram") for step in (2, 4, 6, 8)]


def test_all_ranks_killed_at_once_go_on_from_memory_without_reading_storage(lab: Lab) -> None:
    def nothing_stored(live: Live) -> None:
        shutil.rmtree(live.checkpoints, ignore_errors=True)

    told = lab.run(
        fault=hold(6),
        strikes=[protected(6), "rank=0@step=6", "rank=1@step=6"],
        between={2: nothing_stored},
        settings=["checkpoint.every=3"],
    )
    told.check(lab.undisturbed(), lost=0, restarts=1)
    assert told.restored == [(6, "ram")]


@pytest.mark.soak
def test_a_step_that_always_fails_ends_the_run_with_a_report(lab: Lab) -> None:
    told = lab.run(fault="raise:train.backward:rank=1:step=4")
    assert told.code == WorkerError.exit_code
    assert len(told.of("failure")) == 2 and len(told.recovered) == 0
    assert "step 4 failed 2 times without progress" in told.said and "suspect the data or the code" in told.said
    assert [entry["step"] for entry in told.history] == [1, 2, 3]
