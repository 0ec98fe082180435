"""Every numerical bound that tests compare against, with its reason.

bitwise: same operations in the same order, so no bound is needed: use `torch.equal`.
reordered: the same sum in another order. A sum of n terms in precision u differs by at most about u * sqrt(n) relative
to its largest partial sum for random signs; models here sum at most ~1e4 terms, hence 100 u.
lossy: one rounding to bf16 (2^-8) per stored value.
"""

from __future__ import annotations

import torch

REORDERED = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, factor: float = 1.0) -> None:
    """Assert agreement within the reordered bound of the first one's dtype, relative to the largest value."""
    bound = REORDERED[actual.dtype] * factor
    scale = max(expected.abs().max().item(), 1e-30)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= bound, f"{what}: relative error {error:.3e} exceeds {bound:.1e}"
