"""Workers of this machine that cannot be killed, were killed already, or whose files somebody has tidied up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest

from windlass.dist.env import ProcessEnv
from windlass.dist.errors import ConfigError
from windlass.launch import local
from windlass.launch.fleet import Seating
from windlass.launch.local import LaunchConfig, LocalWorkers, WorkerCommand
from windlass.launch.local_fleet import LocalFleet
from windlass.launch.supervisor import StopRequests, supervise

SLEEP = WorkerCommand(("-c", "import time; time.sleep(600)"))


class Stuck:
    """A process that nobody can end: the kernel waits for a device on its behalf."""

    stdout: IO[bytes] | None = None
    stderr: IO[bytes] | None = None

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid, self.process = process.pid, process

    def poll(self) -> None:
        return None

    def send_signal(self, signum: int) -> None:
        pass


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield Stuck(process)
        process.kill()


def test_a_worker_that_cannot_be_killed_is_left_behind_by_name(
    stuck: Stuck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "KILL_S", 0.0)
    who = [ProcessEnv(node="node-7", local_world_size=1)]

    def start(command: WorkerCommand, variables: Mapping[str, str], *, stdout: int | None, stderr: int | None) -> Stuck:
        return stuck

    workers = LocalWorkers(SLEEP, LaunchConfig(), tmp_path, who, start_process=start)
    stop = StopRequests()
    stop.count = 2
    [ended] = supervise(workers, 0.0, stop, look_s=0.001)
    assert ended.code == -signal.SIGKILL
    assert ended.failure is not None and ended.failure.secondary and ended.failure.exit_code == 137
    assert f"process {stuck.pid} has been killed and does not end (state: " in ended.failure.message
    assert "on node-7" in ended.failure.message and f"process {stuck.pid}" in capsys.readouterr().err
    workers.close()


def test_a_worker_that_was_just_killed_is_waited_for(stuck: Stuck, tmp_path: Path) -> None:
    workers = LocalWorkers(SLEEP, LaunchConfig(), tmp_path, start_process=lambda *_, **__: stuck)
    for _ in range(3):
        workers.send([0], signal.SIGKILL)
    assert workers.wait(0) == []
    workers.close()


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalFleet]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fleet = LocalFleet(SLEEP, LaunchConfig(workers=2, nodes=2))
    with ExitStack() as stack:
        stack.callback(fleet.release, False)
        yield fleet


def test_a_worker_can_be_struck_once(fleet: LocalFleet) -> None:
    fleet.start(1, Seating(("node-0", "node-1")), {})
    assert "rank 1 (process " in fleet.strike("rank", "1")
    for kind in ("rank", "stop"):
        with pytest.raises(ConfigError, match=f"--kill {kind}=1: no such worker is running"):
            fleet.strike(kind, "1")
    fleet.strike("node", "node-0")
    with pytest.raises(ConfigError, match="--kill rank=0: no such worker is running"):
        fleet.strike("rank", "0")


def test_workers_start_again_after_somebody_has_tidied_up(fleet: LocalFleet, tmp_path: Path) -> None:
    seating = Seating(("node-0", "node-1"))
    fleet.start(1, seating, {}).send(range(2), signal.SIGKILL)
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    fleet.fence(2)
    fleet.start(2, seating, {})
    assert [folder.stat().st_mode & 0o777 for folder in tmp_path.iterdir()] == [0o700]
    fleet.release(False)
    assert os.listdir(tmp_path) == []
