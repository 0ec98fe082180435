"""When a jump of the loss sends a run back, how far, and without which samples."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from windlass.dist.errors import NumericsError
from windlass.launch.control_log import ControlLog
from windlass.launch.job import JobConfig, TrainConfig
from windlass.launch.recovery import RecoveryConfig
from windlass.launch.spikes import RollBack, SpikeWatch, note_spike


def watch(**changes: float) -> SpikeWatch:
    return SpikeWatch(RecoveryConfig(**{"spike_factor": 3.0, "spike_window": 4, "spike_back": 2, **changes}))  # type: ignore[arg-type]


def samples_of(step: int) -> tuple[int, int]:
    return (step - 1) * 8, step * 8


def test_a_loss_far_above_the_median_goes_back_before_the_steps_that_may_have_done_harm() -> None:
    spikes = watch()
    quiet = [spikes.observe(step, 2.0, samples_of(step)) for step in range(1, 10)]
    verdict = spikes.observe(10, 6.5, samples_of(10))
    assert quiet == [None] * 9
    assert verdict is not None
    assert (verdict.at_most, verdict.first, verdict.stop) == (7, 7 * 8, 10 * 8)
    assert "6.5 at step 10" in verdict.why


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_jump_even_at_the_start(loss: float) -> None:
    verdict = watch().observe(1, loss, samples_of(1))
    assert verdict is not None
    assert (verdict.at_most, verdict.first, verdict.stop) == (0, 0, 8)


def test_nothing_is_a_jump_before_the_window_is_full_or_without_a_factor() -> None:
    spikes, off = watch(), watch(spike_factor=0.0)
    assert [spikes.observe(s, loss, samples_of(s)) for s, loss in ((1, 1.0), (2, 9.0), (3, 1.0))] == [None] * 3
    assert [off.observe(s, loss, samples_of(s)) for s, loss in ((1, 1.0), (2, math.nan))] == [None] * 2


def test_a_jump_is_noted_for_the_next_start_until_it_has_happened_too_often(tmp_path: Path) -> None:
    config = JobConfig(train=TrainConfig(run_dir=str(tmp_path)), recovery=RecoveryConfig(spike_attempts=2))
    log = ControlLog(tmp_path)
    log.append("launch", workers=1)
    for first in (8, 24):
        note_spike(RollBack(first // 8, first, first + 8, "loss 9 at step 3"), config, 0)
    log.refresh()
    assert log.skips() == [(8, 16), (24, 32)]
    assert log.left() == {0: 3}
    with pytest.raises(NumericsError, match="went back 2 times already"):
        note_spike(RollBack(5, 40, 48, "loss 9 at step 6"), config, 0)
