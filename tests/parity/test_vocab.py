"""The vocabulary cut over ranks against one dense process: all ranks of a pipeline are simulated in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tolerance import assert_close
from windlass.dist.errors import DataError, PlanError
from windlass.model.loss import IGNORE, ChunkedCrossEntropy, LossConfig
from windlass.parallel.vocab.embedding import assemble, lookup, owned, rows_for
from windlass.parallel.vocab.head import VocabHead
from windlass.parallel.vocab.shard import VocabShard, by_owner, cut_vocabulary

F64 = torch.float64
LOSSES = {
    "plain": LossConfig(),
    "smoothed": LossConfig(label_smoothing=0.1),
    "z": LossConfig(z_loss=0.03),
    "capped": LossConfig(softcap=5.0),
    "tempered": LossConfig(temperature=0.7),
    "smoothed and capped": LossConfig(label_smoothing=0.1, softcap=5.0),
    "all": LossConfig(0.1, 0.03, 5.0, 0.7),
}
SEED = 0.3  # what the sum of losses is multiplied by where backward starts


@dataclass
class Case:
    """One micro-batch at the head."""

    x_SD: torch.Tensor
    weight_VD: torch.Tensor
    labels_S: torch.Tensor
    weights_S: torch.Tensor | None = None


def case(vocab: int = 29, tokens: int = 13, width: int = 6, scale: float = 1.0, weighted: bool = False) -> Case:
    """Random values; logits have a standard deviation of about `scale`."""
    generator = torch.Generator().manual_seed(0)
    x_SD = torch.randn(tokens, width, generator=generator, dtype=F64)
    weight_VD = torch.randn(vocab, width, generator=generator, dtype=F64) * scale / width**0.5
    labels_S = torch.randint(vocab, (tokens,), generator=generator)
    labels_S[3:5] = IGNORE
    weights_S = torch.randn(tokens, generator=generator, dtype=F64) if weighted else None
    return Case(x_SD, weight_VD, labels_S, weights_S)


@dataclass
class Result:
    """What training needs of a head."""

    loss_S: torch.Tensor
    logp_S: torch.Tensor
    grad_SD: torch.Tensor
    grad_VD: torch.Tensor


def dense(given: Case, config: LossConfig) -> Result:
    """The definition of the loss, and autograd."""
    x_SD, weight_VD = given.x_SD.clone().requires_grad_(), given.weight_VD.clone().requires_grad_()
    y_SV = x_SD @ weight_VD.t() / config.temperature
    if config.softcap:
        y_SV = config.softcap * torch.tanh(y_SV / config.softcap)
    valid_S = given.labels_S != IGNORE
    lse_S, e = y_SV.logsumexp(1), config.label_smoothing
    y_S = y_SV.gather(1, given.labels_S.where(valid_S, 0)[:, None])[:, 0]
    loss_S = (1 - e) * (lse_S - y_S) + e * (lse_S - y_SV.mean(1)) + config.z_loss * lse_S**2
    if given.weights_S is not None:
        loss_S = loss_S * given.weights_S
    loss_S = loss_S.where(valid_S, 0)
    gradients = torch.autograd.grad(loss_S.sum() * SEED, (x_SD, weight_VD))
    return Result(loss_S.detach(), (y_S - lse_S).where(valid_S, 0).detach(), *gradients)


def cut(given: Case, config: LossConfig, shards: Sequence[VocabShard], algorithm: int, chunk_rows: int = 0) -> Result:
    """Every rank's S and T, and the head rank's sum. Padded rows hold nonsense."""
    x_SD, labels_S = given.x_SD, given.labels_S
    heads = [VocabHead(shards, rank, config, algorithm, chunk_rows) for rank in range(len(shards))]
    weights = [padded(given.weight_VD, shard) for shard in shards]
    scores = [head.score(x_SD, weight, labels_S) for head, weight in zip(heads, weights, strict=True)]
    merged = heads[0].merge([s.stats_SK for s in scores], labels_S, given.weights_S)
    upstream_S = torch.full((len(x_SD),), SEED, dtype=merged.lse_S.dtype)
    upstream_S = upstream_S if given.weights_S is None else upstream_S * given.weights_S
    transposed = [
        head.transposed(s, x_SD, weight, labels_S, merged, upstream_S)
        for head, s, weight in zip(heads, scores, weights, strict=True)
    ]
    partials = [
        p
        for p in (s.partial if algorithm == 2 else t[1] for s, t in zip(scores, transposed, strict=True))
        if p is not None
    ]
    assert [p.shape[0] for p in partials] == [heads[0].partial_rows(r, labels_S) for r in range(len(shards))]
    assert all(p.dtype == x_SD.dtype for p in partials)
    assert all((t[0][s.num_rows :] == 0).all() for t, s in zip(transposed, shards, strict=True))
    grad_SD = heads[-1].input_gradient(partials, merged, labels_S, upstream_S, x_SD.dtype)
    grad_VD = torch.cat([t[0][: s.num_rows] for t, s in zip(transposed, shards, strict=True)])
    return Result(merged.loss_S, merged.logp_S, grad_SD, grad_VD)


def padded(weight_VD: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    nonsense = weight_VD.new_full((shard.padded - shard.num_rows, weight_VD.shape[1]), 3.0)
    return torch.cat([weight_VD[shard.low : shard.high], nonsense])


def assert_same(actual: Result, expected: Result, what: str) -> None:
    for name, value in vars(expected).items():
        assert_close(getattr(actual, name), value, f"{what}: {name}")


def assert_like_dense(given: Case, config: LossConfig, shards: Sequence[VocabShard]) -> None:
    """Both algorithms, all scores at once and three rows at a time."""
    expected = dense(given, config)
    for algorithm, chunk_rows in product((1, 2), (0, 3)):
        actual = cut(given, config, shards, algorithm, chunk_rows)
        assert_same(actual, expected, f"algorithm {algorithm}, chunk {chunk_rows}, {len(shards)} shards")


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_cut_head_equals_the_dense_one(num_ranks: int, loss: str, weighted: bool) -> None:
    assert_like_dense(case(weighted=weighted), LOSSES[loss], cut_vocabulary(29, num_ranks))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [20.0, 120.0], ids=["50", "300"])
def test_large_logits_neither_overflow_nor_lose_digits(scale: float, loss: str) -> None:
    assert_like_dense(case(scale=scale), LOSSES[loss], cut_vocabulary(29, 4))
    assert dense(case(scale=scale), LossConfig()).loss_S.max() > 2 * scale


@pytest.mark.parametrize("loss", LOSSES)
def test_a_shard_of_padding_only_changes_nothing(loss: str) -> None:
    assert_like_dense(case(), LOSSES[loss], cut_vocabulary(29, 4, [1, 0, 2, 0]))


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_on_the_edges_of_shards_are_counted_once(loss: str) -> None:
    shards = cut_vocabulary(29, 4)
    edges = torch.tensor([row for s in shards for row in (s.low, s.high - 1)])
    given = case(tokens=len(edges))
    given.labels_S = edges
    assert_like_dense(given, LOSSES[loss], shards)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_micro_batch_without_labels_has_no_loss_and_no_gradient(loss: str) -> None:
    given = case(weighted=True)
    given.labels_S[:] = IGNORE
    for algorithm, chunk_rows in product((1, 2), (0, 3)):
        result = cut(given, LOSSES[loss], cut_vocabulary(29, 4), algorithm, chunk_rows)
        assert all((value == 0).all() for value in vars(result).values())


def test_weights_of_tokens_without_a_label_are_not_looked_at() -> None:
    given, expected = case(), dense(case(), LossConfig())
    given.weights_S = torch.ones(13, dtype=F64).masked_fill(given.labels_S == IGNORE, torch.nan)
    for algorithm in (1, 2):
        assert_same(cut(given, LossConfig(), cut_vocabulary(29, 4), algorithm), expected, "nan weights")


def test_a_loss_that_is_not_a_number_does_not_look_like_a_good_one() -> None:
    given = case()
    given.weight_VD[28] = torch.nan  # a row of the last rank, the label of none or few tokens
    result = cut(given, LossConfig(), cut_vocabulary(29, 4), 2)
    assert result.loss_S[given.labels_S != IGNORE].isnan().all()


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 9),
    st.sampled_from([1, 2]),
    st.sampled_from(sorted(LOSSES)),
)
def test_any_shape_of_cut_head_equals_the_dense_one(
    num_ranks: int, extra: int, tokens: int, chunk_rows: int, algorithm: int, loss: str
) -> None:
    vocab = num_ranks + extra
    given, config = case(vocab, tokens, 4, scale=3.0, weighted=True), LOSSES[loss]
    given.labels_S[0] = vocab - 1
    actual = cut(given, config, cut_vocabulary(vocab, num_ranks), algorithm, chunk_rows)
    assert_same(actual, dense(given, config), loss)


def test_a_run_without_gradients_keeps_nothing_and_finds_the_same_probabilities() -> None:
    given, shards = case(), cut_vocabulary(29, 4)
    heads = [VocabHead(shards, rank, LOSSES["all"], 2) for rank in range(4)]
    scores = [
        head.score(given.x_SD, padded(given.weight_VD, shard), given.labels_S, gradients=False)
        for head, shard in zip(heads, shards, strict=True)
    ]
    assert all(s.partial is None and s.kept is None for s in scores)
    expected = dense(given, LOSSES["all"])
    for head in heads:
        merged = head.merge([s.stats_SK for s in scores], given.labels_S)
        assert_close(merged.logp_S, expected.logp_S, "logp")
        assert_close(merged.loss_S, expected.loss_S, "loss")


# -- precision and memory --------------------------------------------------------------------------------------------


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("algorithm", [1, 2])
def test_in_bf16_gradients_are_as_good_as_those_of_the_dense_loss(algorithm: int) -> None:
    """Also where p of the label is close to 1 and the gradient a small difference, and though messages are bf16."""
    given, sure = case(512, 64, 64), slice(0, 32)
    with_label_S = given.labels_S[sure] != IGNORE
    given.weight_VD[given.labels_S[sure][with_label_S]] += 0.25 * given.x_SD[sure][with_label_S]
    x_SD, weight_VD = given.x_SD.bfloat16().requires_grad_(), given.weight_VD.bfloat16().requires_grad_()
    expected = dense(Case(x_SD.detach().double(), weight_VD.detach().double(), given.labels_S), LossConfig())
    assert -0.01 < expected.logp_S[sure].mean() < 0
    total = ChunkedCrossEntropy()(x_SD[None], weight_VD, given.labels_S[None])
    local_SD, local_VD = torch.autograd.grad(total, (x_SD, weight_VD), torch.tensor(SEED))
    rounded = Case(x_SD.detach(), weight_VD.detach(), given.labels_S)
    for num_ranks, chunk_rows in product((1, 4), (0, 48)):
        actual = cut(rounded, LossConfig(), cut_vocabulary(512, num_ranks), algorithm, chunk_rows)
        for mine, local, best in (
            (actual.grad_SD[sure], local_SD[sure], expected.grad_SD[sure]),
            (actual.grad_SD, local_SD, expected.grad_SD),
            (actual.grad_VD, local_VD, expected.grad_VD),
        ):
            assert relative_error(mine, best) < 1.25 * relative_error(local, best)
        assert relative_error(actual.logp_S, expected.logp_S) < 1e-3


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and what products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += str(func).startswith("aten.mm")
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_streamed_scores_of_a_shard_never_exist_as_a_whole() -> None:
    given = case(vocab=256, tokens=50)
    shards = cut_vocabulary(256, 1)
    for algorithm in (1, 2):
        with Largest() as seen:
            result = cut(given, LOSSES["all"], shards, algorithm, 32)
        assert seen.numel == max(50 * 32, 256 * 6)
        assert_same(result, dense(given, LOSSES["all"]), "streamed")


@pytest.mark.parametrize("algorithm", [1, 2])
def test_the_logits_of_a_kept_shard_are_computed_once(algorithm: int) -> None:
    with Largest() as seen:
        cut(case(), LossConfig(), cut_vocabulary(29, 1), algorithm)
    assert seen.products == 3  # logits, gradient of the rows, gradient of the input


# -- the local loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [0, 4])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_local_loss_means_the_same(loss: str, weighted: bool, chunk_tokens: int) -> None:
    given, config = case(weighted=weighted), LOSSES[loss]
    expected = dense(given, config)
    x_SD, weight_VD = given.x_SD.requires_grad_(), given.weight_VD.requires_grad_()
    weights_BT = None if given.weights_S is None else given.weights_S[None]
    local = ChunkedCrossEntropy(chunk_tokens, config)
    total = local(x_SD[None], weight_VD, given.labels_S[None], weights_BT)
    grads = torch.autograd.grad(total, (x_SD, weight_VD), torch.tensor(SEED, dtype=F64))
    with torch.no_grad():
        again = local(x_SD[None], weight_VD, given.labels_S[None], weights_BT)
    for actual, wanted in zip(
        (total, again, *grads), (*[expected.loss_S.sum()] * 2, expected.grad_SD, expected.grad_VD), strict=True
    ):
        assert_close(actual.detach(), wanted, loss)


# -- embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [None, [0, 1, 0, 2]])
def test_the_cut_embedding_equals_the_whole_table(shares: list[float] | None) -> None:
    tokens_S, shards = torch.randint(29, (50,)), cut_vocabulary(29, 4, shares)
    table_VD, gradient_SD = torch.randn(29, 6, dtype=F64), torch.randn(50, 6, dtype=F64)
    rows = [lookup(tokens_S, padded(table_VD, shard), shard) for shard in shards]
    assert torch.equal(assemble(tokens_S, shards, rows), table_VD[tokens_S])
    grad_VD = torch.zeros_like(table_VD)
    for shard in shards:
        index_K = tokens_S[owned(tokens_S, shard)]
        grad_VD.index_add_(0, index_K, rows_for(gradient_SD, tokens_S, shard))
    assert_close(grad_VD, torch.zeros_like(table_VD).index_add_(0, tokens_S, gradient_SD), "table")


def test_a_token_outside_the_vocabulary_is_an_error_with_a_remedy() -> None:
    tokens_S, shards = torch.tensor([0, 29]), cut_vocabulary(29, 2)
    rows = [lookup(tokens_S, torch.zeros(s.padded, 4), s) for s in shards]
    with pytest.raises(DataError, match=r"1 token ids .* vocabulary of 29 rows.*model.vocab_size"):
        assemble(tokens_S, shards, rows)


# -- shards ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300_000), st.integers(1, 16), st.lists(st.floats(0, 8), min_size=16, max_size=16), st.booleans())
def test_shards_cover_the_vocabulary_once(vocab: int, num_ranks: int, shares: list[float], even: bool) -> None:
    chosen = None if even or not any(shares[:num_ranks]) else shares[:num_ranks]
    vocab = max(vocab, num_ranks)
    shards = cut_vocabulary(vocab, num_ranks, chosen)
    assert [s.low for s in shards] == [0, *(s.high for s in shards[:-1])]
    assert shards[-1].high == vocab
    assert all(0 <= s.num_rows <= s.padded and s.padded - s.num_rows <= 64 for s in shards)
    if chosen is None:
        assert min(s.num_rows for s in shards) >= 1
        assert all(s.num_rows <= vocab / num_ranks * 17 / 16 + 1 for s in shards)
    elif 0.0 in chosen:
        assert all(s.num_rows == 0 for s, share in zip(shards, chosen, strict=True) if share == 0)


def test_large_vocabularies_are_cut_at_multiples_of_64() -> None:
    assert [s.low % 64 for s in cut_vocabulary(50257, 8)] == [0] * 8
    assert [(s.low, s.high, s.padded) for s in cut_vocabulary(300, 2)] == [(0, 152, 152), (152, 300, 152)]


@given(st.lists(st.integers(-1, 40), max_size=30), st.integers(1, 5))
def test_owners_in_order_are_what_each_owner_finds(tokens: list[int], num_ranks: int) -> None:
    tokens_S, shards = torch.tensor([IGNORE if t < 0 else t for t in tokens]), cut_vocabulary(33, num_ranks)
    found = torch.cat([owned(tokens_S, shard) for shard in shards])
    order = by_owner(tokens_S, shards)
    assert torch.equal(order[: len(found)], found) and len(order) == len(tokens)


def test_impossible_cuts_are_refused_with_what_would_work() -> None:
    with pytest.raises(PlanError, match=r"3 rows cannot be cut over 4 .*pipeline.vocab=off, or at most 3"):
        cut_vocabulary(3, 4)
    for shares in ([1.0], [0, 0], [1, -1], [1, float("inf")], [1, float("nan")]):
        with pytest.raises(PlanError, match=r"pipeline.vocab_shares = .* 2 numbers of at least 0"):
            cut_vocabulary(100, 2, shares)
