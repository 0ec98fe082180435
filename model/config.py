"""What a model is: the policy dataclass of the group `model`, and the combinations that cannot work.

The fields span GPT-2, Llama 2 and 3, Mistral, Qwen2 and Qwen3 exactly; `configs/model/` names published sizes.
Must not know: YAML, other groups of the job, devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from windlass.dist.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a causal language model.

    Invariant: `num_kv_heads`, `head_dim` and `intermediate_size` are never 0 after construction.
    """

    preset: str | None = field(default=None, metadata={"help": "named architecture, see configs/model/"})
    kind: str = field(
        default="decoder",
        metadata={
            "help": "decoder: ours; transformers: the unmodified classes of that library, from hf_folder; "
            "custom: your own, from factory",
            "choices": ("decoder", "transformers", "custom"),
        },
    )
    hf_folder: str | None = field(
        default=None, metadata={"help": "Hugging Face folder that gives the architecture and the starting weights"}
    )
    factory: str | None = field(
        default=None, metadata={"help": "custom: 'package.module:function', called with this config"}
    )
    vocab_size: int = field(default=4096, metadata={"help": "rows of the embedding table", "unit": "tokens", "ge": 1})
    hidden_size: int = field(default=192, metadata={"help": "width of the residual stream", "ge": 1})
    num_layers: int = field(default=4, metadata={"help": "number of blocks", "ge": 1})
    num_heads: int = field(default=3, metadata={"help": "query heads", "ge": 1})
    num_kv_heads: int = field(default=0, metadata={"help": "key and value heads (0: as many as query heads)", "ge": 0})
    head_dim: int = field(default=0, metadata={"help": "width of one head (0: hidden_size / num_heads)", "ge": 0})
    intermediate_size: int = field(
        default=0,
        metadata={"help": "width of the MLP (0: 4 hidden_size; swiglu: 8/3 hidden_size rounded up to 64)", "ge": 0},
    )
    max_seq_len: int = field(default=1024, metadata={"help": "longest sequence", "unit": "tokens", "ge": 1})
    norm: str = field(default="rmsnorm", metadata={"help": "normalisation", "choices": ("rmsnorm", "layernorm")})
    norm_eps: float = field(default=1e-5, metadata={"help": "added to the variance", "gt": 0})
    positions: str = field(default="rope", metadata={"help": "how positions enter", "choices": ("rope", "learned")})
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary frequencies", "gt": 0})
    rope_scaling: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "stretch rotary positions: {rope_type: linear, factor} or {rope_type: llama3, factor, "
            "low_freq_factor, high_freq_factor, original_max_position_embeddings}"
        },
    )
    mlp: str = field(
        default="swiglu",
        metadata={
            "help": "MLP kind (gelu_tanh is GPT-2's gelu_new)",
            "choices": ("swiglu", "gelu", "gelu_tanh"),
        },
    )
    qkv_bias: bool = field(default=False, metadata={"help": "biases of the query, key and value projections"})
    out_bias: bool = field(default=False, metadata={"help": "bias of the attention output projection"})
    mlp_bias: bool = field(default=False, metadata={"help": "biases of the MLP"})
    qk_norm: bool = field(default=False, metadata={"help": "normalise queries and keys per head (Qwen3)"})
    tie_embeddings: bool = field(default=False, metadata={"help": "the head reuses the token embedding table"})
    sliding_window: int | None = field(
        default=None, metadata={"help": "attend to this many last tokens only", "unit": "tokens", "ge": 1}
    )
    init_std: float = field(default=0.02, metadata={"help": "standard deviation of initial weights", "gt": 0})
    loss_chunk_tokens: int = field(
        default=2048,
        metadata={"help": "tokens whose logits exist at one time in the loss (0: all)", "unit": "tokens", "ge": 0},
    )

    def __post_init__(self) -> None:
        heads = max(1, self.num_heads)
        wide = 4 * self.hidden_size if self.mlp != "swiglu" else -(-8 * self.hidden_size // (3 * 64)) * 64
        derived = {"num_kv_heads": heads, "head_dim": self.hidden_size // heads, "intermediate_size": wide}
        for name, value in derived.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)


# Keys that take no part in the architecture: they apply to every kind and beside hf_folder.
FREE_KEYS = frozenset({"preset", "kind", "hf_folder", "factory", "init_std", "loss_chunk_tokens"})

_ROPE_SCALING_KEYS = {
    "linear": {"rope_type", "factor"},
    "llama3": {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}

# (key the user gave, when it cannot take effect, why and what would work)
_DEAD_KEYS: tuple[tuple[str, Callable[[ModelConfig], bool], str], ...] = (
    ("rope_theta", lambda c: c.positions != "rope", "needs positions: rope"),
    ("rope_scaling", lambda c: c.positions != "rope", "needs positions: rope"),
    ("factory", lambda c: c.kind != "custom", "needs kind: custom"),
    ("hf_folder", lambda c: c.kind == "custom", "needs kind: decoder or transformers; a custom factory reads its own"),
)


def check_model(config: ModelConfig, given: Iterable[str] = ()) -> None:
    """Refuse a model that cannot be built, and settings that cannot take effect.

    `given` are the keys the user wrote (with or without the prefix `model.`).
    Raises: ConfigError naming the key
    """
    keys = {key.removeprefix("model.") for key in given}
    for key, is_dead, remedy in _DEAD_KEYS:
        if key in keys and getattr(config, key) is not None and is_dead(config):
            raise ConfigError(f"model.{key} = {getattr(config, key)!r} has no effect here: it {remedy}.")
    if config.kind == "custom":
        if not config.factory or ":" not in config.factory:
            raise ConfigError(
                f"model.factory = {config.factory!r}: kind 'custom' needs 'package.module:function', "
                "for example 'my_project.model:build'."
            )
        return
    if config.kind == "transformers" and not config.hf_folder:
        raise ConfigError(
            "model.hf_folder is not set: kind 'transformers' takes its architecture from config.json there."
        )
    if config.hf_folder:
        _check_beside_folder(config, keys)
    if config.kind == "decoder":
        _check_decoder(config)


def _check_beside_folder(config: ModelConfig, keys: set[str]) -> None:
    if config.preset and "preset" in keys:
        raise ConfigError(
            f"model.preset = '{config.preset}' and model.hf_folder = '{config.hf_folder}' both give the architecture: "
            "remove one."
        )
    clash = sorted(keys - FREE_KEYS)
    if clash:
        raise ConfigError(
            f"model.{clash[0]} = {getattr(config, clash[0])!r} has no effect: config.json in model.hf_folder = "
            f"'{config.hf_folder}' gives the architecture. Remove the key, or edit config.json."
        )
    if config.kind == "transformers" and "init_std" in keys:
        raise ConfigError("model.init_std has no effect: kind 'transformers' takes initializer_range of config.json.")


def _check_decoder(config: ModelConfig) -> None:
    c = config
    if c.num_heads % c.num_kv_heads:
        legal = [n for n in range(1, c.num_heads + 1) if c.num_heads % n == 0]
        raise ConfigError(
            f"model.num_kv_heads = {c.num_kv_heads} does not divide model.num_heads = {c.num_heads}: "
            f"use one of {legal}."
        )
    if c.hidden_size % c.num_heads and c.head_dim == c.hidden_size // c.num_heads:
        raise ConfigError(
            f"model.num_heads = {c.num_heads} does not divide model.hidden_size = {c.hidden_size}: "
            f"use hidden_size = {-(-c.hidden_size // c.num_heads) * c.num_heads}, or set model.head_dim."
        )
    if c.positions == "rope" and c.head_dim % 2:
        raise ConfigError(f"model.head_dim = {c.head_dim} is odd: rotary positions turn pairs, use {c.head_dim + 1}.")
    if c.rope_scaling is not None:
        check_rope_scaling(c.rope_scaling)


def check_rope_scaling(scaling: dict[str, Any]) -> None:
    """Refuse a rotary scaling that is not known or not complete.

    Raises: ConfigError naming the key
    """
    kind = scaling.get("rope_type")
    if kind not in _ROPE_SCALING_KEYS:
        raise ConfigError(f"model.rope_scaling.rope_type = {kind!r}: use one of {sorted(_ROPE_SCALING_KEYS)}.")
    wanted = _ROPE_SCALING_KEYS[kind]
    if missing := sorted(wanted - scaling.keys()):
        raise ConfigError(f"model.rope_scaling lacks {missing[0]}: rope_type '{kind}' needs {sorted(wanted)}.")
    if unknown := sorted(scaling.keys() - wanted):
        raise ConfigError(f"model.rope_scaling.{unknown[0]} is not used by rope_type '{kind}': remove it.")
