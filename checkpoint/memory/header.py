"""What a slot of a segment holds, in words: whose bytes, of which step and generation, the hashes that vouch for them.

Must not know: torch, files, where the bytes are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import numpy as np

from windlass.checkpoint.memory.stripes import DATA, PARITY
from windlass.dist.errors import CheckpointError

FACTS_BYTES = 256 << 10  # what a header has room for beside its tables
OWN_PARITY = -1  # the key of a parity slot's own bytes among its hash tables
_COUNT = struct.Struct("<Q")


class State(IntEnum):
    """How far a slot is. Up to COPIED it is the trainer's, from then on the snapshot process's."""

    FREE = 0
    FILLING = 1
    COPIED = 2
    FILLED = 3  # hashed
    ENCODED = 4  # protected by parity
    COMMITTED = 5


@dataclass(frozen=True)
class SlotHeader:
    """What the bytes of a slot are.

    Units: bytes; `hashes` holds xxh3_64 of each chunk, by rank (OWN_PARITY: of a parity slot's own bytes)
    """

    job: str
    generation: int
    step: int
    rank: int
    world_size: int
    role: str
    layout: str  # digest; "" for parity
    num_bytes: int
    chunk_bytes: int
    state: State
    facts: dict[str, Any] = field(default_factory=dict)
    hashes: dict[int, np.ndarray] = field(default_factory=dict, compare=False)
    layouts: dict[int, str] = field(default_factory=dict)  # of the group's members, by rank
    sequence: int = field(default=-1, compare=False)  # of the slot when this was read; -1: not read from a slot

    @property
    def own_key(self) -> int:
        return self.rank if self.role == DATA else OWN_PARITY

    @property
    def num_chunks(self) -> int:
        return -(-self.num_bytes // self.chunk_bytes)

    def dump(self) -> tuple[dict[str, Any], bytes]:
        """Return this as JSON and, beside it, the tables: 64-bit words, little endian, one table after the other."""
        tables = {rank: np.ascontiguousarray(table, dtype="<u8") for rank, table in self.hashes.items()}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("hashes", "sequence")}
        values["state"] = int(self.state)
        values["tables"] = [[rank, len(table)] for rank, table in tables.items()]
        return values, b"".join(table.tobytes() for table in tables.values())

    @staticmethod
    def parse(values: Mapping[str, Any], tables: bytes | memoryview) -> SlotHeader:
        """Read what `dump` returned.

        Raises: CheckpointError if it is no header
        """
        try:
            at, hashes = 0, {}
            for rank, length in values["tables"]:
                hashes[int(rank)] = np.frombuffer(tables, dtype="<u8", count=length, offset=at)
                at += 8 * length
            given = {f.name: values[f.name] for f in fields(SlotHeader) if f.name in values}
            given |= {"state": State(values["state"]), "hashes": hashes, "sequence": -1}
            given["layouts"] = {int(k): str(v) for k, v in values["layouts"].items()}
            header = SlotHeader(**given)
            numbers = (header.generation, header.step, header.rank, header.world_size, header.num_bytes)
            if (
                header.role not in (DATA, PARITY)
                or header.chunk_bytes < 1
                or not all(type(n) is int and n >= 0 for n in numbers)
            ):
                raise ValueError(f"role {header.role!r}, chunk_bytes {header.chunk_bytes}, numbers {numbers}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"this is not the header of a slot: {type(error).__name__}: {error}") from error
        return header


def pack(header: SlotHeader) -> bytes:
    """Return the bytes that stand for a header in a slot.

    Raises: CheckpointError if its facts are too large
    """
    values, tables = header.dump()
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if _COUNT.size + len(text) > FACTS_BYTES:
        raise CheckpointError(
            f"rank {header.rank}: the facts of snapshot {header.step} take {len(text)} bytes of a header, which has "
            f"room for {FACTS_BYTES - _COUNT.size}. Large state belongs into the pieces of the state source"
        )
    return b"".join([_COUNT.pack(len(text)), text, tables])


def unpack(body: bytes) -> SlotHeader:
    """Read what `pack` returned."""
    (count,) = _COUNT.unpack_from(body)
    end = _COUNT.size + count
    return SlotHeader.parse(json.loads(body[_COUNT.size : end]), memoryview(body)[end:])
