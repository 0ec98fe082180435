"""Where a start goes on: what a restart remembers of the user's wish, what is damaged, what the run has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_doubles import FlatSource
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.inventory import STORAGE, Held
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.policy import CheckpointConfig
from windlass.checkpoint.save import save
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CheckpointError, ConfigError
from windlass.launch.control_log import ControlLog
from windlass.launch.generation import Start, begin_generation, highest_generation
from windlass.launch.job import JobConfig, TrainConfig
from windlass.launch.origin import Origin, find_origin
from windlass.launch.resume_memory import Found, _Heard
from windlass.launch.tiers import adopt_newest


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


def by_torchrun(attempt: int, config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> Origin:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    return find_origin(config, Alone(), None, begin_generation(config, ProcessEnv(launcher="torchrun"), Alone()))


def test_a_run_that_is_refused_is_refused_again_when_torchrun_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path, 50)
    for attempt in (0, 1):
        with pytest.raises(ConfigError, match="has a checkpoint of step 50, which would be overwritten"):
            by_torchrun(attempt, job(tmp_path, "never"), monkeypatch)


def test_torchrun_starts_a_run_again_where_the_user_said_until_it_has_made_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, wanted = tmp_path / "run", str(checkpoint(tmp_path / "other", 100))
    checkpoint(run, 50)
    for attempt in (0, 1):
        origin = by_torchrun(attempt, job(run, wanted), monkeypatch)
        assert (origin.step, str(origin.checkpoint)) == (100, wanted)
    checkpoint(run, 120, generation=2)
    assert by_torchrun(2, job(run, wanted), monkeypatch).step == 120


class Machine:
    """Drives that hold one whole step, of the generation that this says."""

    def __init__(self, generation: int) -> None:
        self.generation, self.adopted = generation, 0

    def whole_steps(self) -> dict[int, dict[str, Any]]:
        return {50: {"step": 50, "generation": self.generation}}

    def adopt(self, step: int | None) -> None:
        self.adopted = step or 0


@pytest.mark.parametrize(("resume", "generation", "adopted"), [("never", 1, 0), ("never", 2, 50), ("auto", 1, 50)])
def test_a_restart_takes_from_the_drives_only_what_the_user_wants_to_go_on_from(
    resume: str, generation: int, adopted: int, tmp_path: Path
) -> None:
    log = ControlLog(tmp_path)
    for launch, starts in (("one", 1), ("two", 2)):
        log.append("launch", launch=launch, workers=1)
        for _ in range(starts):
            log.bump()
    start = begin_generation(job(tmp_path, resume), ProcessEnv(generation=3), Alone())
    assert start.restarted
    machine = Machine(generation)
    adopt_newest(machine, Alone(), -1, start.admits)  # type: ignore[arg-type]
    assert machine.adopted == adopted


def test_where_a_run_stands_it_knows_what_of_its_history_is_durable(tmp_path: Path) -> None:
    assert found(tmp_path / "new", Start()).base_at(0) == Base(0)
    run = tmp_path / "run"
    for step, generation in ((50, 1), (100, 1), (70, 2)):
        checkpoint(run, step, generation)
    assert found(run, Start(generation=3)).base_at(80) == Base(80, {STORAGE: 70}), "what began later is newer"
    went_back = found(run, Start(generation=3, left={2: 60}))
    assert went_back.base_at(60) == Base(60, {STORAGE: 50}), "what it has left does not count"
    named = str(checkpoint(tmp_path / "other", 30))
    assert found(tmp_path / "new", Start(), named).base_at(30) == Base(30, {STORAGE: 30})


def test_on_local_drives_only_a_step_that_all_ranks_have_there_is_durable() -> None:
    members = tuple(Member(rank, f"node-{rank}", f"node-{rank}", "", 0, "", 8) for rank in range(2))
    world = Membership("a" * 16, 1, 2, "none", 1, ((0,), (1,)), members, local_parity=False, chunk_bytes=256)

    def held(rank: int, step: int, tier: str) -> Held:
        return Held(f"node-{rank}", "", 0, tier, rank, "data", step, 1)

    drives = [held(0, 20, "local"), held(1, 20, "local"), held(0, 40, "local"), held(0, 10, "local")]
    memory = [held(0, 42, "ram"), held(1, 42, "ram")]
    given = _Heard([*drives, *memory], {1: world}, {}, [])
    survey: Any = None  # nothing is read
    there = Found(given, survey, (), {}).on_drives(42)
    assert there is not None and there.step == 20
    assert Found(given, survey, (), {}).on_drives(19) is None
