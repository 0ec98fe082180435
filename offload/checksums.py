"""Hashes of what was written to a file, piece by piece, and their comparison with what is read.

Must not know: files, slots.
"""

from __future__ import annotations

import torch
import xxhash

from windlass.dist.errors import OffloadError
from windlass.offload.engines import BLOCK_BYTES, host_view
from windlass.offload.ranges import Piece


def hash_pieces(start: int, data: torch.Tensor) -> list[Piece]:
    """Return the pieces of a write that begins at `start`, cut where blocks begin so that parts can be verified."""
    whole, end = _host_bytes(data), start + data.numel()
    cuts = [*range(start - start % BLOCK_BYTES + BLOCK_BYTES, end, BLOCK_BYTES)]
    return [
        Piece(low, high, xxhash.xxh3_64_hexdigest(whole[low - start : high - start]))
        for low, high in zip([start, *cuts], [*cuts, end], strict=True)
    ]


def hash_remainders(piece: Piece, data: torch.Tensor, start: int, end: int) -> list[Piece]:
    """Return what is left of a piece, whose bytes are `data`, when start..end is written over."""
    sides = [(piece.start, min(piece.end, start)), (max(piece.start, end), piece.end)]
    return [
        Piece(low, high, xxhash.xxh3_64_hexdigest(_host_bytes(data)[low - piece.start : high - piece.start]))
        for low, high in sides
        if low < high
    ]


def compare(where: str, piece: Piece, data: torch.Tensor) -> None:
    """Raise OffloadError unless `data` is what was written as this piece."""
    found = xxhash.xxh3_64_hexdigest(_host_bytes(data))
    if piece.digest and found != piece.digest:
        raise OffloadError(
            f"{where}: bytes {piece.start}..{piece.end} are damaged (xxh3 {found}, written as {piece.digest}). Resume "
            "from a checkpoint; if it happens again, take this drive out of cluster.nvme_paths"
        )


def _host_bytes(tensor: torch.Tensor) -> memoryview:
    return host_view(tensor if tensor.device.type == "cpu" else tensor.cpu())
