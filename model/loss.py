"""Next-token cross entropy from hidden states, without keeping logits.

Legend: S tokens of all rows, C tokens of one chunk, D hidden width, V vocabulary.
Must not know: normalisation, who holds the vocabulary elsewhere, how many tokens the step has.
Source: gradients formed in the forward pass of the chunk: Hsu et al. 2024, arXiv:2410.10989, section 3.2.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import linear, log_softmax

IGNORE = -100  # the value `data.batch` gives to tokens without a label


class Loss(Protocol):
    """Summed cross entropy of a linear head."""

    def __call__(self, h_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Return the loss in nats, summed over labels != -100, as a scalar."""


class ChunkedCrossEntropy:
    """Cross entropy over chunks of tokens, so that logits of at most `chunk_tokens` exist (0: of all)."""

    def __init__(self, chunk_tokens: int = 0) -> None:
        self.chunk_tokens = chunk_tokens

    def __call__(self, h_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        h_SD, labels_S = h_BTD.reshape(-1, h_BTD.shape[-1]), labels_BT.reshape(-1)
        chunk = self.chunk_tokens or max(1, len(labels_S))
        if torch.is_grad_enabled() and (h_SD.requires_grad or weight_VD.requires_grad):
            return _CrossEntropy.apply(h_SD, weight_VD, labels_S, chunk)
        parts = zip(h_SD.split(chunk), labels_S.split(chunk), strict=True)
        return torch.stack([_forward(h_CD, weight_VD, labels_C)[0] for h_CD, labels_C in parts]).sum()


def _forward(
    h_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logits_CV = linear(h_CD, weight_VD)
    exact = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
    logp_CV = log_softmax(logits_CV, dim=-1, dtype=exact)
    valid_C = labels_C != IGNORE
    target_C1 = labels_C.where(valid_C, 0)[:, None]
    loss = -logp_CV.gather(1, target_C1)[:, 0].where(valid_C, 0).sum()
    return loss, logp_CV, target_C1, valid_C


class _CrossEntropy(torch.autograd.Function):
    """Sum of cross entropies. The gradient is formed chunk by chunk in forward, while the chunk's logits exist.

    Differs: gradients wait on `ctx` itself and are scaled in place, because as saved tensors they would need a copy of
    the size of the vocabulary; so backward runs once.
    """

    @staticmethod
    def forward(
        ctx: Any, h_SD: torch.Tensor, weight_VD: torch.Tensor, labels_S: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        grad_h_SD = torch.empty_like(h_SD) if wants_h else None
        grad_weight_VD: torch.Tensor | None = None
        losses = []
        for start in range(0, len(labels_S), chunk):
            h_CD = h_SD[start : start + chunk]
            loss, logp_CV, target_C1, valid_C = _forward(h_CD, weight_VD, labels_S[start : start + chunk])
            losses.append(loss)
            grad_CV = logp_CV.exp_()
            grad_CV.scatter_add_(1, target_C1, grad_CV.new_full((), -1.0).expand(target_C1.shape))
            grad_CV = grad_CV.mul_(valid_C[:, None]).to(h_SD.dtype)
            if grad_h_SD is not None:
                torch.mm(grad_CV, weight_VD, out=grad_h_SD[start : start + chunk])
            if wants_weight:
                grad_weight_VD = _accumulate(grad_weight_VD, grad_CV.t() @ h_CD)
        ctx.grads = (grad_h_SD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the cross entropy's backward ran twice on one graph: compute the loss again")
        grad_h_SD, grad_weight_VD = ctx.grads
        ctx.grads = None
        scale = grads[0]
        return (
            None if grad_h_SD is None else grad_h_SD.mul_(scale),
            None if grad_weight_VD is None else grad_weight_VD.mul_(scale),
            None,
            None,
        )


def _accumulate(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    if total is None:
        return part
    if total.dtype == torch.bfloat16:
        total = total.float()  # from the second chunk on: bf16 sums would lose the small chunks
    return total.add_(part)
