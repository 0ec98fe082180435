"""Whole runs on one and two ranks: the same losses, validation and samples however they are started and interrupted."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import outcomes, run_world
from windlass.checkpoint.policy import CheckpointConfig
from windlass.data.config import DataConfig
from windlass.data.prepare import prepare
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import ConfigError, PlanError
from windlass.dist.mesh import ParallelismConfig
from windlass.launch.events import Event, Stepped
from windlass.launch.job import JobConfig, TrainConfig
from windlass.launch.metrics import MetricsConfig, read_metrics
from windlass.launch.run import build_run, run_worker
from windlass.launch.run_folder import RunFolder, RunLock
from windlass.launch.trainer import Trainer
from windlass.model.config import ModelConfig
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.pipeline.policy import PipelineConfig
from windlass.parallel.zero import ZeroConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away", "from", "it"]
    for number in range(40):
        text = " ".join(words[(number * i + i * i) % len(words)] for i in range(60))
        (folder / f"{number}.txt").write_text(text)
    prepare([folder], folder / "tokens", tokenizer="bytes", validation=0.2, workers=1)
    return folder / "tokens"


def job(data: Path, run: Path, **train: Any) -> JobConfig:
    """A model of a few thousand parameters; global batch 4, which 1, 2 and 4 ranks divide."""
    return JobConfig(
        model=ModelConfig(vocab_size=257, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32),
        data=DataConfig(path=str(data)),
        train=TrainConfig(
            **{"steps": 6, "seq_len": 16, "micro_batch": 2, "global_batch": 4, "run_dir": str(run), "device": "cpu",
               "eval_batches": 5} | train
        ),
        optimizer=OptimizerConfig(lr=0.01),
        metrics=MetricsConfig(tensorboard=False),
        parallelism=ParallelismConfig(timeout_s=60),
    )  # fmt: skip


def train(env: ProcessEnv, config: JobConfig) -> int:
    return run_worker(config, env)


class StopAt:
    """A sink that sends this process a signal after a step."""

    def __init__(self, step: int, signum: int) -> None:
        self.step, self.signum = step, signum

    def write(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == self.step:
            os.kill(os.getpid(), self.signum)

    def close(self) -> None:
        """Nothing to store."""


def train_until(env: ProcessEnv, config: JobConfig, rank: int, step: int) -> tuple[str, int]:
    with build_run(config, env) as run:
        if env.rank == rank:
            run.events.sinks.append(StopAt(step, signal.SIGTERM))
        ended = Trainer(run).train()
    return ended.reason, ended.step


def history(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(run / "metrics.jsonl") if entry.get("event") == event]


def losses(run: Path) -> dict[int, tuple[float, list[int]]]:
    return {entry["step"]: (entry["loss"], entry["samples"]) for entry in history(run)}


def test_one_and_two_ranks_see_the_same_samples_and_validate_on_the_same_set(data: Path, tmp_path: Path) -> None:
    assert run_world(1, train, job(data, tmp_path / "one"), with_env=True) == [0]
    assert run_world(2, train, job(data, tmp_path / "two"), with_env=True) == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    for step in one:
        assert one[step][1] == two[step][1] == [4 * (step - 1), 4 * step]
        assert one[step][0] == pytest.approx(two[step][0], rel=1e-4)
    first, last = zip(history(tmp_path / "one", "eval"), history(tmp_path / "two", "eval"), strict=True)
    for a, b in (first, last):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert last[0]["loss"] < first[0]["loss"]
    assert first[0]["bits_per_byte"] == pytest.approx(first[0]["loss"] / 0.6931471805599453)  # one byte per token
    written = {path.name for path in (tmp_path / "two").iterdir()}
    assert written == {"config.yaml", "plan.json", "metrics.jsonl", "log.txt", "checkpoints", "traces", "lock"}
    ended = history(tmp_path / "two", "exit")[0]
    assert (ended["reason"], ended["ok"], ended["warnings"]) == ("done", True, [])
    for state in ("param", "grad", "exp_avg", "exp_avg_sq"):
        assert ended["measured_bytes"][state] == ended["predicted_bytes"][state] > 0


def test_a_run_stopped_by_a_signal_on_one_rank_resumes_bitwise(data: Path, tmp_path: Path) -> None:
    whole, parts = job(data, tmp_path / "whole"), job(data, tmp_path / "parts")
    assert run_world(2, train, replace(whole, zero=ZeroConfig(stage=2)), with_env=True) == [0, 0]
    stopped = run_world(2, train_until, replace(parts, zero=ZeroConfig(stage=2)), 1, 2, with_env=True)
    assert stopped[0] == stopped[1]
    reason, step = stopped[0]
    assert (reason, history(tmp_path / "parts", "exit")[0]["ok"]) == ("SIGTERM", True)
    assert 2 <= step < 6
    assert (tmp_path / "parts" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert run_world(2, train, replace(parts, zero=ZeroConfig(stage=2)), with_env=True) == [0, 0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert history(tmp_path / "parts", "resume")[0]["changes"] == []


def test_a_killed_run_resumes_on_another_number_of_ranks_and_stage_with_the_same_samples(
    data: Path, tmp_path: Path
) -> None:
    config = replace(job(data, tmp_path / "run"), checkpoint=CheckpointConfig(every=2), zero=ZeroConfig(stage=3))
    found = outcomes(2, train, config, with_env=True, env={"WINDLASS_FAULT": "kill:rank=1:step=4"})
    assert found[0].error is not None
    assert "rank 1" in str(found[0].error)
    assert history(tmp_path / "run", "exit")[0]["ok"] is False
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert run_world(1, train, replace(config, zero=ZeroConfig(stage=0)), with_env=True) == [0]
    (resumed,) = history(tmp_path / "run", "resume")
    assert resumed["step"] == 2
    assert resumed["changes"] == ["world size was 2, is 1", "zero.stage was 3, is 0"]
    assert [samples for _, samples in losses(tmp_path / "run").values()] == [[4 * s, 4 * s + 4] for s in range(6)]
    assert run_world(2, train, job(data, tmp_path / "whole"), with_env=True) == [0, 0]
    for step, (loss, _) in losses(tmp_path / "whole").items():
        assert losses(tmp_path / "run")[step][0] == pytest.approx(loss, rel=1e-4)


def test_a_full_disk_while_saving_does_not_end_a_run_on_any_rank(data: Path, tmp_path: Path) -> None:
    config = replace(job(data, tmp_path / "run"), checkpoint=CheckpointConfig(every=2))
    fault = {"WINDLASS_FAULT": "enospc:checkpoint:rank=1:step=4"}
    assert run_world(2, train, config, with_env=True, env=fault) == [0, 0]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000006"]
    (warning,) = history(tmp_path / "run", "warning")
    assert warning["message"].startswith("CHECKPOINT NOT SAVED, training goes on: checkpoint of step 4")
    assert "No space left on device" in warning["message"]
    assert len(history(tmp_path / "run", "exit")[0]["warnings"]) == 1


def test_a_damaged_checkpoint_is_passed_over_and_named(data: Path, tmp_path: Path) -> None:
    config = replace(job(data, tmp_path / "run", steps=4), checkpoint=CheckpointConfig(every=2))
    assert run_world(1, train, config, with_env=True) == [0]
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run_world(1, train, replace(config, train=replace(config.train, steps=5)), with_env=True) == [0]
    (resumed,) = history(tmp_path / "run", "resume")
    assert resumed["step"] == 2
    assert len(resumed["passed_over"]) == 1
    assert resumed["passed_over"][0].startswith("step-00000004: ")
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5]


def test_a_run_folder_in_use_is_refused_before_ranks_meet(data: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    with RunLock(folder), pytest.raises(ConfigError, match=f"in use by another run \\(process {os.getpid()} on "):
        run_world(1, train, job(data, folder.root), with_env=True)
    assert not folder.metrics.exists()


def test_ranks_started_with_different_jobs_stop_and_name_the_key(data: Path, tmp_path: Path) -> None:
    found = outcomes(2, train_by_rank, [job(data, tmp_path / "run", steps=steps) for steps in (6, 7)], with_env=True)
    for outcome in found:
        assert "config.train.steps is 6 on rank 0 and 7 on rank 1" in str(outcome.error)


def train_by_rank(env: ProcessEnv, configs: list[JobConfig]) -> int:
    return run_worker(configs[env.rank], env)


def test_a_job_that_would_overwrite_its_checkpoints_is_refused(data: Path, tmp_path: Path) -> None:
    config = job(data, tmp_path / "run", steps=2)
    assert run_world(1, train, config, with_env=True) == [0]
    before = (tmp_path / "run" / "config.yaml").read_text()
    never = replace(config, checkpoint=CheckpointConfig(resume="never"))
    with pytest.raises(ConfigError, match="has a checkpoint of step 2"):
        run_world(1, train, never, with_env=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    branch = replace(
        config,
        train=replace(config.train, run_dir=str(tmp_path / "branch"), steps=3),
        checkpoint=CheckpointConfig(resume=str(tmp_path / "run")),
    )
    assert run_world(1, train, branch, with_env=True) == [0]
    assert list(losses(tmp_path / "branch")) == [3]
    assert json.loads((tmp_path / "branch" / "plan.json").read_text())["world_size"] == 1


def train_from(env: ProcessEnv, config: JobConfig, folders: list[Path]) -> int:
    os.chdir(folders[env.rank])
    return run_worker(config, env)


def test_ranks_with_different_schedules_stop_at_the_first_action_that_differs(data: Path, tmp_path: Path) -> None:
    header = "# stage_rank: 0 1\n# vocab: 0\n# micro_batches: 2\n0: 0F0 0F1 0B0 0B1\n"
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder, row in zip(folders, ("1F0 1B0 1F1 1B1", "1F0 1F1 1B0 1B1"), strict=True):
        folder.mkdir()
        (folder / "own.txt").write_text(f"{header}1: {row}\n")
    config = replace(
        job(data, tmp_path / "run"),
        parallelism=ParallelismConfig(pp=2, timeout_s=60),
        pipeline=PipelineConfig(schedule="own.txt"),
    )
    for outcome in outcomes(2, train_from, config, folders, with_env=True):
        message = str(outcome.error)
        assert isinstance(outcome.error, PlanError), outcome.text
        assert "pipeline.ranks[1][1] is '1F0' on rank 0 and '1RECV_F1' on rank 1" in message
