"""A loss that jumps takes the run back and leaves the samples out, also when a rank is killed on the way.

Row 22 of the fault matrix: rollback with a skip list, twice, with a kill during each rollback. The oracle for the bits
is the same run without kills; for the order it is the list of all samples without those that are skipped.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fault.memory_runs import BATCH, EXACT, Lab, Told
from windlass.data.prepare import prepare
from windlass.launch.control_log import ControlLog

STEPS = 40
SPIKES = (
    "recovery.spike_factor=1.25",
    "recovery.spike_window=4",
    "recovery.spike_attempts=4",
    "checkpoint.every=4",
    "checkpoint.keep=0",
    f"train.steps={STEPS}",
)


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that repeats itself, with a few documents of noise in it."""
    folder = tmp_path_factory.mktemp("rough")
    noise = random.Random(3)
    for number in range(14):
        text = "the quick brown fox " * 40
        if number in (3, 9):
            text = "".join(chr(noise.randrange(33, 126)) for _ in range(240))
        (folder / f"{number:02d}.txt").write_text(text)
    prepare([folder], folder / "tokens", workers=1, validation=0.0)
    return folder / "tokens"


def run(lab: Lab, rough: Path, fault: str = "") -> Told:
    return lab.run(settings=[*SPIKES, f"data.path={rough}"], pace=("peers", "storage"), fault=fault)


def test_try(lab: Lab, rough: Path) -> None:
    told = run(lab, rough)
    print(told.said)
    print([(e["step"], round(e["loss"], 2), e["samples"]) for e in told.every_step])
    print(told.of("skip"), told.of("rollback"), told.restored)
