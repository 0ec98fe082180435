"""Bulk output: one rank's pieces into one file, hashed on the way, durable when the call returns.

Each piece is a `torch.save` archive, as torch.distributed.checkpoint stores it; where its raw bytes lie is recorded, so
our reader needs no archive and no pickle. Must not know: manifests, other ranks, retention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import torch
import xxhash

from windlass.checkpoint.manifest import StoredFile
from windlass.checkpoint.storage import FileWriter, Storage
from windlass.dist.errors import CheckpointError
from windlass.dist.state import Piece

BUFFER_BYTES = 8 << 20
ALIGNMENT = 64  # torch aligns data inside an archive to this; starting archives there aligns it in the file


@dataclass(frozen=True)
class Written:
    """Where one piece went: its raw bytes, and the archive around them."""

    offset: int
    num_bytes: int
    xxh3: str
    archive_offset: int
    archive_bytes: int


class _Stream:
    """A file for `torch.save` that hashes, counts and notices where a tensor's own bytes go by.

    An error is kept and raised after `torch.save` has returned: thrown through its archive writer it would be replaced
    by one that hides the cause.
    """

    def __init__(self, file: FileWriter, name: str) -> None:
        self.file, self.name = file, name
        self.pending = bytearray()
        self.position = 0
        self.hasher = xxhash.xxh3_64()
        self.error: BaseException | None = None
        self.watched = (0, 0)  # address and bytes of the tensor under way
        self.seen_at: int | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)  # of bytes: torch.save hands over no others
        self.hasher.update(view)
        if len(view) == self.watched[1] and address_of(view) == self.watched[0]:
            self.seen_at = self.position
        self.position += len(view)
        if self.error is None:
            try:
                self._put(view)
            except BaseException as error:
                self.error = error
        return len(view)

    def flush(self) -> None:
        """Nothing: `flush_pending` writes it."""

    def _put(self, view: memoryview) -> None:
        if len(self.pending) + len(view) > BUFFER_BYTES:
            self.file.write(self.pending)
            self.pending.clear()
        if len(view) > BUFFER_BYTES:
            self.file.write(view)
        else:
            self.pending += view

    def save(self, tensor: torch.Tensor) -> Written:
        self.write(bytes(-self.position % ALIGNMENT))
        start, self.seen_at = self.position, None
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        data = raw.numpy().data
        self.watched = (raw.data_ptr(), raw.nbytes)
        # A storage of exactly these bytes: torch.save writes whole storages, and pieces are views of large ones.
        torch.save(torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape), cast(IO[bytes], self))
        self.check()
        if self.seen_at is None:
            raise CheckpointError(
                f"torch {torch.__version__} did not write a tensor's bytes in one part, so their place in "
                f"{self.name} is unknown: use a torch version that Windlass is tested with (2.11 to 2.13)"
            )
        return Written(self.seen_at, raw.nbytes, xxhash.xxh3_64_hexdigest(data), start, self.position - start)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def flush_pending(self) -> None:
        self.check()
        self.file.write(self.pending)


def write_pieces(
    storage: Storage, name: str, pieces: Sequence[Piece], before_piece: Callable[[], None]
) -> tuple[list[Written], StoredFile]:
    """Write pieces that are not empty, in order, into a new file and make it durable.

    Raises: OSError as the file system reports it.
    """
    file = storage.start(name)
    stream = _Stream(file, name)
    try:
        written = []
        with without_crc32():
            for piece in pieces:
                before_piece()
                written.append(stream.save(piece.tensor))
        stream.flush_pending()
    except BaseException:
        file.abandon()
        raise
    file.finish()
    return written, StoredFile(stream.position, stream.hasher.hexdigest())


def address_of(view: memoryview) -> int:
    """Return where the bytes of a buffer lie in memory."""
    return np.frombuffer(view, np.uint8).__array_interface__["data"][0] if view else 0


@contextmanager
def without_crc32() -> Iterator[None]:
    """Let torch.save write no checksums."""
    # The archive's own CRC halves the write speed, torch.load never checks it, and xxh3 covers the same bytes.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
