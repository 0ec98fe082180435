"""Token shards on disk: written whole or not at all, read one row group at a time.

One Parquet row is one document: `tokens` (list of uint16 or uint32) and `num_bytes` (of its UTF-8 text). Dictionary
encoding with zstd is smaller than raw ids (1.1 to 1.7 bytes per token for vocabularies of 4K to 128K, measured) and
decodes above 100M tokens/s on one core; every Parquet reader understands it. Must not know: splits, tokenizers.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from windlass.dist.errors import DataError

_ELEMENT = "element"


def _schema(dtype: np.dtype) -> pa.Schema:
    tokens = pa.list_(pa.field(_ELEMENT, pa.from_numpy_dtype(dtype), nullable=False))
    return pa.schema([pa.field("tokens", tokens, nullable=False), pa.field("num_bytes", pa.int64(), nullable=False)])


def write_file(path: Path, content: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, also after a power cut."""
    temporary = _temporary(path)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _publish(temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _publish(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class ShardWriter:
    """Writes one shard. Documents gather until a row group is full; the file appears when the block ends well.

    Invariant: a row group holds at most `group_tokens` tokens, or one longer document.
    Raises:    DataError if the disk is full or not writable; nothing is left behind.
    """

    def __init__(self, path: Path, dtype: np.dtype, group_tokens: int) -> None:
        self.path, self.group_tokens = path, group_tokens
        self.groups: list[tuple[int, int]] = []
        self.size_bytes = 0
        self._schema = _schema(dtype)
        self._dtype = dtype
        self._documents: list[np.ndarray] = []
        self._num_bytes: list[int] = []
        self._num_tokens = 0
        self._file: pq.ParquetWriter | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        if self._documents and self._num_tokens + len(tokens) > self.group_tokens:
            self._flush()
        self._documents.append(tokens)
        self._num_bytes.append(num_bytes)
        self._num_tokens += len(tokens)

    def _flush(self) -> None:
        ends = np.cumsum([len(d) for d in self._documents], dtype=np.int32)
        column = pa.ListArray.from_arrays(
            pa.array(np.concatenate(([0], ends)), pa.int32()),
            pa.array(np.concatenate(self._documents).astype(self._dtype, copy=False)),
            type=self._schema.field("tokens").type,
        )
        table = pa.table([column, pa.array(self._num_bytes, pa.int64())], schema=self._schema)
        try:
            if self._file is None:
                self._file = pq.ParquetWriter(
                    _temporary(self.path),
                    self._schema,
                    compression="zstd",
                    use_dictionary=[f"tokens.list.{_ELEMENT}"],
                    dictionary_pagesize_limit=8 << 20,
                    write_page_checksum=True,
                    write_statistics=False,
                )
            self._file.write_table(table, row_group_size=len(table))
        except OSError as e:
            raise _unwritable(self.path, e) from e
        self.groups.append((len(self._documents), self._num_tokens))
        self._documents, self._num_bytes, self._num_tokens = [], [], 0

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        temporary = _temporary(self.path)
        try:
            if kind is None:
                self._finish(temporary)
        finally:
            if self._file is not None and self._file.is_open:
                with suppress(OSError):  # a full disk fails again here; the first error is the one to show
                    self._file.close()
            temporary.unlink(missing_ok=True)

    def _finish(self, temporary: Path) -> None:
        if self._documents:
            self._flush()
        if self._file is None:
            return
        try:
            self._file.close()
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
                self.size_bytes = os.fstat(file.fileno()).st_size
            _publish(temporary, self.path)
        except OSError as e:
            raise _unwritable(self.path, e) from e


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be written ({error}). Free space or choose another --out, then run again.")


class ShardReader:
    """Reads row groups of one shard through a memory map.

    Raises: DataError naming the file if it is missing, truncated or damaged (page checksums are verified).
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        check_size(path, size_bytes)
        try:
            self._file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as e:
            raise _damaged(path, str(e)) from e

    def read(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens of all documents of the row group, length of each document)."""
        column = self._column(group, "tokens")
        first, last = column.offsets[0].as_py(), column.offsets[-1].as_py()
        return column.values.to_numpy()[first:last], np.diff(column.offsets.to_numpy())

    def read_num_bytes(self, group: int) -> np.ndarray:
        """Return the text bytes of each document of the row group."""
        return self._column(group, "num_bytes").to_numpy()

    def _column(self, group: int, name: str) -> pa.Array:
        try:
            return self._file.read_row_group(group, columns=[name], use_threads=False).column(0).combine_chunks()
        except (pa.ArrowException, OSError, IndexError) as e:
            raise _damaged(self.path, f"row group {group}: {e}") from e


def check_size(path: Path, size_bytes: int) -> None:
    """Raise DataError unless the shard is there with the size that `facts.json` recorded."""
    try:
        found = path.stat().st_size
    except OSError as e:
        raise _damaged(path, e.strerror or str(e)) from e
    if found != size_bytes:
        raise _damaged(path, f"{found} bytes, {size_bytes} were written: truncated or replaced")


def _damaged(path: Path, reason: str) -> DataError:
    remedy = "Delete it and run `windlass data prepare` again: only this shard is redone."
    return DataError(f"token shard {path}: {reason}. {remedy}")
