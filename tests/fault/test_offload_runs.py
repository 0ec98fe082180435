"""Whole runs with state on nvme: killed at a transfer and resumed, in each other's way, without room, over budget.

Each goes through the command line as a process of its own; what a single file or engine does is in the other files of
this folder and in tests/parity.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from windlass.data.prepare import prepare

JOB = """
model: {vocab_size: 257, hidden_size: 32, num_layers: 3, num_heads: 2, max_seq_len: 64, tie_embeddings: true}
train: {steps: 5, seq_len: 32, micro_batch: 2, eval_batches: 1}
optimizer: {lr: 1e-2, clip_norm: 2.0}
zero: {stage: 3}
offload: {policy: fuyou, chunk: 4096}
checkpoint: {at_end: false}
metrics: {tensorboard: false, log_every: 1}
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox " * (20 + i))
    prepare([folder], folder / "tokens", validation=0.3, workers=1)
    return folder / "tokens"


class Runs:
    """Runs of one small job, each in a process."""

    def __init__(self, tokens: Path, folder: Path) -> None:
        self.folder, self.nvme = folder, folder / "nvme"
        self.nvme.mkdir()
        self._job = folder / "job.yaml"
        self._job.write_text(JOB)
        self._tokens = tokens

    def start(self, name: str, *overrides: str, fault: str = "") -> subprocess.Popen[str]:
        """Start a run in its own folder."""
        given = [f"data.path={self._tokens}", f"train.run_dir={self.folder / name}"]
        where = f"cluster.nvme_paths=[{self.nvme}]"
        environ = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"WINDLASS_FAULT": fault} if fault else {})
        return subprocess.Popen(
            [sys.executable, "-m", "windlass", "train", str(self._job), *given, where, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environ,
        )

    def train(self, name: str, *overrides: str, fault: str = "") -> tuple[int, str]:
        """Run to the end; return exit code and what it said."""
        process = self.start(name, *overrides, fault=fault)
        text = process.communicate(timeout=150)[0]
        assert "Traceback" not in text, text
        return process.returncode, text

    def losses(self, name: str) -> dict[int, tuple[float, float]]:
        """Return loss and norm by step; a step that was made again counts as it was made last."""
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "event" not in row}

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row.get("event") == kind]

    def left(self) -> list[str]:
        """Return what is in the drive's folder."""
        return sorted(p.name for p in self.nvme.iterdir())


@pytest.fixture
def runs(tokens: Path, tmp_path: Path) -> Runs:
    return Runs(tokens, tmp_path)


@pytest.mark.parametrize(
    ("workers", "fault"),
    [
        pytest.param(1, "kill:nvme.write:step=63", marks=pytest.mark.soak),
        (1, "kill:nvme.commit:step=3"),
        pytest.param(2, "kill:nvme.write:rank=1:step=33", marks=pytest.mark.soak),
    ],
)
def test_a_run_killed_at_a_transfer_goes_on_from_the_last_whole_step_as_if_nothing_had_been(
    runs: Runs, workers: int, fault: str
) -> None:
    many = f"launch.workers={workers}"
    code, text = runs.train("through", many)
    assert code == 0, text
    code, text = runs.train("killed", many, fault=fault)
    assert code != 0, text
    code, text = runs.train("killed", many)
    assert code == 0, text
    resumed = runs.events("killed", "resume")
    assert resumed and resumed[0]["folder"] == "state on nvme" and resumed[0]["step"] >= 1, text
    assert runs.losses("killed") == runs.losses("through")
    assert [e["loss"] for e in runs.events("killed", "eval")][-1] == runs.events("through", "eval")[-1]["loss"]


def test_the_losses_are_those_of_a_run_without_offload_and_a_saved_run_leaves_no_file(runs: Runs) -> None:
    code, text = runs.train("plain", "offload.policy=none", "offload.chunk=4194304")
    assert code == 0, text
    code, text = runs.train("offloaded", "checkpoint.at_end=true")
    assert code == 0, text
    assert runs.losses("offloaded") == runs.losses("plain")
    assert runs.left() == []


def test_two_runs_in_one_folder_do_not_touch_each_others_state(runs: Runs) -> None:
    first = runs.start("same", "train.steps=100000")
    try:
        assert first.stdout is not None
        assert any("step: 2 " in line for line in iter(first.stdout.readline, ""))
        code, text = runs.train("same")
        assert code != 0 and "same" in text and ("in use" in text or "pid" in text), text
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_a_drive_that_is_full_in_the_middle_ends_the_run_with_what_to_do(runs: Runs) -> None:
    code, text = runs.train("full", fault="enospc:nvme.write:step=30")
    assert code == 7, text
    assert "No space left on device" in text and "cluster.nvme_paths" in text
    code, text = runs.train("full")
    assert code == 0, text


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("offload.host_bytes=20kB", "offload.host_bytes"),
        pytest.param("offload.device_bytes=100kB", "offload.device_bytes", marks=pytest.mark.soak),
        pytest.param("offload.nvme_bytes=50kB", "offload.nvme_bytes", marks=pytest.mark.soak),
    ],
)
def test_a_budget_that_is_too_small_is_refused_before_training_with_the_one_that_works(
    runs: Runs, override: str, needed: str
) -> None:
    code, text = runs.train("small", override)
    assert code in (3, 11), text
    assert needed in text
    assert not (runs.folder / "small" / "metrics.jsonl").exists() or not runs.losses("small")


def test_a_misspelt_folder_is_named_and_never_made(runs: Runs) -> None:
    wrong = runs.folder / "nvmee"
    code, text = runs.train("lost", f"cluster.nvme_paths=[{wrong}]")
    assert code == 2, text
    assert "nvmee" in text and "did you mean" in text
    assert not wrong.exists()


@pytest.mark.soak
def test_what_the_drives_hold_is_not_written_over_by_records_cut_otherwise_nor_taken_for_another_past(
    runs: Runs,
) -> None:
    code, text = runs.train("past", fault="kill:nvme.write:step=63")
    assert code != 0, text
    code, text = runs.train("past", "offload.chunk=2048")
    assert code == 7 and "offload.chunk" in text and "holds step" in text, text
    shutil.rmtree(runs.folder / "past")
    code, text = runs.train("past")
    assert code == 0, text
    assert not runs.events("past", "resume") and min(runs.losses("past")) == 1
