"""Look into a token folder: totals, document lengths, texts, and whether every shard is intact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from windlass.data.facts import SPLITS, Facts, read_facts
from windlass.data.shards import ShardReader
from windlass.data.tokenizer import load_tokenizer
from windlass.dist.errors import DataError


@dataclass(frozen=True)
class SplitSummary:
    """What `windlass data inspect` says about a split. `lengths` are quantiles of the tokens per document."""

    split: str
    documents: int
    tokens: int
    text_bytes: int
    num_shards: int
    shard_bytes: int
    num_groups: int
    lengths: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """Everything `windlass data inspect` prints."""

    facts: Facts
    splits: tuple[SplitSummary, ...]
    damaged: tuple[str, ...]


def inspect_folder(folder: str | Path, *, verify: bool = False, max_lengths: int = 1_000_000) -> Summary:
    """Summarise a token folder. `verify` reads all of it; lengths are those of the first `max_lengths` documents.

    Raises: DataError if the folder is not complete; damaged shards are listed instead when verifying
    """
    facts = read_facts(folder)
    damaged = tuple(_damage(facts)) if verify else ()
    return Summary(facts, tuple(_summarise(facts, split, max_lengths, damaged) for split in SPLITS), damaged)


def _summarise(facts: Facts, split: str, max_lengths: int, damaged: tuple[str, ...]) -> SplitSummary:
    totals = facts.splits[split]
    lengths = np.zeros(0, np.int64)
    if not damaged:
        for group in _groups(facts, split):
            lengths = np.concatenate((lengths, group[1]))
            if len(lengths) >= max_lengths:
                break
    return SplitSummary(
        split,
        totals.documents,
        totals.tokens,
        totals.text_bytes,
        len(totals.shards),
        sum(shard.size_bytes for shard in totals.shards),
        sum(len(shard.groups) for shard in totals.shards),
        {f"{q}%": int(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 100)} if len(lengths) else {},
    )


def _groups(facts: Facts, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for shard in facts.splits[split].shards:
        reader = ShardReader(facts.folder / shard.name, shard.size_bytes)
        for index in range(len(shard.groups)):
            yield reader.read(index)


def _damage(facts: Facts) -> Iterator[str]:
    for split in SPLITS:
        text_bytes = 0
        for shard in facts.splits[split].shards:
            try:
                reader = ShardReader(facts.folder / shard.name, shard.size_bytes)
                for index, expected in enumerate(shard.groups):
                    tokens, lengths = reader.read(index)
                    text_bytes += int(reader.read_num_bytes(index).sum())
                    if (len(lengths), len(tokens)) != expected or int(tokens.max()) > facts.max_token_id:
                        yield f"{facts.folder / shard.name}: row group {index} is not what facts.json says"
            except DataError as e:
                text_bytes = -1
                yield str(e)
                break
        if text_bytes not in (-1, facts.splits[split].text_bytes):
            yield f"{facts.folder}: {split} documents have {text_bytes} bytes of text, not what facts.json says"


def read_texts(folder: str | Path, split: str, num: int) -> list[str]:
    """Return the first documents of a split as text."""
    facts = read_facts(folder)
    tokenizer = load_tokenizer(facts.folder)

    def texts() -> Iterator[str]:
        for tokens, lengths in _groups(facts, split):
            for document in np.split(tokens, np.cumsum(lengths)[:-1]):
                yield tokenizer.decode(document.tolist())

    return list(islice(texts(), num))
