"""The local launcher with workers that need no torch."""

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

from windlass.launch.local import LaunchConfig, WorkerCommand, launch_local

STANDIN = Path(__file__).parents[1] / "fault" / "standin.py"
DRIVER = """
import json, sys
from windlass.launch.local import LaunchConfig, WorkerCommand, launch_local
standin, folder, *actions = sys.argv[1:]
sys.exit(launch_local(WorkerCommand((standin, folder), json.dumps(actions).encode()),
                      LaunchConfig(workers=len(actions), all_ranks=True)))
"""


def launch(folder: Path, *actions: str, **settings: object) -> int:
    command = WorkerCommand((str(STANDIN), str(folder)), json.dumps(actions).encode())
    return launch_local(command, LaunchConfig(workers=len(actions), **settings))  # type: ignore[arg-type]


def drive(folder: Path, *actions: str) -> subprocess.Popen[str]:
    """Run the launcher as its own process and return it once every rank waits."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(STANDIN), str(folder), *actions],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    for _ in actions:
        assert any("waiting" in line for line in iter(driver.stdout.readline, ""))
    return driver


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher waits for what every rank has to say, however slowly: for tests in which all end by themselves."""
    monkeypatch.setattr("windlass.launch.supervisor.REPORT_S", 60.0)


def test_rank_0_speaks_for_all_and_others_only_through_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, "ok", "ok", threads=3) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["rank 0 of 2, local 0 of 2", "threads 3"]
    assert sorted(err.splitlines()) == ["[rank 1] noted on stderr by 1", "noted on stderr by 0"]


def test_all_ranks_shows_every_line_with_its_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path, "ok", "ok", all_ranks=True) == 0
    assert "[rank 1] rank 1 of 2, local 1 of 2" in capfd.readouterr().out


def test_the_real_cause_comes_first_and_gives_the_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], heard: None
) -> None:
    assert launch(tmp_path, "lost-peer", "late-value-error", "lost-peer") == 1
    err = capfd.readouterr().err
    assert err.index("rank 1 failed first: ValueError: the real cause") < err.index("ranks 0, 2 then failed: CommError")
    assert err.count("Traceback") == 1


def test_equal_errors_of_all_ranks_are_one_message_with_their_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], heard: None
) -> None:
    assert launch(tmp_path, "data-error", "data-error") == 4
    assert capfd.readouterr().err.count("is damaged") == 1


def test_a_killed_rank_ends_the_run_with_128_and_its_signal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], heard: None
) -> None:
    assert launch(tmp_path, "lost-peer", "kill") == 128 + signal.SIGKILL
    assert "rank 1 failed first: killed by SIGKILL" in capfd.readouterr().err


def test_a_rank_that_hangs_is_killed_within_ten_seconds_of_a_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, "hang", "code-7", grace_s=0.5) == 7
    assert time.monotonic() - float((tmp_path / "failed").read_text()) < 10
    assert "rank 0 stopped by the launcher" in capfd.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_lets_every_rank_save_and_ends_with_zero(signum: signal.Signals, tmp_path: Path) -> None:
    driver = drive(tmp_path, "until-stopped", "until-stopped")
    driver.send_signal(signum)
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert sorted(out.splitlines()) == ["[rank 1] saved by 1", "saved by 0"]


def test_killing_the_launcher_kills_its_ranks(tmp_path: Path) -> None:
    driver = drive(tmp_path, "until-stopped", "hang")
    ranks = psutil.Process(driver.pid).children(recursive=True)
    assert len(ranks) == 2
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
