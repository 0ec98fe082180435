"""Attention masks, rotary tables, norms and the loss against plain definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from windlass.model import loss as loss_module
from windlass.model.attention import LocalAttention, document_mask
from windlass.model.build import build_model, logits_of, materialise
from windlass.model.config import ModelConfig
from windlass.model.loss import ChunkedCrossEntropy
from windlass.model.norm import RMSNorm
from windlass.model.rope import inverse_frequencies, rotary_tables, rotate

F64 = torch.float64


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), min_size=1, max_size=3), st.integers(1, 14))
def test_tokens_see_earlier_tokens_of_their_document_in_the_window(rows: list[list[int]], window: int) -> None:
    length = min(sum(row) for row in rows)
    documents_BT = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row))[:length] for row in rows])
    mask = document_mask(documents_BT, window, F64)
    for b, row in enumerate(documents_BT.tolist()):
        wanted = [[j <= i and i - j < window and row[i] == row[j] for j in range(length)] for i in range(length)]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        assert torch.equal(causal if mask is None else mask[b, 0] == 0, torch.tensor(wanted))
        assert mask is None or mask[b, 0].isneginf().sum() == length * length - sum(map(sum, wanted))


def test_rows_of_one_document_need_no_mask() -> None:
    one = torch.tensor([[3, 3, 3], [0, 0, 0]])
    assert document_mask(one, None, F64) is None
    assert document_mask(one, 3, F64) is None
    assert document_mask(one, 2, F64) is not None
    assert document_mask(torch.tensor([[0, 0, 1]]), None, F64) is not None


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_packed_documents_get_the_logits_they_get_alone(dtype: torch.dtype) -> None:
    config = ModelConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, sliding_window=5)
    model, generator = build_model(config), torch.Generator().manual_seed(0)
    materialise(model, lambda name, start, stop, out: out.normal_(std=0.3, generator=generator), dtype)
    tokens_BT = torch.randint(40, (1, 14), generator=generator)
    documents_BT = torch.tensor([[0] * 8 + [1] * 6])
    positions_BT = torch.tensor([[*range(8), *range(6)]])
    packed = logits_of(model, tokens_BT, positions_BT, documents_BT)
    for low, high in ((0, 8), (8, 14)):
        part = slice(low, high)
        single = torch.zeros(1, high - low, dtype=torch.long)
        alone = logits_of(model, tokens_BT[:, part], positions_BT[:, part], single)
        assert torch.allclose(packed[:, part], alone, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_grouped_heads_attend_like_repeated_ones() -> None:
    q, k, v = (torch.randn(2, 6, heads, 4, dtype=F64) for heads in (4, 2, 2))
    scheme, none = LocalAttention(), None
    repeated = (k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    assert torch.allclose(scheme(q, k, v, none), scheme(q, *repeated, none))


def test_rotation_turns_pairs_and_its_gradient_turns_back() -> None:
    positions_BT = torch.tensor([[0, 1, 5], [2, 0, 1]])
    cos, sin = rotary_tables(positions_BT, inverse_frequencies(6, 100.0, None), F64)
    x = torch.randn(2, 3, 2, 6, dtype=F64, requires_grad=True)
    pairs = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    assert torch.allclose(rotate(x, cos, sin), torch.cat([pairs.real, pairs.imag], -1))
    assert torch.equal(rotate(x, cos, sin)[0, 0], x[0, 0])  # position 0 stays
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin), x)


def test_rope_scaling_stretches_slow_pairs_only() -> None:
    plain = inverse_frequencies(64, 500000.0, None)
    assert torch.equal(inverse_frequencies(64, 500000.0, {"rope_type": "linear", "factor": 4.0}), plain / 4)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    stretched = inverse_frequencies(64, 500000.0, {"rope_type": "llama3", **scaling})
    assert torch.equal(stretched[:8], plain[:8])
    assert torch.equal(stretched[-8:], plain[-8:] / 8)
    assert (stretched[1:] < stretched[:-1]).all()


def test_rms_norm_equals_its_definition_with_its_gradient() -> None:
    norm = RMSNorm(5, 1e-5).to(F64)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 5, dtype=F64, requires_grad=True)
    assert torch.allclose(norm(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(norm, {"weight": w}, (x,)), norm.weight)


def loss_case(dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_BTD = torch.randn(2, 9, 6, generator=generator, dtype=F64).to(dtype).requires_grad_()
    weight_VD = torch.randn(11, 6, generator=generator, dtype=F64).to(dtype).requires_grad_()
    labels_BT = torch.randint(11, (2, 9), generator=generator)
    labels_BT[0, 3:6] = -100
    return h_BTD, weight_VD, labels_BT


@pytest.mark.parametrize("chunk", [0, 1, 4, 18, 100])
def test_the_loss_and_its_gradients_do_not_depend_on_the_chunk(chunk: int) -> None:
    h_BTD, weight_VD, labels_BT = loss_case()
    logits = (h_BTD @ weight_VD.t()).flatten(0, 1)
    expected = F.cross_entropy(logits, labels_BT.flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected, (h_BTD, weight_VD), torch.tensor(0.25, dtype=F64))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        loss = ChunkedCrossEntropy(chunk)(h_BTD, weight_VD, labels_BT)
    grads = torch.autograd.grad(loss, (h_BTD, weight_VD), torch.tensor(0.25, dtype=F64))
    assert torch.allclose(loss, expected, rtol=1e-14)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(grads, wanted, strict=True))
    with torch.no_grad():
        assert torch.allclose(ChunkedCrossEntropy(chunk)(h_BTD, weight_VD, labels_BT), expected, rtol=1e-14)


def test_the_loss_of_a_frozen_head_still_reaches_the_hidden_states() -> None:
    h_BTD, weight_VD, labels_BT = loss_case()
    loss = ChunkedCrossEntropy(4)(h_BTD, weight_VD.detach(), labels_BT)
    (grad,) = torch.autograd.grad(loss, h_BTD)
    assert (grad[0, 3:6] == 0).all()
    assert grad[1].abs().sum() > 0


def test_a_second_backward_of_the_loss_is_refused() -> None:
    h_BTD, weight_VD, labels_BT = loss_case()
    loss = ChunkedCrossEntropy(4)(h_BTD, weight_VD, labels_BT)
    torch.autograd.grad(loss, h_BTD, retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        torch.autograd.grad(loss, h_BTD)


def test_bf16_chunks_add_their_weight_gradients_in_fp32() -> None:
    h_BTD, weight_VD, labels_BT = loss_case(torch.bfloat16)
    whole, chunked = (
        torch.autograd.grad(ChunkedCrossEntropy(chunk)(h_BTD, weight_VD, labels_BT), weight_VD)[0] for chunk in (0, 3)
    )
    assert chunked.dtype == torch.bfloat16
    assert torch.allclose(whole.float(), chunked.float(), rtol=0.02, atol=0.02)


def test_full_logits_never_exist_in_a_chunked_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []

    def watched(h_CD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        logits_CV = F.linear(h_CD, weight_VD)
        made.append(logits_CV.shape)
        return logits_CV

    monkeypatch.setattr(loss_module, "linear", watched)
    h_BTD, weight_VD = torch.randn(1, 20, 2, requires_grad=True), torch.randn(32, 2, requires_grad=True)
    loss = ChunkedCrossEntropy(8)(h_BTD, weight_VD, torch.randint(32, (1, 20)))
    torch.autograd.grad(loss, (h_BTD, weight_VD))
    assert made == [(8, 32), (8, 32), (4, 32)]  # and backward made none
