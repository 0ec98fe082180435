"""Which start of the workers this is, where no controller of ours counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.checkpoint.agree import Alone
from windlass.checkpoint.policy import CheckpointConfig
from windlass.dist.env import ProcessEnv
from windlass.launch.control_log import ControlLog
from windlass.launch.generation import Start, begin_generation
from windlass.launch.job import JobConfig, TrainConfig
from windlass.launch.recovery import RecoveryConfig


def start(run: Path, factor: float, launcher: str = "torchrun") -> Start:
    recovery, checkpoint = RecoveryConfig(spike_factor=factor), CheckpointConfig(every=5)
    config = JobConfig(train=TrainConfig(run_dir=str(run)), checkpoint=checkpoint, recovery=recovery)
    return begin_generation(config, ProcessEnv(launcher=launcher), Alone())


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_what_is_made_after_a_rollback_is_told_from_what_was_left(tmp_path: Path, launcher: str) -> None:
    first = start(tmp_path, 3.0, launcher)
    ControlLog(tmp_path, first.generation).append("rollback", step=50, first=400, last=416, why="the loss jumped")
    second = start(tmp_path, 3.0, launcher)
    assert (first.generation, second.generation) == (1, 2)
    assert not second.admits(first.generation, 55)
    third = start(tmp_path, 3.0, launcher)
    assert third.admits(second.generation, 60) and third.skips == ((400, 416),)


def test_nothing_is_counted_where_nothing_depends_on_it(tmp_path: Path) -> None:
    assert [start(tmp_path, 0.0).generation for _ in range(2)] == [0, 0]
    assert not (tmp_path / "control").exists()
