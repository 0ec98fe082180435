"""The facts of a prepared token folder: what `facts.json` says, and the checks that need nothing else.

`facts.json` is written last, so a folder that has one is complete. Must not know: Parquet, rows, samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from windlass.dist.errors import DataError

FORMAT = 1
FACTS = "facts.json"
UNITS = ".units"  # journal of `prepare`: one file per finished unit of work
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenizerFacts:
    """Which tokenizer wrote the ids. Two folders fit together when these are equal."""

    digest: str
    vocab_size: int
    eos_id: int
    eos_token: str


@dataclass(frozen=True)
class ShardFacts:
    """One Parquet file. `groups` lists (documents, tokens) of each row group, end-of-document tokens not counted."""

    name: str
    size_bytes: int
    groups: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SplitFacts:
    """Totals of one split. `tokens` are text tokens; every document is followed by one more, its end, when read."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[ShardFacts, ...]


@dataclass(frozen=True)
class Facts:
    """Everything known about a token folder without opening a shard."""

    folder: Path
    tokenizer: TokenizerFacts
    dtype: str
    max_token_id: int
    splits: Mapping[str, SplitFacts]
    sources: tuple[str, ...]
    settings: Mapping[str, Any]
    skipped: Mapping[str, Any]

    def bytes_per_token(self, split: str) -> float:
        """Return text bytes per labelled token: `nats / ln 2 / this` are bits per byte.

        A document of n tokens has n labels (its end is predicted, its first token is not), so the ratio is exact.
        """
        totals = self.splits[split]
        if not totals.tokens:
            raise DataError(f"{self.folder}: the {split} split holds no tokens, so it has no bytes per token")
        return totals.text_bytes / totals.tokens

    def to_json(self) -> str:
        plain = {"format": FORMAT, **asdict(self)}
        del plain["folder"]
        return json.dumps(plain, indent=1) + "\n"


def read_facts(folder: str | Path) -> Facts:
    """Read `facts.json` of a prepared folder.

    Raises: DataError if the folder is missing, empty, half prepared, or of another format.
    """
    folder = Path(folder)
    remedy = f"Write it with `windlass data prepare SOURCE... --out {folder}`."
    if not folder.is_dir():
        raise DataError(f"data folder {folder}: no such folder. {remedy}")
    path = folder / FACTS
    if not path.is_file():
        if (folder / UNITS).is_dir():
            raise DataError(
                f"data folder {folder}: preparing it was interrupted ({FACTS} is missing). "
                "Run the same `windlass data prepare` again: finished parts are kept."
            )
        what = "holds no prepared tokens" if any(folder.iterdir()) else "is empty"
        raise DataError(f"data folder {folder}: {what} ({FACTS} is missing). {remedy}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise DataError(f"{path}: cannot be read ({e}). {remedy}") from e
    found = plain.get("format") if isinstance(plain, dict) else None
    if found != FORMAT:
        raise DataError(f"{path}: format {found!r}, this version reads format {FORMAT}. {remedy}")
    try:
        return Facts(
            folder=folder,
            tokenizer=TokenizerFacts(**plain["tokenizer"]),
            dtype=plain["dtype"],
            max_token_id=plain["max_token_id"],
            splits={name: _split(split) for name, split in plain["splits"].items()},
            sources=tuple(plain["sources"]),
            settings=plain["settings"],
            skipped=plain["skipped"],
        )
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{path}: damaged ({type(e).__name__}: {e}). {remedy}") from e


def _split(plain: dict[str, Any]) -> SplitFacts:
    return SplitFacts(
        documents=plain["documents"],
        tokens=plain["tokens"],
        text_bytes=plain["text_bytes"],
        shards=tuple(
            ShardFacts(s["name"], s["size_bytes"], tuple((docs, tokens) for docs, tokens in s["groups"]))
            for s in plain["shards"]
        ),
    )


def check_vocab(facts: Facts, vocab_size: int) -> None:
    """Raise DataError when a stored token id does not fit a model of `vocab_size`."""
    largest = max(facts.max_token_id, facts.tokenizer.eos_id)
    if largest >= vocab_size:
        raise DataError(
            f"{facts.folder}: holds token id {largest}, but the model has model.vocab_size = {vocab_size} "
            f"(ids 0 to {vocab_size - 1}). Set model.vocab_size to at least {largest + 1} (the tokenizer has "
            f"{facts.tokenizer.vocab_size}), or prepare the text with the model's tokenizer."
        )


def check_same_tokenizer(members: list[Facts]) -> None:
    """Raise DataError when folders of one mixture were written by different tokenizers."""
    first = members[0]
    for other in members[1:]:
        if other.tokenizer != first.tokenizer:
            raise DataError(
                f"data.mixture: {other.folder} was tokenized by {_name(other.tokenizer)}, {first.folder} by "
                f"{_name(first.tokenizer)}. Prepare all members with one tokenizer: "
                f"`windlass data prepare SOURCE... --tokenizer {first.folder} --out ...`."
            )


def _name(tokenizer: TokenizerFacts) -> str:
    return f"{tokenizer.digest[:12]} ({tokenizer.vocab_size} ids, end of document {tokenizer.eos_id})"
