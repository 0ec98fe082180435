"""Documents out of input files: text, JSON lines, Parquet, plain or compressed.

Everything that can be wrong with an input is found here and named with its place. Must not know: tokens, shards.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from windlass.data.sources import Piece
from windlass.dist.errors import DataError

SNIFF_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"


@dataclass
class Findings:
    """What a reader met besides documents. `stop` turns the first problem into an error."""

    stop: bool
    problems: list[str] = field(default_factory=list)
    not_text: list[str] = field(default_factory=list)
    num_empty: int = 0

    def problem(self, what: str) -> None:
        if self.stop:
            raise DataError(f"{what}. Repair or remove it, or go on without it: --on-error skip.")
        self.problems.append(what)


def check_on_error(on_error: str) -> None:
    """Raise DataError unless this is a way to treat damaged inputs."""
    if on_error not in ("stop", "skip"):
        raise DataError(f"--on-error {on_error!r}: use stop or skip")


def read_documents(piece: Piece, findings: Findings, *, text_field: str, max_document_bytes: int) -> Iterator[str]:
    """Yield the documents of one piece, in order.

    A plain text file is one document; one longer than `max_document_bytes` is cut at line ends into several. A bad line
    is left out; a file damaged in the middle gives what comes before the damage. Files met while walking a folder that
    are not UTF-8 text are listed in `findings.not_text`, files the user named are problems.
    """
    read = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[piece.kind]
    argument = str(max_document_bytes) if piece.kind == "text" else text_field
    num_documents = 0
    try:
        for text in read(piece, findings, argument):
            if text:
                num_documents += 1
                yield text
            else:
                findings.num_empty += 1
    except (OSError, EOFError, pa.ArrowException) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__
        findings.problem(f"{piece.path}: cannot be read ({reason}), after {num_documents} documents")


def _open(piece: Piece) -> io.BufferedReader:
    # pyarrow's streams raise on a truncated .zst, which the zstandard module reads as a normal end of file.
    raw = pa.input_stream(piece.path) if piece.compressed else io.FileIO(piece.path)
    return io.BufferedReader(raw, 1 << 20)


def _first_line_from(file: io.BufferedReader, offset: int) -> int:
    """Return where the first line that begins at or after `offset` begins."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    file.readline()
    return file.tell()


def _read_text(piece: Piece, findings: Findings, limit: str) -> Iterator[str]:
    with _open(piece) as file:
        if not piece.named and not _looks_like_text(file.peek(SNIFF_BYTES)[:SNIFF_BYTES]):
            if piece.start == 0:
                findings.not_text.append(piece.path)
            return
        position, num_bytes = 0, None
        if not piece.compressed:
            position = _first_line_from(file, piece.start)
            if piece.stop < piece.size_bytes:
                num_bytes = _first_line_from(file, piece.stop) - position
            file.seek(position)
        for block in _cut_at_lines(file, int(limit), num_bytes):
            body = block.removeprefix(_BOM) if position == 0 else block
            try:
                yield body.decode("utf-8")
            except UnicodeDecodeError as e:
                where = position + len(block) - len(body) + e.start
                findings.problem(f"{piece.path}: not UTF-8 at byte {where} (0x{body[e.start]:02x})")
                return
            position += len(block)


def _looks_like_text(block: bytes) -> bool:
    head = block[:SNIFF_BYTES]
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as e:
        return e.reason == "unexpected end of data" and e.end == len(head)  # a character cut by the sniff itself
    return True


def _cut_at_lines(file: io.BufferedReader, limit: int, num_bytes: int | None) -> Iterator[bytes]:
    rest = b""
    while block := file.read(limit if num_bytes is None else min(limit, num_bytes)):
        num_bytes = None if num_bytes is None else num_bytes - len(block)
        rest += block
        while len(rest) > limit:
            cut = rest.rfind(b"\n", limit // 2, limit) + 1
            if cut == 0:  # one line longer than half the limit: cut between characters
                cut = limit
                while cut > limit - 4 and rest[cut] & 0xC0 == 0x80:
                    cut -= 1
            yield rest[:cut]
            rest = rest[cut:]
    if rest or num_bytes is None:
        yield rest


def _read_jsonl(piece: Piece, findings: Findings, text_field: str) -> Iterator[str]:
    with _open(piece) as file:
        start = 0
        if not piece.compressed:
            start = _first_line_from(file, piece.start)
            file.seek(start)
        position, number = start, 0
        while piece.compressed or position < piece.stop:
            line = file.readline()
            if not line:
                return
            position += len(line)
            number += 1
            text = _line_text(line.removeprefix(_BOM) if position == len(line) else line, text_field)
            if isinstance(text, _Bad):
                line_number = number + _lines_before(piece, start)
                findings.problem(f"{piece.path}: line {line_number}: {text.reason}")
            elif text is not None:
                yield text


@dataclass(frozen=True)
class _Bad:
    reason: str


def _line_text(line: bytes, text_field: str) -> str | _Bad | None:
    if line.isspace():
        return None
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        return _Bad(f"not UTF-8 at byte {e.start} of the line (0x{line[e.start]:02x})")
    except (ValueError, RecursionError) as e:
        return _Bad(f"not JSON ({e})")
    if not isinstance(row, dict):
        return _Bad(f"a JSON {type(row).__name__}, an object with the field {text_field!r} is needed")
    if text_field not in row:
        return _Bad(f"no field {text_field!r} (it has {_listed(list(row))}); --text-field names another")
    text = row[text_field]
    if not isinstance(text, str):
        return _Bad(f"field {text_field!r} is a {type(text).__name__}, text is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        return _Bad(f"field {text_field!r} holds half a surrogate pair at character {e.start}")
    return text


def _lines_before(piece: Piece, offset: int) -> int:
    if offset == 0:
        return 0
    with _open(piece) as file:
        return sum(1 for _ in iter(lambda: file.tell() < offset and file.readline(), False))


def _read_parquet(piece: Piece, findings: Findings, text_field: str) -> Iterator[str]:
    with pq.ParquetFile(piece.path) as file:
        schema = file.schema_arrow
        if text_field not in schema.names:
            columns = _listed(schema.names)
            findings.problem(f"{piece.path}: no column {text_field!r} (it has {columns}); --text-field names another")
            return
        kind = schema.field(text_field).type
        value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)):
            findings.problem(f"{piece.path}: column {text_field!r} is {kind}, text (string) is needed")
            return
        for group in range(piece.start, piece.stop):
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[text_field]):
                try:
                    texts = batch.column(0).to_pylist()
                except UnicodeDecodeError as e:
                    findings.problem(f"{piece.path}: row group {group}: not UTF-8 ({e})")
                    continue
                for text in texts:
                    yield text or ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"
