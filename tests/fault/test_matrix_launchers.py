"""Recovery where torchrun starts the workers: the snapshot process of the node outlives them all.

Rows of the fault matrix: 1 and 3 (a rank, all ranks killed), 4 (the snapshot process killed), under torchrun.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.commands import Runs, Started, runs_in, tokens_in
from tests.waiting import until

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
TORCHRUN_WINDLASS = (*TORCHRUN, "-m", "windlass")
STEPS = 40


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens_in(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Iterator[Started]:
    with runs_in(tmp_path_factory.mktemp("undisturbed"), tokens, steps=STEPS) as runs:
        run = runs.start(runs.given(), "run", program=TORCHRUN_WINDLASS)
        assert run.wait() == 0, run.output()
        yield run


@pytest.fixture
def runs(tmp_path: Path, tokens: Path) -> Iterator[Runs]:
    with runs_in(tmp_path, tokens, steps=STEPS) as runs:
        yield runs


def test_under_torchrun_a_killed_rank_goes_on_from_its_own_memory(runs: Runs, undisturbed: Started) -> None:
    given = runs.given()
    run = runs.start(given, "run", program=TORCHRUN_WINDLASS)
    run.until_step(5)
    [served] = run.served()
    beat = run.kill(1)
    assert run.wait() == 0, run.output()
    [resumed] = run.events("resume")
    assert "ram snapshot of generation 1" in resumed["folder"]
    assert resumed["step"] >= beat.step - 2, "at most one finished step is lost"
    assert run.figures() == undisturbed.figures()
    assert len(run.figures()) == STEPS
    assert not served.alive and given.left() == []
