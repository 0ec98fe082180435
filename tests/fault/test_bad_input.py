"""Every kind of bad input a user can give `windlass train`: one clear error, its exit code, and nothing lost.

Each goes through the command line in this process. What needs several ranks (a rank that raises or is killed, a full
disk on one of them) is in tests/ray/test_launch_ways.py, tests/world/test_launch_local.py and
tests/world/test_trainer_world.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from windlass.data.prepare import prepare
from windlass.launch.cli import main

TINY = (
    "model: {vocab_size: 257, hidden_size: 32, num_layers: 2, num_heads: 2, max_seq_len: 64}\n"
    "train: {steps: 2, seq_len: 32, micro_batch: 2, eval_batches: 1}\n"
    "metrics: {tensorboard: false}\n"
)


HOLD_THE_LOCK = """
import sys
from pathlib import Path
from windlass.launch.run_folder import RunFolder, RunLock
folder = RunFolder(Path(sys.argv[1]))
folder.create()
with RunLock(folder):
    print("held", flush=True)
    sys.stdin.read()
"""
LLAMA = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox " * (20 + i))
    prepare([folder], folder / "tokens", validation=0.3, workers=1)
    return folder / "tokens"


class Cli:
    """Runs `windlass train` on a small job and keeps what it said."""

    def __init__(self, tokens: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.run_dir = folder / "run"
        self._job = folder / "job.yaml"
        self._job.write_text(TINY)
        self._defaults = [f"data.path={tokens}", f"train.run_dir={self.run_dir}"]
        self._capfd = capfd

    def train(self, *overrides: str, code: int = 0) -> str:
        """Train, check the exit code, and return everything printed."""
        with pytest.raises(SystemExit) as ended:
            main(["train", str(self._job), *self._defaults, *overrides])
        out, err = self._capfd.readouterr()
        assert (ended.value.code or 0) == code, out + err
        assert "Traceback" not in out + err
        return out + err

    def steps(self) -> list[str]:
        return sorted(p.name for p in (self.run_dir / "checkpoints").iterdir())


@pytest.fixture
def cli(tokens: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tokens, tmp_path, capfd)


def test_a_missing_or_empty_data_folder_is_named(cli: Cli, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in cli.train(f"data.path={tmp_path / 'nowhere'}", code=4)
    (tmp_path / "empty").mkdir()
    said = cli.train(f"data.path={tmp_path / 'empty'}", code=4)
    assert str(tmp_path / "empty") in said and "windlass data prepare" in said
    assert not cli.run_dir.exists()


def test_data_tokenized_otherwise_than_the_model_is_refused(cli: Cli, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("some text " * 200)
    for name, words in (("ours", "alpha beta gamma "), ("theirs", "delta epsilon zeta ")):
        source = tmp_path / f"{name}.txt"
        source.write_text(words * 300)
        with pytest.raises(SystemExit):
            main(["data", "tokenizer", str(source), "--vocab", "270", "--out", str(tmp_path / name)])
    prepare([texts], tmp_path / "other", str(tmp_path / "theirs" / "tokenizer.json"), validation=0.0, workers=1)
    model = tmp_path / "model"
    cli.train("train.steps=1", f"data.path={tmp_path / 'other'}", "model.vocab_size=270")
    with pytest.raises(SystemExit):
        main(["checkpoint", "export", str(cli.run_dir), "--to", "hf", "--out", str(model)])
    (model / "tokenizer.json").write_bytes((tmp_path / "ours" / "tokenizer.json").read_bytes())
    cli._job.write_text("train: {steps: 1, seq_len: 32, micro_batch: 2}\n")
    said = cli.train(
        f"model.hf_folder={model}", f"data.path={tmp_path / 'other'}", "train.run_dir=" + str(tmp_path / "r2"), code=4
    )
    assert "tokenizer" in said


def test_a_vocabulary_smaller_than_a_token_id_is_refused(cli: Cli) -> None:
    said = cli.train("model.vocab_size=100", code=4)
    assert "vocab" in said and "257" in said


def test_a_world_that_the_mesh_does_not_divide_is_refused_before_any_process_starts(cli: Cli) -> None:
    said = cli.train("launch.workers=2", "parallelism.dp_shard=3", code=3)
    assert "dp_shard" in said and "2 ranks" in said


def test_a_checkpoint_of_another_model_names_the_first_differing_tensor(cli: Cli) -> None:
    cli.train()
    said = cli.train("model.hidden_size=64", "train.steps=4", code=8)
    assert "embed." in said and "32" in said and "64" in said
    assert cli.steps() == ["step-00000002"]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(cli: Cli, damage: str) -> None:
    cli.train("checkpoint.every=1")
    assert cli.steps() == ["step-00000001", "step-00000002"]
    file = cli.run_dir / "checkpoints" / "step-00000002" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data) if damage == "flipped" else bytes(data[: len(data) // 2]))
    said = cli.train("checkpoint.every=1", "train.steps=3")
    assert "step-00000002" in said and "step-00000001" in said
    last = json.loads((cli.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "exit" and last["step"] == 3


def test_a_full_disk_while_saving_is_a_loud_warning_and_training_goes_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.train()
    before = {p: p.read_bytes() for p in (cli.run_dir / "checkpoints" / "step-00000002").iterdir()}
    monkeypatch.setenv("WINDLASS_FAULT", "enospc:checkpoint")
    said = cli.train("train.steps=4")
    assert "CHECKPOINT NOT SAVED" in said and "No space left" in said and "step: 4" in said
    assert {p: p.read_bytes() for p in before} == before
    assert cli.steps() == ["step-00000002"]


def test_a_run_folder_in_use_is_refused(cli: Cli) -> None:
    cli.run_dir.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLD_THE_LOCK,
            str(cli.run_dir),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    said = cli.train(code=2)
    holder.communicate("")
    assert str(holder.pid) in said and "run" in said


def test_an_hf_folder_with_only_a_pickle_is_refused(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    torch.save({}, folder / "pytorch_model.bin")
    cli._job.write_text("train: {steps: 1, seq_len: 32}\n")
    said = cli.train(f"model.hf_folder={folder}", code=5)
    assert "safetensors" in said
