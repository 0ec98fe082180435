"""Building, materialising and counting models, presets, and what the configuration refuses."""

from __future__ import annotations

import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from windlass.dist.errors import ConfigError, ModelError
from windlass.model.build import build_model, materialise, named_parameters
from windlass.model.config import ModelConfig, check_model
from windlass.model.flops import flops_per_token, num_parameters
from windlass.model.protocol import BlockModel

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs" / "model").glob("*.yaml"))
GPT = {"norm": "layernorm", "positions": "learned", "mlp": "gelu_tanh"}
GPT |= dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "tie_embeddings"), True)
SMALL = {"vocab_size": 50, "hidden_size": 24, "num_layers": 2, "num_heads": 2, "max_seq_len": 16}


def random_weights(model: BlockModel, dtype: torch.dtype = torch.float32) -> BlockModel:
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, start: int, stop: int, out_1d: torch.Tensor) -> None:
        init = model.init(name)
        values = torch.randn(stop - start, generator=generator, dtype=torch.float64) * init.std
        out_1d.copy_(values if init.kind == "normal" else torch.full_like(values, float(init.kind == "ones")))

    materialise(model, fill, dtype)
    return model


def summed_loss(model: BlockModel, tokens_BT: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    context = model.context(positions_BT, torch.zeros_like(tokens_BT), dtype)
    h_BTD = model.embed(tokens_BT, context)
    for block in model.blocks:
        h_BTD = block(h_BTD, context)
    return model.head(h_BTD, tokens_BT.roll(-1, 1))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_a_preset_has_the_parameters_its_first_line_states(path: Path) -> None:
    fields = yaml.safe_load(path.read_text())
    config = ModelConfig(**fields)
    check_model(config, fields)
    stated = re.match(r"# ([\d,]+) parameters; .+", path.read_text())
    assert stated and num_parameters(config) == int(stated[1].replace(",", ""))


def test_presets_have_the_published_sizes() -> None:
    published = {
        "gpt2": 124_439_808,
        "gpt2-xl": 1_557_611_200,
        "llama2-70b": 68_976_648_192,
        "llama3-8b": 8_030_261_248,
        "mistral-7b": 7_241_732_096,
        "qwen2-0.5b": 494_032_768,
        "qwen3-32b": 32_762_123_264,
    }
    for name, count in published.items():
        fields = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
        assert num_parameters(ModelConfig(**fields)) == count, name
    zero = ModelConfig(**yaml.safe_load((ROOT / "configs" / "model" / "zero-7.5b.yaml").read_text()))
    assert abs(num_parameters(zero) - 7.5e9) < 1e6


def test_a_built_model_uses_no_memory_and_names_its_parts() -> None:
    model = build_model(ModelConfig(**SMALL, **GPT))
    names = [name for name, parameter in named_parameters(model) if parameter.is_meta]
    assert names[0] == "embed.tokens.weight"
    assert "blocks.1.attn.q.bias" in names
    assert names[-1] == "head.norm.bias"  # the tied projection is named under the embedding
    assert isinstance(model, BlockModel)


def test_tied_parameters_stay_one_object_and_frozen_ones_frozen() -> None:
    model = build_model(ModelConfig(**SMALL, tie_embeddings=True))
    model.blocks[0].requires_grad_(False)
    random_weights(model)
    assert model.head.proj.weight is model.embed.tokens.weight
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    assert all(p.requires_grad for p in model.blocks[1].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [{}, GPT, {"qk_norm": True, "num_kv_heads": 1, "sliding_window": 4}])
def test_every_dtype_trains_and_the_loss_is_exact(kind: dict, dtype: torch.dtype) -> None:
    model = random_weights(build_model(ModelConfig(**SMALL, **kind, loss_chunk_tokens=7)), dtype)
    tokens_BT = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    loss = summed_loss(model, tokens_BT, dtype)
    parameters = [parameter for _, parameter in named_parameters(model)]
    grads = torch.autograd.grad(loss, parameters)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss.item() / 24 - math.log(50)) < 0.5
    assert all(g.dtype == dtype and g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def test_residual_projections_start_narrower() -> None:
    model = build_model(ModelConfig(**SMALL, init_std=0.1))
    assert model.init("blocks.0.attn.q.weight").std == 0.1
    assert model.init("blocks.0.mlp.down.weight").std == pytest.approx(0.05)
    assert model.init("blocks.0.attn.q_norm.weight").kind == "ones"
    assert model.init("head.norm.bias").kind == "zeros"


def test_flops_count_blocks_head_and_visible_attention() -> None:
    config = ModelConfig(**SMALL, tie_embeddings=True)
    counted = num_parameters(config)  # tied: the table counts once, in the head
    attention = 12 * 2 * 24
    assert flops_per_token(config, 10) == 6 * counted + attention * 10
    assert (
        flops_per_token(ModelConfig(**SMALL, tie_embeddings=True, sliding_window=4), 10) == 6 * counted + attention * 4
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_kv_heads = 3 .* one of \[1, 2, 4\]"),
        ({"hidden_size": 25}, "hidden_size = 26"),
        ({"head_dim": 5}, "head_dim = 5 is odd"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta is not used"),
        ({"positions": "learned", "rope_theta": 1e6}, "rope_theta .* needs positions: rope"),
        ({"factory": "a:b"}, "factory .* needs kind: custom"),
        ({"kind": "custom", "hf_folder": "x", "factory": "a:b"}, "hf_folder"),
        ({"kind": "custom"}, "model.factory = None"),
        ({"kind": "transformers"}, "hf_folder is not set"),
        ({"hf_folder": "x", "num_layers": 3}, "num_layers = 3 has no effect"),
        ({"hf_folder": "x", "preset": "gpt2"}, "both give the architecture"),
    ],
)
def test_a_config_that_cannot_work_names_its_key(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(ModelConfig(**{**SMALL, **fields}), {f"model.{key}" for key in fields})


def example_from_the_page() -> str:
    page = (ROOT / "docs" / "your-own-model.md").read_text()
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found
    return found[1]


def test_the_example_of_the_page_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    code = example_from_the_page()
    assert sum(1 for line in code.splitlines() if line.strip()) <= 33
    module = types.ModuleType("my_model")
    exec(compile(code, "docs/your-own-model.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_model", module)
    model = random_weights(build_model(ModelConfig(**SMALL, kind="custom", factory="my_model:MyModel")))
    parameters = [parameter for _, parameter in named_parameters(model)]
    tokens_BT = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        loss = summed_loss(model, tokens_BT)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss / 24, parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(grad, alpha=0.5)
    assert losses[2] < losses[1] < losses[0]


class _Parts(nn.Module):
    def __init__(self, embed: nn.Module, lacking: str | None = None) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = embed, nn.ModuleList(), nn.Identity()
        if lacking:
            delattr(self, lacking)

    def context(self) -> None:
        return None

    def init(self) -> None:
        return None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: _Parts(nn.Identity(), "head"), "without head"),
        (lambda c: _Parts(nn.Linear(2, 2, device="cpu")), "weight is on cpu, not on 'meta'"),
        (lambda c: _Parts(nn.BatchNorm1d(2)), "buffer running_mean has no values"),
    ],
)
def test_a_factory_that_breaks_the_protocol_is_told_how(make, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("broken_model")
    module.build = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_model", module)
    with pytest.raises(ModelError, match=message):
        build_model(ModelConfig(kind="custom", factory="broken_model:build"))


def test_a_factory_that_does_not_exist_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'no_such_module:f' cannot be loaded"):
        build_model(ModelConfig(kind="custom", factory="no_such_module:f"))
