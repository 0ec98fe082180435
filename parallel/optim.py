"""Optimizers and the learning-rate schedule: policies, and the updates they stand for.

The update itself is torch's fused kernel, which runs at memory speed on CPU and CUDA, or DeepSpeed's on the CPU for who
asks for it. Must not know: what is sharded where; it sees flat 1-D tensors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from windlass.dist.deepspeed_ops import load_op
from windlass.dist.errors import OffloadError

Tensors = list[torch.Tensor]
ADAM_KERNELS = ("torch", "deepspeed")
_DEEPSPEED_ID = 1 << 30  # DeepSpeed counts its own optimizers from 0
_DEEPSPEED_LOCK = threading.Lock()


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


def adamw_(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    steps: torch.Tensor,
    *,
    lr: float,
    config: OptimizerConfig,
    decay: float,
    kernel: str = "torch",
) -> None:
    """Make one AdamW update in place. `steps` counts the updates, this one included; `kernel` is one of `ADAM_KERNELS`.

    torch's releases the GIL while it runs; DeepSpeed's, the one of `DeepSpeedCPUAdam`, holds it: the process does
    nothing else meanwhile.

    Shapes:      the first four: 1-D, alike, one dtype (fp32 on the CPU with deepspeed); steps: fp32 scalar
    Raises:      OffloadError if DeepSpeed's kernel cannot be built, or is asked for anything but fp32 on the CPU
    """
    tensors = (weights, gradient, exp_avg, exp_avg_sq)
    if kernel == "torch":
        torch._fused_adamw_(
            [weights],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [steps],
            lr=lr,
            beta1=config.betas[0],
            beta2=config.betas[1],
            weight_decay=decay,
            eps=config.eps,
            amsgrad=False,
            maximize=False,
        )
        return
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        raise OffloadError(
            f"offload.adam = 'deepspeed': updates fp32 in host memory, these weights are {weights.dtype} on "
            f"{weights.device}, their gradient {gradient.dtype}. Use offload.adam=torch."
        )
    op = load_deepspeed_adam()
    rest = (lr, *config.betas, config.eps, decay, True)
    with _DEEPSPEED_LOCK:
        # It keeps powers of the betas from call to call, multiplied up or raised anew as steps happen to follow one
        # another; an empty update of step 0 makes it raise them anew, so that a resumed run gives the same bits.
        op.adam_update(_DEEPSPEED_ID, 0, *rest, *(t[:0] for t in tensors))
        op.adam_update(_DEEPSPEED_ID, int(steps.item()), *rest, *tensors)


@lru_cache(maxsize=1)
def load_deepspeed_adam() -> Any:
    """Return DeepSpeed's module of CPU Adam with one optimizer of ours made.

    Blocks:      host, about a minute when it has to be compiled
    Raises:      OffloadError if it cannot be
    """
    op = load_op("cpu_adam", "offload.adam = 'deepspeed'", "offload.adam=torch")
    op.create_adam(_DEEPSPEED_ID, 1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)
    return op


class UpdateKernel:
    """One optimizer update of a flat range, wherever that is: the same arithmetic for a whole unit and a part of it.

    The kernels are the ones behind `torch.optim.AdamW(fused=True)` and `SGD(fused=True)`, called directly: the classes
    import torch's compiler when the first one is built, seconds of every start. `adam` is the kernel of AdamW.
    Invariant:   safe to call from several threads at once
    """

    def __init__(self, config: OptimizerConfig, adam: str = "torch") -> None:
        if adam not in ADAM_KERNELS:
            raise OffloadError(f"offload.adam = {adam!r}: must be one of {', '.join(ADAM_KERNELS)}.")
        if adam == "deepspeed" and config.name == "adamw":
            load_deepspeed_adam()  # now, not in the middle of a step
        self.config, self.adam = config, adam

    @torch.no_grad()
    def update(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        state: Sequence[torch.Tensor],
        *,
        cut: int,
        steps: int,
        lr: float,
    ) -> None:
        """Make one update in place, the first `cut` elements with weight decay; `steps` counts it from 1.

        Shapes:      weights, gradient and each state: 1-D, alike, one dtype
        """
        cut = min(max(cut, 0), weights.numel())
        for part, decay in ((slice(0, cut), self.config.weight_decay), (slice(cut, weights.numel()), 0.0)):
            if part.start == part.stop:
                continue
            parts = weights[part], gradient[part], [s[part] for s in state]
            if self.config.name == "adamw":
                self._adamw(*parts, steps, lr, decay)
            else:
                self._sgd(*parts, lr, decay)

    def _adamw(
        self, weights: torch.Tensor, gradient: torch.Tensor, state: Tensors, steps: int, lr: float, decay: float
    ) -> None:
        count = torch.full((), steps, dtype=torch.float32, device=weights.device)
        config, kernel = self.config, self.adam if weights.device.type == "cpu" else "torch"
        adamw_(weights, gradient, state[0], state[1], count, lr=lr, config=config, decay=decay, kernel=kernel)

    def _sgd(self, weights: torch.Tensor, gradient: torch.Tensor, state: Tensors, lr: float, decay: float) -> None:
        # A zero momentum buffer equals torch's copy of the first gradient, because dampening is 0.
        torch._fused_sgd_(
            [weights],
            [gradient],
            state,
            weight_decay=decay,
            momentum=self.config.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


class FlatOptimizer:
    """Updates one flat range of master weights in place, its first `cut` elements with weight decay.

    State tensors are flat like the weights and exist from the start, so a checkpoint restores into them and no step
    allocates.
    """

    def __init__(self, kernel: UpdateKernel, weights: torch.Tensor, cut: int) -> None:
        self.state = {name: torch.zeros_like(weights) for name in kernel.config.state_names}
        self._kernel, self._weights, self._cut = kernel, weights, cut
        self._steps = 0

    def set_steps(self, steps: int) -> None:
        """Say how many updates were made, for bias correction."""
        self._steps = steps

    def update(self, gradient: torch.Tensor, lr: float) -> None:
        """Make one update.

        Shapes:      gradient: like the weights, in their dtype
        """
        self._steps += 1
        state = list(self.state.values())
        self._kernel.update(self._weights, gradient, state, cut=self._cut, steps=self._steps, lr=lr)
