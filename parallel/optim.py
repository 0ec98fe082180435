"""Optimizers and the learning-rate schedule: policies, and the updates they stand for.

The update itself is torch's fused kernel, which runs at memory speed on CPU and CUDA. Must not know: what is sharded
where; it sees flat 1-D tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer updates the master weights."""

    name: str = field(default="adamw", metadata={"help": "optimizer", "choices": ("adamw", "sgd")})
    lr: float = field(default=3e-4, metadata={"help": "peak learning rate", "gt": 0})
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"help": "AdamW moment decay rates"})
    eps: float = field(default=1e-8, metadata={"help": "AdamW denominator floor", "gt": 0})
    momentum: float = field(default=0.0, metadata={"help": "SGD momentum", "ge": 0, "lt": 1})
    weight_decay: float = field(
        default=0.1, metadata={"help": "weight decay of tensors with two or more dims (decoupled for adamw)", "ge": 0}
    )
    clip_norm: float = field(
        default=1.0, metadata={"help": "global gradient norm limit; 0 switches clipping off", "ge": 0}
    )
    nonfinite: str = field(
        default="skip",
        metadata={"help": "what a non-finite gradient norm does to the step", "choices": ("skip", "stop")},
    )
    max_skips: int = field(
        default=10, metadata={"help": "consecutive skipped steps before the run stops", "unit": "steps", "ge": 1}
    )

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the per-parameter state tensors, each of the shape and dtype of the master weight."""
        if self.name == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    kind: str = field(
        default="cosine", metadata={"help": "shape after warm-up", "choices": ("constant", "cosine", "linear", "wsd")}
    )
    warmup_steps: int = field(default=0, metadata={"help": "linear warm-up", "unit": "steps", "ge": 0})
    decay_steps: int = field(
        default=0,
        metadata={"help": "length of the wsd decay at the end (0: a tenth of the run)", "unit": "steps", "ge": 0},
    )
    min_ratio: float = field(default=0.1, metadata={"help": "final rate as a share of the peak", "ge": 0, "le": 1})


def learning_rate(optimizer: OptimizerConfig, schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of step `step` (counted from 0) of a run of `total_steps`.

    Source: WSD: Hu et al. 2024, arXiv:2404.06395 (here with a linear decay).
    """
    peak, floor = optimizer.lr, optimizer.lr * schedule.min_ratio
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    begin = schedule.warmup_steps
    if schedule.kind == "wsd":
        begin = total_steps - (schedule.decay_steps or max(1, total_steps // 10))
    progress = min(1.0, max(0.0, (step - begin) / max(1, total_steps - 1 - begin)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return floor + (peak - floor) * shape


class FlatOptimizer:
    """Updates one flat range of master weights in place, its first `cut` elements with weight decay.

    State tensors are flat like the weights and exist from the start, so a checkpoint restores into them and no step
    allocates. The kernels are the ones behind `torch.optim.AdamW(fused=True)` and `SGD(fused=True)`, called directly:
    the classes import torch's compiler when the first one is built, seconds of every start.
    """

    def __init__(self, config: OptimizerConfig, weights: torch.Tensor, cut: int) -> None:
        self._config = config
        self.state = {name: torch.zeros_like(weights) for name in config.state_names}
        self._steps = torch.zeros((), dtype=torch.float32, device=weights.device)
        parts = ((slice(0, cut), config.weight_decay), (slice(cut, weights.numel()), 0.0))
        self._parts = [(part, decay) for part, decay in parts if part.start < part.stop]
        self._weights = weights

    def set_steps(self, steps: int) -> None:
        """Say how many updates were made, for bias correction."""
        self._steps.fill_(steps)

    @torch.no_grad()
    def update(self, gradient: torch.Tensor, lr: float) -> None:
        """Make one update.

        Shapes:      gradient: like the weights, in their dtype
        """
        self._steps += 1
        kernel = self._adamw if self._config.name == "adamw" else self._sgd
        for part, decay in self._parts:
            kernel([self._weights[part]], [gradient[part]], [[s[part]] for s in self.state.values()], lr, decay)

    def _adamw(self, weights: Tensors, gradients: Tensors, state: list[Tensors], lr: float, decay: float) -> None:
        torch._fused_adamw_(
            weights,
            gradients,
            state[0],
            state[1],
            [],
            [self._steps],
            lr=lr,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            weight_decay=decay,
            eps=self._config.eps,
            amsgrad=False,
            maximize=False,
        )

    def _sgd(self, weights: Tensors, gradients: Tensors, state: list[Tensors], lr: float, decay: float) -> None:
        # A zero momentum buffer equals torch's copy of the first gradient, because dampening is 0.
        torch._fused_sgd_(
            weights,
            gradients,
            state[0] if state else [],
            weight_decay=decay,
            momentum=self._config.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
