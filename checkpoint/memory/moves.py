"""Which bytes of live state go where in a snapshot: shares of replicas, layouts, and the moves that fill a slot.

Must not know: segments, threads, when a snapshot is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from windlass.checkpoint.memory.layout import ALIGNMENT, Fragment, Layout
from windlass.checkpoint.memory.stripes import Block
from windlass.checkpoint.reader import dtype_name
from windlass.dist.box import Box, boxes_of_range
from windlass.dist.state import Piece

PARITY_RUN = 1 << 20  # bytes of parity made at a time from all members: they stay in the cache until they are whole


@dataclass(frozen=True)
class Part:
    """Some elements of one piece, row-major, that are a box of its tensor."""

    piece: int  # its index
    first: int  # element of the piece
    box: Box  # of the global tensor


def cut(pieces: Sequence[Piece], n: int, i: int) -> list[Part]:
    """Return part i of n, equal in bytes up to granules of 64, of all pieces laid end to end."""
    starts, total = [], 0
    for piece in pieces:
        starts.append(total)
        total += _aligned(piece.nbytes)
    low, high = (total // ALIGNMENT * k // n * ALIGNMENT for k in (i, i + 1))
    parts = []
    for index, (piece, start) in enumerate(zip(pieces, starts, strict=True)):
        if piece.box.numel == 0:
            if i == 0:  # only names a tensor
                parts.append(Part(index, 0, piece.box))
            continue
        size = piece.dtype.itemsize
        first, last = max(low - start, 0) // size, min(high - start, piece.nbytes) // size
        if first >= last:
            continue
        for inner in boxes_of_range(piece.box.sizes, first, last):
            offsets = tuple(a + b for a, b in zip(piece.box.offsets, inner.offsets, strict=True))
            parts.append(Part(index, first, Box(offsets, inner.sizes)))
            first += inner.numel
    return parts


def layout_of(pieces: Sequence[Piece], parts: Sequence[Part]) -> Layout:
    """Lay parts out in their order, each on a granule."""
    fragments, end = [], 0
    for part in parts:
        piece = pieces[part.piece]
        num_bytes = part.box.numel * piece.dtype.itemsize
        fragments.append(Fragment(piece.key, dtype_name(piece.dtype), piece.global_shape, part.box, end, num_bytes))
        end += _aligned(num_bytes)
    return Layout(tuple(fragments), end)


@dataclass(frozen=True)
class Move:
    """Bytes `[low, high)` of a piece that go to `[at, at + high - low)` of the data of this rank, or are added to its
    parity there (exclusive or)."""

    piece: int
    low: int
    high: int
    at: int
    parity: bool = False


def data_moves(pieces: Sequence[Piece], parts: Sequence[Part], layout: Layout) -> list[Move]:
    """Return the moves that fill the data, in order of the pieces and of the targets."""
    moves = []
    for part, fragment in zip(parts, layout.fragments, strict=True):
        low = part.first * pieces[part.piece].dtype.itemsize
        if fragment.num_bytes:
            moves.append(Move(part.piece, low, low + fragment.num_bytes, fragment.offset))
    return moves


def parity_moves(members: Sequence[tuple[Sequence[Move], Block]]) -> list[Move]:
    """Return the moves that make parity: of each member, what fills its data, and the block of it that goes in.

    All are added to zeros, because the gaps between the fragments of one member lie beside fragments of another.
    """
    moves = []
    for fills, block in members:
        for move in fills:
            low, high = max(move.at, block.start), min(move.at + move.high - move.low, block.start + block.length)
            if low < high:
                first = move.low + low - move.at
                moves.append(Move(move.piece, first, first + high - low, low - block.start, parity=True))
    return moves


def in_runs(moves: Sequence[Move]) -> list[Move]:
    """Order the moves of parity by runs of their targets, so that each run is made from all members at once.

    Only for state that rests in memory: pieces are no longer visited in order.
    """
    runs = []
    for number, move in enumerate(moves):
        low = move.low
        while low < move.high:
            at = move.at + low - move.low
            high = min(move.high, low + PARITY_RUN - at % PARITY_RUN)
            runs.append((at // PARITY_RUN, number, replace(move, low=low, high=high, at=at)))
            low = high
    return [move for _, _, move in sorted(runs, key=lambda run: run[:2])]


def gaps(moves: Sequence[Move], num_bytes: int) -> list[tuple[int, int]]:
    """Return the places of `[0, num_bytes)` that no move reaches; the moves come in order of their targets."""
    out, end = [], 0
    for move in moves:
        if move.at > end:
            out.append((end, move.at))
        end = move.at + move.high - move.low
    return [*out, (end, num_bytes)] if end < num_bytes else out


@dataclass(frozen=True)
class Stretch:
    """Bytes of a piece and the place they go to, as `Move`."""

    source: torch.Tensor  # flat, uint8
    at: int
    parity: bool


def stretches(pieces: Sequence[Piece], moves: Sequence[Move], most: int) -> list[Stretch]:
    """Return the moves as bytes, neighbours joined to stretches of at most `most` bytes and longer ones cut.

    Small parameters lie side by side in the flat state of a unit, and one copy is cheaper than many.
    """
    out: list[Stretch] = []
    opened: tuple[torch.UntypedStorage, int, Move] | None = None  # where the stretch under way lies, and itself

    def close() -> None:
        if opened is not None:
            storage, first, whole = opened
            for low in range(0, whole.high - whole.low, most):
                size = min(most, whole.high - whole.low - low)
                source = torch.empty(0, dtype=torch.uint8, device=storage.device)
                source.set_(storage, first + low, (size,), (1,))
                out.append(Stretch(source, whole.at + low, whole.parity))

    for move in moves:
        tensor = pieces[move.piece].tensor.detach()
        storage = tensor.untyped_storage()
        first = int(tensor.storage_offset()) * tensor.dtype.itemsize + move.low
        if opened is not None:
            _, begin, before = opened
            size = before.high - before.low
            same = before.parity == move.parity and opened[0].data_ptr() == storage.data_ptr()
            if same and begin + size == first and before.at + size == move.at:
                opened = (opened[0], begin, replace(before, high=before.high + move.high - move.low))
                continue
        close()
        opened = (storage, first, move)
    close()
    return out


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor as flat bytes."""
    return tensor.detach().view(-1).view(torch.uint8)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
