"""When a jump of the loss sends a run back, how far, and without which samples."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_doubles import on_threads
from windlass.checkpoint.agree import Alone, Peers
from windlass.dist.errors import NumericsError
from windlass.launch.control_log import ControlLog
from windlass.launch.generation import Start
from windlass.launch.job import JobConfig, TrainConfig
from windlass.launch.recovery import RecoveryConfig
from windlass.launch.resume import Progress
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


def noted_by(num_ranks: int, back: RollBack, config: JobConfig) -> list[object]:
    """Return what each rank, one after the note, reads in the log, or what it raises."""

    def note(world: Peers) -> object:
        note_spike(back, config, 0, world)
        log = ControlLog(Path(config.train.run_dir))
        return log.left(), log.skips()

    return on_threads(num_ranks, note)


def test_a_jump_is_noted_for_the_next_start_until_it_has_happened_too_often(tmp_path: Path) -> None:
    config = JobConfig(train=TrainConfig(run_dir=str(tmp_path)), recovery=RecoveryConfig(spike_attempts=2))
    log = ControlLog(tmp_path)
    log.append("launch", workers=1)
    for first in (8, 24):
        note_spike(RollBack(first // 8, first, first + 8, "loss 9 at step 3"), config, 0, Alone())
    log.refresh()
    assert [record["kind"] for record in log.records] == ["launch", "rollback", "rollback"], "no crash comes between"
    assert log.skips() == [(8, 16), (24, 32)]
    assert log.left() == {0: 3}
    for refusal in noted_by(2, RollBack(5, 40, 48, "loss 9 at step 6"), config):
        assert isinstance(refusal, NumericsError) and "went back 2 times already" in str(refusal)


def test_no_rank_leaves_before_the_note_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.launch.control_log.os.fsync", lambda fd: time.sleep(0.3))
    config = JobConfig(train=TrainConfig(run_dir=str(tmp_path)))
    assert noted_by(2, RollBack(5, 40, 48, "loss 9 at step 6"), config) == [({0: 5}, [(40, 48)])] * 2


def test_the_records_of_older_runs_are_read_as_well(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    log.append("skip", first=8, last=16)  # type: ignore[arg-type]  # a kind that is written no more
    log.append("rollback", step=1, why="loss 9 at step 3")
    assert (log.skips(), log.left()) == ([(8, 16)], {0: 1})


CONFIG = RecoveryConfig(spike_factor=3.0, spike_window=4, spike_back=2)


def resumed(facts: Mapping[str, object], step: int, left: Mapping[int, int] | None = None, **place: Any) -> SpikeWatch:
    """Go on from state of generation 1 with these facts, as they are read back."""
    extra = {
        "step": step,
        "consumed": 8 * step,
        "tokens": 0,
        "generation": 1,
        "rollback": json.loads(json.dumps(facts)),
    }
    return SpikeWatch.resumed(CONFIG, Progress.of(extra, "somewhere", **place), Start(left=left or {}))


def test_a_run_that_was_started_again_decides_as_the_undisturbed_one() -> None:
    losses = [2.0 + 0.1 * step / 7 for step in range(9)] + [7.0]
    calm = watch()
    verdicts = [calm.observe(step, loss, samples_of(step)) for step, loss in enumerate(losses, 1)]
    assert verdicts[-1] is not None and verdicts[:-1] == [None] * 9
    for killed in range(1, 10):
        before = watch()
        for step, loss in enumerate(losses[:killed], 1):
            before.observe(step, loss, samples_of(step))
        after = resumed(before.facts(), killed)
        rest = [after.observe(step, losses[step - 1], samples_of(step)) for step in range(killed + 1, 11)]
        assert rest == verdicts[killed:], f"killed after step {killed}"


def test_state_that_was_saved_without_these_facts_has_an_empty_window() -> None:
    extra = {"step": 9, "consumed": 72, "tokens": 0}
    spikes = SpikeWatch.resumed(CONFIG, Progress.of(extra, "old"), Start())
    assert (spikes.facts()["losses"], spikes.facts()["samples"], spikes.facts()["began"]) == ([], [], 9)
    assert watch(spike_factor=0.0).facts() == {}


def test_a_run_that_has_just_gone_back_need_not_go_back_beyond_that_and_still_knows_the_usual_loss() -> None:
    calm = watch()
    for step in range(1, 9):
        calm.observe(step, 2.0, samples_of(step))
    again, other = resumed(calm.facts(), 8, {1: 8}), resumed(calm.facts(), 8, own=False)
    later = resumed(calm.facts(), 8, {0: 3})
    verdicts = [spikes.observe(9, 7.0, samples_of(9)) for spikes in (again, other, later)]
    assert [back and (back.at_most, back.first) for back in verdicts] == [(8, 64), (8, 64), (6, 48)]
