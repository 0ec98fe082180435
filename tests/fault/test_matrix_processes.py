"""The fault matrix, real processes: snapshot processes that are killed. Training does not even notice.

Row 4   kill -9 of a snapshot process while it makes checksums, encodes, votes, commits, persists, or idles
        -> test_training_goes_on_while_snapshot_processes_are_killed_at_work,
           test_a_snapshot_process_killed_while_it_persists_leaves_no_trace_and_the_step_is_saved_later
Row 5   kill -9 of a snapshot process and its trainer together
        -> test_a_snapshot_process_killed_with_its_trainer_costs_what_the_trainer_costs
"""

from __future__ import annotations

import pytest

from tests.fault.memory_runs import Act, Lab, Live, hold, protected
from tests.fault.oracle import Told
from windlass.checkpoint.store import list_checkpoints


def replaced(told: Told) -> set[str]:
    """Return the nodes whose snapshot process had to be replaced."""
    notices = [record["message"] for record in told.of("notice")]
    assert all("replaced in" in message for message in notices), notices
    return {message.split(" ")[3] for message in notices}


def protected_again(live: Live) -> None:
    """Wait until a step that is finished by now, or a later one, is protected on all nodes."""
    live.until_at("peers", live.done())


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(("smp.checksum", "smp.encode"), id="hashing"),
        pytest.param(("smp.encoded", "smp.vote"), id="voting", marks=pytest.mark.soak),
        pytest.param(("smp.commit", "smp.freed"), id="committing", marks=pytest.mark.soak),
    ],
)
def test_training_goes_on_while_snapshot_processes_are_killed_at_work(lab: Lab, moments: tuple[str, str]) -> None:
    first, second = moments
    told = lab.run(
        fault=f"kill:{first}:rank=0,kill:{second}:rank=1",
        strikes=["smp=0@step=7", Act(9, protected_again)],
    )
    told.check(lab.undisturbed(), restarts=0)
    assert replaced(told) == {"node-0", "node-1"}


def test_a_snapshot_process_killed_while_it_persists_leaves_no_trace_and_the_step_is_saved_later(lab: Lab) -> None:
    told = lab.run(
        fault="kill:persist.write:rank=1,kill:persist.manifest:rank=0",
        pace=("peers", "storage"),
        settings=["checkpoint.every=3", "checkpoint.keep=0"],
    )
    told.check(lab.undisturbed(), restarts=0)
    assert replaced(told) == {"node-0", "node-1"}
    root = told.run / "checkpoints"
    assert [(info.step, info.problem) for info in list_checkpoints(root)] == [(step, None) for step in (12, 9, 6, 3)]
    assert not [path.name for path in root.iterdir() if ".tmp" in path.name]


def test_a_snapshot_process_killed_with_its_trainer_costs_what_the_trainer_costs(lab: Lab) -> None:
    told = lab.run(fault=hold(5), strikes=[protected(5), "smp=1@step=5", "rank=1@step=5"])
    told.check(lab.undisturbed(), lost=0, restarts=1)
    assert told.restored == [(5, "ram")]
