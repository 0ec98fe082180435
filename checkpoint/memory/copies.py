"""Where a copy of a rank's segment is read: from this node's own memory or drive, or from the node that holds it.

A copy gives whole chunks, each compared with the checksum in its header, or raises: nothing else leaves this file.
Must not know: torch, how missing chunks are computed, which copy is to be preferred.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from windlass.checkpoint.local_level import LocalLevel
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.inventory import Held
from windlass.checkpoint.memory.segment import Segment, Slot, SlotHeader
from windlass.dist.errors import CheckpointError


class Unusable(Exception):
    """A copy, or a chunk of it, that waiting does not bring back: damaged, overwritten, of something else.

    It never leaves the readers of copies: they take another copy, or say in a CheckpointError what is lost.
    """


class Peer(Protocol):
    """What is asked of the snapshot process of another node."""

    def header_of(self, held: Held) -> SlotHeader: ...

    def read_from(self, held: Held, offset: int, into: memoryview) -> None: ...

    def close(self) -> None: ...


class Copy:
    """One copy, described by its header. Threads may read it at once."""

    def __init__(self, held: Held, header: SlotHeader, fetch: Callable[[int, memoryview], None]) -> None:
        self.held, self.header = held, header
        self._fetch = fetch
        self._table = header.hashes.get(header.own_key)
        found = (header.generation, header.step, header.rank, header.role)
        if found != (held.generation, held.step, held.rank, held.role):
            raise Unusable(f"{self}: has become generation, step, rank, role {found}: it was overwritten")
        if self._table is None or len(self._table) != header.num_chunks:
            raise Unusable(f"{self}: was never hashed whole, so nothing vouches for its bytes")

    def __str__(self) -> str:
        return name_of(self.held)

    def chunk_bytes(self, number: int) -> int:
        """Return the length of a chunk; only the last may be shorter than the others."""
        return min(self.header.chunk_bytes, self.header.num_bytes - number * self.header.chunk_bytes)

    def read(self, number: int, into: memoryview) -> None:
        """Fill `into` with a chunk.

        Raises: Unusable if the chunk is damaged; CheckpointError if the copy cannot be read now
        """
        self._fetch(number * self.header.chunk_bytes, into)
        assert self._table is not None
        found, stated = xxhash.xxh3_64_intdigest(into), int(self._table[number])
        if found != stated:
            raise Unusable(f"{self}: chunk {number} is damaged: its xxh3 is {found:016x}, was {stated:016x}")


class Reach:
    """Opens copies, and owns what is open: mapped segments of this node, connections to others.

    `level` is what this node keeps on its drive; None: the drive, if any, is read through the snapshot process.
    """

    def __init__(self, folder: NodeFolder, level: LocalLevel | None, connect: Callable[[Held], Peer]) -> None:
        self.folder, self._level, self._connect = folder, level, connect
        self._lock = threading.Lock()
        self._segments: dict[Path, Segment | None] = {}
        self._peers: dict[tuple[str, int], Peer] = {}

    def is_own(self, held: Held) -> bool:
        """Tell whether a copy is on this node, where it is read without a socket."""
        return held.node == self.folder.node and (held.tier == "ram" or self._level is not None)

    def open(self, held: Held) -> Copy:
        """Open a copy.

        Raises: Unusable if it is not there any more; CheckpointError if its node cannot be asked now
        """
        if self.is_own(held):
            slot, header = self._own_slot(held)
            return Copy(held, header, lambda offset, into: _copy_out(slot, offset, into))
        peer = self._peer(held)
        return Copy(held, peer.header_of(held), lambda offset, into: peer.read_from(held, offset, into))

    def close(self) -> None:
        """Close connections and files."""
        for peer in self._peers.values():
            peer.close()
        for segment in self._segments.values():
            if segment is not None:
                segment.close()
        self._peers.clear()
        self._segments.clear()

    def _peer(self, held: Held) -> Peer:
        with self._lock:
            address = (held.host, held.port)
            if address not in self._peers:
                self._peers[address] = self._connect(held)
            return self._peers[address]

    def _own_slot(self, held: Held) -> tuple[Slot, SlotHeader]:
        with self._lock:
            for path in self._paths(held):
                if path not in self._segments:
                    self._segments[path] = _opened(path)
                segment = self._segments[path]
                for slot in segment.slots if segment is not None else ():
                    header = slot.header()
                    if header is not None and (header.generation, header.step) == (held.generation, held.step):
                        return slot, header
        raise Unusable(f"{name_of(held)} is not there any more")

    def _paths(self, held: Held) -> list[Path]:
        if held.tier == "ram":
            return [s.path for s in self.folder.segments() if (s.role, s.rank) == (held.role, held.rank)]
        steps = [] if self._level is None else self._level.complete()
        named = [step.segments().get((held.role, held.rank)) for step in steps if step.step == held.step]
        return [path for path in named if path is not None]


def name_of(held: Held) -> str:
    """Name a copy in messages."""
    where = "memory" if held.tier == "ram" else "drive"
    return (
        f"{held.role} of rank {held.rank}, step {held.step} of generation {held.generation}, in {held.node}'s {where}"
    )


def _opened(path: Path) -> Segment | None:
    with contextlib.suppress(CheckpointError, FileNotFoundError):
        return Segment.open(path)
    return None


def _copy_out(slot: Slot, offset: int, into: memoryview) -> None:
    np.frombuffer(into, np.uint8)[:] = slot.data[offset : offset + len(into)]
