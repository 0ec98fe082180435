"""State files when things break for real: processes killed at any write, limits of the system, two users at a time."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tests.state_files import Drive, pages, read
from windlass.dist.errors import OffloadError
from windlass.offload.engines import PAGE
from windlass.offload.extents import Extent
from windlass.offload.nvme import StateFile

KEYS = ("embed", "blocks.0", "blocks.1", "head")
EXTENTS = tuple(Extent(key, (n + 1) * 64 * PAGE, 2) for n, key in enumerate(KEYS))
STEPS = 6
# Forked from a clean process: torch's threads of other tests in this one would be missing in its children.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "windlass.offload.nvme"])


def child(
    work: Callable[[Path, Connection], None], folder: Path, fault: str = ""
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Run `work` in a child process; it is given the other end of the connection that is returned."""
    ours, theirs = SERVER.Pipe()
    process = SERVER.Process(target=_with_fault, args=(work, folder, theirs, fault), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _with_fault(work: Callable[[Path, Connection], None], folder: Path, talk: Connection, fault: str) -> None:
    if fault:
        os.environ["WINDLASS_FAULT"] = fault
    work(folder, talk)


def content(key: str, step: int) -> torch.Tensor:
    """Return the state of a key after a step."""
    return pages((KEYS.index(key) + 1) * 64, seed=100 * step + KEYS.index(key))


def train(folder: Path, talk: Connection | None = None) -> None:
    """Write step after step into alternating slots, from the last commit that is there; tell of every commit."""
    with Drive(folder) as drive:
        file = drive.reopen(EXTENTS) or drive.create(EXTENTS)
        done = file.commits()[0].step if file.commits() else 0
        for step in range(done + 1, STEPS + 1):
            for key in KEYS:
                file.write(key, step % 2, 0, content(key, step))
            file.commit(step, dict.fromkeys(KEYS, step % 2), {"step": step})
            if talk is not None:
                talk.send(step)


def last_told(talk: Connection) -> int:
    """Return the last commit that a child told of before it ended."""
    told = 0
    while True:
        try:
            told = talk.recv()
        except EOFError:
            return told


def check_commits(file: StateFile) -> list[int]:
    """Return the steps of the commits, each of which holds exactly the state of its step."""
    for commit in file.commits():
        assert commit.extra == {"step": commit.step}
        for key, slot in commit.slots.items():
            assert torch.equal(read(file, key, slot, (KEYS.index(key) + 1) * 64), content(key, commit.step)), key
    return [commit.step for commit in file.commits()]


def newest_whole(folder: Path) -> int:
    """Return the newest committed step, having checked that every commit is whole; 0: there is none."""
    with Drive(folder) as drive:
        file = drive.reopen(EXTENTS)
        return max(check_commits(file), default=0) if file is not None else 0


def gone_on(folder: Path) -> list[int]:
    """Train on from what was committed; return the commits at the end, each of which is whole."""
    train(folder)
    with Drive(folder) as drive:
        file = drive.reopen(EXTENTS)
        return check_commits(file) if file is not None else []


@pytest.mark.parametrize("count", random.Random(4).sample(range(1, STEPS * len(KEYS) + 1), 6))
def test_a_process_killed_at_any_write_leaves_its_last_commit_whole(tmp_path: Path, count: int) -> None:
    process, talk = child(train, tmp_path, f"kill:nvme.write:step={count}")
    told = last_told(talk)
    process.join()
    assert process.exitcode == -signal.SIGKILL and told == (count - 1) // len(KEYS)
    assert newest_whole(tmp_path) == told
    assert gone_on(tmp_path) == [STEPS, STEPS - 1]


@pytest.mark.parametrize("step", [1, 4])
def test_a_process_killed_at_a_commit_leaves_the_one_before(tmp_path: Path, step: int) -> None:
    process, talk = child(train, tmp_path, f"kill:nvme.commit:step={step}")
    assert last_told(talk) == step - 1
    process.join()
    assert newest_whole(tmp_path) == step - 1
    assert gone_on(tmp_path) == [STEPS, STEPS - 1]


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_process_killed_at_no_particular_moment_leaves_its_last_commit_whole(tmp_path: Path, step: int) -> None:
    process, talk = child(train, tmp_path)
    while talk.recv() < step:
        continue
    process.kill()
    told = max(step, last_told(talk))
    process.join()
    assert newest_whole(tmp_path) in (told, told + 1), "a commit may be there of which nobody was told yet"
    assert gone_on(tmp_path) == [STEPS, STEPS - 1]


def write_under_a_limit(folder: Path, talk: Connection) -> None:
    with Drive(folder) as drive:
        file = drive.create([Extent("k", 2 << 20)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        try:
            file.write("k", 0, 0, pages(512))
        except OffloadError as error:
            talk.send(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.write("k", 0, 0, pages(512))
        talk.send(torch.equal(read(file, "k", 0, 512), pages(512)))


def test_a_limit_on_file_sizes_gives_a_true_short_write_and_an_error_that_names_it(tmp_path: Path) -> None:
    process, talk = child(write_under_a_limit, tmp_path)
    message = talk.recv()
    assert "write of 'k' slot 0 bytes 0..2097152" in message and "File too large after 1048576 of 2097152" in message
    assert "ulimit -f unlimited" in message
    assert talk.recv() is True
    process.join()


def make_under_a_limit(folder: Path, talk: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    with Drive(folder) as drive:
        try:
            drive.create([Extent("k", 2 << 20)])
        except OffloadError as error:
            talk.send(str(error))


def test_a_file_too_large_for_the_system_is_refused_when_it_is_made(tmp_path: Path) -> None:
    process, talk = child(make_under_a_limit, tmp_path)
    assert "making" in (message := talk.recv()) and "ulimit -f unlimited" in message
    process.join()
    assert not list(tmp_path.iterdir())


def hold(folder: Path, talk: Connection) -> None:
    with Drive(folder) as drive:
        drive.create().write("a", 0, 0, pages(3))
        talk.send(os.getpid())
        talk.recv()


def test_two_processes_do_not_share_a_folder_and_a_dead_one_leaves_it_free(tmp_path: Path) -> None:
    process, talk = child(hold, tmp_path)
    pid = talk.recv()
    with Drive(tmp_path) as drive:
        for call in (drive.create, drive.reopen):
            with pytest.raises(OffloadError, match=f"is in use by process {pid} on "):
                call()
        process.kill()
        process.join()
        assert drive.reopen() is None
        file = drive.create()
        with pytest.raises(OffloadError, match="never written"):
            read(file, "a", 0, 1)
