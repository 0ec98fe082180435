"""Every kind of pipeline that a user can ask for and not get: one line that names the value that would work.

Each goes through `windlass plan` in this process, which plans as `windlass train` does before any rank starts. What
happens to a pipeline that has started (a rank that is killed) is in tests/world/.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.launch.cli import main

TINY = (
    "model: {vocab_size: 257, hidden_size: 32, num_layers: 4, num_heads: 2, max_seq_len: 64}\n"
    "train: {seq_len: 32, micro_batch: 2, global_batch: 4}\n"
    "parallelism: {pp: 2}\n"
    "launch: {workers: 2}\n"
)
HEADER = "# stage_rank: 0 1\n# vocab: 0\n# micro_batches: 2\n"
WORKS = HEADER + "0: 0F0 0F1 0B0 0B1\n1: 1F0 1B0 1F1 1B1\n"


class Plans:
    """Plans a small job and keeps what was said."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self._job = folder / "job.yaml"
        self._job.write_text(TINY)
        self.file = folder / "own.txt"
        self._capfd = capfd

    def plan(self, *overrides: str, code: int = 3) -> str:
        """Plan, check the exit code, and return what was printed as one line."""
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(self._job), *overrides])
        out, err = self._capfd.readouterr()
        assert (ended.value.code or 0) == code, out + err
        assert "Traceback" not in out + err
        assert err.count("error:") == (code != 0)
        return " ".join((out + err).split())

    def plan_file(self, text: str, *overrides: str, code: int = 3) -> str:
        """Plan with a schedule of one's own."""
        self.file.write_text(text)
        return self.plan(f"pipeline.schedule={self.file}", *overrides, code=code)


@pytest.fixture
def plans(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Plans:
    return Plans(tmp_path, capfd)


def test_more_pipeline_ranks_than_blocks_name_the_most_that_work(plans: Plans) -> None:
    assert "Use parallelism.pp=4 or less" in plans.plan("parallelism.pp=5", "launch.workers=5")
    plans.plan("parallelism.pp=4", "launch.workers=4", code=0)


def test_more_stages_than_blocks_name_the_schedules_that_work(plans: Plans) -> None:
    said = plans.plan("parallelism.pp=4", "launch.workers=4", "pipeline.schedule=vhalf")
    assert "needs 8 stages" in said and "has 4 blocks" in said
    assert "Use pipeline.schedule=gpipe or 1f1b or zb1p, or parallelism.pp=2" in said
    plans.plan("parallelism.pp=4", "launch.workers=4", "pipeline.schedule=zb1p", code=0)
    plans.plan("pipeline.schedule=vhalf", code=0)


@pytest.mark.parametrize(("batch", "has"), [(2, 1), (8, 4)])
def test_other_micro_batches_than_a_schedule_file_needs_name_the_batch_that_works(
    plans: Plans, batch: int, has: int
) -> None:
    said = plans.plan_file(WORKS, f"train.global_batch={batch}")
    assert str(plans.file) in said and "is for 2 micro-batches" in said and f"has {has}." in said
    assert "Use train.global_batch=4" in said
    plans.plan_file(WORKS, "train.global_batch=4", code=0)


def test_a_vocabulary_smaller_than_the_ranks_it_is_cut_over_is_refused_and_auto_leaves_it_whole(plans: Plans) -> None:
    small = ("model.vocab_size=3", "parallelism.pp=4", "launch.workers=4")
    said = plans.plan(*small, "pipeline.vocab=2", "pipeline.schedule=1f1b")
    assert "3" in said and "4" in said and "pipeline.vocab=off" in said
    assert "without vocabulary passes" in plans.plan(*small, code=0)


def test_a_schedule_file_with_a_cycle_says_who_waits_for_whom_and_what_must_come_first(plans: Plans) -> None:
    said = plans.plan_file(HEADER + "0: 0F0 0B0 0F1 0B1\n1: 1F1 1B1 1F0 1B0\n")
    assert "rank 0 waits in 0B0 for 1B0 of rank 1, which waits in 1F1 for 0F1 of rank 0" in said
    assert "must come before 1F1 on rank 1" in said


def test_a_schedule_file_with_a_missing_receive_names_the_receive(plans: Plans) -> None:
    said = plans.plan_file(
        HEADER + "0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1\n"
        "1: 1RECV_F0 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1\n"
    )
    assert "rank 1 lacks 1RECV_F1" in said


def test_a_stage_that_does_not_fit_names_the_cut_that_does(plans: Plans) -> None:
    heavy = ("model.hidden_size=512", "model.num_heads=8", "cluster.device_bytes=8e8", "pipeline.schedule=1f1b")
    said = plans.plan(*heavy, "pipeline.cut=[3,1]")
    assert "pipeline rank 0 with 3 blocks does not fit" in said and said.endswith("Use pipeline.cut=[]")
    plans.plan(*heavy, code=0)


def test_a_model_that_no_cut_makes_fit_says_how_many_bytes_are_lacking(plans: Plans) -> None:
    said = plans.plan("model.hidden_size=512", "model.num_heads=8", "cluster.device_bytes=7e8")
    assert "does not fit" in said and "GB more" in said
