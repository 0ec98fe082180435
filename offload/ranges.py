"""Which bytes of a region have been written, and with which hash. Plain interval arithmetic.

Must not know: files, tensors, how a hash is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from windlass.dist.errors import OffloadError


class Piece(NamedTuple):
    """Bytes start..end that were written as one, and their hash ("": none was taken)."""

    start: int
    end: int
    digest: str = ""


class Ranges:
    """The written bytes of one region: pieces in order, none overlapping another."""

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self.pieces: list[Piece] = []
        for piece in pieces:
            self.put(piece)

    def overlapping(self, start: int, end: int) -> list[Piece]:
        """Return the pieces that share bytes with start..end."""
        return [piece for piece in self.pieces if piece.start < end and start < piece.end]

    def missing(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the first bytes of start..end that were never written, or None if all were."""
        for piece in self.overlapping(start, end):
            if piece.start > start:
                return start, piece.start
            start = piece.end
        return (start, end) if start < end else None

    def remove(self, start: int, end: int) -> None:
        """Forget start..end. What is left of a piece that reaches out of it has no hash."""
        kept: list[Piece] = []
        for piece in self.pieces:
            if piece.end <= start or piece.start >= end:
                kept.append(piece)
                continue
            kept += [Piece(*side) for side in ((piece.start, start), (end, piece.end)) if side[0] < side[1]]
        self.pieces = kept

    def put(self, piece: Piece) -> None:
        """Note that a piece was written. Neighbours without a hash become one."""
        self.remove(piece.start, piece.end)
        before = [other for other in self.pieces if other.end <= piece.start]
        after = self.pieces[len(before) :]
        if not piece.digest:
            while before and before[-1].end == piece.start and not before[-1].digest:
                piece = Piece(before.pop().start, piece.end)
            while after and after[0].start == piece.end and not after[0].digest:
                piece = Piece(piece.start, after.pop(0).end)
        self.pieces = [*before, piece, *after]

    def as_lists(self) -> list[list[int | str]]:
        """Return the pieces as plain lists, for a record on disk."""
        return [list(piece) for piece in self.pieces]

    @staticmethod
    def from_lists(rows: Sequence[Sequence[int | str]]) -> Ranges:
        """Read back what `as_lists` gave.

        Raises: OffloadError if a row is no piece
        """
        pieces = []
        for row in rows:
            match row:
                case [int(start), int(end), str(digest)] if 0 <= start < end:
                    pieces.append(Piece(start, end, digest))
                case _:
                    raise OffloadError(f"a record of written bytes has the row {row!r}: must be [start, end, hash]")
        return Ranges(pieces)
