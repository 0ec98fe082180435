"""The run folder: its places, its lock, its files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
import threading
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from windlass.dist.env import ProcessEnv
from windlass.dist.errors import ConfigError
from windlass.launch import run_folder
from windlass.launch.job import JobConfig, MetricsConfig, TrainConfig
from windlass.launch.run_folder import RunFolder, RunLock, alone_in, at_work


def _hold(root: str, pipe: Connection) -> None:
    RunLock(RunFolder(Path(root)))
    pipe.send(os.getpid())
    pipe.recv()
    os._exit(1)  # a crash: nothing is released by hand


def test_a_second_run_is_refused_by_name_and_a_crash_frees_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(str(folder.root), theirs))
    process.start()
    pid = ours.recv()
    with pytest.raises(ConfigError) as caught:
        RunLock(folder)
    assert f"process {pid} on {socket.gethostname()}, since 2" in str(caught.value)
    assert "give another train.run_dir" in str(caught.value)
    ours.send("die")
    process.join()
    with RunLock(folder):
        assert (folder.root / "lock").read_text() != ""


def test_the_lock_can_be_taken_again_after_release(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = RunLock(folder)
    with pytest.raises(ConfigError, match="in use by another run"):
        RunLock(folder)
    first.release()
    first.release()
    RunLock(folder).release()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create(controlled=True)
    return folder


def test_a_second_run_is_refused_while_one_is_alone_and_named(folder: RunFolder) -> None:
    refused = pytest.raises(ConfigError, match=rf"train\.run_dir = '{folder.root}': in use by .*{os.getpid()} on")
    with alone_in(folder), at_work(folder), refused, alone_in(folder):
        raise AssertionError("two runs at once")
    with alone_in(folder):
        assert (folder.root / "lock").exists()


def test_a_run_waits_for_the_workers_of_a_launcher_that_was_killed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LEAVE_S", 60.0)
    working, seen, look = threading.Event(), threading.Event(), run_folder._at_work

    def looked(folder: RunFolder) -> bool:
        found = look(folder)
        if found:
            seen.set()
        return found

    def work() -> None:
        with at_work(folder), at_work(folder):  # two of them, as beside each other
            working.set()
            assert seen.wait(60)

    worker = threading.Thread(target=work)
    worker.start()
    assert working.wait(60)
    monkeypatch.setattr(run_folder, "_at_work", looked)
    with alone_in(folder):
        assert seen.is_set() and not look(folder)
    worker.join()


def test_workers_that_do_not_end_with_their_launcher_are_named(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LEAVE_S", 0.1)
    refused = pytest.raises(ConfigError, match=r"workers of an earlier launch .*fuser .*/control/workers")
    with at_work(folder), refused, alone_in(folder):
        raise AssertionError("beside them")
    RunLock(folder).release()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_launcher_locks_the_folder_for_workers_that_it_counts_and_rank_0_where_none_does(
    folder: RunFolder, rank: int
) -> None:
    from windlass.launch.run import _open_folder

    config = JobConfig(train=TrainConfig(run_dir=str(folder.root)), metrics=MetricsConfig(tensorboard=False))

    def env(generation: int) -> ProcessEnv:
        return ProcessEnv(rank=rank, local_rank=rank, world_size=2, local_world_size=2, generation=generation)

    with alone_in(folder), ExitStack() as stack:
        _open_folder(config, env(3), stack)
        assert run_folder._at_work(folder)
    assert not run_folder._at_work(folder)
    with ExitStack() as stack:
        _open_folder(config, env(0), stack)
        if rank == 0:
            with pytest.raises(ConfigError, match="in use"):
                RunLock(folder)
        else:
            RunLock(folder).release()


def test_a_full_disk_does_not_keep_a_run_from_locking_its_folder(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with RunLock(folder), pytest.raises(ConfigError, match="in use by another run"):
        RunLock(folder)


def test_a_file_where_the_control_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "control").write_text("x")
    with pytest.raises(ConfigError, match=r"train\.run_dir = .*File exists .*/control"):
        RunFolder(tmp_path).create(controlled=True)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match=r"train\.run_dir = .*File exists"):
        RunFolder(tmp_path / "run").create()


def test_an_earlier_different_config_is_kept_and_an_equal_one_is_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    for text in ("a: 1\n", "a: 1\n", "a: 2\n", "a: 3\n"):
        folder.write_config(text)
    assert folder.config.read_text() == "a: 3\n"
    assert (tmp_path / "config-1.yaml").read_text() == "a: 1\n"
    assert (tmp_path / "config-2.yaml").read_text() == "a: 2\n"
    assert not (tmp_path / "config-3.yaml").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_every_place_of_the_layout_lies_inside_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.create()
    places = (
        folder.config,
        folder.plan,
        folder.metrics,
        folder.log,
        folder.tensorboard,
        folder.checkpoints,
        folder.traces,
    )
    assert all(place.parent == folder.root for place in places)
    assert folder.checkpoints.is_dir()
    assert folder.traces.is_dir()


def test_a_text_that_cannot_be_replaced_leaves_no_draft_and_any_text_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        run_folder.write_atomically(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    folder = RunFolder(tmp_path)
    for _ in range(2):
        folder.write_config("path: '\udcff'\n")
    assert folder.config.read_bytes() == b"path: '\\udcff'\n" and not (tmp_path / "config-1.yaml").exists()
