"""`config.json` of a Hugging Face folder <-> ModelConfig, for GPT-2, Llama, Mistral, Qwen2 and Qwen3.

Both spellings of rotary settings are understood (`rope_theta` + `rope_scaling`, and `rope_parameters` of transformers
5) and both are written. Whatever changes the mathematics and has no counterpart here is refused, never dropped.
Must not know: tensors and their names.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from windlass.dist.errors import ConfigError, ModelError
from windlass.model.config import ModelConfig, check_rope_scaling

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_MAXIMUM_KEYS = ("max_position_embeddings", "n_positions")
_ARCHITECTURE_KEYS = {  # what every causal language model has, under GPT-2's names and everyone else's
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "max_seq_len": _MAXIMUM_KEYS,
}


def resolve_model(config: ModelConfig) -> ModelConfig:
    """Return the config with the architecture of `hf_folder` filled in; unchanged without one, or when called again.

    With kind "transformers" only the sizes are filled in: the library itself reads the rest.
    Raises:      ModelError if the folder cannot be used
    """
    if not config.hf_folder:
        return config
    raw = _Json(Path(config.hf_folder))
    if config.kind == "transformers":
        return replace(config, **_sizes(raw))
    found = read_hf_config(Path(config.hf_folder))
    return replace(found, hf_folder=config.hf_folder, loss_chunk_tokens=config.loss_chunk_tokens)


def read_hf_config(folder: Path) -> ModelConfig:
    """Return the architecture that `config.json` describes.

    Raises:      ModelError naming the key that is missing, or has no counterpart
    """
    raw = _Json(folder)
    model_type = raw.get("model_type", None)
    if model_type not in FAMILIES:
        raise ModelError(
            f"{raw.path}: model_type = {model_type!r} is not one of {', '.join(FAMILIES)}. "
            "Set model.kind = 'transformers' to train the library's own class."
        )
    raw.refuse("quantization_config", None, "only unquantised weights can be trained")
    fields = _read_gpt2(raw) if model_type == "gpt2" else _read_llama(raw, model_type)
    return ModelConfig(**_sizes(raw), **fields, init_std=raw.get("initializer_range", 0.02))


def family_of(config: ModelConfig) -> str:
    """Return the Hugging Face family that is exactly this architecture.

    Raises:      ModelError naming the settings that none of them has
    """
    c = config
    biases = {"qkv_bias": c.qkv_bias, "out_bias": c.out_bias, "mlp_bias": c.mlp_bias}
    if c.norm == "layernorm":
        family, wanted = (
            "gpt2",
            {
                "positions": "learned",
                "mlp": c.mlp if c.mlp != "swiglu" else "gelu_tanh",
                **dict.fromkeys(biases, True),
                "qk_norm": False,
                "sliding_window": None,
                "num_kv_heads": c.num_heads,
                "head_dim": c.hidden_size // c.num_heads,
            },
        )
    else:
        wanted = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu"}
        if c.qk_norm:
            family, wanted = "qwen3", {**wanted, "out_bias": c.qkv_bias, "mlp_bias": False}
        elif c.qkv_bias and not c.out_bias:
            family, wanted = "qwen2", {**wanted, "mlp_bias": False}
        elif c.sliding_window is not None:
            family, wanted = "mistral", {**wanted, **dict.fromkeys(biases, False)}
        else:
            family, wanted = "llama", {**wanted, "out_bias": c.qkv_bias}
    wrong = [f"model.{key} = {getattr(c, key)!r} ({v!r} there)" for key, v in wanted.items() if getattr(c, key) != v]
    if wrong:
        raise ModelError(
            f"no Hugging Face class is this architecture; the nearest, {_ARCHITECTURES[family]}, differs in "
            f"{', '.join(wrong)}."
        )
    return family


def write_hf_config(
    config: ModelConfig, dtype: torch.dtype, bos_token_id: int | None, eos_token_id: int | None
) -> dict[str, Any]:
    """Return the content of `config.json`."""
    c, family, name = config, family_of(config), str(dtype).removeprefix("torch.")
    common = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "dtype": name,
        "torch_dtype": name,  # the spelling before transformers 5
        "vocab_size": c.vocab_size,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "use_cache": True,
    }
    if family == "gpt2":
        return {
            **common,
            "n_embd": c.hidden_size,
            "n_layer": c.num_layers,
            "n_head": c.num_heads,
            "n_positions": c.max_seq_len,
            "n_ctx": c.max_seq_len,
            "n_inner": c.intermediate_size,
            "activation_function": "gelu_new" if c.mlp == "gelu_tanh" else "gelu",
            "layer_norm_epsilon": c.norm_eps,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        }
    scaling = c.rope_scaling or {"rope_type": "default"}
    result = {
        **common,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "attention_dropout": 0.0,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling and dict(c.rope_scaling),
        "rope_parameters": {"rope_theta": c.rope_theta, **scaling},
    }
    if family == "llama":
        result |= {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}
    if family == "mistral":
        result |= {"sliding_window": c.sliding_window}
    if family == "qwen3":
        result |= {"attention_bias": c.qkv_bias}
    if family in ("qwen2", "qwen3"):
        kind = "full_attention" if c.sliding_window is None else "sliding_attention"
        result |= {
            "use_sliding_window": c.sliding_window is not None,
            "sliding_window": c.sliding_window,
            "max_window_layers": c.num_layers if c.sliding_window is None else 0,
            "layer_types": [kind] * c.num_layers,
        }
    return result


class _Json:
    """`config.json` of a folder, with errors that name it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        try:
            self.values: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelError(
                f"{self.path} does not exist: model.hf_folder must be a Hugging Face folder with config.json and "
                "*.safetensors."
            ) from error
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.path} cannot be read as JSON: {error}.") from error

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def need(self, *keys: str) -> Any:
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        raise ModelError(f"{self.path} lacks {keys[0]!r}.")

    def refuse(self, key: str, allowed: Any, why: str) -> None:
        if self.get(key, allowed) != allowed:
            raise ModelError(f"{self.path}: {key} = {self.values[key]!r}, but {why}. Only {allowed!r} is supported.")


def _sizes(raw: _Json) -> dict[str, Any]:
    sizes = {field: raw.need(*keys) for field, keys in _ARCHITECTURE_KEYS.items()}
    tied = raw.get("tie_word_embeddings", raw.get("model_type", None) == "gpt2")
    return {**sizes, "tie_embeddings": bool(tied)}


def _read_gpt2(raw: _Json) -> dict[str, Any]:
    raw.refuse("scale_attn_weights", True, "attention is always scaled here")
    raw.refuse("scale_attn_by_inverse_layer_idx", False, "every layer scales attention alike here")
    raw.refuse("add_cross_attention", False, "there is no encoder here")
    activation = raw.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ModelError(f"{raw.path}: activation_function = {activation!r}, use one of {sorted(_GPT2_ACTIVATIONS)}.")
    return {
        "norm": "layernorm",
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "mlp": _GPT2_ACTIVATIONS[activation],
        "intermediate_size": raw.get("n_inner", 0),
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
    }


def _read_llama(raw: _Json, family: str) -> dict[str, Any]:
    raw.refuse("hidden_act", "silu", "the gated MLP here uses SiLU")
    heads = raw.need("num_attention_heads")
    all_biased = family in ("llama", "qwen3") and raw.get("attention_bias", False)
    theta, scaling = _read_rope(raw)
    return {
        "norm": "rmsnorm",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "positions": "rope",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "mlp": "swiglu",
        "num_kv_heads": raw.get("num_key_value_heads", heads) if family == "llama" else raw.need("num_key_value_heads"),
        "head_dim": raw.need("head_dim") if family == "qwen3" else raw.get("head_dim", 0),
        "intermediate_size": raw.need("intermediate_size"),
        "qkv_bias": family == "qwen2" or all_biased,
        "out_bias": all_biased,
        "mlp_bias": family == "llama" and raw.get("mlp_bias", False),
        "qk_norm": family == "qwen3",
        "sliding_window": _read_window(raw, family),
    }


def _read_rope(raw: _Json) -> tuple[float, dict[str, Any] | None]:
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_parameters", None) or {})}
    rope |= raw.get("rope_scaling", None) or {}
    theta, partial = (
        float(rope.pop("rope_theta")),
        rope.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1)),
    )
    if partial != 1:
        raise ModelError(f"{raw.path}: partial_rotary_factor = {partial}, but heads are rotated whole here.")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind == "default":
        return theta, None
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", raw.need(*_MAXIMUM_KEYS))
    scaling = {"rope_type": kind, **rope}
    try:
        check_rope_scaling(scaling)
    except ConfigError as error:
        raise ModelError(f"{raw.path}: {error}") from error
    return theta, scaling


def _read_window(raw: _Json, family: str) -> int | None:
    if family == "llama":
        return None
    if family == "mistral":
        return raw.values.get("sliding_window", 4096)  # absent means the library's default, null means none
    if not raw.get("use_sliding_window", False):
        return None
    num_layers, window = raw.need("num_hidden_layers"), raw.get("sliding_window", 4096)
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types", ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)])
    if len(set(kinds)) > 1:
        raise ModelError(
            f"{raw.path}: layers mix full and sliding attention. Set model.kind = 'transformers' to train that."
        )
    return window if kinds[0] == "sliding_attention" else None
