"""The folder of a state file: room, owners, commits that survive the process, and several users at a time."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.state_files import Drive, pages, read
from windlass.dist.errors import OffloadError, TierOutOfMemory
from windlass.offload.claim import run_folder
from windlass.offload.engines import PAGE, ThreadEngine
from windlass.offload.extents import Extent
from windlass.offload.nvme import StateFile


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    with Drive(tmp_path) as drive:
        yield drive


# -- room and folders --------------------------------------------------------------------------------------------------


def test_a_drive_without_room_says_what_is_needed_and_free(drive: Drive, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(
        OffloadError, match=r"rank 0 needs 1125899906842624 bytes in .*, \d+ are free.*cluster.nvme_paths"
    ):
        drive.create([Extent("a", 1 << 50)])
    monkeypatch.setattr(os, "posix_fallocate", _raise(errno.ENOSPC))
    with pytest.raises(OffloadError, match="rank 0 needs 32768 bytes"):
        drive.create()
    assert not list(tmp_path.iterdir())


def _raise(code: int) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_budget_is_kept(drive: Drive, tmp_path: Path) -> None:
    with pytest.raises(
        TierOutOfMemory, match=r"32768 bytes on nvme .* 32767 are allowed. Set offload.nvme_bytes=32768"
    ):
        drive.create(budget=32767)
    assert not list(tmp_path.iterdir())
    drive.create(budget=32768)


def test_a_missing_folder_is_not_created(tmp_path: Path) -> None:
    (tmp_path / "nvme0").mkdir()
    (tmp_path / "file").touch()
    for name, words in (("nvne0", "does not exist. Did you mean .*nvme0"), ("file", "is not a folder")):
        with pytest.raises(OffloadError, match=f"cluster.nvme_paths: .*{name} {words}"):
            Drive(tmp_path / name).create()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "nvme0"]


@pytest.mark.parametrize("extents", [[Extent("a", 1), Extent("a", 1)], [Extent("a", 0)], [Extent("a", 1, 0)]])
def test_extents_that_make_no_sense_are_refused(drive: Drive, extents: list[Extent]) -> None:
    with pytest.raises(OffloadError, match="needs bytes, one slot or two, and a key of its own"):
        drive.create(extents)


def test_a_folder_has_one_user(drive: Drive) -> None:
    file = drive.create()
    with pytest.raises(OffloadError, match=r"is open here already. Does cluster.nvme_paths name it twice\?"):
        drive.create()
    assert drive.create(identity={"run": 2}).path != file.path
    file.close()
    drive.create().write("a", 0, 0, pages(3))


def test_closing_can_remove_the_folder(drive: Drive, tmp_path: Path) -> None:
    drive.create().close(remove=True)
    assert not list(tmp_path.iterdir())


# -- commits -----------------------------------------------------------------------------------------------------------


def two_steps(drive: Drive, **changes: Any) -> StateFile:
    file = drive.create(**changes)
    file.write("a", 0, 0, pages(3, 1))
    file.commit(1, {"a": 0}, {"loss": 1.5})
    file.write("a", 1, 0, pages(3, 2))
    file.commit(2, {"a": 1}, {})
    return file


@pytest.mark.parametrize("checksums", [False, True])
def test_a_later_process_finds_the_last_two_steps(drive: Drive, checksums: bool) -> None:
    two_steps(drive, checksums=checksums).close()
    file = drive.reopen(checksums=checksums)
    assert file is not None
    assert [(c.step, dict(c.slots), c.extra) for c in file.commits()] == [
        (2, {"a": 1}, {}),
        (1, {"a": 0}, {"loss": 1.5}),
    ]
    assert torch.equal(read(file, "a", 1, 3), pages(3, 2))
    file.roll_back(1)
    assert torch.equal(read(file, "a", 0, 3), pages(3, 1))
    with pytest.raises(OffloadError, match="never written"):
        read(file, "a", 1, 3)
    with pytest.raises(OffloadError, match=r"holds steps \[1\], not 2"):
        file.roll_back(2)
    file.write("a", 1, 0, pages(3, 3))
    file.commit(2, {"a": 1}, {})
    assert [c.step for c in file.commits()] == [2, 1]
    file.close()


def test_a_commit_ends_before_its_slot_is_written_again(drive: Drive) -> None:
    file = two_steps(drive)
    file.write("a", 0, PAGE, pages(1, 7))
    assert [c.step for c in file.commits()] == [2]
    file.close()
    again = drive.reopen()
    assert again is not None and [c.step for c in again.commits()] == [2]
    again.write("a", 1, 0, pages(3))
    again.close()
    assert drive.reopen() is None


def test_a_state_from_elsewhere_begins_with_nothing_written(drive: Drive) -> None:
    file = two_steps(drive)
    file.forget()
    assert not file.commits()
    with pytest.raises(OffloadError, match="never written"):
        read(file, "a", 0, 1)
    file.write("a", 0, 0, pages(3))
    file.commit(1, {"a": 0}, {})
    assert [c.step for c in file.commits()] == [1]


def test_only_two_commits_are_kept(drive: Drive) -> None:
    file = two_steps(drive)
    file.write("b", 0, 0, pages(2))
    file.commit(3, {"b": 0, "a": 1}, {})
    assert [c.step for c in file.commits()] == [3, 2]
    assert len(list(file.path.parent.glob("commit-*"))) == 2


def test_only_what_is_whole_is_committed(drive: Drive) -> None:
    file = two_steps(drive)
    file.write("b", 0, 0, pages(1))
    for slots, words in (({"b": 0}, "'b' slot 0 bytes 4096..8192 were never"), ({"b": 1}, "there is no slot 1 of 'b'")):
        with pytest.raises(OffloadError, match=words):
            file.commit(3, slots, {})
    with pytest.raises(OffloadError, match="step 2 is there already"):
        file.commit(2, {"a": 1}, {})
    with pytest.raises(OffloadError, match=r"commit of step 3: .*plain numbers"):
        file.commit(3, {"a": 1}, {"what": object()})
    assert [c.step for c in file.commits()] == [2, 1]


def test_another_layout_or_run_or_a_damaged_record_is_not_taken_for_ours(drive: Drive) -> None:
    two_steps(drive).close()
    assert drive.reopen([Extent("a", 4 * PAGE, 2), Extent("b", 1)]) is None
    assert drive.reopen(identity={"run": 2}) is None
    home = run_folder(drive.folder, 0, {"run": 1})
    newest = home / "commit-00000002.json"
    newest.write_bytes(newest.read_bytes().replace(b'"a": 1', b'"a": 0'))
    (home / "commit-00000003.tmp").write_text("unfinished")
    file = drive.reopen()
    assert file is not None and [c.step for c in file.commits()] == [1]
    file.close()
    drive.create().close()
    assert drive.reopen() is None


@pytest.mark.parametrize("fails", ["replace", "unlink"])
def test_a_commit_whose_record_may_be_on_the_drive_ends_before_its_slot_is_written(
    drive: Drive, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    file = two_steps(drive)
    file.write("a", 0, 0, pages(3, 3))
    really = {"replace": os.replace, "unlink": Path.unlink}[fails]
    owner: Any = os if fails == "replace" else Path

    def fail(*given: Any, **more: Any) -> None:
        really(*given, **more)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if fails == "unlink":  # so that there is an older record to remove
        file.commit(3, {"a": 0}, {})
        file.write("b", 0, 0, pages(2))
    newest = file.commits()[0].step
    with monkeypatch.context() as patch:
        patch.setattr(owner, fails, fail)
        with pytest.raises(OffloadError, match=f"commit of step {newest + 1} .*Input/output error"):
            file.commit(newest + 1, {"a": 0}, {})
    file.write("a", 0, 0, pages(3, 4))
    file.close()
    again = drive.reopen()
    assert again is None or all(commit.slots.get("a") != 0 for commit in again.commits())


# -- several at a time -------------------------------------------------------------------------------------------------


class Held(ThreadEngine):
    """Writes wait until they are let go."""

    def __init__(self) -> None:
        super().__init__(block_bytes=PAGE)
        self.begun, self.go = threading.Event(), threading.Event()

    def write(self, offset: int, data: torch.Tensor) -> None:
        self.begun.set()
        assert self.go.wait(60)
        super().write(offset, data)


@pytest.fixture
def writing(drive: Drive) -> Iterator[tuple[StateFile, Held, threading.Thread, list[str]]]:
    engine, errors = Held(), list[str]()
    file = drive.create(engine=engine)

    def write() -> None:
        try:
            file.write("a", 0, 0, pages(3))
        except OffloadError as error:
            errors.append(str(error))

    thread = threading.Thread(target=write)
    thread.start()
    assert engine.begun.wait(60)
    yield file, engine, thread, errors
    engine.go.set()
    thread.join()


def test_two_transfers_of_the_same_bytes_are_refused(writing: Any) -> None:
    file, engine, thread, errors = writing
    with pytest.raises(
        OffloadError, match=r"read of 'a' slot 0 .* while a write of 'a' slot 0 bytes 0..12288 is under"
    ):
        read(file, "a", 0, 1)
    with pytest.raises(OffloadError, match=r"commit of .* while a write"):
        file.commit(1, {"a": 0}, {})
    with pytest.raises(OffloadError, match=r"roll back of .* while a write"):
        file.forget()
    engine.go.set()
    thread.join()
    assert not errors and torch.equal(read(file, "a", 0, 3), pages(3))


def test_closing_waits_for_nobody_and_ends_what_is_under_way(writing: Any, tmp_path: Path) -> None:
    file, engine, thread, errors = writing
    file.close(remove=True)
    assert file.path.exists()
    with pytest.raises(OffloadError, match="the file was closed before"):
        file.write("b", 0, 0, pages(2))
    engine.go.set()
    thread.join()
    assert "closed after 0 of 12288 bytes" in errors[0]
    assert not list(tmp_path.iterdir())
