"""Recovery where torchrun starts the workers, so that no launcher of ours looks after anything.

Rows of the fault matrix: 1 (a rank killed) and 4 (the snapshot process killed), under torchrun.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.commands import WINDLASS, Commands, commands_of
from tests.fault.memory_runs import Lab
from tests.waiting import until
from windlass.checkpoint.memory.heartbeat import Phase

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2", *WINDLASS)
STEPS = 60


@pytest.fixture
def commands(lab: Lab, tmp_path: Path) -> Iterator[Commands]:
    with commands_of(lab, tmp_path) as commands:
        yield commands


@pytest.mark.soak
def test_under_torchrun_a_killed_rank_goes_on_from_memory_and_a_killed_snapshot_process_is_replaced(
    lab: Lab, commands: Commands
) -> None:
    run = commands.start(program=TORCHRUN, steps=STEPS)
    run.until(5)
    [served] = run.served()
    beat = run.kill(1)
    killed_at = run.last_step()
    until(lambda: (now := run.beat(1)) is not None and now.pid != beat.pid and now.phase == Phase.STEP)
    run.until(killed_at + 5)
    assert run.served() == [served], "it outlives the workers"
    os.kill(served.pid, signal.SIGKILL)
    until(lambda: all(other.alive and other.pid != served.pid for other in run.served()))
    run.until(run.last_step() + 5)
    told = commands.told(run)
    told.check(lab.undisturbed(**{"train.steps": STEPS}), repeats=1)
    [resumed] = run.events("resume")
    assert "ram snapshot of generation 1" in resumed["folder"]
    assert killed_at - 1 <= resumed["step"] <= killed_at + 1, "at most one finished step is done again"
