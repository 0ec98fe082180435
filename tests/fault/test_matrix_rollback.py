"""A loss that jumps takes the run back and leaves the samples out, also when a rank is killed on the way.

Row 22 of the fault matrix: rollback with a skip list, twice, with a kill during each rollback and one so shortly before
a jump that the window of losses reaches back beyond it. The oracle for the bits is the same run without kills; for the
order it is the list of all samples without those that are skipped.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.fault.memory_runs import Lab, Live
from tests.fault.oracle import BATCH, EXACT, Told
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
            text = "".join(chr(noise.randrange(33, 126)) for _ in range(120))
        (folder / f"{number:02d}.txt").write_text(text)
    prepare([folder], folder / "tokens", workers=1, validation=0.0)
    return folder / "tokens"


def run(lab: Lab, rough: Path, fault: str = "", then: Mapping[int, str] | None = None) -> Told:
    """Run the job with a fault in generation 2, and others in later ones."""

    def strike(what: str) -> Callable[[Live], None]:
        return lambda live: os.environ.update(WINDLASS_FAULT=what)

    between = {generation: strike(what) for generation, what in (then or {}).items()}
    settings = [*SPIKES, f"data.path={rough}"]
    return lab.run(settings=settings, pace=("peers", "storage"), fault=fault, between=between)


def figures(told: Told) -> list[list[object]]:
    return [[entry["step"], *(entry[key] for key in EXACT)] for entry in told.history]


@pytest.mark.soak
def test_a_run_goes_back_twice_and_leaves_samples_out_whatever_is_killed_on_the_way(lab: Lab, rough: Path) -> None:
    calm = run(lab, rough)
    assert (calm.code, calm.leftovers) == (0, []), calm.said
    skips = ControlLog(calm.run).skips()
    assert len(skips) == len(calm.of("rollback")) == 2 and not calm.of("failure")
    left = [n for n in range(0, 2 * STEPS * BATCH, BATCH) if not any(first <= n < last for first, last in skips)]
    assert [entry["samples"] for entry in calm.history] == [[n, n + BATCH] for n in left[:STEPS]]
    assert all(step % 4 == 0 and tier == "storage" for step, tier in calm.restored)

    first, second = (step + 1 for step, _ in calm.restored)
    jump = calm.of("rollback")[1]["step"] + 2  # the step whose loss made the second rollback
    told = run(
        lab,
        rough,
        fault=f"kill:train.forward:rank=1:step={first}:generation=2",
        then={
            3: f"kill:train.update:rank=0:step={jump - 1}:generation=3",
            5: f"kill:train.backward:rank=0:step={second}:generation=5",
        },
    )
    assert (told.code, told.leftovers) == (0, []), told.said
    assert [r["generation"] for r in told.of("failure")] == [2, 3, 5]
    assert ControlLog(told.run).skips() == skips
    assert figures(told) == figures(calm)
    again = [(r["generation"], r["restored"]) for r in told.recovered]
    assert [step for generation, step in again if generation != 4] == [first - 1, second - 1], (
        "what was left stays left"
    )
