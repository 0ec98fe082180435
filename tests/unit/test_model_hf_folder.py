"""Reading and writing Hugging Face folders without the library: byte ranges, damage, atomic export."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from windlass.dist.errors import ModelError
from windlass.model.build import build_model, named_parameters
from windlass.model.config import ModelConfig
from windlass.model.hf_config import read_hf_config
from windlass.model.hf_read import HfReader
from windlass.model.hf_write import export_hf

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "max_seq_len": 16}
LLAMA = ModelConfig(**SMALL, num_kv_heads=1)
GPT2 = ModelConfig(
    **SMALL,
    norm="layernorm",
    positions="learned",
    mlp="gelu_tanh",
    **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "tie_embeddings"), True),
)


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = build_model(replace(config, hf_folder=None))
    shapes = {name: parameter.shape for name, parameter in named_parameters(model)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def saved(folder: Path, config: ModelConfig = LLAMA, dtype: torch.dtype = torch.float32, limit: int = 10**9) -> Path:
    return export_hf(folder, config, weights_of(config).__getitem__, dtype, max_shard_bytes=limit)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    config = LLAMA if request.param == "llama" else GPT2
    with HfReader(saved(tmp_path_factory.mktemp("hf") / "out", config, limit=900), config) as reader:
        yield reader, weights_of(config)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_of_any_parameter_reads_exactly_its_bytes(opened, data: st.DataObject) -> None:
    reader, weights = opened
    name = data.draw(st.sampled_from(sorted(weights)))
    flat = weights[name].view(-1)
    start = data.draw(st.integers(0, flat.numel()))
    stop = data.draw(st.integers(start, flat.numel()))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    out, before = torch.empty(stop - start, dtype=dtype), reader.bytes_read
    reader.fill(name, start, stop, out)
    assert torch.equal(out, flat[start:stop].to(dtype))
    assert reader.bytes_read - before == 4 * (stop - start)


def test_files_written_by_hand_are_what_the_format_library_reads(tmp_path: Path) -> None:
    folder, weights = saved(tmp_path / "out", GPT2, torch.bfloat16), weights_of(GPT2)
    tensors = load_file(folder / "model.safetensors")
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (8, 24)
    assert torch.equal(tensors["transformer.h.1.mlp.c_fc.weight"].t(), weights["blocks.1.mlp.up.weight"].bfloat16())
    assert "lm_head.weight" not in tensors


def test_the_original_gpt2_names_without_prefix_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out", GPT2)
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # a buffer that old versions saved
    save_file(tensors, file)
    out = torch.empty(64)
    with HfReader(folder, read_hf_config(folder)) as reader:
        reader.fill("blocks.1.attn.k.weight", 0, 64, out)
    assert torch.equal(out.view(8, 8), weights_of(GPT2)["blocks.1.attn.k.weight"])


def cut_tail(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def cut_head(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def garble_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(8)
        stream.write(b"\xff\xff")


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def edit(name: str, tensor: torch.Tensor | None):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name, None)
        save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_tail, r"model\.safetensors is truncated: tensor lm_head\.weight ends at byte"),
        (cut_head, r"model\.safetensors is truncated: 100 bytes"),
        (garble_header, r"model\.safetensors cannot be read as safetensors"),
        (only_pickles, r"pickle \(pytorch_model\.bin\).* convert it once: python -c"),
        (nothing, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
        (edit("model.norm.weight", None), r"lacks tensor model\.norm\.weight"),
        (edit("model.norm.weight", torch.ones(9)), r"model\.norm\.weight has shape \[9\], the model's is \[8\]"),
        (edit("model.norm.weight", torch.ones(8, dtype=torch.int8)), r"model\.norm\.weight is stored as I8"),
        (edit("model.layers.0.self_attn.q_proj.bias", torch.ones(8)), r"q_proj\.bias belongs to no parameter"),
    ],
)
def test_a_damaged_folder_is_named_with_its_tensor(damage, message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        HfReader(folder, LLAMA)


def test_a_missing_shard_and_a_lying_index_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out", limit=900)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    first, last = places["model.embed_tokens.weight"], places["lm_head.weight"]
    index.write_text(json.dumps({**content, "weight_map": {**places, "lm_head.weight": first}}))
    with pytest.raises(ModelError, match=f"{first} lacks tensor lm_head.weight"):
        HfReader(folder, LLAMA)
    index.write_text(json.dumps(content))
    (folder / last).unlink()
    with pytest.raises(ModelError, match=f"{last} does not exist, but .* places tensor lm_head.weight there"):
        HfReader(folder, LLAMA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "rope_scaling": None}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "t5"}, "model_type = 't5' is not one of gpt2, llama"),
    ],
)
def test_a_config_json_that_means_another_model_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "out") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ModelError, match=message):
        build_model(ModelConfig(hf_folder=str(file.parent)))


def test_a_folder_without_or_with_broken_config_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        build_model(ModelConfig(hf_folder=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        build_model(ModelConfig(hf_folder=str(tmp_path)))


def test_export_refuses_what_it_cannot_write_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, weights = tmp_path / "out", weights_of(LLAMA)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM, differs in model\.mlp = 'gelu' \('swiglu' there\)"):
        export_hf(target, ModelConfig(**SMALL, mlp="gelu"), weights.__getitem__, torch.float32)
    with pytest.raises(ModelError, match=r"cannot export torch\.int8"):
        export_hf(target, LLAMA, weights.__getitem__, torch.int8)
    with pytest.raises(ModelError, match=r"parameter embed\.tokens\.weight has shape \[3\]"):
        export_hf(target, LLAMA, lambda name: torch.ones(3), torch.float32)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        export_hf(target, LLAMA, weights.__getitem__, torch.float32, tokenizer_folder=tmp_path)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ModelError, match="No space left on device"):
            saved(target)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError, match="exists"):
        saved(saved(target))


def test_a_model_exports_after_the_folder_it_came_from_is_gone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out", replace(LLAMA, hf_folder=str(tmp_path / "gone")))
    assert replace(read_hf_config(folder), loss_chunk_tokens=LLAMA.loss_chunk_tokens) == LLAMA


def test_a_tokenizer_travels_with_the_export(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    weights = weights_of(LLAMA)
    out = export_hf(tmp_path / "out", LLAMA, weights.__getitem__, torch.float32, tokenizer_folder=source)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 16
