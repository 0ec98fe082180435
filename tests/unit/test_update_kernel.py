"""Updates of flat ranges: the bits of torch's optimizers, in parts as in whole; the other kernel only where it fits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from windlass.dist.errors import OffloadError
from windlass.parallel import optim
from windlass.parallel.optim import FlatOptimizer, OptimizerConfig, UpdateKernel

SIZE, CUT = 640, 256


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(SIZE, generator=generator, dtype=dtype)
    return weights, [torch.randn(SIZE, generator=generator, dtype=dtype) for _ in range(3)]


class Recorder:
    """Stands for DeepSpeed's module: notes the calls, changes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float, int]] = []

    def create_adam(self, *_: Any) -> None:
        return None

    def adam_update(self, number: int, step: int, lr: float, *rest: Any) -> None:
        assert number >= 1 << 30 and len(rest) == 9
        self.calls.append((step, rest[3], rest[5].numel()))


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(optim, "load_deepspeed_adam", lambda: recorder)
    return recorder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "config",
    [OptimizerConfig(), OptimizerConfig(name="sgd", momentum=0.9, weight_decay=0.0), OptimizerConfig(name="sgd")],
    ids=["adamw", "sgd with momentum", "sgd"],
)
def test_updates_have_the_bits_of_torchs_fused_optimizers(config: OptimizerConfig, dtype: torch.dtype) -> None:
    weights, gradients = tensors(dtype)
    parts = [weights[:CUT].clone().requires_grad_(), weights[CUT:].clone().requires_grad_()]
    groups = [
        {"params": [part], "weight_decay": decay} for part, decay in zip(parts, (config.weight_decay, 0.0), strict=True)
    ]
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if config.name == "adamw" else torch.optim.SGD
    named = {"betas": config.betas, "eps": config.eps} if config.name == "adamw" else {"momentum": config.momentum}
    reference = make(groups, lr=1e-2, fused=True, **named)
    ours = FlatOptimizer(UpdateKernel(config), weights, CUT)
    for gradient in gradients:
        parts[0].grad, parts[1].grad = gradient[:CUT].clone(), gradient[CUT:].clone()
        reference.step()
        ours.update(gradient, 1e-2)
    assert torch.equal(weights, torch.cat([part.detach() for part in parts]))


def test_parts_updated_by_several_threads_are_the_whole() -> None:
    kernel = UpdateKernel(OptimizerConfig())
    found = []
    for size in (SIZE, 64):
        weights, gradients = tensors()
        state = [torch.zeros(SIZE), torch.zeros(SIZE)]
        for steps, gradient in enumerate(gradients, 1):
            with ThreadPoolExecutor(4) as pool:
                for at in range(0, SIZE, size):
                    part = slice(at, at + size)
                    views = weights[part], gradient[part], [s[part] for s in state]
                    pool.submit(kernel.update, *views, cut=CUT - at, steps=steps, lr=1e-2)
        found.append([weights, *state])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_an_update_by_deepspeed_begins_from_step_0_each_time(deepspeed: Recorder) -> None:
    weights, gradients = tensors()
    kernel = UpdateKernel(OptimizerConfig(weight_decay=0.5), "deepspeed")
    kernel.update(weights, gradients[0], [weights.clone(), weights.clone()], cut=CUT, steps=7, lr=1e-2)
    assert deepspeed.calls == [(0, 0.5, 0), (7, 0.5, CUT), (0, 0.0, 0), (7, 0.0, SIZE - CUT)]


def test_deepspeed_updates_nothing_but_fp32_in_host_memory(deepspeed: Recorder) -> None:
    weights, gradients = tensors(torch.float64)
    kernel = UpdateKernel(OptimizerConfig(), "deepspeed")
    with pytest.raises(OffloadError, match=r"offload.adam = 'deepspeed'.*float64.*Use offload.adam=torch"):
        kernel.update(weights, gradients[0], [weights.clone(), weights.clone()], cut=CUT, steps=1, lr=1e-2)
    assert not deepspeed.calls


def test_an_unknown_kernel_is_refused_and_sgd_needs_none_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OffloadError, match="torch, deepspeed"):
        UpdateKernel(OptimizerConfig(), "fused")
    monkeypatch.setattr(optim, "load_deepspeed_adam", lambda: pytest.fail("loaded"))
    UpdateKernel(OptimizerConfig(name="sgd"), "deepspeed")
    UpdateKernel(OptimizerConfig())
