"""Attention as a constructor argument of the decoder: what a scheme offers, and the local one.

Legend: B rows, T tokens, N query heads, K key/value heads, H head width.
Must not know: projections, rotary positions, which ranks hold which tokens.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention


class AttentionScheme(Protocol):
    """Causal attention within documents. A scheme may exchange keys and values with other ranks."""

    def prepare(
        self, positions_BT: torch.Tensor, documents_BT: torch.Tensor, window: int | None, dtype: torch.dtype
    ) -> Any:
        """Return what every layer needs, once per micro-batch; `dtype` is that of queries and keys."""

    def __call__(self, q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, prepared: Any) -> torch.Tensor:
        """Return out_BTNH."""


class LocalAttention:
    """Attention over the tokens this process holds, through torch's fused kernel."""

    def prepare(
        self, positions_BT: torch.Tensor, documents_BT: torch.Tensor, window: int | None, dtype: torch.dtype
    ) -> Any:
        """Return the mask of the rows, or None where plain causal attention says the same."""
        return document_mask(documents_BT, window, dtype)

    def __call__(
        self, q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, prepared: torch.Tensor | None
    ) -> torch.Tensor:
        out_BNTH = scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            k_BTKH.transpose(1, 2),
            v_BTKH.transpose(1, 2),
            attn_mask=prepared,
            is_causal=prepared is None,
            enable_gqa=q_BTNH.shape[2] != k_BTKH.shape[2],
        )
        return out_BNTH.transpose(1, 2)


def document_mask(documents_BT: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return who may look at whom: earlier tokens of the same document, at most `window` with oneself.

    Shapes:      documents_BT -> mask_B1TT (0 = attend, -inf = not), or None if every row is one document and no
                 longer than the window, because plain causal kernels skip half of the work
    Differs:     additive and in the compute dtype, because torch turns a bool mask into one again in every layer
                 and keeps each for backward
    Blocks:      host, once per micro-batch, to look at the documents
    """
    num_tokens = documents_BT.shape[1]
    window = num_tokens if window is None else window
    if window >= num_tokens and bool((documents_BT == documents_BT[:, :1]).all()):
        return None
    place_T = torch.arange(num_tokens, device=documents_BT.device)
    distance_TT = place_T[:, None] - place_T[None, :]
    visible_TT = (distance_TT >= 0) & (distance_TT < window)
    visible_B1TT = ((documents_BT[:, :, None] == documents_BT[:, None, :]) & visible_TT)[:, None]
    return torch.zeros(visible_B1TT.shape, dtype=dtype, device=visible_B1TT.device).masked_fill_(
        ~visible_B1TT, -math.inf
    )
