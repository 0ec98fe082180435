"""A run that is asked to end at any moment ends in time, with 0, and with its newest step durable.

Row 18 of the fault matrix: SIGTERM before any worker runs, while workers start, in a step, during validation, while a
checkpoint is being written, between failure and restart, and while a snapshot is being restored.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault.commands import commands_of
from tests.fault.memory_runs import Act, Lab, Live, Told
from windlass.checkpoint.memory.folder import list_jobs
from windlass.checkpoint.manifest import read_manifest
from windlass.checkpoint.store import find_checkpoint

GRACE_S = 20.0
LONG = ("train.steps=2000", f"recovery.grace_s={GRACE_S:g}")


def ask(live: Live) -> None:
    """Do what SIGTERM to the launcher does."""
    live.stop.asked = 1


def newest(told: Told) -> int:
    """Return the step of the newest checkpoint, -1 for none."""
    found = find_checkpoint(told.run / "checkpoints")
    return -1 if found is None else read_manifest(found).step


def last(told: Told) -> int:
    return max((entry["step"] for entry in told.every_step), default=-1)


def test_before_any_worker_runs_there_is_nothing_to_save(lab: Lab) -> None:
    told = lab.run(between={1: ask}, settings=LONG)
    assert (told.code, told.leftovers) == (0, []), told.said
    assert not told.of("start") and newest(told) == -1


@pytest.mark.parametrize("step", [1, 3])
def test_in_a_step_it_is_finished_and_saved(step: int, lab: Lab) -> None:
    told = lab.run(strikes=[Act(step, ask)], settings=LONG)
    assert (told.code, told.leftovers) == (0, []), told.said
    assert newest(told) == last(told) >= step
    assert told.seconds < GRACE_S
