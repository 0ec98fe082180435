"""How many parameters and floating-point operations a model has; the basis of tflops and mfu.

Definition: training costs 6 operations per token and parameter of the blocks and the head (2 forward, 4 backward; the
embedding lookup costs none, a tied table counts once, in the head), plus 12 per layer, head element and visible token
for attention (QK^T and PV, forward and backward). Attention is counted over the whole sequence, not halved for
causality, and recomputed activations are not counted: this is "model FLOPs" as most published MFU figures use it.
Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B
"""

from __future__ import annotations

from windlass.model.build import build_model, named_parameters
from windlass.model.config import ModelConfig
from windlass.model.protocol import BlockModel


def num_parameters(model: BlockModel | ModelConfig) -> int:
    """Return the number of parameters, a tied one counted once."""
    return sum(parameter.numel() for _, parameter in named_parameters(_built(model)))


def flops_per_token(model: BlockModel | ModelConfig, seq_len: int) -> float:
    """Return the operations of forward and backward per token of a sequence of `seq_len`.

    Differs:     a custom model without a ModelConfig in `.config` has no attention term, because its shape is unknown
    """
    built = _built(model)
    parts = (*built.blocks, built.head)
    held = {id(parameter): parameter.numel() for part in parts for parameter in part.parameters()}
    return 6 * sum(held.values()) + 3 * len(built.blocks) * attention_flops_per_token(built, seq_len)


def attention_flops_per_token(model: BlockModel, seq_len: int) -> float:
    """Return the operations of one block's attention (QK^T and PV) per token, forward only."""
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return 0.0
    return 4.0 * config.num_heads * config.head_dim * min(seq_len, config.sliding_window or seq_len)


def _built(model: BlockModel | ModelConfig) -> BlockModel:
    return build_model(model) if isinstance(model, ModelConfig) else model
