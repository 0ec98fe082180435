"""Which checkpoints stay: the newest ones, and those that a rollback may need."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoint_doubles import FlatSource
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.save import save
from windlass.checkpoint.store import begin_generation, list_checkpoints


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


def test_what_a_rollback_has_left_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    for step in (40, 50, 55):
        checkpoint(tmp_path, step, keep=3, back=5)
    # Generation 1 went back from there to step 40: its steps 50 and 55 are of no history that goes on.
    assert checkpoint(tmp_path, 60, keep=2, back=5, generation=2, began=40) == [40, 50, 55, 60]
    assert checkpoint(tmp_path, 65, keep=2, back=5, generation=2, began=40) == [60, 65]
