"""The embedding lookup over a cut table: owners look their rows up, whoever needs them puts them together.

Token ids are known everywhere, so only looked-up rows travel, in token order, and their number is known to both sides.
Legend: S tokens of a micro-batch, K those of one shard, R rows of a shard, D hidden width.
Must not know: who sends, learned positions, how gradients are accumulated.
Source: Yeung et al. 2024, arXiv:2411.05288, appendix C.
Differs:     owners send their rows only, instead of an all-reduce of mostly zeros
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from windlass.dist.errors import DataError
from windlass.parallel.vocab.shard import VocabShard, by_owner, owned


def lookup(tokens_S: torch.Tensor, weight_RD: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Return rows_KD of the tokens that this shard holds, in token order."""
    return weight_RD.index_select(0, tokens_S[owned(tokens_S, shard)] - shard.low)


def assemble(
    tokens_S: torch.Tensor, shards: Sequence[VocabShard], rows_by_rank: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return e_SD from what `lookup` gave on every rank.

    Raises:      DataError if a token is in no shard
    """
    first = rows_by_rank[0]
    e_SD = first.new_empty(tokens_S.numel(), first.shape[1])
    found = sum(rows.shape[0] for rows in rows_by_rank)
    if found != tokens_S.numel():
        raise DataError(
            f"{tokens_S.numel() - found} token ids of a micro-batch are not in the vocabulary of {shards[-1].high} "
            "rows: prepare the data with the model's tokenizer, or raise model.vocab_size"
        )
    places = by_owner(tokens_S, shards).split([rows.shape[0] for rows in rows_by_rank])
    for place_K, rows_KD in zip(places, rows_by_rank, strict=True):
        e_SD.index_copy_(0, place_K, rows_KD)
    return e_SD


def rows_for(gradient_SD: torch.Tensor, tokens_S: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Return the rows_KD of the embedding's gradient that belong to this shard, in token order."""
    return gradient_SD.index_select(0, owned(tokens_S, shard))
