"""The fault matrix, real processes: workers that are killed.

Row 1   kill -9 of one rank in forward, in backward, between two parts of an update, at the gate
        -> test_a_rank_killed_inside_a_step_costs_at_most_one_step
Row 2   kill -9 of one rank while its snapshot is being copied: before, in the middle, at the end
        -> test_a_rank_killed_while_its_snapshot_is_copied_leaves_the_one_before
Row 3   kill -9 of all ranks at once
        -> test_all_ranks_killed_at_once_go_on_from_memory_without_reading_storage
Row 21  a crash loop
        -> test_a_step_that_always_fails_ends_the_run_with_a_report,
           test_failures_with_progress_between_them_are_no_crash_loop, test_the_budget_of_restarts_is_kept
"""

from __future__ import annotations

import shutil

import pytest

from tests.fault.memory_runs import Lab, Live, hold
from windlass.dist.errors import WorkerError

AT = 6  # the step in which it happens


@pytest.mark.parametrize("moment", ["train.forward", "train.backward", "train.update", "gate.wait"])
def test_a_rank_killed_inside_a_step_costs_at_most_one_step(lab: Lab, moment: str) -> None:
    told = lab.run(fault=f"kill:{moment}:rank=1:step={AT}:generation=1")
    told.check(lab.undisturbed(), lost=1, restarts=1)
    ((step, tier),) = told.restored
    assert tier == "ram" and AT - 2 <= step <= AT


@pytest.mark.parametrize("moment", ["snapshot.begin", "snapshot.eager", "snapshot.chunk", "snapshot.filled"])
def test_a_rank_killed_while_its_snapshot_is_copied_leaves_the_one_before(lab: Lab, moment: str) -> None:
    told = lab.run(fault=f"kill:{moment}:rank=0:step={AT}:generation=1")
    told.check(lab.undisturbed(), lost=1, restarts=1)
    ((step, tier),) = told.restored
    assert (step, tier) == (AT - 1, "ram")


def test_all_ranks_killed_at_once_go_on_from_memory_without_reading_storage(lab: Lab) -> None:
    def nothing_stored(live: Live) -> None:
        shutil.rmtree(live.checkpoints, ignore_errors=True)

    told = lab.run(
        fault=hold(AT),
        strikes=[f"rank=0@step={AT}", f"rank=1@step={AT}"],
        between={2: nothing_stored},
        settings=["checkpoint.every=3"],
    )
    told.check(lab.undisturbed(), lost=0, restarts=1)
    assert told.restored == [(AT, "ram")]


def test_a_step_that_always_fails_ends_the_run_with_a_report(lab: Lab) -> None:
    told = lab.run(fault=f"raise:train.backward:rank=1:step={AT}")
    assert told.code == WorkerError.exit_code
    assert len(told.of("failure")) == 2 and len(told.recovered) == 0
    assert f"step {AT} failed 2 times without progress" in told.said and "suspect the data or the code" in told.said
    assert [entry["step"] for entry in told.history] == list(range(1, AT))


def test_failures_with_progress_between_them_are_no_crash_loop(lab: Lab) -> None:
    strikes = [f"rank={number % 2}@step={step}" for number, step in enumerate((2, 4, 6, 8, 10))]
    told = lab.run(strikes=strikes)
    told.check(lab.undisturbed(), lost=2, restarts=5)
    assert {tier for _, tier in told.restored} == {"ram"}


def test_the_budget_of_restarts_is_kept(lab: Lab) -> None:
    told = lab.run(strikes=["rank=0@step=3", "rank=1@step=6"], settings=["recovery.max_restarts=1"])
    assert told.code == 128 + 9
    assert "recovery.max_restarts = 1 restarts are used up" in told.said
    assert len(told.recovered) == 1
