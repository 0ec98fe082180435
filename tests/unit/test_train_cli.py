"""`windlass train` and `windlass launch` before any process starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from windlass.dist.env import ProcessEnv
from windlass.launch import worker
from windlass.launch.cli import main
from windlass.launch.local import LaunchConfig, threads_per_worker


@pytest.fixture
def job(tmp_path: Path) -> str:
    file = tmp_path / "job.yaml"
    file.write_text("train: {seq_len: 64}\nlaunch: {workers: 2}\n")
    return str(file)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("spelling", [["zero.stag=3"], ["--zero.stag=3"]])
def test_an_unknown_key_is_refused_in_both_spellings(
    spelling: list[str], job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = run(capsys, "train", job, *spelling)
    assert code == 2 and "zero.stage" in err and "Traceback" not in err


def test_another_number_of_workers_than_torchrun_started_is_refused(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variables = ProcessEnv(
        rank=1, local_rank=1, world_size=4, local_world_size=4, rendezvous="file:///none"
    ).variables()
    for name, value in (variables | {"WINDLASS_LAUNCHER": "torchrun"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    code, err = run(capsys, "train", job)
    assert code == 2 and "torchrun has started 4 workers" in err and "launch.workers=4" in err and "[rank 1]" in err


@pytest.mark.parametrize(
    ("command", "keys", "says"),
    [
        ("train", ["launch.nodes=2"], "launch.nodes = 2: has no effect without a controller"),
        ("train", ["launch.spares=2"], "launch.spares = 2: has no effect without a controller"),
        ("train", ["launch.nodes=3", "recovery.max_restarts=1"], "launch.nodes = 3: launch.workers = 2 cannot be"),
        ("drill", ["launch.nodes=3", "--kill", "rank=1@step=3"], "launch.nodes = 3: launch.workers = 2 cannot be"),
        ("drill", ["launch.nodes=2", "--kill", "node=2@step=3"], "Use one of node-0, node-1"),
    ],
)
def test_nodes_that_there_would_not_be_are_refused_before_any_process_starts(
    command: str,
    keys: list[str],
    says: str,
    job: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("windlass.launch.check._check_run", lambda loaded: None)  # there is no data
    code, err = run(capsys, command, job, f"train.run_dir={tmp_path / 'run'}", *keys)
    assert code == 2 and says in err and not (tmp_path / "run").exists()


def test_launch_without_ray_says_how_to_install_it(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, err = run(capsys, "launch", job, "--ray", "local")
    assert code == 2 and "pip install ray" in err


def test_the_command_of_a_worker_carries_the_job_that_was_checked(job: str) -> None:
    import pickle

    from windlass.launch.config import load_job

    loaded = load_job(job, ["train.steps=7"])
    command = worker.worker_command(loaded)
    assert command.arguments == ("-m", "windlass.launch.worker")
    assert pickle.loads(command.payload) == loaded


def test_cores_are_shared_among_the_workers_of_a_machine() -> None:
    assert [threads_per_worker(LaunchConfig(), workers, cores=8) for workers in (1, 3, 16)] == [8, 2, 1]
    assert threads_per_worker(LaunchConfig(threads=5), 16, cores=8) == 5
