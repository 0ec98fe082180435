"""Hashes a slot chunk by chunk while the trainer still fills it, so that little is left to do when it is whole.

Must not know: who fills it, what the hashes are for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.segment import Slot, hash_chunks

PIECE_CHUNKS = 64  # hashed before others are looked at


@dataclass
class _Fill:
    sequence: int  # of the header that began it
    table: list[int] = field(default_factory=list)


class Hasher:
    """Remembers how far every slot has been hashed. One thread."""

    def __init__(self) -> None:
        self._fills: dict[Slot, _Fill] = {}

    def work(self, slot: Slot, header: SlotHeader) -> bool:
        """Hash the chunks that have landed since, a piece at most; make the slot FILLED when that was the last of a
        whole one. Return whether there was anything to do.
        """
        began = header.sequence if header.state == State.FILLING else header.sequence - 1
        fill = self._fills.get(slot)
        if fill is None or fill.sequence != began:
            fill = self._fills[slot] = _Fill(began)
        whole = header.state == State.COPIED
        landed = header.num_bytes if whole else slot.progress // header.chunk_bytes * header.chunk_bytes
        first = len(fill.table)
        end = min(landed, (first + PIECE_CHUNKS) * header.chunk_bytes)
        if first * header.chunk_bytes < end:
            fill.table += hash_chunks(slot.data, end, header.chunk_bytes, first).tolist()
        if whole and len(fill.table) == header.num_chunks:
            table = np.array(fill.table, dtype="<u8")
            slot.write(replace(header, state=State.FILLED, hashes={**header.hashes, header.own_key: table}))
            del self._fills[slot]
            return True
        return len(fill.table) > first

    def forget(self, slots: set[Slot]) -> None:
        """Keep only what is known of these slots."""
        self._fills = {slot: fill for slot, fill in self._fills.items() if slot in slots}
