"""`windlass checkpoint ls | verify | export` as a user types them."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.checkpoint_doubles import FlatSource, even_shards, save_shards, some_state
from windlass.checkpoint.reader import read_manifest
from windlass.data.tokenizer import load_tokenizer, train_tokenizer
from windlass.dist.errors import CheckpointError
from windlass.launch.cli.checkpoint import app
from windlass.model.build import build_model, named_parameters
from windlass.model.config import ModelConfig


def windlass(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    if isinstance(result.exception, CheckpointError):
        raise result.exception
    return result


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        save_shards(tmp_path / "run" / "checkpoints", step, even_shards(some_state(step), 2))
    return tmp_path / "run"


def damage(run):
    folder = run / "checkpoints" / "step-00000002"
    piece = read_manifest(folder).tensors["model.embed.weight"].pieces[0]
    data = bytearray((folder / piece.file).read_bytes())
    data[piece.offset] ^= 1
    (folder / piece.file).write_bytes(data)
    return piece.file


def test_ls_shows_step_bytes_tensors_world_and_what_is_incomplete(run):
    (run / "checkpoints" / "step-00000001" / "__1_0.distcp").unlink()
    lines = windlass("ls", run).output.splitlines()
    assert lines[0].split() == ["STEP", "BYTES", "TENSORS", "WORLD", "AGE", "VALID?"]
    assert lines[1].split()[0] == "2" and lines[1].split()[3:5] == ["6", "2"] and lines[1].endswith("yes")
    assert lines[2].split()[:2] == ["1", "no:"] and "__1_0.distcp" in lines[2]


def test_ls_as_json(run):
    found = json.loads(windlass("ls", run / "checkpoints", "--json").output)
    assert [row["step"] for row in found] == [2, 1] and found[0]["tensors"] == 6 and found[0]["problem"] is None


def test_ls_of_nothing_says_so(tmp_path):
    assert "no checkpoints" in windlass("ls", tmp_path).output
    with pytest.raises(CheckpointError, match="no such folder"):
        windlass("ls", tmp_path / "nowhere")


def test_verify_names_damaged_files_and_tensors_and_exits_non_zero(run):
    assert windlass("verify", run).exit_code == 0
    file = damage(run)
    result = windlass("verify", run)
    assert result.exit_code == CheckpointError.exit_code
    assert file in result.output and "model.embed.weight" in result.output
    assert "step-00000001: valid" in result.output and "step-00000002: DAMAGED" in result.output
    assert windlass("verify", run / "checkpoints" / "step-00000001").exit_code == 0


def test_verify_of_a_folder_without_checkpoints_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        windlass("verify", tmp_path)


def test_export_refuses_a_checkpoint_that_names_no_model_or_an_unknown_one(run, tmp_path):
    with pytest.raises(CheckpointError, match="does not say what model"):
        windlass("export", run, "--to", "hf", "--out", tmp_path / "hf")
    extra = {"model": {"from_the_future": 1}, "versions": {"windlass": "9.9"}}
    save_shards(run / "checkpoints", 3, [FlatSource(some_state())], extra=extra)
    with pytest.raises(CheckpointError, match=r"from_the_future.*9\.9"):
        windlass("export", run, "--to", "hf", "--out", tmp_path / "hf")


@pytest.fixture
def trained(tmp_path):
    """A run whose newest checkpoint is damaged, and the tensors of the other."""
    config = ModelConfig(
        vocab_size=257, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_seq_len=8, norm="rmsnorm"
    )
    tokenizer = load_tokenizer("bytes")
    state = {f"model.{name}": torch.randn(p.shape) for name, p in named_parameters(build_model(config))}
    state["optimizer.step"] = torch.tensor(3)
    extra = {
        "model": asdict(config),
        "tokenizer": {"folder": str(tmp_path / "tokens"), "digest": tokenizer.facts.digest},
    }
    for step in (1, 2):
        folder = save_shards(tmp_path / "run" / "checkpoints", step, even_shards(state, 2), extra=extra).folder
    (folder / "__1_0.distcp").unlink()
    return tmp_path, state, tokenizer


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_export_of_a_run_writes_a_hugging_face_folder_of_its_newest_valid_checkpoint(trained, dtype, expected):
    folder, state, _ = trained
    result = windlass("export", folder / "run", "--to", "hf", "--out", folder / "hf", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert "step-00000001 ->" in result.output and "is gone: exported without one" in result.output
    assert json.loads((folder / "hf" / "config.json").read_text())["vocab_size"] == 257
    weights = load_file(next((folder / "hf").glob("*.safetensors")))
    assert {w.dtype for w in weights.values()} == {expected}
    embed = next(value for key, value in state.items() if key.startswith("model.embed"))
    assert any(torch.equal(w, embed.to(expected)) for w in weights.values())


def test_export_includes_the_tokenizer_of_the_data_if_it_is_still_the_same(trained):
    folder, _, tokenizer = trained
    (folder / "tokens").mkdir()
    tokenizer.save(folder / "tokens")
    windlass("export", folder / "run", "--out", folder / "hf")
    assert (folder / "hf" / "tokenizer.json").is_file()
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.facts.eos_id


def test_export_leaves_another_tokenizer_out_unless_it_is_asked_for(trained):
    folder, _, _ = trained
    (folder / "tokens").mkdir()
    train_tokenizer(["abc abd abe " * 50], 300)[0].save(folder / "tokens")
    result = windlass("export", folder / "run", "--out", folder / "hf")
    assert "is not the one that the model was trained with" in result.output
    assert not (folder / "hf" / "tokenizer.json").exists()
    windlass("export", folder / "run", "--out", folder / "hf2", "--tokenizer", folder / "tokens")
    assert (folder / "hf2" / "tokenizer.json").is_file()
