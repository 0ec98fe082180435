"""Rotary position embedding: the tables of a micro-batch, and the rotation.

Legend: B rows, T tokens, N heads, H head width, R = H / 2 rotation pairs (element r turns with element r + R).
Must not know: attention, documents.
Source: Su et al. 2021, arXiv:2104.09864; "llama3" scaling: Grattafiori et al. 2024, arXiv:2407.21783, section 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> torch.Tensor:
    """Return the angle per position of every pair.

    Shapes:      -> freq_R (fp32)
    Differs:     always fp32, whatever the compute dtype, because published models are defined that way
    """
    freq_R = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if scaling is None:
        return freq_R
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return freq_R / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength_R = 2 * math.pi / freq_R
    blend_R = ((original / wavelength_R - low) / (high - low)).clamp(0, 1)  # 0: slow pairs, stretched; 1: fast, kept
    return (1 - blend_R) * freq_R / factor + blend_R * freq_R


def rotary_tables(
    positions_BT: torch.Tensor, freq_R: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of every token, broadcastable over heads.

    Shapes:      positions_BT -> cos_BT1R, sin_BT1R
    """
    angle_BTR = positions_BT[..., None].to(torch.float32) * freq_R.to(positions_BT.device)
    return angle_BTR.cos().to(dtype)[:, :, None], angle_BTR.sin().to(dtype)[:, :, None]


class _Rotate(torch.autograd.Function):
    # Saves the tables only (shared by all layers): plain operators would also keep both halves of every product alive.

    @staticmethod
    def forward(ctx: Any, x_BTNH: torch.Tensor, cos_BT1R: torch.Tensor, sin_BT1R: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_BT1R, sin_BT1R)
        return _turn(x_BTNH, cos_BT1R, sin_BT1R, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos_BT1R, sin_BT1R = ctx.saved_tensors
        return _turn(grads[0], cos_BT1R, sin_BT1R, -1), None, None


def _turn(x_BTNH: torch.Tensor, cos_BT1R: torch.Tensor, sin_BT1R: torch.Tensor, sign: int) -> torch.Tensor:
    a, b = x_BTNH.chunk(2, dim=-1)
    out = torch.empty_like(x_BTNH)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.mul(a, cos_BT1R, out=out_a).addcmul_(b, sin_BT1R, value=-sign)
    torch.mul(b, cos_BT1R, out=out_b).addcmul_(a, sin_BT1R, value=sign)
    return out


def rotate(x_BTNH: torch.Tensor, cos_BT1R: torch.Tensor, sin_BT1R: torch.Tensor) -> torch.Tensor:
    """Turn every pair of every head by the angle of its token.

    Shapes:      x_BTNH, cos_BT1R, sin_BT1R -> out_BTNH
    """
    return _Rotate.apply(x_BTNH, cos_BT1R, sin_BT1R)
