"""Where a start goes on: what a restart remembers of the user's wish, what is damaged, what the run has left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint_doubles import FlatSource
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.policy import CheckpointConfig
from windlass.checkpoint.save import save
from windlass.dist.errors import CheckpointError, ConfigError
from windlass.launch.generation import Start, highest_generation
from windlass.launch.job import JobConfig, TrainConfig
from windlass.launch.origin import Origin, find_origin


def job(run: Path, resume: str = "auto") -> JobConfig:
    return JobConfig(train=TrainConfig(run_dir=str(run)), checkpoint=CheckpointConfig(resume=resume, every=50))


def checkpoint(run: Path, step: int, generation: int = 0) -> Path:
    source = FlatSource({"model.w": torch.arange(6.0) + step})
    report = save(run / "checkpoints", step, source, {"step": step, "generation": generation}, Alone(), keep=0)
    assert report.ok, report.reason
    return run / "checkpoints" / f"step-{step:08d}"


def found(run: Path, start: Start, resume: str = "auto") -> Origin:
    return find_origin(job(run, resume), Alone(), None, start)


def test_nothing_is_there_at_first_and_later_the_newest_checkpoint(tmp_path: Path) -> None:
    assert not found(tmp_path, Start()).found
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 9)
    origin = found(tmp_path, Start())
    assert (origin.step, Path(str(origin.checkpoint)).name, origin.passed_over) == (9, "step-00000009", [])


def test_a_damaged_checkpoint_is_passed_over_with_the_reason_and_never_in_silence(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    short = checkpoint(tmp_path, 9)
    data = next(short.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-5])
    origin = found(tmp_path, Start())
    assert origin.step == 5
    assert any("step-00000009" in note for note in origin.passed_over)
    flipped = next((tmp_path / "checkpoints" / "step-00000005").glob("*.distcp"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid .*step-0000000"):
        found(tmp_path, Start())


def test_a_restart_begins_where_the_user_said_until_this_launch_has_made_something(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    wanted = str(checkpoint(other, 100))
    first = found(run, Start(generation=1, since=1), wanted)
    again = found(run, Start(generation=2, since=1, restarted=True), wanted)
    assert (first.step, again.step) == (100, 100)
    assert str(again.checkpoint) == wanted
    checkpoint(run, 120, generation=2)
    assert found(run, Start(generation=3, since=1, restarted=True), wanted).step == 120


def test_a_restart_of_a_run_that_was_to_begin_anew_ignores_what_earlier_launches_left(tmp_path: Path) -> None:
    wanted = str(checkpoint(tmp_path / "other", 100))
    checkpoint(tmp_path / "run", 50, generation=3)
    again = found(tmp_path / "run", Start(generation=6, since=5, restarted=True), wanted)
    assert (again.step, str(again.checkpoint)) == (100, wanted)
    with pytest.raises(ConfigError, match="has a checkpoint of step 50, which would be overwritten"):
        found(tmp_path / "run", Start(generation=6, since=5, restarted=True), "never")


def test_what_a_run_has_left_by_going_back_is_not_gone_on_from(tmp_path: Path) -> None:
    checkpoint(tmp_path, 50, generation=1)
    checkpoint(tmp_path, 100, generation=1)
    back = Start(generation=2, since=1, restarted=True, left={1: 90})
    later = Start(generation=3, since=1, restarted=True, left={1: 90})
    assert found(tmp_path, back).step == 50
    assert found(tmp_path, later).step == 50
    assert not later.admits(1, 100)
    assert later.admits(2, 100)


def test_a_run_that_went_back_beyond_its_checkpoints_is_an_error_and_not_a_beginning(tmp_path: Path) -> None:
    checkpoint(tmp_path, 100, generation=1)
    checkpoint(tmp_path, 150, generation=1)
    for back in (90, 50):  # there was one of step 50
        with pytest.raises(
            CheckpointError, match=rf"goes back to step {back} or before.*oldest checkpoint is of step 100"
        ):
            found(tmp_path, Start(generation=2, since=1, restarted=True, left={1: back}))
    early = found(tmp_path, Start(generation=2, since=1, restarted=True, left={1: 49}))
    assert not early.found, "none was due before step 50: the run begins again"


def test_a_run_that_went_back_before_its_first_checkpoint_begins_again_where_the_user_said(tmp_path: Path) -> None:
    run, wanted = tmp_path / "run", str(checkpoint(tmp_path / "other", 110))
    checkpoint(run, 150, generation=1)
    again = found(run, Start(generation=2, since=1, restarted=True, left={1: 148}), wanted)
    assert (str(again.checkpoint), again.own) == (wanted, False)
    late = tmp_path / "late"
    checkpoint(late, 200, generation=1)
    with pytest.raises(CheckpointError, match="goes back to step 160 or before"):
        found(late, Start(generation=2, since=1, restarted=True, left={1: 160}), wanted)


def test_the_next_generation_is_later_than_what_storage_has_heard_of(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5, generation=7)
    found(tmp_path, Start(generation=7, since=7))
    assert highest_generation(job(tmp_path)) == 7
