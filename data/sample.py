"""A bounded, evenly spread sample of the documents of some sources: what a tokenizer is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from windlass.data.documents import Findings, check_on_error, read_documents
from windlass.data.sources import Filter, find_pieces, plan_units
from windlass.dist.errors import DataError

_PART_BYTES = 256 << 10  # text files are read in parts of this size, so that a sample of one large file is possible


def read_sample(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    max_bytes: int,
    on_error: str = "stop",
    text_field: str = "text",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[Iterator[str], Findings]:
    """Return documents of about `max_bytes` in total, chosen by their content, and what is found while they are read.

    `out` is left out when it lies inside a source.
    Raises: DataError if there are no input files
    """
    check_on_error(on_error)
    files = find_pieces(sources, Path(out), Filter(tuple(include), tuple(exclude)))
    if not files:
        raise DataError(f"no input files in {', '.join(map(str, sources))}")
    share = max_bytes / max(sum(file.size_bytes for file in files), 1)
    pieces = [piece for unit in plan_units(files) for piece in unit.pieces]
    findings = Findings(stop=on_error == "stop")

    def texts() -> Iterator[str]:
        for piece in pieces:
            for text in read_documents(piece, findings, text_field=text_field, max_document_bytes=_PART_BYTES):
                if share >= 1 or xxhash.xxh3_64_intdigest(text.encode("utf-8")) < share * 2**64:
                    yield text

    return texts(), findings
