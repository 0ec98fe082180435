"""Workers in a Ray cluster of two emulated nodes, without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.waiting import until
from windlass.dist.errors import ConfigError, PlanError
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.ray.workers import launch_ray

STANDIN = Path(__file__).parents[1] / "fault" / "standin.py"
DRIVER = """
import json, sys
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.ray.workers import launch_ray
standin, folder, address, *actions = sys.argv[1:]
sys.exit(launch_ray(WorkerCommand((standin, folder), json.dumps(actions).encode()),
                    LaunchConfig(workers=len(actions), all_ranks=True, grace_s=0.5),
                    address=address, num_nodes=0, spread=False, device="cpu"))
"""


def launch(cluster: Cluster, folder: Path, *actions: str, num_nodes: int = 0, spread: bool = False) -> int:
    folder.mkdir(exist_ok=True)
    command = WorkerCommand((str(STANDIN), str(folder)), json.dumps(actions).encode())
    config = LaunchConfig(workers=len(actions), grace_s=0.5, all_ranks=True)
    return launch_ray(command, config, address=cluster.address, num_nodes=num_nodes, spread=spread, device="cpu")


def drive(folder: Path, address: str, *actions: str) -> subprocess.Popen[str]:
    """Run the launcher as its own process and return it once every rank waits."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(STANDIN), str(folder), address, *actions],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    for _ in actions:
        assert any("waiting" in line for line in iter(driver.stdout.readline, ""))
    return driver


def standins(folder: Path) -> list[psutil.Process]:
    """Return the workers that were given a folder below this one."""
    processes = psutil.process_iter(["cmdline"])
    commands = [(process, process.info["cmdline"] or []) for process in processes]
    return [p for p, words in commands if words[1:2] == [str(STANDIN)] and Path(words[2]).is_relative_to(folder)]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher waits for what every rank has to say, however slowly: for tests in which all end by themselves."""
    monkeypatch.setattr("windlass.launch.supervisor.REPORT_S", 60.0)


def test_ranks_of_a_node_are_contiguous_and_the_output_comes_back(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(cluster, tmp_path, "ok", "ok", "ok", "ok", num_nodes=2, spread=True) == 0
    out = capfd.readouterr().out
    for rank in range(4):
        assert f"{'' if rank == 0 else f'[rank {rank}] '}rank {rank} of 4, local {rank % 2} of 2\n" in out
    assert not ray.is_initialized()


def test_the_first_cause_is_shown_once(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str], heard: None
) -> None:
    assert launch(cluster, tmp_path, "lost-peer", "late-value-error", "lost-peer", spread=True) == 1
    err = capfd.readouterr().err
    assert err.index("rank 1 failed first: ValueError: the real cause") < err.index("ranks 0, 2 then failed: CommError")
    assert err.count("Traceback") == 1


def test_ranks_that_hang_are_stopped_and_their_room_is_given_back(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(cluster, tmp_path / "first", "hang", "code-7", "hang", "hang", spread=True) == 7
    assert "ranks 0, 2-3 stopped by the launcher" in capfd.readouterr().err
    assert launch(cluster, tmp_path / "second", "ok", "ok", "ok", "ok") == 0
    until(lambda: not standins(tmp_path))


def test_killing_an_actor_kills_its_worker_and_ends_the_run_within_seconds(cluster: Cluster, tmp_path: Path) -> None:
    driver = drive(tmp_path, cluster.address, "hang", "hang")
    (victim, _) = standins(tmp_path)
    actor = victim.parent()
    assert actor is not None
    started = time.monotonic()
    actor.kill()
    _, err = driver.communicate(timeout=120)
    assert time.monotonic() - started < 60, "the worker itself would wait much longer"
    assert driver.returncode == 1
    assert "failed first: the Ray actor of the worker died" in err
    until(lambda: not standins(tmp_path))


def test_a_request_to_stop_lets_every_rank_save_and_stops_the_ray_we_started(tmp_path: Path) -> None:
    driver = drive(tmp_path, "local", "until-stopped", "until-stopped")
    ours = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert sorted(out.splitlines()) == ["[rank 1] saved by 1", "saved by 0"]
    assert not psutil.wait_procs(ours, timeout=60)[1]


def test_a_cluster_that_is_too_small_is_refused_at_once(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="too small"):
        launch(cluster, tmp_path, *["ok"] * 6, num_nodes=2)


def test_an_address_without_a_cluster_is_refused_with_the_command_that_starts_one() -> None:
    command, config = WorkerCommand((str(STANDIN),)), LaunchConfig()
    with pytest.raises(ConfigError, match="--ray auto"):
        launch_ray(command, config, address="ray://here:10001", num_nodes=0, spread=False, device="cpu")
    with pytest.raises(PlanError, match="ray start --head"):
        launch_ray(command, config, address="127.0.0.1:1", num_nodes=0, spread=False, device="cpu")
