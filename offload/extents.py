"""Room for state in a file: extents by key and slot, where they lie, and transfers of parts of them.

Must not know: files, engines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from windlass.dist.errors import OffloadError
from windlass.offload.engines import PAGE


@dataclass(frozen=True)
class Extent:
    """Room for one key: so many bytes, rounded up to pages, in one slot or two."""

    key: str
    num_bytes: int
    slots: int = 1

    @property
    def padded_bytes(self) -> int:
        return -(-self.num_bytes // PAGE) * PAGE


class Access(NamedTuple):
    """A transfer under way."""

    verb: str
    key: str
    slot: int
    start: int
    end: int

    def hurts(self, other: Access) -> bool:
        same = (self.key, self.slot) == (other.key, other.slot) and self.start < other.end and other.start < self.end
        return same and "write" in (self.verb, other.verb)

    def __str__(self) -> str:
        return f"{self.verb} of '{self.key}' slot {self.slot} bytes {self.start}..{self.end}"


def place_extents(extents: Sequence[Extent]) -> tuple[dict[tuple[str, int], int], int]:
    """Return where every slot begins in the file, and how long that is.

    Units: bytes
    Raises: OffloadError if an extent has no bytes, no slot, or the key of another
    """
    offsets: dict[tuple[str, int], int] = {}
    position = 0
    for extent in extents:
        if extent.num_bytes <= 0 or extent.slots < 1 or (extent.key, 0) in offsets:
            raise OffloadError(f"{extent}: needs bytes, one slot or two, and a key of its own")
        for slot in range(extent.slots):
            offsets[extent.key, slot] = position
            position += extent.padded_bytes
    return offsets, position


def layout_of(extents: Sequence[Extent]) -> str:
    """Return what tells one layout from another."""
    rows = [[extent.key, extent.padded_bytes, extent.slots] for extent in extents]
    return xxhash.xxh3_64_hexdigest(json.dumps(rows).encode())
