"""Our decoder against the library's classes with random weights: logits, gradients, import, export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from windlass.dist.errors import ModelError
from windlass.model.adapter import KNOWN
from windlass.model.build import build_model, logits_of, materialise, named_parameters
from windlass.model.config import ModelConfig
from windlass.model.flops import flops_per_token, num_parameters
from windlass.model.hf import hf_layout
from windlass.model.hf_config import family_of, read_hf_config, resolve_model
from windlass.model.hf_read import HfReader
from windlass.model.hf_write import export_hf

BASE = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
BASE |= {"pad_token_id": None, "initializer_range": 0.2}
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "initializer_range": 0.2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {**BASE, "rope_parameters": LLAMA3}),
    "llama-biased-tied": ("llama", {**BASE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {**BASE, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 32}),
    "mistral": ("mistral", {**BASE, "sliding_window": 7}),
    "mistral-wide-heads": ("mistral", {**BASE, "sliding_window": None, "head_dim": 10}),
    "qwen2": ("qwen2", {**BASE, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**BASE, **WINDOW, "max_window_layers": 0}),
    "qwen3": ("qwen3", {**BASE, "head_dim": 8}),
    "qwen3-biased": ("qwen3", {**BASE, **WINDOW, "head_dim": 8, "max_window_layers": 0, "attention_bias": True}),
}
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: CASES[name] for name in ("llama3", "gpt2", "mistral", "qwen2", "qwen3")},
    "qwen2-mixed-windows": ("qwen2", {**BASE, **WINDOW, "max_window_layers": 1}),
    **{kind: (kind, BASE) for kind in KNOWN[5:]},
}
TOKENS_BT = torch.randint(3, 61, (2, 21), generator=torch.Generator().manual_seed(5))
ONE_DOCUMENT = (torch.arange(21).expand(2, 21), torch.zeros_like(TOKENS_BT))


def library_model(case: tuple[str, dict[str, Any]]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(case[0], **case[1]), attn_implementation="sdpa"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at constants, which hide swapped ones
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module", autouse=True)
def quiet_library() -> Iterator[None]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one saved folder per case, written by the library itself."""
    root = tmp_path_factory.mktemp("hf")
    for name, case in {**CASES, **ADAPTED}.items():
        library_model(case).save_pretrained(root / name)
    return {name: root / name for name in {**CASES, **ADAPTED}}


def load(folder: Path, dtype: torch.dtype, kind: str = "decoder") -> Any:
    config = ModelConfig(kind=kind, hf_folder=str(folder), loss_chunk_tokens=10)
    model = build_model(config)
    with HfReader(folder, config) as reader:
        materialise(model, reader.fill, dtype)
    return model


def load_library(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    return normalise_exactly(model) if dtype == torch.float64 else model


def normalise_exactly(model: Any) -> Any:
    """Let the library's RMS norms compute in fp64: they always go through fp32, which would hide what is compared."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def forward(x: torch.Tensor, module: Any = module) -> torch.Tensor:
                return module.weight * (x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt())

            module.forward = forward
    return model


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def loss_and_grads(model: Any, config: ModelConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed loss, and gradients under the library's names and shapes."""
    context = model.context(*ONE_DOCUMENT, model.embed.tokens.weight.dtype)
    h_BTD = model.embed(TOKENS_BT, context)
    for block in model.blocks:
        h_BTD = block(h_BTD, context)
    loss = model.head(h_BTD, F.pad(TOKENS_BT, (0, 1), value=-100)[:, 1:])
    named = dict(named_parameters(model))
    grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    stacked = {t.name: torch.cat([grads[part] for part in t.parts]) for t in hf_layout(config)}
    return loss, {t.name: stacked[t.name].t() if t.transposed else stacked[t.name] for t in hf_layout(config)}


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_has_the_logits_of_the_library(name: str, folders: dict[str, Path]) -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        with torch.no_grad():
            theirs = load_library(folders[name], dtype)(TOKENS_BT).logits
            assert relative(logits_of(load(folders[name], dtype), TOKENS_BT, *ONE_DOCUMENT), theirs) < bound


@pytest.mark.parametrize("kind", ["decoder", "transformers"])
@pytest.mark.parametrize("name", [*sorted({*CASES} & {*ADAPTED}), "gpt2-untied", "qwen3-biased"])
def test_gradients_equal_those_of_the_library(name: str, kind: str, folders: dict[str, Path]) -> None:
    config = ModelConfig(kind=kind, hf_folder=str(folders[name]))
    library, ours = load_library(folders[name], torch.float64), load(folders[name], torch.float64, kind)
    if kind == "transformers":
        normalise_exactly(ours)
    expected = F.cross_entropy(
        library(TOKENS_BT).logits[:, :-1].flatten(0, 1), TOKENS_BT[:, 1:].flatten(), reduction="sum"
    )
    named = dict(library.named_parameters())
    wanted = dict(zip(named, torch.autograd.grad(expected, list(named.values())), strict=True))
    loss, grads = loss_and_grads(ours, config)
    assert relative(loss, expected) < 1e-12
    assert grads.keys() == wanted.keys()
    assert all(relative(grads[key], wanted[key]) < 1e-9 for key in wanted)


@pytest.mark.parametrize("name", ADAPTED)
def test_the_adapter_has_the_logits_of_the_whole_library_model(name: str, folders: dict[str, Path]) -> None:
    with torch.no_grad():
        theirs = load_library(folders[name], torch.float32)(TOKENS_BT).logits
        adapted = load(folders[name], torch.float32, "transformers")
        assert relative(logits_of(adapted, TOKENS_BT, *ONE_DOCUMENT), theirs) < 1e-5
    assert all(adapted.init(key).kind in ("normal", "ones", "zeros") for key in adapted.hf_names)


def test_the_adapter_keeps_documents_apart(folders: dict[str, Path]) -> None:
    documents_BT = torch.tensor([[0] * 9 + [1] * 12]).expand(2, 21)
    positions_BT = torch.tensor([[*range(9), *range(12)]]).expand(2, 21)
    for name in ("gpt2", "qwen2-mixed-windows"):
        adapted = load(folders[name], torch.float32, "transformers")
        ours = logits_of(adapted, TOKENS_BT, positions_BT, documents_BT)
        second = (torch.arange(12).expand(2, 12), torch.zeros(2, 12, dtype=torch.long))
        assert relative(ours[:, 9:], logits_of(adapted, TOKENS_BT[:, 9:], *second)) < 1e-5


@pytest.mark.parametrize("kind", ["decoder", "transformers"])
@pytest.mark.parametrize("name", ["llama3", "gpt2", "gpt2-untied", "mistral", "qwen2", "qwen3-biased"])
def test_an_exported_folder_gives_the_library_the_same_logits(
    name: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = load(folders[name], torch.float32, kind)
    config = resolve_model(ModelConfig(kind=kind, hf_folder=str(folders[name])))
    parameters = dict(named_parameters(model))
    out = export_hf(
        tmp_path / "out", config, parameters.__getitem__, torch.float32, max_shard_bytes=9000, eos_token_id=2
    )
    assert len(list(out.glob("*.safetensors"))) > 1
    exported, original = AutoModelForCausalLM.from_pretrained(out).eval(), load_library(folders[name], torch.float32)
    assert type(exported) is type(original)
    saved = original.state_dict()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in exported.state_dict().items())
    assert relative(exported(TOKENS_BT).logits, original(TOKENS_BT).logits) < 1e-6
    assert exported.generation_config.eos_token_id == 2
    half = export_hf(tmp_path / "half", config, parameters.__getitem__, torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    tied = original.config.tie_word_embeddings
    assert (exported.lm_head.weight is exported.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_survives_import_and_export(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = read_hf_config(folders[name])
    without_window = name == "mistral-wide-heads"  # then Mistral is Llama
    assert family_of(config) == ("llama" if without_window else CASES[name][0])
    model = load(folders[name], torch.float32)
    out = export_hf(tmp_path / "out", config, dict(named_parameters(model)).__getitem__, torch.float32)
    assert read_hf_config(out) == config


def test_both_spellings_of_rotary_settings_are_read(tmp_path: Path) -> None:
    new = {"model_type": "llama", **BASE, "rope_parameters": LLAMA3}
    old = {"model_type": "llama", **BASE, "rope_theta": LLAMA3["rope_theta"]}
    old["rope_scaling"] = {
        "type": "llama3",
        **{k: v for k, v in LLAMA3.items() if k not in ("rope_theta", "rope_type")},
    }
    found = []
    for content in (new, old):
        (tmp_path / "config.json").write_text(json.dumps(content))
        found.append(read_hf_config(tmp_path))
    assert found[0] == found[1]
    assert found[0].rope_theta == 500.0
    assert found[0].rope_scaling is not None and found[0].rope_scaling["rope_type"] == "llama3"


def test_resolving_a_folder_gives_every_kind_its_sizes(folders: dict[str, Path]) -> None:
    for kind in ("decoder", "transformers"):
        config = ModelConfig(kind=kind, hf_folder=str(folders["qwen2-window"]))
        resolved = resolve_model(config)
        assert (resolved.vocab_size, resolved.hidden_size, resolved.max_seq_len) == (61, 24, 64)
        assert resolve_model(resolved) == resolved
        counted = sum(p.numel() for p in library_model(CASES["qwen2-window"]).parameters())
        assert num_parameters(config) == counted
        assert flops_per_token(config, 8) > 6 * (counted - 61 * 24)


def test_an_unknown_library_class_is_refused_with_the_way_out(tmp_path: Path) -> None:
    content = {"model_type": "mixtral", **BASE, "num_local_experts": 2, "num_experts_per_tok": 1}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"model_type = 'mixtral' is not one of .* docs/your-own-model.md"):
        build_model(ModelConfig(kind="transformers", hf_folder=str(tmp_path)))
    with pytest.raises(ModelError, match=r"Set model\.kind = 'transformers'"):
        build_model(ModelConfig(hf_folder=str(tmp_path)))
