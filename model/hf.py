"""Hugging Face tensor names <-> ours, in both directions from one table.

A Hugging Face tensor is one or more of our parameters stacked along dim 0, and in GPT-2 stored transposed (its
"Conv1D" keeps (in, out)). Must not know: files, config.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from windlass.model.build import build_model, named_parameters
from windlass.model.config import ModelConfig
from windlass.model.hf_config import family_of, resolve_model


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face folder and the parameters it holds.

    Invariant:   shape == (transposed of) the stack of `parts` along dim 0
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    transposed: bool


# (our modules, stacked; their module; stored transposed)
_Row = tuple[tuple[str, ...], str, bool]

_LLAMA_OUTER: tuple[_Row, ...] = (
    (("embed.tokens",), "model.embed_tokens", False),
    (("head.norm",), "model.norm", False),
    (("head.proj",), "lm_head", False),
)
_LLAMA_BLOCK: tuple[_Row, ...] = (
    (("attn_norm",), "input_layernorm", False),
    (("attn.q",), "self_attn.q_proj", False),
    (("attn.k",), "self_attn.k_proj", False),
    (("attn.v",), "self_attn.v_proj", False),
    (("attn.out",), "self_attn.o_proj", False),
    (("attn.q_norm",), "self_attn.q_norm", False),
    (("attn.k_norm",), "self_attn.k_norm", False),
    (("mlp_norm",), "post_attention_layernorm", False),
    (("mlp.gate",), "mlp.gate_proj", False),
    (("mlp.up",), "mlp.up_proj", False),
    (("mlp.down",), "mlp.down_proj", False),
)
_GPT2_OUTER: tuple[_Row, ...] = (
    (("embed.tokens",), "transformer.wte", False),
    (("embed.positions",), "transformer.wpe", False),
    (("head.norm",), "transformer.ln_f", False),
    (("head.proj",), "lm_head", False),
)
_GPT2_BLOCK: tuple[_Row, ...] = (
    (("attn_norm",), "ln_1", False),
    (("attn.q", "attn.k", "attn.v"), "attn.c_attn", True),
    (("attn.out",), "attn.c_proj", True),
    (("mlp_norm",), "ln_2", False),
    (("mlp.up",), "mlp.c_fc", True),
    (("mlp.down",), "mlp.c_proj", True),
)


def hf_layout(config: ModelConfig) -> list[HfTensor]:
    """Return every tensor of the Hugging Face folder of this model, embedding first, head last.

    Raises:      ModelError if no Hugging Face family is this architecture
    """
    model = build_model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(model)}
    if config.kind == "transformers":
        from windlass.model.adapter import HfAdapter

        assert isinstance(model, HfAdapter)
        return [HfTensor(model.hf_names[n], shape, (n,), (shape,), False) for n, shape in shapes.items()]
    family = family_of(resolve_model(config))
    rows: list[_Row] = list(_rows(family, len(model.blocks)))
    return [tensor for ours, theirs, transposed in rows for tensor in _tensors(ours, theirs, transposed, shapes)]


def _rows(family: str, num_layers: int) -> list[_Row]:
    outer, block, prefix = _LLAMA_OUTER, _LLAMA_BLOCK, "model.layers"
    if family == "gpt2":
        outer, block, prefix = _GPT2_OUTER, _GPT2_BLOCK, "transformer.h"
    inner = [
        (tuple(f"blocks.{i}.{ours}" for ours in row[0]), f"{prefix}.{i}.{row[1]}", row[2])
        for i in range(num_layers)
        for row in block
    ]
    first = [row for row in outer if row[0][0].startswith("embed.")]
    return [*first, *inner, *(row for row in outer if row not in first)]


def _tensors(
    ours: tuple[str, ...], theirs: str, transposed: bool, shapes: dict[str, tuple[int, ...]]
) -> list[HfTensor]:
    found = []
    for suffix in ("weight", "bias"):
        parts = tuple(f"{module}.{suffix}" for module in ours)
        if parts[0] in shapes:  # a tied head, a bias or a head norm may not exist
            part_shapes = tuple(shapes[part] for part in parts)
            shape = (sum(s[0] for s in part_shapes), *part_shapes[0][1:])
            turned = transposed and len(shape) == 2
            found.append(HfTensor(f"{theirs}.{suffix}", shape[::-1] if turned else shape, parts, part_shapes, turned))
    return found
