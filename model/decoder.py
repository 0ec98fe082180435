"""The decoder: one causal language model that is GPT-2, Llama, Mistral, Qwen2 or Qwen3, depending on its config.

Legend: B rows, T tokens, D hidden width, N query heads, K key/value heads, H head width, V vocabulary.
Must not know: who holds parameters, how long they stay, which tokens other ranks hold (the attention scheme may).
Source: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv:2307.09288; Jiang et al. 2023, arXiv:2310.06825;
Yang et al. 2024, arXiv:2407.10671; Yang et al. 2025, arXiv:2505.09388.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from windlass.model.attention import AttentionScheme
from windlass.model.config import ModelConfig
from windlass.model.loss import Loss
from windlass.model.norm import RMSNorm, build_norm
from windlass.model.protocol import Init
from windlass.model.rope import inverse_frequencies, rotary_tables, rotate

RESIDUAL_OUTPUTS = ("attn.out.weight", "mlp.down.weight")  # projections that write into the residual stream


@dataclass(frozen=True)
class Context:
    """What every block needs besides its input, computed once per micro-batch."""

    positions_BT: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor] | None  # cos_BT1R, sin_BT1R
    prepared: Any  # of the attention scheme


class Embed(nn.Module):
    """Token embedding, plus the learned position embedding where the model has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.max_seq_len, config.hidden_size) if learned else None

    def forward(self, tokens_BT: torch.Tensor, context: Context) -> torch.Tensor:
        return self.place(self.tokens(tokens_BT), context)

    def place(self, e_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        """Add the learned positions, if there are any, to rows of the token table."""
        return e_BTD if self.positions is None else e_BTD + self.positions(context.positions_BT)


class Attention(nn.Module):
    """Projections, head norms and rotation around an attention scheme."""

    def __init__(self, config: ModelConfig, scheme: AttentionScheme) -> None:
        super().__init__()
        self.scheme, self.head_dim = scheme, config.head_dim
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, wide, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.out = nn.Linear(wide, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH, k_BTKH, v_BTKH = (project(x_BTD).view(heads) for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if context.rotary is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, *context.rotary), rotate(k_BTKH, *context.rotary)
        out_BTNH = self.scheme(q_BTNH, k_BTKH, v_BTKH, context.prepared)
        return self.out(out_BTNH.flatten(2))


class GatedMLP(nn.Module):
    """SwiGLU. Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class PlainMLP(nn.Module):
    """Two projections around a GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.mlp == "gelu_tanh" else "none"
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate=self.approximate))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, scheme: AttentionScheme) -> None:
        super().__init__()
        self.attn_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.attn = Attention(config, scheme)
        self.mlp_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config) if config.mlp == "swiglu" else PlainMLP(config)

    def forward(self, h_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        h_BTD = h_BTD + self.attn(self.attn_norm(h_BTD), context)
        return h_BTD + self.mlp(self.mlp_norm(h_BTD))


class Head(nn.Module):
    """Final norm, projection to the vocabulary, loss."""

    def __init__(self, config: ModelConfig, loss: Loss) -> None:
        super().__init__()
        self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.proj = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss = loss

    def forward(
        self, h_BTD: torch.Tensor, labels_BT: torch.Tensor, weights_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.loss(self.norm(h_BTD), self.proj.weight, labels_BT, weights_BT)

    def logits(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """Return logits_BTV."""
        return self.proj(self.norm(h_BTD))


class Decoder(nn.Module):
    """Embedding, blocks and head of a config; see `model.protocol.BlockModel`.

    Built through `model.build.build_model`, which puts it on the meta device.
    """

    def __init__(self, config: ModelConfig, attention: AttentionScheme, loss: Loss) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        embed, head = Embed(config), Head(config, loss)
        if config.tie_embeddings:
            head.proj.weight = embed.tokens.weight
        self.embed: nn.Module = embed
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.head: nn.Module = head
        self.freq_R: torch.Tensor | None = None  # not a buffer: it is a constant of the architecture, always fp32
        if config.positions == "rope":
            self.freq_R = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

    def context(self, positions_BT: torch.Tensor, documents_BT: torch.Tensor, dtype: torch.dtype) -> Context:
        """Return rotary tables gathered by position and the attention scheme's preparation (masks)."""
        rotary = None if self.freq_R is None else rotary_tables(positions_BT, self.freq_R, dtype)
        prepared = self.attention.prepare(positions_BT, documents_BT, self.config.sliding_window, dtype)
        return Context(positions_BT, rotary, prepared)

    def init(self, name: str) -> Init:
        """Return the start of a parameter: normal weights, narrower where a projection adds to the residual stream.

        Source: Radford et al. 2019, section 2.3 (residual layers scaled by 1 / sqrt of their number)
        """
        if name.endswith("bias"):
            return Init("zeros")
        if "norm." in name:
            return Init("ones")
        residual = name.endswith(RESIDUAL_OUTPUTS)
        return Init("normal", self.config.init_std / (math.sqrt(2 * self.config.num_layers) if residual else 1.0))
