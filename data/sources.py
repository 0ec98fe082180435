"""Which inputs there are, and how they are cut into units of work.

The cut depends on the inputs alone, so the output does not depend on the number of workers. Must not know: tokens.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from windlass.dist.errors import DataError

COMPRESSED = (".gz", ".zst")
MIN_UNIT_BYTES, MAX_UNIT_BYTES, AIM_UNITS = 4 << 20, 64 << 20, 32


@dataclass(frozen=True)
class Piece:
    """A part of one input file: bytes [start, stop), or row groups [start, stop) of a Parquet file."""

    path: str
    kind: str  # "text" | "jsonl" | "parquet"
    compressed: bool
    named: bool  # the user named this file: it must be readable text
    size_bytes: int
    mtime_ns: int
    start: int
    stop: int
    cost_bytes: int


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time. It becomes one shard per split."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def cost_bytes(self) -> int:
        return sum(piece.cost_bytes for piece in self.pieces)


@dataclass(frozen=True)
class Filter:
    """Which files of a walked folder are wanted, by shell patterns on names or on paths below the source folder."""

    include: tuple[str, ...] = ()  # none: every file
    exclude: tuple[str, ...] = ()  # files, and folders with all they hold

    def wants_file(self, path: str) -> bool:
        return not self.drops(path) and (not self.include or _matches(path, self.include))

    def drops(self, path: str) -> bool:
        return _matches(path, self.exclude)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, p) or fnmatchcase(os.path.basename(path), p) for p in patterns)


def find_pieces(sources: Sequence[str | Path], out: Path, wanted: Filter) -> list[Piece]:
    """List every input file as one piece: sources in the order given, folders walked in name order, each file once.

    Hidden files and folders, what is not a regular file, and the folder `out` are left out.
    Raises: DataError if a source does not exist.
    """
    pieces: dict[object, Piece] = {}
    hidden = _identity(out)
    for source in map(str, sources):
        if os.path.isdir(source):
            for path in _walk(source, hidden, wanted):
                _add(pieces, path, named=False)
        elif os.path.isfile(source):
            _add(pieces, source, named=True)
        else:
            why = "not a regular file or folder" if os.path.exists(source) else "no such file or folder"
            raise DataError(f"source {source}: {why}. Name folders of text, .txt, .jsonl (also .gz, .zst) or .parquet.")
    return list(pieces.values())


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:  # not there (yet)
        return None
    return info.st_dev, info.st_ino


def _walk(source: str, out: tuple[int, int] | None, wanted: Filter) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"source folder {error.filename}: cannot be listed ({error.strerror})") from error

    for parent, folders, files in os.walk(source, onerror=refuse):
        below = os.path.relpath(parent, source) + os.sep if parent != source else ""
        folders[:] = sorted(
            f
            for f in folders
            if f[0] != "."
            and not wanted.drops(below + f)
            and (out is None or _identity(os.path.join(parent, f)) != out)
        )
        for name in sorted(files):
            if name[0] != "." and wanted.wants_file(below + name):
                yield os.path.join(parent, name)


def _add(pieces: dict[object, Piece], path: str, *, named: bool) -> None:
    stem, suffix = os.path.splitext(path.lower())
    compressed = suffix in COMPRESSED
    suffix = os.path.splitext(stem)[1] if compressed else suffix
    kind = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(suffix, "text")
    kind = "text" if compressed and kind == "parquet" else kind
    identity: object = path
    size = mtime = 0
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            return
        identity, size, mtime = (info.st_dev, info.st_ino), info.st_size, info.st_mtime_ns
    except OSError:  # a dangling link: the reader names it, under the user's --on-error
        kind = "text"
    pieces.setdefault(identity, Piece(path, kind, compressed, named, size, mtime, 0, size, cost_bytes=size))


def plan_units(files: Sequence[Piece], unit_bytes: int = 0) -> list[Unit]:
    """Cut files into units of about `unit_bytes` (0: from the total, a power of two between 4 and 64 MiB).

    Large .txt and .jsonl files are cut by bytes, Parquet by row groups; a compressed file is one piece.
    """
    if unit_bytes == 0:
        per_unit = sum(piece.cost_bytes for piece in files) // AIM_UNITS
        unit_bytes = min(max(1 << max(per_unit, 1).bit_length() - 1, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    waiting: list[Piece] = []
    cost = 0
    for piece in (part for file in files for part in _parts(file, unit_bytes)):
        if waiting and cost + piece.cost_bytes > unit_bytes:
            units.append(Unit(len(units), tuple(waiting)))
            waiting, cost = [], 0
        waiting.append(piece)
        cost += piece.cost_bytes
    if waiting:
        units.append(Unit(len(units), tuple(waiting)))
    return units


def _parts(piece: Piece, unit_bytes: int) -> Iterator[Piece]:
    if piece.kind == "parquet":
        yield from _row_group_parts(piece, unit_bytes)
    elif piece.compressed or piece.size_bytes <= unit_bytes:
        yield piece
    else:
        for start in range(0, piece.size_bytes, unit_bytes):
            stop = min(start + unit_bytes, piece.size_bytes)
            yield replace(piece, start=start, stop=stop, cost_bytes=stop - start)


def _row_group_parts(piece: Piece, unit_bytes: int) -> Iterator[Piece]:
    try:
        with pq.ParquetFile(piece.path) as file:
            costs = [file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups)]
    except (pa.ArrowException, OSError):  # damaged: the reader names it, under the user's --on-error
        yield replace(piece, start=0, stop=-1)
        return
    start = cost = 0
    for group, group_cost in enumerate(costs):
        if group > start and cost + group_cost > unit_bytes:
            yield replace(piece, start=start, stop=group, cost_bytes=cost)
            start, cost = group, 0
        cost += group_cost
    yield replace(piece, start=start, stop=len(costs), cost_bytes=cost)
