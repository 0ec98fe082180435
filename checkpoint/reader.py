"""Bulk input: fills pieces in memory from the raw bytes a manifest points to.

Reads at offsets into one small reused buffer: neighbouring pieces in one call, large ones in chunks that stay in the
processor's cache while they are hashed and copied. Never unpickles.
Must not know: where files lie, other ranks, models, stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

import torch
import xxhash

from windlass.checkpoint.cover import PieceIndex, flat_span
from windlass.checkpoint.manifest import Manifest, StoredPiece
from windlass.checkpoint.manifest import read_manifest as read_manifest
from windlass.checkpoint.storage import Files, Place, RandomAccess, files_of
from windlass.dist.box import Box, boxes_of_range
from windlass.dist.errors import CheckpointError
from windlass.dist.state import Piece

BUFFER_BYTES = 4 << 20
GAP_BYTES = 64 << 10  # reading over a gap of this size is cheaper than a second call


def read_tensor(checkpoint: Place | Files, key: str) -> torch.Tensor:
    """Return one whole tensor of a checkpoint, verified, on the CPU in its stored dtype."""
    with CheckpointReader(checkpoint) as reader:
        return reader.read(key)


def dtype_name(dtype: torch.dtype) -> str:
    """Return 'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return torch.float32 for 'float32'. Raises: CheckpointError if this torch has no such dtype."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"a tensor of the checkpoint has dtype '{name}', which torch {torch.__version__} lacks")
    return found


@dataclass
class _Read:
    """One stored piece, the part of its elements that is read, and the places in memory they go to."""

    stored: StoredPiece
    key: str
    dtype: torch.dtype
    targets: list[tuple[Piece, Box]] = field(default_factory=list)  # (piece, common block)
    first: int = 0
    last: int = 0

    @property
    def begin(self) -> int:
        return self.stored.offset + self.first * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.stored.offset + self.last * self.dtype.itemsize

    def scatter(self, first: int, elements: torch.Tensor) -> None:
        """Copy elements `[first, first + n)` of the stored piece to where they are wanted, converting dtypes."""
        origin, position = self.stored.box.offsets, 0
        for box in boxes_of_range(self.stored.box.sizes, first, first + elements.numel()):
            chunk = elements[position : position + box.numel].view(box.sizes)
            position += box.numel
            here = Box(tuple(a + b for a, b in zip(origin, box.offsets, strict=True)), box.sizes)
            for piece, common in self.targets:
                part = common.intersect(here)
                if part is not None:
                    piece.tensor.detach()[part.within(piece.box).slices].copy_(chunk[part.within(here).slices])


class CheckpointReader:
    """An open checkpoint. With `verify`, every stored piece it touches is read whole and checked against its xxh3."""

    def __init__(self, checkpoint: Place | Files, manifest: Manifest | None = None, *, verify: bool = True) -> None:
        self.files = files_of(checkpoint)
        self.manifest = manifest if manifest is not None else read_manifest(self.files)
        self.verify = verify
        self._indexes: dict[str, PieceIndex] = {}
        self._bytes = memoryview(bytearray(BUFFER_BYTES))

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._indexes.clear()

    def read(self, key: str) -> torch.Tensor:
        """Return one whole tensor."""
        stored = self.manifest.tensors.get(key)
        if stored is None:
            raise CheckpointError(f"checkpoint {self.files.place} has no tensor '{key}'")
        out = torch.empty(stored.shape, dtype=dtype_of(stored.dtype))
        self.fill([Piece(key, stored.shape, Box.whole(stored.shape), out)])
        return out

    def fill(self, pieces: Sequence[Piece]) -> int:
        """Write the stored values into the tensors of `pieces`, whose keys and shapes the manifest must have.

        Units: returns bytes read.
        Invariant: on CheckpointError the tensors may hold a mixture and must not be used.
        Raises: CheckpointError naming the file and tensor of damaged or missing bytes.
        """
        by_file: dict[str, list[_Read]] = {}
        for read in self._plan(pieces):
            by_file.setdefault(read.stored.file, []).append(read)
        return sum(
            self._fill_from(name, sorted(reads, key=lambda r: r.begin)) for name, reads in sorted(by_file.items())
        )

    def _plan(self, pieces: Iterable[Piece]) -> Iterable[_Read]:
        reads: dict[tuple[str, int], _Read] = {}
        for piece in pieces:
            if piece.box.numel == 0:
                continue
            tensor = self.manifest.tensors[piece.key]
            if piece.key not in self._indexes:
                self._indexes[piece.key] = PieceIndex(tensor.shape, [p.box for p in tensor.pieces])
            found = 0
            for number, common in self._indexes[piece.key].meeting(piece.box):
                stored = tensor.pieces[number]
                read = reads.setdefault((piece.key, number), _Read(stored, piece.key, dtype_of(tensor.dtype)))
                read.targets.append((piece, common))
                found += common.numel
            if found != piece.box.numel:
                raise CheckpointError(
                    f"checkpoint {self.files.place}: tensor '{piece.key}' holds {found} of the {piece.box.numel} "
                    f"elements of the block at {list(piece.box.offsets)}"
                )
        for read in reads.values():
            read.first, read.last = 0, read.stored.box.numel
            if not self.verify:
                spans = [flat_span(read.stored.box.sizes, c.within(read.stored.box)) for _, c in read.targets]
                read.first, read.last = min(low for low, _ in spans), max(high for _, high in spans)
        return reads.values()

    def _fill_from(self, name: str, reads: list[_Read]) -> int:
        place, total = f"{self.files.place}/{name}", 0
        with _opened(self.files, name) as file:
            for run in _runs(reads):
                begin, end = run[0].begin, run[-1].end
                total += end - begin
                if end - begin <= BUFFER_BYTES:
                    self._read_at(file, begin, end - begin, place)
                    for read in run:
                        low, high = read.begin - begin, read.end - begin
                        if self.verify:
                            self._check(read, xxhash.xxh3_64_hexdigest(self._bytes[low:high]))
                        read.scatter(read.first, torch.frombuffer(self._bytes[low:high], dtype=read.dtype))
                else:
                    self._stream(file, run[0], place)
        return total

    def _stream(self, file: RandomAccess, read: _Read, place: str) -> None:
        hasher = xxhash.xxh3_64()
        step = BUFFER_BYTES // read.dtype.itemsize
        for first in range(read.first, read.last, step):
            num_bytes = (min(first + step, read.last) - first) * read.dtype.itemsize
            self._read_at(file, read.stored.offset + first * read.dtype.itemsize, num_bytes, place)
            if self.verify:
                hasher.update(self._bytes[:num_bytes])
            read.scatter(first, torch.frombuffer(self._bytes[:num_bytes], dtype=read.dtype))
        if self.verify:
            self._check(read, hasher.hexdigest())

    def _read_at(self, file: RandomAccess, offset: int, num_bytes: int, place: str) -> None:
        count = file.read_into(self._bytes[:num_bytes], offset)
        if count < num_bytes:
            raise CheckpointError(f"{place} is truncated: it ends at byte {offset + count}, inside its tensors")

    def _check(self, read: _Read, found: str) -> None:
        if found != read.stored.xxh3:
            raise CheckpointError(
                f"{self.files.place}/{read.stored.file} is damaged: the bytes of tensor '{read.key}' at offset "
                f"{read.stored.offset} have xxh3 {found}, the manifest says {read.stored.xxh3}"
            )


def _runs(reads: list[_Read]) -> Iterator[list[_Read]]:
    """Group reads in file order so that each group is one call; a read larger than the buffer stands alone."""
    run: list[_Read] = []
    for read in reads:
        if run and (read.begin - run[-1].end > GAP_BYTES or read.end - run[0].begin > BUFFER_BYTES):
            yield run
            run = []
        run.append(read)
    if run:
        yield run


@contextmanager
def _opened(files: Files, name: str) -> Iterator[RandomAccess]:
    try:
        file = files.open(name)
    except OSError as error:
        raise CheckpointError(f"{files.place}/{name} cannot be opened: {error.strerror}") from error
    try:
        yield file
    except OSError as error:
        raise CheckpointError(f"{files.place}/{name} cannot be read: {error.strerror}") from error
    finally:
        file.close()
