"""The output head and its loss over a vocabulary cut by rows: passes S and T of one rank, and what joins the ranks.

Legend: S tokens of a micro-batch, D hidden width, R rows of this rank's shard, C rows of one chunk of them, L labels
that this shard holds, K statistics per token. With y the scores, p their softmax over the whole vocabulary, g the label
and u the gradient that reaches a token's loss, `model.loss` gives

    dL/dy_j = u (f p_j - (1 - e) [j = g] - e / V),     f = 1 + 2 z lse,     dy_j/dlogit_j = slope_j / temperature.

S knows the softmax p' of its own shard only, of which p is exp(lse' - lse) p'. It leaves the label out: the average

    A = sum over j != g of p'_j slope_j W_j

is a part in the sense of `parallel.softmax`, and the row W_g, times c slope_g with c = f p_g - (1 - e), joins it when
lse is known. Never are two large numbers subtracted, so messages may be of the model's dtype.
Algorithm 1 forms the gradient of the input in T, after all statistics: backward waits for two barriers. Algorithm 2
forms A in S and sends it with the rows W_g: backward waits for one, and T may come at any time later.
Must not know: who sends, schedules, where gradients go.
Source: Yeung et al. 2024, arXiv:2411.05288, sections 3 and 4.
Differs:     the label apart from A; smoothing, penalty, cap, temperature and weights; no gradient is broadcast, since
             labels and weights are on every rank; S and T over chunks of rows, with a running softmax
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from windlass.model.loss import IGNORE, LossConfig
from windlass.parallel.softmax import exact_dtype, merge_into, merge_partials
from windlass.parallel.vocab.shard import VocabShard, by_owner, owned


@dataclass(frozen=True)
class _Kept:
    """Exponentials relative to each token's peak, times slopes, 0 for the label: T needs no second look at logits."""

    terms_SR: torch.Tensor
    peak_S: torch.Tensor


@dataclass
class Scores:
    """What S found: statistics for every rank; with algorithm 2 a part of the input's gradient, for the head rank."""

    stats_SK: torch.Tensor  # columns: lse of the shard, score of the label (0 where others hold it), [sum of scores]
    partial: torch.Tensor | None  # T does not need it: set it to None once it is sent
    kept: _Kept | None
    index_L: torch.Tensor  # tokens whose label this shard holds


@dataclass(frozen=True)
class _Running:
    """What S adds up over chunks; None where it is not wanted."""

    stats_SK: torch.Tensor
    part_SD: torch.Tensor | None
    smooth_SD: torch.Tensor | None  # the rows under the smoothed target, weighed by each token's slopes


@dataclass(frozen=True)
class Merged:
    """What all shards together say about each token."""

    loss_S: torch.Tensor  # weighted, 0 where there is no label
    logp_S: torch.Tensor  # log-probability of the label, 0 where there is none
    lse_S: torch.Tensor
    label_S: torch.Tensor  # score of the label, 0 where there is none
    lse_by_rank: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Factors:
    """What a token's gradient is made of: `softmax_S` p_j + `label_S` [j = g] - `plain_S` e / V, slopes aside."""

    plain_S: torch.Tensor
    softmax_S: torch.Tensor
    label_S: torch.Tensor


@dataclass(frozen=True)
class _Chunk:
    """Scores of some rows of the shard; those of padding are -inf."""

    rows: slice
    num_real: int
    scores_SC: torch.Tensor
    slope_SC: torch.Tensor | None  # None: 1
    column_S: torch.Tensor  # of the label; 0 where it is not among the rows
    inside_S: torch.Tensor  # whether it is

    def label_column(self) -> torch.Tensor:
        """Return each token's value in the column of its label."""
        return self.scores_SC.gather(1, self.column_S[:, None])[:, 0]

    def exponentials(self, shift_S: torch.Tensor) -> torch.Tensor:
        """Turn the scores, in place, into exponentials relative to a shift, with 0 for the label."""
        terms_SC = self.scores_SC.sub_(shift_S[:, None]).exp_()
        others_S = self.label_column().masked_fill_(self.inside_S, 0)
        return terms_SC.scatter_(1, self.column_S[:, None], others_S[:, None])


class VocabHead:
    """The head as one rank computes it.

    `algorithm` is 1 or 2. `chunk_rows`: rows of the shard whose scores exist at one time; T then computes them again.
    With 0 all exist at once and S keeps what T needs, in the model's dtype.
    Invariant:   sums over tokens are never divided; padded rows get gradients of 0, whatever finite values they hold
    """

    def __init__(
        self, shards: Sequence[VocabShard], rank: int, config: LossConfig, algorithm: int, chunk_rows: int = 0
    ) -> None:
        self._shards, self._shard, self._config = tuple(shards), shards[rank], config
        self._algorithm, self._chunk_rows = algorithm, chunk_rows
        self._smooth = config.label_smoothing / shards[-1].high  # the share of the target that every row gets
        # Under a cap each token has its own slopes, so the smoothed target's rows differ from token to token.
        self._smooth_per_token = self._smooth > 0 and config.softcap > 0
        self._keeps = not chunk_rows and not self._smooth_per_token
        self.num_stats = 3 if self._smooth else 2

    # -- S -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, x_SD: torch.Tensor, weight_RD: torch.Tensor, labels_S: torch.Tensor, *, gradients: bool = True
    ) -> Scores:
        """Run S. Without `gradients` only statistics are formed and nothing is kept.

        Shapes:      weight_RD with its padded rows; stats_SK exact; partial (partial_rows, D) in the dtype of x
        Blocks:      host, on a GPU, until earlier work is done: how many labels a shard holds is a shape
        """
        exact = exact_dtype(x_SD.dtype)
        stats_SK = x_SD.new_zeros(len(x_SD), self.num_stats, dtype=exact)
        stats_SK[:, 0] = -torch.inf
        index_L = owned(labels_S, self._shard)
        sends = gradients and self._algorithm == 2
        part_SD = torch.zeros_like(x_SD, dtype=exact) if sends else None
        smooth_SD = torch.zeros_like(x_SD, dtype=exact) if sends and self._smooth_per_token else None
        running, keep, kept = _Running(stats_SK, part_SD, smooth_SD), gradients and self._keeps, None
        for rows in self._chunks(weight_RD):
            kept = self._score_chunk(rows, x_SD, weight_RD, labels_S, running, keep)
        if part_SD is None:
            return Scores(stats_SK, None, kept, index_L)
        pieces = [part_SD, weight_RD.index_select(0, labels_S[index_L] - self._shard.low)]
        if smooth_SD is not None:
            pieces.append(smooth_SD)
        elif self._smooth:
            pieces.append(self._sum_of_rows(weight_RD)[None])
        partial = torch.cat([piece.to(x_SD.dtype) for piece in pieces])
        return Scores(stats_SK, partial, kept, index_L)

    def _score_chunk(
        self,
        rows: slice,
        x_SD: torch.Tensor,
        weight_RD: torch.Tensor,
        labels_S: torch.Tensor,
        running: _Running,
        keep: bool,
    ) -> _Kept | None:
        """Add a chunk to what runs; a function of its own, so that its memory is free before the next one."""
        stats_SK, part_SD, smooth_SD = running.stats_SK, running.part_SD, running.smooth_SD
        wants_terms = keep or part_SD is not None
        chunk, weight_CD = self._chunk(rows, x_SD, weight_RD, labels_S, slope=wants_terms), weight_RD[rows]
        lse_S, label_S = stats_SK[:, 0], stats_SK[:, 1]
        own_S = chunk.label_column()
        label_S.copy_(own_S.where(chunk.inside_S, label_S))
        if self._smooth:
            stats_SK[:, 2] += chunk.scores_SC[:, : chunk.num_real].sum(1)
        peak_S = chunk.scores_SC.amax(1)
        terms_SC = chunk.exponentials(peak_S)
        sum_S = terms_SC.sum(1).add_((own_S - peak_S).exp_().where(chunk.inside_S, 0))
        chunk_lse_S = sum_S.log().add_(peak_S)
        if part_SD is None:
            lse_S.copy_(torch.logaddexp(lse_S, chunk_lse_S))
        if not wants_terms:
            return None
        if chunk.slope_SC is not None:
            terms_SC.mul_(chunk.slope_SC)
        terms_SC = terms_SC.to(x_SD.dtype)
        if part_SD is not None:
            average_SD = _product(terms_SC, weight_CD, torch.empty_like(part_SD)).div_(sum_S[:, None])
            merge_into(part_SD, lse_S, average_SD, chunk_lse_S)
        if smooth_SD is not None and chunk.slope_SC is not None:
            slope_SC = chunk.slope_SC[:, : chunk.num_real].to(x_SD.dtype)
            smooth_SD += _product(slope_SC, weight_CD[: chunk.num_real], torch.empty_like(smooth_SD))
        return _Kept(terms_SC, peak_S) if keep else None

    def _chunks(self, weight_RD: torch.Tensor) -> Iterator[slice]:
        """Yield the chunks that hold real rows."""
        size = self._chunk_rows or len(weight_RD)
        for start in range(0, self._shard.num_rows, size):
            yield slice(start, min(start + size, len(weight_RD)))

    def _chunk(
        self, rows: slice, x_SD: torch.Tensor, weight_RD: torch.Tensor, labels_S: torch.Tensor, *, slope: bool
    ) -> _Chunk:
        scores_SC = x_SD.new_empty(len(x_SD), rows.stop - rows.start, dtype=exact_dtype(x_SD.dtype))
        _product(x_SD, weight_RD[rows].t(), scores_SC)
        slope_SC = self._config.scores_(scores_SC, slope=slope)
        num_real = min(rows.stop, self._shard.num_rows) - rows.start
        scores_SC[:, num_real:] = -torch.inf
        column_S = labels_S - (self._shard.low + rows.start)
        inside_S = (column_S >= 0) & (column_S < num_real)
        return _Chunk(rows, num_real, scores_SC, slope_SC, column_S.where(inside_S, 0), inside_S)

    # -- between -----------------------------------------------------------------------------------------------------

    def partial_rows(self, rank: int, labels_S: torch.Tensor) -> int:
        """Return how many rows the message has that a rank sends to the head rank.

        Blocks:      host, if the labels are on a GPU
        """
        if self._algorithm == 1:
            return len(labels_S)
        return len(labels_S) + len(owned(labels_S, self._shards[rank])) + self._smooth_rows(len(labels_S))

    def _smooth_rows(self, num_tokens: int) -> int:
        return num_tokens if self._smooth_per_token else int(self._smooth > 0)

    @torch.no_grad()
    def merge(
        self, stats_by_rank: Sequence[torch.Tensor], labels_S: torch.Tensor, weights: torch.Tensor | None = None
    ) -> Merged:
        """Join the statistics of all ranks; `weights` of tokens are of any shape.

        Invariant:   the same on every rank, bit for bit
        """
        lse_by_rank = tuple(stats_SK[:, 0] for stats_SK in stats_by_rank)
        totals_SK = torch.stack(list(stats_by_rank)).sum(0)
        valid_S, lse_S = labels_S != IGNORE, torch.stack(lse_by_rank).logsumexp(0)
        label_S = totals_SK[:, 1]
        logp_S = (label_S - lse_S).where(valid_S, 0)
        spread_S = lse_S - totals_SK[:, 2] / self._shards[-1].high if self._smooth else lse_S
        loss_S = self._config.per_token(logp_S, lse_S, spread_S)
        if weights is not None:
            loss_S = loss_S * weights.reshape(-1).to(loss_S.dtype)
        return Merged(loss_S.where(valid_S, 0), logp_S, lse_S, label_S, lse_by_rank)

    def _factors(self, merged: Merged, labels_S: torch.Tensor, upstream_S: torch.Tensor) -> _Factors:
        config = self._config
        plain_S = upstream_S.to(merged.lse_S.dtype).where(labels_S != IGNORE, 0) / config.temperature
        pull_S = config.pull(merged.lse_S)
        # f p - (1 - e), without losing the digits of a p close to 1
        label_S = merged.logp_S.expm1() + (pull_S - 1) * merged.logp_S.exp() + config.label_smoothing
        if config.softcap:
            label_S *= 1 - (merged.label_S / config.softcap).square()
        return _Factors(plain_S, plain_S * pull_S, plain_S * label_S)

    # -- T -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def transposed(
        self,
        scores: Scores,
        x_SD: torch.Tensor,
        weight_RD: torch.Tensor,
        labels_S: torch.Tensor,
        merged: Merged,
        upstream_S: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run T: return the gradient of this rank's rows, and with algorithm 1 its part of the input's gradient.

        `upstream_S` is the gradient that reaches each token's loss, its weight included.
        Shapes:      gradient_RD exact (fp32 for bf16), padded rows 0; partial (S, D) in the dtype of x
        """
        factors = self._factors(merged, labels_S, upstream_S)
        exact, num_real = exact_dtype(x_SD.dtype), self._shard.num_rows
        grad_RD = torch.empty_like(weight_RD, dtype=exact)
        partial_SD = torch.zeros_like(x_SD, dtype=exact) if self._algorithm == 1 else None
        done = 0
        for rows in self._chunks(weight_RD):
            terms_SC, scale_S = self._terms(rows, scores.kept, x_SD, weight_RD, labels_S, merged, factors)
            _product(terms_SC.t(), (x_SD * scale_S[:, None]).to(x_SD.dtype), grad_RD[rows])
            if partial_SD is not None:
                product_SD = _product(terms_SC, weight_RD[rows], torch.empty_like(partial_SD))
                partial_SD.addcmul_(product_SD, scale_S[:, None])
            done = rows.stop
            del terms_SC  # its memory is free before the next chunk
        grad_RD[done:] = 0
        index_L, row_L = scores.index_L, labels_S[scores.index_L] - self._shard.low
        label_L1 = factors.label_S[index_L][:, None]
        _add_rows(grad_RD, row_L, x_SD[index_L] * label_L1)
        if partial_SD is not None:
            partial_SD.index_add_(0, index_L, weight_RD[row_L] * label_L1)
        if self._smooth and not self._smooth_per_token:
            share_S = factors.plain_S * self._smooth
            grad_RD[:num_real] -= share_S @ x_SD.to(exact)
            if partial_SD is not None:
                partial_SD.addr_(share_S, self._sum_of_rows(weight_RD), alpha=-1)
        return grad_RD, None if partial_SD is None else partial_SD.to(x_SD.dtype)

    def _terms(
        self,
        rows: slice,
        kept: _Kept | None,
        x_SD: torch.Tensor,
        weight_RD: torch.Tensor,
        labels_S: torch.Tensor,
        merged: Merged,
        factors: _Factors,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of a chunk's logits as a matrix and the factor of each token, labels left out."""
        if kept is not None:
            return kept.terms_SR, (kept.peak_S - merged.lse_S).exp_().mul_(factors.softmax_S)
        chunk = self._chunk(rows, x_SD, weight_RD, labels_S, slope=True)
        terms_SC, scale_S = chunk.exponentials(merged.lse_S), factors.softmax_S
        if self._smooth_per_token:
            pull_S1, scale_S = self._config.pull(merged.lse_S)[:, None], factors.plain_S
            terms_SC[:, : chunk.num_real].mul_(pull_S1).sub_(self._smooth)
        if chunk.slope_SC is not None:
            terms_SC.mul_(chunk.slope_SC)
        return terms_SC.to(x_SD.dtype), scale_S

    def _sum_of_rows(self, weight_RD: torch.Tensor) -> torch.Tensor:
        return weight_RD[: self._shard.num_rows].sum(0, dtype=exact_dtype(weight_RD.dtype))

    # -- the head rank -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def input_gradient(
        self,
        partials: Sequence[torch.Tensor],
        merged: Merged,
        labels_S: torch.Tensor,
        upstream_S: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the gradient of x_SD from the parts of all ranks, in rank order."""
        exact, num_tokens = merged.lse_S.dtype, len(labels_S)
        if self._algorithm == 1:
            grad_SD = partials[0].to(exact, copy=True)
            for partial in partials[1:]:
                grad_SD += partial
            return grad_SD.to(dtype)
        factors = self._factors(merged, labels_S, upstream_S)
        parts = [(partial[:num_tokens], lse_S) for partial, lse_S in zip(partials, merged.lse_by_rank, strict=True)]
        grad_SD = merge_partials(parts)[0].mul_(factors.softmax_S[:, None])
        places, start, num_smooth = by_owner(labels_S, self._shards), 0, self._smooth_rows(num_tokens)
        for partial in partials:
            _, rows_LD, smooth = partial.split([num_tokens, len(partial) - num_tokens - num_smooth, num_smooth])
            place_L = places[start : start + len(rows_LD)]
            grad_SD.index_add_(0, place_L, rows_LD * factors.label_S[place_L][:, None])
            if num_smooth:
                grad_SD.addcmul_(smooth.to(exact), factors.plain_S[:, None], value=-self._smooth)
            start += len(rows_LD)
        return grad_SD.to(dtype)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write a @ b into `out`, whose dtype may be wider: a GPU's sums are then never rounded to the narrow one."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def _add_rows(out_RD: torch.Tensor, index_L: torch.Tensor, rows_LD: torch.Tensor) -> None:
    """Add rows, some of them to the same row, always in the same order (index_add_ on a GPU has none)."""
    if out_RD.is_cuda:
        out_RD.index_put_((index_L,), rows_LD, accumulate=True)
    else:
        out_RD.index_add_(0, index_L, rows_LD)
