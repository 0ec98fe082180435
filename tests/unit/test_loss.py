"""The options of the loss from a job to the head, and weights of tokens. Numbers: tests/parity/test_vocab.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from windlass.data.batch import IGNORE, Batch
from windlass.dist.errors import ConfigError
from windlass.launch.check import check_job
from windlass.launch.config import load_job
from windlass.model.build import build_model, materialise
from windlass.model.config import ModelConfig
from windlass.model.loss import ChunkedCrossEntropy, LossConfig

SMALL = ModelConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, loss_chunk_tokens=4)


def head_of(loss: LossConfig, model: ModelConfig = SMALL) -> Any:
    built = build_model(model, loss=loss)
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, start: int, stop: int, out_1d: torch.Tensor) -> None:
        out_1d.copy_(torch.randn(stop - start, generator=generator))

    materialise(built, fill, torch.float32)
    return built.head


def test_a_job_gives_the_options_of_its_loss_to_the_head() -> None:
    loaded = load_job("quickstart", ["loss.label_smoothing=0.1", "loss.z_loss=1e-4", "loss.softcap=30"])
    head = head_of(loaded.config.loss)
    assert head.loss.config == LossConfig(label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
    assert head.loss.chunk_tokens == 4


@pytest.mark.parametrize(
    ("given", "legal"),
    [
        ("loss.label_smoothing=1", "at least 0 and less than 1"),
        ("loss.z_loss=-1", "at least 0"),
        ("loss.softcap=-30", "at least 0"),
        ("loss.temperature=0", "greater than 0"),
        ("loss.temperature=.inf", "a finite number"),
    ],
)
def test_an_impossible_option_is_refused_with_its_range(given: str, legal: str) -> None:
    with pytest.raises(ConfigError, match=rf"{given.split('=')[0]} = .*must be {legal}"):
        check_job(load_job("quickstart", [given]), 1, to_run=False)


def test_a_custom_model_does_not_silently_lose_the_options() -> None:
    custom = ModelConfig(kind="custom", factory="any.module:build")
    with pytest.raises(ConfigError, match=r"loss.softcap = 30.0 has no effect.*brings its own loss"):
        build_model(custom, loss=LossConfig(softcap=30.0))


def test_weights_multiply_the_loss_of_tokens() -> None:
    head, h_BTD = head_of(LossConfig()), torch.randn(2, 5, 16)
    labels_BT, weights_BT = torch.randint(32, (2, 5)), torch.rand(2, 5)
    one_by_one = [
        head(h_BTD[b : b + 1, t : t + 1], labels_BT[b : b + 1, t : t + 1]) * weights_BT[b, t]
        for b in range(2)
        for t in range(5)
    ]
    assert torch.allclose(head(h_BTD, labels_BT, weights_BT), torch.stack(one_by_one).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_one_change_no_bit(dtype: torch.dtype) -> None:
    h_BTD, weight_VD = torch.randn(2, 9, 6).to(dtype), torch.randn(11, 6).to(dtype)
    labels_BT = torch.randint(11, (2, 9))
    labels_BT[0, 3:6] = IGNORE
    results = []
    for weights_BT in (None, torch.ones(2, 9)):
        leaves = h_BTD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        total = ChunkedCrossEntropy(4)(*leaves, labels_BT, weights_BT)
        results.append((total.detach(), *torch.autograd.grad(total, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_moves_with_and_without_weights() -> None:
    rows = [torch.zeros(1, 3, dtype=torch.int64) for _ in range(4)]
    plain = Batch(*rows, torch.zeros(1, dtype=torch.int64))
    weighted = Batch(*rows, torch.zeros(1, dtype=torch.int64), torch.ones(1, 3))
    assert plain.to(torch.device("meta")).weights_BT is None
    moved = weighted.to(torch.device("meta")).weights_BT
    assert moved is not None and moved.is_meta
