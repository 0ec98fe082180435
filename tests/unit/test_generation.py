"""Which start of the workers this is, where no controller of ours counts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from windlass.checkpoint.agree import Alone
from windlass.checkpoint.memory.heartbeat import process_started
from windlass.checkpoint.policy import CheckpointConfig, SnapshotConfig
from windlass.dist.env import ProcessEnv
from windlass.launch import generation
from windlass.launch.control_log import ControlLog
from windlass.launch.generation import Start, begin_generation, is_restart
from windlass.launch.job import JobConfig, TrainConfig
from windlass.launch.local import import_path
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


def launched(
    monkeypatch: pytest.MonkeyPatch, run: Path, agent: str, restarts: int = 0, resume: str = "never", *, memory: bool
) -> Start:
    """Start as torchrun does for the time that this agent says."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    monkeypatch.setattr(generation, "torchrun_agent", lambda: agent)
    config = JobConfig(
        train=TrainConfig(run_dir=str(run)),
        checkpoint=CheckpointConfig(resume=resume),
        snapshot=SnapshotConfig(every=int(memory), folder=str(run)),
    )
    assert is_restart(config, ProcessEnv(launcher="torchrun")) == ControlLog(run).begun_by([agent])
    return begin_generation(config, ProcessEnv(launcher="torchrun"), Alone())


@pytest.mark.parametrize("memory", [False, True])
def test_under_torchrun_a_restart_goes_on_from_what_this_launch_has_made_and_nothing_older(
    memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = partial(launched, monkeypatch, tmp_path, memory=memory)
    first, again = start("a"), start("a", 1)
    assert not first.restarted and (again.restarted, again.since) == (True, first.generation)
    assert again.admits(first.generation, 9) and not again.admits(first.generation - 1, 9)
    # The first attempt of the next launch dies before it is counted: the second is the first start of that launch.
    new = start("b", 1)
    assert not new.restarted and not new.admits(again.generation, 50) and not new.admits(0, 50)
    later = start("b", 2)
    assert later.restarted and later.admits(new.generation, 60) and not later.admits(again.generation, 50)


def test_a_launch_ends_with_its_last_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Alone):
        size = 2

        def gather_objects(self, obj: object) -> list[object]:
            return list(self.agents) if obj in ("a", "b", "c", "d", "e") else [obj]

        def __init__(self, *agents: str) -> None:
            self.agents = agents

    config = JobConfig(train=TrainConfig(run_dir=str(tmp_path)), checkpoint=CheckpointConfig(resume="never"))
    found = []
    for agents in (("a", "b"), ("b", "c"), ("c", "d"), ("e", "e")):
        monkeypatch.setattr(generation, "torchrun_agent", lambda agents=agents: agents[0])
        found.append(begin_generation(config, ProcessEnv(launcher="torchrun"), Two(*agents)))
    assert [(start.restarted, start.since) for start in found] == [(False, 1), (True, 1), (True, 1), (False, 4)]
    assert [r["workers"] for r in ControlLog(tmp_path).records if r["kind"] == "launch"] == [2, 2]


def test_who_asks_to_go_on_from_what_is_there_may_whoever_has_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = launched(monkeypatch, tmp_path, "a", memory=True)
    assert launched(monkeypatch, tmp_path, "b", resume="auto", memory=True).admits(old.generation, 50)


def test_a_launch_of_torchrun_has_its_own_budget_of_rollbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = launched(monkeypatch, tmp_path, "a", memory=True)
    ControlLog(tmp_path, first.generation).append("rollback", step=50, first=400, last=416, why="the loss jumped")
    launched(monkeypatch, tmp_path, "a", 1, memory=True)
    assert ControlLog(tmp_path).num_rollbacks() == 1
    launched(monkeypatch, tmp_path, "b", memory=True)
    assert ControlLog(tmp_path).num_rollbacks() == 0


def test_the_agent_is_found_through_a_script_that_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert generation.torchrun_agent() == ""
    code = "from windlass.launch.generation import torchrun_agent; print(torchrun_agent())"
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code],
        env={**os.environ, "TORCHELASTIC_RESTART_COUNT": "0", "PYTHONPATH": import_path()},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"{socket.gethostname()}:{os.getpid()}:{process_started(os.getpid())}"
