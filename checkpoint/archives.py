"""Writes a rank's bytes from memory as the file that `save` would write, without torch.

Each fragment becomes a torch.save archive: the frame that the trainer made, around the raw bytes. All of it is compared
with the hashes of the snapshot on the way, so no checkpoint is published that holds what memory has damaged.
Must not know: torch, other ranks, when a checkpoint counts.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.storage import Buffer, FileWriter, Storage
from windlass.dist.errors import CheckpointError

FRAMES_VERSION = 1
ALIGNMENT = 64  # of archives in the file, as in `writer.py`
BATCH_BYTES = 4 << 20  # of one system call
SLICE_BYTES = 1 << 20  # hashed three times over: for the chunk, the piece and the file


class Checked:
    """The bytes of a snapshot from front to back, compared with the hashes of its chunks as they pass.

    Raises: CheckpointError naming the first chunk that differs, once its last byte has been taken
    """

    def __init__(self, what: str, data: np.ndarray, num_bytes: int, chunk_bytes: int, table: Sequence[int]) -> None:
        self.what, self.chunk_bytes, self.num_bytes, self.table = what, chunk_bytes, num_bytes, table
        self.view = data.data[:num_bytes]
        self.position = 0
        self._hasher = xxhash.xxh3_64()

    def take(self, low: int, high: int) -> Iterator[memoryview]:
        """Yield bytes `[low, high)` in slices that stay in the processor's cache while they are hashed; nothing before
        `low` can be taken any more.
        """
        while self.position < high:
            inside = self.chunk_bytes - self.position % self.chunk_bytes
            border = low if self.position < low else high
            part = self.view[self.position : min(border, self.position + min(inside, SLICE_BYTES))]
            self._hasher.update(part)
            self.position += len(part)
            if self.position % self.chunk_bytes == 0 or self.position == self.num_bytes:
                self._compare()
            if self.position > low:
                yield part

    def finish(self) -> None:
        """Compare what was not taken."""
        for _ in self.take(self.num_bytes, self.num_bytes):
            raise AssertionError("nothing lies beyond the end")

    def _compare(self) -> None:
        number = (self.position - 1) // self.chunk_bytes
        if number >= len(self.table) or self._hasher.intdigest() != self.table[number]:
            raise CheckpointError(
                f"{self.what}: bytes {number * self.chunk_bytes} on are not those that were hashed: they were damaged"
            )
        self._hasher.reset()


class _Output:
    """A file under way: hashes, counts, keeps to a pace, and writes in batches."""

    def __init__(self, file: FileWriter, pace: Pace, before_write: Callable[[], None]) -> None:
        self.file, self.pace, self.before_write = file, pace, before_write
        self.hasher, self.position = xxhash.xxh3_64(), 0
        self.parts: list[Buffer] = []
        self.pending = 0

    def put(self, part: Buffer) -> None:
        self.hasher.update(part)
        self.position += len(part)
        self.parts.append(part)
        self.pending += len(part)
        if self.pending >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        self.before_write()
        self.pace.spend(self.pending)
        self.file.write(*self.parts)
        self.parts, self.pending = [], 0


def write_archives(
    storage: Storage,
    name: str,
    layout: Layout,
    source: Checked,
    *,
    pace: Pace,
    fault: Callable[[str], None],
) -> dict[str, Any]:
    """Write a new file of all fragments and make it durable; return what `commit` wants to be told of it.

    `fault` is called with "open", "write" (before each part) and "fsync".

    Blocks: host
    Raises: OSError; CheckpointError if memory is damaged. What there is of the file is then the caller's to remove
    """
    frames = _unpacked(layout)
    rows: list[list[Any]] = [[f.key, list(f.global_shape), f.dtype, None] for f in layout.fragments if not f.box.numel]
    if len(rows) == len(layout.fragments):
        return {"rows": rows, "file": None}
    fault("open")
    file = storage.start(name)
    try:
        out = _Output(file, pace, lambda: fault("write"))
        for fragment, frame in zip(layout.fragments, frames, strict=True):
            if frame is None:
                continue
            out.put(bytes(-out.position % ALIGNMENT))
            start = out.position
            out.put(frame[0])
            offset, hasher = out.position, xxhash.xxh3_64()
            for part in source.take(fragment.offset, fragment.offset + fragment.num_bytes):
                hasher.update(part)
                out.put(part)
            out.put(frame[1])
            place = [offset, fragment.num_bytes, hasher.hexdigest(), start, out.position - start]
            boxed = [list(fragment.box.offsets), list(fragment.box.sizes), *place]
            rows.append([fragment.key, list(fragment.global_shape), fragment.dtype, boxed])
        source.finish()
        out.flush()
        fault("fsync")
    except BaseException:
        file.abandon()
        raise
    file.finish()
    return {"rows": rows, "file": [name, out.position, out.hasher.hexdigest()]}


def file_bytes(layout: Layout) -> int:
    """Return the size of the file of a layout."""
    position = 0
    for fragment, frame in zip(layout.fragments, _unpacked(layout), strict=True):
        if frame is not None:
            position += -position % ALIGNMENT + len(frame[0]) + fragment.num_bytes + len(frame[1])
    return position


def _unpacked(layout: Layout) -> list[tuple[bytes, bytes] | None]:
    """Return the frame of each fragment; None for one without elements."""
    frames = layout.frames
    if frames is None or frames.get("version") != FRAMES_VERSION or len(frames["of"]) != len(layout.fragments):
        raise CheckpointError(
            f"layout {layout.digest} has no frames of version {FRAMES_VERSION}: its trainer was started with "
            "checkpoint.mode=sync or with another Windlass, so its snapshots cannot be written as checkpoints"
        )
    made = [tuple(zlib.decompress(base64.b64decode(part)) for part in pair) for pair in frames["made"]]
    return [None if number < 0 else (made[number][0], made[number][1]) for number in frames["of"]]
