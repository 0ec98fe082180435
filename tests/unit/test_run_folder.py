"""The run folder: its places, its lock, its files."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from windlass.dist.errors import ConfigError
from windlass.launch.run_folder import RunFolder, RunLock


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
