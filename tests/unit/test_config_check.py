"""Combinations that cannot work and settings without effect are refused before any process starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.dist.errors import ConfigError, DataError, PlanError, WindlassError
from windlass.launch.check import check_job
from windlass.launch.config import load_job, to_yaml


def told(tmp_path: Path, *overrides: str, world: int = 2, to_run: bool = False) -> str:
    path = tmp_path / "job.yaml"
    path.write_text("train: {steps: 100}\n")
    with pytest.raises(WindlassError) as caught:
        check_job(load_job(path, overrides), world, to_run=to_run)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.global_batch=7", "train.micro_batch=2"], ["train.global_batch = 7", "2 x 2 = 4", "Use 4 or 8"]),
        (["train.global_batch=1"], ["train.global_batch = 1", "Use 2."]),
        (["model.positions=learned", "train.seq_len=2048"], ["train.seq_len = 2048", "model.max_seq_len=2048"]),
        (["lr_scheduler.warmup_steps=100"], ["lr_scheduler.warmup_steps = 100", "train.steps = 100", "Use 10"]),
        (["lr_scheduler.decay_steps=5"], ["lr_scheduler.decay_steps = 5", "no effect", "only with wsd"]),
        (
            ["lr_scheduler.kind=wsd", "lr_scheduler.warmup_steps=50", "lr_scheduler.decay_steps=60"],
            ["lr_scheduler.decay_steps = 60", "Use at most 50"],
        ),
        (["lr_scheduler.kind=constant", "lr_scheduler.min_ratio=0.5"], ["lr_scheduler.min_ratio = 0.5", "no effect"]),
        (["optimizer.momentum=0.9"], ["optimizer.momentum = 0.9", "no effect", "optimizer.betas"]),
        (["optimizer.name=sgd", "optimizer.betas=[0.8, 0.9]"], ["optimizer.betas = [0.8, 0.9]", "no effect"]),
        (["optimizer.name=sgd", "optimizer.eps=1e-3"], ["optimizer.eps", "no effect"]),
        (["optimizer.betas=[0.9, 1.0]"], ["optimizer.betas = [0.9, 1.0]", "less than 1"]),
        (["optimizer.nonfinite=stop", "optimizer.max_skips=3"], ["optimizer.max_skips = 3", "no effect"]),
        (["precision.param=fp64", "precision.reduce=bf16"], ["precision.reduce = 'bf16'", "auto, fp64"]),
        (["precision.reduce=fp64"], ["precision.reduce = 'fp64'", "auto, fp32, bf16"]),
        (["zero.stage=2", "zero.reshard=each"], ["zero.reshard = 'each'", "only with 3"]),
        (["zero.prefetch=2"], ["zero.prefetch = 2", "zero.stage = 0"]),
        (["parallelism.dp_replicate=2"], ["parallelism.dp_replicate = 2", "zero.stage = 0"]),
        (["zero.stage=1", "parallelism.dp_replicate=2"], ["zero.stage = 1", "nothing is sharded", "dp_shard=2"]),
        (["activation.every=2"], ["activation.every = 2", "only with recompute"]),
        (["checkpoint.at_end=false", "checkpoint.keep=5"], ["checkpoint.keep = 5", "nothing is saved"]),
        (["checkpoint.every=200"], ["checkpoint.every = 200", "train.steps = 100"]),
        (["profiler.num_steps=5"], ["profiler.num_steps = 5", "profiler.start_step = 0"]),
        (["profiler.start_step=500"], ["profiler.start_step = 500", "train.steps = 100"]),
        (["train.device=cuda", "parallelism.transport=shm"], ["parallelism.transport = 'shm'", "auto or group"]),
        (["model.positions=learned", "model.rope_theta=5"], ["model.rope_theta", "no effect"]),
        (["model.num_heads=5", "model.hidden_size=192"], ["model."]),
        (["zero.stage=3", "zero.reshard=run"], ["zero.reshard = 'run'", "auto, each, turnaround or never"]),
        (["cluster.nvme_weights=[1, 2]"], ["cluster.nvme_weights = [1.0, 2.0]", "no effect", "cluster.nvme_paths"]),
        (
            ["cluster.nvme_paths=[a, b]", "cluster.nvme_weights=[1]"],
            ["cluster.nvme_weights = [1.0]", "2 positive numbers", "such as [1.0, 1.0]"],
        ),
        (["cluster.nvme_paths=[a]", "cluster.nvme_weights=[0]"], ["cluster.nvme_weights = [0.0]", "positive"]),
        (["cluster.nvme_paths=[a, a]"], ["cluster.nvme_paths = ['a', 'a']", "twice"]),
        (["pipeline.schedule=zbv"], ["pipeline.schedule = 'zbv'", "no effect", "parallelism.pp = 1"]),
        (["pipeline.vocab_chunk=64"], ["pipeline.vocab_chunk = 64", "no effect", "parallelism.pp = 1"]),
    ],
)
def test_what_cannot_work_names_the_keys_and_what_would(tmp_path: Path, overrides: list[str], parts: list[str]) -> None:
    text = told(tmp_path, *overrides)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.global_batch=3", "train.micro_batch=2"], ["train.global_batch = 3", "2 x 2 = 4", "Use 4."]),
        (["pipeline.schedule=1fb1"], ["pipeline.schedule = '1fb1'", "did you mean '1f1b'?", "vhalf", "schedule file"]),
        (["pipeline.schedule=no/such.txt"], ["pipeline.schedule = 'no/such.txt'", "no such file"]),
        (
            ["pipeline.schedule=1f1b", "pipeline.chunks=3"],
            ["pipeline.chunks = 3", "no effect", "only with interleaved"],
        ),
        (["pipeline.vocab=off", "pipeline.vocab_chunk=64"], ["pipeline.vocab_chunk = 64", "pipeline.vocab = 'off'"]),
        (["pipeline.vocab=off", "pipeline.vocab_shares=[1, 2]"], ["pipeline.vocab_shares = [1.0, 2.0]", "no effect"]),
        (["pipeline.vocab=3"], ["pipeline.vocab = '3'", "auto, off, 1, 2"]),
        (["pipeline.speeds=[1]"], ["pipeline.speeds = [1.0]", "2 positive numbers", "such as [1.0, 0.5]"]),
        (["pipeline.speeds=[1, 0]"], ["pipeline.speeds = [1.0, 0.0]", "2 positive numbers"]),
        (["pipeline.speeds=[1, .inf]"], ["pipeline.speeds = [1.0, inf]", "2 positive numbers"]),
        (["pipeline.vocab_shares=[0, 0]"], ["pipeline.vocab_shares = [0.0, 0.0]", "not all 0"]),
        (["pipeline.vocab_shares=[1, 1, 1]"], ["pipeline.vocab_shares = [1.0, 1.0, 1.0]", "2 numbers"]),
        (["pipeline.cut=[4, 0]"], ["pipeline.cut = [4, 0]", "1 or more"]),
        (["zero.stage=3", "zero.reshard=turnaround"], ["zero.reshard = 'turnaround'", "auto, run, each or never"]),
    ],
)
def test_what_a_pipeline_cannot_do_names_the_keys_and_what_would_work(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    text = told(tmp_path, "parallelism.pp=2", *overrides, world=4)
    assert all(part in text for part in parts), text


def test_a_vocabulary_share_of_zero_and_a_schedule_file_are_legal(tmp_path: Path) -> None:
    path, schedule = tmp_path / "job.yaml", tmp_path / "schedule.txt"
    schedule.write_text("")
    path.write_text(f"parallelism: {{pp: 2}}\npipeline: {{vocab_shares: [0, 1], schedule: {schedule}}}\n")
    assert check_job(load_job(path), 2, to_run=False).size("dp") == 1


def test_a_folder_for_state_that_is_missing_stops_a_run_but_not_a_plan_for_other_machines(tmp_path: Path) -> None:
    (tmp_path / "nvme0").mkdir()
    overrides = [f"cluster.nvme_paths=[{tmp_path}/nvm0]"]
    text = told(tmp_path, *overrides, to_run=True)
    assert "cluster.nvme_paths" in text and f"did you mean '{tmp_path}/nvme0'?" in text
    assert not (tmp_path / "nvm0").exists()
    assert check_job(load_job(tmp_path / "job.yaml", overrides), 1, to_run=False).world_size == 1


def test_a_mesh_that_does_not_divide_the_ranks_names_those_that_do(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("zero: {stage: 1}\nparallelism: {dp_shard: 4}\n")
    with pytest.raises(PlanError, match="6 ranks"):
        check_job(load_job(path), 6, to_run=False)


def test_asking_for_what_is_the_default_anyway_is_not_an_unused_setting(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("zero: {stage: 0, reshard: auto, prefetch: 1}\noptimizer: {momentum: 0.0}\n")
    assert check_job(load_job(path), 2, to_run=False).world_size == 2


@pytest.mark.parametrize("name", ["quickstart", "pretrain-125m", "pretrain-7b", "zero-7.5b"])
def test_the_resolved_configuration_of_a_shipped_job_passes_the_same_checks(tmp_path: Path, name: str) -> None:
    world = 64 if name in ("pretrain-7b", "zero-7.5b") else 2
    first = load_job(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(first.config))
    assert check_job(load_job(path), world, to_run=False) == check_job(first, world, to_run=False)


def test_a_run_needs_data(tmp_path: Path) -> None:
    assert "windlass data prepare" in told(tmp_path, to_run=True)
    both = ["data.path=a", "data.mixture=[{path: b, weight: 1}]"]
    assert "data.mixture" in told(tmp_path, *both, to_run=True)
    assert "weight" in told(tmp_path, "data.mixture=[{path: b, weight: -1}]", to_run=True)


def test_a_missing_or_empty_data_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"data: {{path: {tmp_path / 'nothing'}}}\n")
    with pytest.raises(DataError, match="nothing: no such folder"):
        check_job(load_job(path), 1)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="is empty"):
        check_job(load_job(path), 1)


def test_seq_len_beyond_max_seq_len_is_allowed_with_rotary_positions(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train: {seq_len: 4096}\nmodel: {max_seq_len: 1024}\n")
    assert check_job(load_job(path), 1, to_run=False).world_size == 1


def test_errors_are_config_errors_with_their_own_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("zero: {prefetch: 3}\n")
    with pytest.raises(ConfigError) as caught:
        check_job(load_job(path), 1, to_run=False)
    assert caught.value.exit_code == 2
    assert f"({path}:1)" in str(caught.value)
