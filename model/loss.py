"""Next-token cross entropy from hidden states, without keeping logits; its options, and their mathematics per token.

Legend: S tokens of all rows, C tokens of one chunk, D hidden width, V vocabulary.
The loss of a token with label g and weight w, over the scores y_j of the vocabulary, with lse = log sum_j exp y_j:

    w ((1 - e) (lse - y_g) + e (lse - mean_j y_j) + z lse^2),   y_j = c tanh(logit_j / (t c)), or logit_j / t if c = 0

with e label_smoothing, z z_loss, c softcap, t temperature. Everything is a plain sum over tokens.
Must not know: normalisation, who holds the vocabulary elsewhere, how many tokens the step has.
Source: gradients formed in the forward pass of the chunk: Hsu et al. 2024, arXiv:2410.10989, section 3.2; smoothing:
Szegedy et al. 2015, arXiv:1512.00567, section 7; the penalty on lse: Chowdhery et al. 2022, arXiv:2204.02311, section
5; the cap: Gemma Team 2024, arXiv:2408.00118, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.functional import linear, log_softmax

IGNORE = -100  # the value `data.batch` gives to tokens without a label


@dataclass(frozen=True)
class LossConfig:
    """What is summed over tokens: cross entropy, and what may be added to it."""

    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of the target that is spread over the vocabulary", "ge": 0, "lt": 1}
    )
    z_loss: float = field(
        default=0.0, metadata={"help": "weight of the squared log-normaliser, which keeps logits small", "ge": 0}
    )
    softcap: float = field(
        default=0.0, metadata={"help": "logits are squashed into (-softcap, softcap) by tanh (0: not)", "ge": 0}
    )
    temperature: float = field(default=1.0, metadata={"help": "logits are divided by it", "gt": 0})

    @property
    def reshapes(self) -> bool:
        """Whether scores differ from logits."""
        return self.softcap > 0 or self.temperature != 1

    def scores_(self, logits: torch.Tensor, *, slope: bool) -> torch.Tensor | None:
        """Turn logits into scores in place; return their derivative times the temperature, None where it is 1.

        `slope`: whether the derivative is wanted.
        """
        if not self.softcap:
            if self.temperature != 1:
                logits.div_(self.temperature)
            return None
        logits.div_(self.temperature * self.softcap).tanh_()
        derivative = torch.addcmul(logits.new_ones(()), logits, logits, value=-1) if slope else None
        logits.mul_(self.softcap)
        return derivative

    def per_token(self, logp_S: torch.Tensor, lse_S: torch.Tensor, spread_S: torch.Tensor) -> torch.Tensor:
        """Return the loss of each token; `logp_S` is that of its label, `spread_S` is lse minus the mean score."""
        loss_S = -logp_S
        if self.label_smoothing:
            loss_S = torch.lerp(loss_S, spread_S, self.label_smoothing)
        return loss_S.addcmul(lse_S, lse_S, value=self.z_loss) if self.z_loss else loss_S

    def pull(self, lse_S: torch.Tensor) -> torch.Tensor:
        """Return the factor of the softmax in the derivative of the loss with respect to the scores."""
        return 1 + 2 * self.z_loss * lse_S


PLAIN = LossConfig()


class Loss(Protocol):
    """Summed cross entropy of a linear head."""

    def __call__(
        self,
        h_BTD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_BT: torch.Tensor,
        weights_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss in nats, summed over labels != -100 with the weights of tokens, as a scalar."""


class ChunkedCrossEntropy:
    """Cross entropy over chunks of tokens, so that logits of at most `chunk_tokens` exist (0: of all)."""

    def __init__(self, chunk_tokens: int = 0, config: LossConfig = PLAIN) -> None:
        self.chunk_tokens, self.config = chunk_tokens, config

    def __call__(
        self,
        h_BTD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_BT: torch.Tensor,
        weights_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        h_SD, labels_S = h_BTD.reshape(-1, h_BTD.shape[-1]), labels_BT.reshape(-1)
        weights_S = None if weights_BT is None else weights_BT.reshape(-1)
        chunk = self.chunk_tokens or max(1, len(labels_S))
        if torch.is_grad_enabled() and (h_SD.requires_grad or weight_VD.requires_grad):
            return _CrossEntropy.apply(h_SD, weight_VD, labels_S, weights_S, chunk, self.config)
        parts = (
            _chunk(h_SD[place], weight_VD, labels_S[place], _at(weights_S, place), self.config, gradient=False)[0]
            for place in _places(len(labels_S), chunk)
        )
        return torch.stack(list(parts)).sum()


def _places(num_tokens: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, num_tokens, chunk)]


def _at(weights_S: torch.Tensor | None, place: slice) -> torch.Tensor | None:
    return None if weights_S is None else weights_S[place]


def _chunk(
    h_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_C: torch.Tensor,
    weights_C: torch.Tensor | None,
    config: LossConfig,
    *,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the loss of a chunk, and its gradient with respect to the logits."""
    logits_CV = linear(h_CD, weight_VD)
    exact = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
    slope_CV = None
    if config.reshapes:
        logits_CV = logits_CV.to(exact)
        slope_CV = config.scores_(logits_CV, slope=gradient)
    logp_CV = log_softmax(logits_CV, dim=-1, dtype=exact)
    valid_C = labels_C != IGNORE
    target_C1 = labels_C.where(valid_C, 0)[:, None]
    logp_C = logp_CV.gather(1, target_C1)[:, 0]
    lse_C = logits_CV.gather(1, target_C1)[:, 0] - logp_C
    loss_C = config.per_token(logp_C, lse_C, -logp_CV.mean(1) if config.label_smoothing else logp_C)
    scale_C = valid_C
    if weights_C is not None:
        scale_C = weights_C.to(exact).where(valid_C, 0)
        loss_C = loss_C * scale_C
    loss = loss_C.where(valid_C, 0).sum()
    if not gradient:
        return loss, None
    del logits_CV  # the memory that the gradient in the model's dtype may take
    grad_CV = logp_CV.exp_()
    if config.z_loss:
        grad_CV.mul_(config.pull(lse_C)[:, None])
    hit = grad_CV.new_full((), config.label_smoothing - 1.0)
    grad_CV.scatter_add_(1, target_C1, hit.expand(target_C1.shape))
    if config.label_smoothing:
        grad_CV.sub_(config.label_smoothing / grad_CV.shape[1])
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    if config.temperature != 1:
        scale_C = scale_C.to(exact) / config.temperature
    return loss, grad_CV.mul_(scale_C[:, None]).to(h_CD.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Sum of cross entropies. The gradient is formed chunk by chunk in forward, while the chunk's logits exist.

    Differs: gradients wait on `ctx` itself and are scaled in place, because as saved tensors they would need a copy of
    the size of the vocabulary; so backward runs once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_SD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_S: torch.Tensor,
        weights_S: torch.Tensor | None,
        chunk: int,
        config: LossConfig,
    ) -> torch.Tensor:
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        grad_h_SD = torch.empty_like(h_SD) if wants_h else None
        grad_weight_VD: torch.Tensor | None = None
        losses = []
        for place in _places(len(labels_S), chunk):
            h_CD = h_SD[place]
            loss, grad_CV = _chunk(h_CD, weight_VD, labels_S[place], _at(weights_S, place), config, gradient=True)
            assert grad_CV is not None
            losses.append(loss)
            if grad_h_SD is not None:
                torch.mm(grad_CV, weight_VD, out=grad_h_SD[place])
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
            *[None] * 4,
        )


def _accumulate(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    if total is None:
        return part
    if total.dtype == torch.bfloat16:
        total = total.float()  # from the second chunk on: bf16 sums would lose the small chunks
    return total.add_(part)


@torch.no_grad()
def label_log_probs(head: Any, h_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return logp_BT of the labels under any head that gives logits, row after row; 0 where there is no label."""
    config = getattr(getattr(head, "loss", None), "config", PLAIN)
    valid_BT = labels_BT != IGNORE
    rows = []
    for h_1TD, labels_T, valid_T in zip(h_BTD.split(1), labels_BT, valid_BT, strict=True):
        logits_TV = head.logits(h_1TD)[0]
        scores_TV = logits_TV.to(torch.float64 if logits_TV.dtype == torch.float64 else torch.float32, copy=True)
        config.scores_(scores_TV, slope=False)
        logp_TV = log_softmax(scores_TV, dim=-1)
        rows.append(logp_TV.gather(1, labels_T.where(valid_T, 0)[:, None])[:, 0].where(valid_T, 0))
    return torch.stack(rows)
