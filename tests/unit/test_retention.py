"""Which checkpoints stay: the newest ones, and those that a rollback may need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.checkpoint_doubles import FlatSource
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.retention import being_read, remove_replaced, retain, sweep
from windlass.checkpoint.save import save
from windlass.checkpoint.storage import LocalStorage
from windlass.checkpoint.store import CheckpointInfo, aside, begin_generation, list_checkpoints


def checkpoint(root: Path, step: int, *, keep: int, back: int, generation: int = 1, began: int = 0) -> list[int]:
    """Save a step of a run that may go back, and return the steps that are there then."""
    begin_generation(root, generation)
    extra = {"step": step, "generation": generation}
    extra |= {"rollback": {"back": back, "began": began}} if back else {}  # type: ignore[dict-item]
    report = save(root, step, FlatSource({"model.w": torch.arange(3.0)}), extra, Alone(), keep=keep)
    assert report.ok and not report.warnings, report
    return sorted(info.step for info in list_checkpoints(root))


def test_the_newest_ones_stay_and_without_rollbacks_no_others(tmp_path: Path) -> None:
    assert [checkpoint(tmp_path, step, keep=2, back=0) for step in (4, 7, 8, 12)] == [[4], [4, 7], [7, 8], [8, 12]]


def test_one_that_is_old_enough_to_go_back_to_stays_also_when_steps_come_close_together(tmp_path: Path) -> None:
    told = [checkpoint(tmp_path, step, keep=2, back=3) for step in (4, 7, 8, 9, 12)]  # 7 and 9: at a SIGTERM
    assert told == [[4], [4, 7], [4, 7, 8], [4, 7, 8, 9], [9, 12]]


def test_a_leftover_into_which_somebody_still_writes_goes_with_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, remove = tmp_path / ".step-00000010.tmp-1-persist-0123abcd", os.rmdir
    (left / "inside").mkdir(parents=True)

    def late(path: str, **given: int) -> None:
        if str(path) == str(left):
            (left / "__1_0.distcp").touch()
        remove(path, **given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", late)
        assert sweep(LocalStorage(tmp_path), 2) == [] and left.exists()
    assert sweep(LocalStorage(tmp_path), 2) == [left.name] and not left.exists()


def test_what_a_rollback_has_left_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    for step in (40, 50, 55):
        checkpoint(tmp_path, step, keep=3, back=5)
    # Generation 1 went back from there to step 40: its steps 50 and 55 are of no history that goes on.
    assert checkpoint(tmp_path, 60, keep=2, back=5, generation=2, began=40) == [40, 50, 55, 60]
    assert checkpoint(tmp_path, 65, keep=2, back=5, generation=2, began=40) == [60, 65]


def test_nothing_is_read_where_nothing_can_be_removed(tmp_path: Path) -> None:
    for step in (4, 7):
        checkpoint(tmp_path, step, keep=0, back=0)

    def never(info: CheckpointInfo) -> bool:
        raise AssertionError(f"{info.name} was read for nothing")

    assert retain(LocalStorage(tmp_path), 1, 7, 3, is_valid=never, least=2) == []
    assert retain(LocalStorage(tmp_path), 1, 7, 2, is_valid=never, least=2) == []


def test_what_was_replaced_goes_unless_somebody_reads_it_or_its_successor_is_not_there(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4, keep=0, back=0)
    storage = LocalStorage(tmp_path)
    read, replaced = aside("step-00000004", "old"), aside("step-00000004", "old")
    only = aside("step-00000009", "old")
    for name in (read, replaced, only):
        storage.make_folder(name)
    with being_read(storage.inside(read)):
        remove_replaced(storage)
        assert {read, only} <= set(storage.names()) and replaced not in storage.names()
    remove_replaced(storage)
    assert read not in storage.names() and only in storage.names()
