"""One unit of work: tokenize its inputs, write its shards, then its journal entry.

The journal entry is what makes a unit finished: it names everything that decided the shards' content. Must not know:
processes, other units, facts of the whole folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from windlass.data.documents import Findings, read_documents
from windlass.data.facts import SPLITS, UNITS, ShardFacts, TokenizerFacts
from windlass.data.shards import ShardWriter, write_file
from windlass.data.sources import Unit
from windlass.data.tokenizer import Tokenizer

_BATCH_CHARS = 1 << 20  # text encoded at a time: enough to keep every core of the tokenizer busy, little memory


@dataclass(frozen=True)
class Settings:
    """What besides inputs and tokenizer decides the content of a shard."""

    validation: float
    text_field: str
    max_document_bytes: int
    group_tokens: int
    on_error: str


@dataclass(frozen=True)
class UnitResult:
    """The journal entry of one finished unit."""

    key: str
    shards: dict[str, ShardFacts]
    text_bytes: dict[str, int]
    max_token_id: int
    num_empty: int
    not_text: list[str]
    problems: list[str]


def unit_key(unit: Unit, tokenizer: TokenizerFacts, settings: Settings) -> str:
    """Return a name of everything that decides the content of a unit's shards."""
    return xxhash.xxh3_128_hexdigest(repr((unit, tokenizer, settings)).encode())


def journal_path(out: Path, index: int) -> Path:
    return out / UNITS / f"{index:05d}.json"


def read_finished(out: Path, unit: Unit, key: str) -> UnitResult | None:
    """Return the journal entry of a unit that need not be redone."""
    try:
        plain = json.loads(journal_path(out, unit.index).read_text(encoding="utf-8"))
        shards = {split: ShardFacts(s["name"], s["size_bytes"], s["groups"]) for split, s in plain["shards"].items()}
        whole = all((out / s.name).stat().st_size == s.size_bytes for s in shards.values())
        result = UnitResult(**(plain | {"shards": shards}))
    except (OSError, ValueError, KeyError, TypeError):  # no journal, a damaged one, or a shard that is gone: redo
        return None
    return result if whole and result.key == key else None


def tokenize_unit(unit: Unit, tokenizer: Tokenizer, settings: Settings, out: Path) -> UnitResult:
    """Write the shards of one unit, then its journal entry."""
    findings = Findings(stop=settings.on_error == "stop")
    text_bytes = dict.fromkeys(SPLITS, 0)
    max_token_id = -1
    names = {split: f"{split}-{unit.index:05d}.parquet" for split in SPLITS}
    bound = int(settings.validation * 2**64)
    with (
        ShardWriter(out / names["train"], tokenizer.dtype, settings.group_tokens) as train,
        ShardWriter(out / names["validation"], tokenizer.dtype, settings.group_tokens) as validation,
    ):
        writers = {"train": train, "validation": validation}
        for texts in _batches(unit, settings, findings):
            for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if not len(tokens):
                    findings.num_empty += 1
                    continue
                content = text.encode("utf-8")
                split = "validation" if xxhash.xxh3_64_intdigest(content) < bound else "train"
                writers[split].add(tokens, len(content))
                text_bytes[split] += len(content)
                max_token_id = max(max_token_id, int(tokens.max()))
    result = UnitResult(
        unit_key(unit, tokenizer.facts, settings),
        {s: ShardFacts(names[s], w.size_bytes, tuple(w.groups)) for s, w in writers.items() if w.groups},
        text_bytes,
        max_token_id,
        findings.num_empty,
        findings.not_text,
        findings.problems,
    )
    write_file(journal_path(out, unit.index), json.dumps(asdict(result)).encode("utf-8"))
    return result


def _batches(unit: Unit, settings: Settings, findings: Findings) -> Iterator[list[str]]:
    texts: list[str] = []
    num_chars = 0
    for piece in unit.pieces:
        for text in read_documents(
            piece, findings, text_field=settings.text_field, max_document_bytes=settings.max_document_bytes
        ):
            texts.append(text)
            num_chars += len(text)
            if num_chars >= _BATCH_CHARS:
                yield texts
                texts, num_chars = [], 0
    if texts:
        yield texts
