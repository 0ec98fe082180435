"""Which rows of the vocabulary each pipeline rank holds.

Must not know: tensors of the model, who computes when. Source: Yeung et al. 2024, arXiv:2411.05288, section 3.
Differs:     shares may be uneven or zero; the vocabulary itself is not padded, only the matrix of its last rows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from windlass.dist.errors import PlanError

ALIGN = 64  # rows; matrix kernels are at their best when every dim is a multiple of this
BLOCKS_PER_RANK = 16  # boundaries may be this coarse: then no shard is off its share by more than about 1/16


@dataclass(frozen=True)
class VocabShard:
    """Rows [low, high) of the vocabulary, kept in a matrix of `padded` rows; the further ones mean nothing."""

    low: int
    high: int
    padded: int

    @property
    def num_rows(self) -> int:
        """Real rows."""
        return self.high - self.low


def cut_vocabulary(vocab_size: int, num_ranks: int, shares: Sequence[float] | None = None) -> tuple[VocabShard, ...]:
    """Cut the vocabulary into one shard per rank, evenly or in proportion to `shares`.

    Boundaries lie at multiples of 64 rows, of a smaller power of two where the vocabulary is small. A share of zero
    gives a shard of padding only.
    Raises:      PlanError if there are fewer rows than ranks, or shares that cannot be shared out
    """
    if vocab_size < num_ranks:
        raise PlanError(
            f"a vocabulary of {vocab_size} rows cannot be cut over {num_ranks} pipeline ranks: every rank needs at "
            f"least one. Use pipeline.vocab=off, or at most {vocab_size} pipeline ranks"
        )
    weights = [1.0] * num_ranks if shares is None else [float(share) for share in shares]
    if len(weights) != num_ranks or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise PlanError(
            f"pipeline.vocab_shares = {list(shares or ())}: it must be {num_ranks} numbers of at least 0, one per "
            f"pipeline rank, that are not all 0, as in {[1] * num_ranks}"
        )
    align = ALIGN
    while align > 1 and align * BLOCKS_PER_RANK * num_ranks > vocab_size:
        align //= 2
    given = list(accumulate(weights))
    ideal = [vocab_size * g / given[-1] for g in given]
    bounds = [0, *(vocab_size if b == vocab_size else align * math.floor(b / align + 0.5) for b in ideal)]
    bounds = [min(b, vocab_size) for b in bounds]
    return tuple(VocabShard(low, high, max(1, -(-(high - low) // align)) * align) for low, high in pairwise(bounds))


def owned(tokens_S: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Return index_K, where the tokens lie whose rows this shard holds, in token order.

    Blocks:      host, on a GPU: how many there are is part of the shape
    """
    return ((tokens_S >= shard.low) & (tokens_S < shard.high)).nonzero()[:, 0]


def by_owner(tokens_S: torch.Tensor, shards: Sequence[VocabShard]) -> torch.Tensor:
    """Return the places of tokens ordered by the shard that holds them, within it in token order; ids that no shard
    holds come last.

    So the concatenation of `owned` over all shards is the start of this, found without waiting for a GPU.
    """
    owner_S = torch.zeros_like(tokens_S)
    for shard in shards:
        owner_S += tokens_S >= shard.high
    return owner_S.masked_fill_(tokens_S < 0, len(shards)).argsort(stable=True)
