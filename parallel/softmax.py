"""Softmax averages in parts: the one merge that cut vocabularies and ring attention share.

A part is a pair (out, lse): `out` is the average of some rows weighted by a softmax over a part of the columns, `lse`
the logarithm of the sum of exponentials of that part. Merging pairs gives the pair of all columns; an empty part has
lse = -inf, and what its `out` holds does not matter. Must not know: what the columns are, who computed a part.
Source: the running softmax of Milakov and Gimelshein 2018, arXiv:1805.02867; its use for partial averages: Dao et al.
2022, arXiv:2205.14135, section 3.1.
Differs:     parts that are all empty merge to an empty one; the usual forms return NaN for -inf minus -inf
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which statistics and sums over parts are kept: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def merge_into(out: torch.Tensor, lse: torch.Tensor, out_j: torch.Tensor, lse_j: torch.Tensor) -> None:
    """Merge a part into another one in place.

    Shapes:      out, out_j (..., D); lse, lse_j (...). `out` and `lse` are of an exact dtype, `out_j` of any
    Invariant:   `out` starts finite (zeros where it is empty)
    """
    total = torch.logaddexp(lse, lse_j)
    shift = total.masked_fill(total == -torch.inf, 0)
    weight_j = (lse_j - shift).exp_()[..., None]
    out.mul_((lse - shift).exp_()[..., None])
    out.add_((out_j * weight_j).masked_fill_(weight_j == 0, 0))
    lse.copy_(total)


def merge_partials(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pair (out, lse) of all parts together, in the exact dtype.

    Shapes:      each out (..., D), lse (...)
    Invariant:   the order and grouping of parts matter to rounding only; a single part comes back as it is
    """
    first, first_lse = parts[0]
    exact = exact_dtype(first.dtype)
    out = torch.zeros(first.shape, dtype=exact, device=first.device)
    lse = torch.full(first_lse.shape, -torch.inf, dtype=exact, device=first.device)
    for out_j, lse_j in parts:
        merge_into(out, lse, out_j, lse_j)
    return out, lse
