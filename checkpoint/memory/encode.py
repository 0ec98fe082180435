"""Makes the parity of one member of a redundancy group: pulls the others' bytes, combines them, says whose they are.

Every chunk pulled is compared with the hash that its owner made, and parity counts only if all were right. While one
piece is combined the next is on its way, from several members at once, and no faster than the pace allows.
Must not know: sockets (bytes come through a Fetch), torch, votes.
Source: SCR/redset (pipelined pieces, what is known of a member is also kept by its neighbours).
Differs: a member pulls what it combines instead of taking part in a ring, so a slow or dead member delays only parity
made of its own bytes, and nobody waits in a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import xxhash

from windlass.checkpoint.memory.codes import Code
from windlass.checkpoint.memory.header import OWN_PARITY, SlotHeader, State
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.memory.segment import Slot, hash_chunks, num_chunks
from windlass.checkpoint.memory.stripes import DATA, PARITY, Block, Stripes
from windlass.dist.errors import CheckpointError

PIECE_BYTES = 2 << 20  # pulled from a member at a time
SCRATCH_BYTES = 16 << 20  # pieces on their way or being combined, together, whatever the chunks are
ALIGN = 64  # of pieces shorter than a chunk
LANES = 4  # members pulled from at once

# (rank, role, offset, into): fill `into` with bytes of that segment of that rank, of the snapshot that is meant.
# Raises CheckpointError if they cannot be had. Many threads call it at once.
Fetch: TypeAlias = Callable[[int, str, int, memoryview], None]


def checked_in_order(
    fetch: Fetch, tables: Mapping[int, np.ndarray], sizes: Mapping[int, int], chunk_bytes: int
) -> Fetch:
    """Return a fetch that compares the data of ranks with their hashes, in pieces that may be shorter than a chunk.

    The pieces of one chunk must come in order, one at a time: what is wrong with it shows with the last of them.
    """
    begun: dict[tuple[int, int], xxhash.xxh3_64] = {}  # by rank and chunk

    def fetch_checked(rank: int, role: str, offset: int, into: memoryview) -> None:
        fetch(rank, role, offset, into)
        end = offset + into.nbytes
        for chunk in range(offset // chunk_bytes, num_chunks(end, chunk_bytes)):
            low, high = chunk * chunk_bytes, min((chunk + 1) * chunk_bytes, sizes[rank])
            running = begun.setdefault((rank, chunk), xxhash.xxh3_64())
            running.update(into[max(low - offset, 0) : high - offset])
            if high <= end and begun.pop((rank, chunk)).intdigest() != int(tables[rank][chunk]):
                raise CheckpointError(f"rank {rank}, {role}: chunk {chunk} is damaged, in its memory or on its way")

    return fetch_checked


def piece_bytes(stripes: Stripes) -> int:
    """Return how much of a block is pulled at a time: whole chunks or a part of one, and no more scratch than there
    should be.
    """
    most = min(PIECE_BYTES, SCRATCH_BYTES // (2 * stripes.num_data))
    return most // stripes.chunk_bytes * stripes.chunk_bytes or most // ALIGN * ALIGN


@dataclass(frozen=True)
class _Piece:
    """A range of one parity block."""

    data: list[Block]  # of its stripe
    index: int  # which parity block of the code
    low: int  # within the block
    high: int

    def parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return for each data block the room for its bytes in this range."""
        ends = [min(block.length, self.high) for block in self.data]
        return [row[: max(end - self.low, 0)] for row, end in zip(rows, ends, strict=True)]


def encode_parity(
    stripes: Stripes, rank: int, fetch: Fetch, out: np.ndarray, *, pace: Pace | None = None
) -> np.ndarray:
    """Write all parity of a member into `out` and return the hash of each of its chunks.

    Blocks: host
    Raises: CheckpointError if bytes of a member cannot be had or are damaged; `out` is then worthless
    """
    code, pace, step, chunk = Code(stripes.n, stripes.k), pace or Pace(), piece_bytes(stripes), stripes.chunk_bytes
    span = max(step, chunk)
    pieces = [
        _Piece(stripes.stripe(stripes.stripe_of_parity(rank, index))[: stripes.num_data], index, low, high)
        for index in range(stripes.k)
        for start in range(0, stripes.block_bytes, span)
        for stop in [min(start + span, stripes.block_bytes)]
        for low in range(start, stop, step)
        for high in [min(low + step, stop)]
    ]
    if not pieces:
        return np.empty(0, "<u8")
    width = min(step, stripes.block_bytes)
    scratch = [np.empty((stripes.num_data, width), np.uint8) for _ in pieces[:2]]
    tables: list[np.ndarray] = []

    def get(block: Block, low: int, part: np.ndarray) -> None:
        pace.spend(len(part))
        fetch(block.rank, DATA, block.start + low, part.data)

    def pull(number: int) -> list[Future[None]]:
        piece = pieces[number]
        parts = piece.parts(scratch[number % 2])
        return [
            pool.submit(get, block, piece.low, part) for block, part in zip(piece.data, parts, strict=True) if len(part)
        ]

    with ThreadPoolExecutor(min(LANES, stripes.num_data), "snapshot-pull") as pool:
        try:
            coming = pull(0)
            for number, piece in enumerate(pieces):
                for future in coming:
                    future.result()
                coming = pull(number + 1) if number + 1 < len(pieces) else []
                start = piece.index * stripes.block_bytes
                target = out[start + piece.low : start + piece.high]
                code.encode_one(piece.index, piece.parts(scratch[number % 2]), target)
                if piece.high % chunk == 0:
                    whole = out[start + piece.low // chunk * chunk : start + piece.high]
                    tables.append(hash_chunks(whole, len(whole), chunk))
        finally:
            pool.shutdown(cancel_futures=True)
    return np.concatenate(tables)


def encode_slot(
    slot: Slot,
    stripes: Stripes,
    rank: int,
    members: Mapping[int, SlotHeader],
    fetch: Fetch,
    *,
    sequence: int = -1,
    pace: Pace | None = None,
) -> SlotHeader:
    """Fill a parity slot of `rank` and return its header, ENCODED: the bytes, their hashes, and what is known of the
    group. `members` are the hashed data headers of the whole group; `sequence` is what the slot must still hold.

    Blocks: host
    Raises: CheckpointError if the headers do not belong together, bytes cannot be had or are damaged, or somebody else
            has taken the slot; the slot is then not ENCODED
    """
    header = parity_header(stripes, rank, members)
    sequence = slot.sequence if sequence < 0 else sequence
    begun = replace(header, state=State.FILLING, hashes={}, sequence=sequence)
    if not slot.claim():  # a trainer of an older generation, which made parity itself, may still write it
        raise CheckpointError(f"rank {rank}: the parity slot for step {header.step} was taken by somebody else")
    try:
        if not slot.write(begun):
            raise CheckpointError(f"rank {rank}: the parity slot for step {header.step} was taken by somebody else")
        tables = {r: member.hashes[r] for r, member in members.items()}
        fetch = checked_in_order(
            fetch, tables, dict(zip(stripes.ranks, stripes.sizes, strict=True)), stripes.chunk_bytes
        )
        own = encode_parity(stripes, rank, fetch, slot.data[: stripes.parity_bytes], pace=pace)
        return _seal(slot, header, own, sequence + 1)
    finally:
        slot.release()


def seal_slot(slot: Slot, stripes: Stripes, rank: int, members: Mapping[int, SlotHeader]) -> SlotHeader:
    """Make a parity slot ENCODED whose bytes the trainer has written (COPIED or FILLED): local parity.

    Raises: CheckpointError if the slot does not hold parity of that snapshot
    """
    wanted, found = parity_header(stripes, rank, members), slot.header()
    if (
        found is None
        or found.state not in (State.COPIED, State.FILLED)
        or (found.role, found.rank, found.generation, found.step) != (PARITY, rank, wanted.generation, wanted.step)
        or found.num_bytes != stripes.parity_bytes
    ):
        raise CheckpointError(
            f"rank {rank}: the parity slot does not hold {stripes.parity_bytes} bytes of parity of step {wanted.step}, "
            f"generation {wanted.generation}, but {found if found is None else (found.state.name, found.step)}"
        )
    own = found.hashes.get(OWN_PARITY)
    if own is None:
        own = hash_chunks(slot.data, found.num_bytes, stripes.chunk_bytes)
    return _seal(slot, wanted, own, found.sequence)


def _seal(slot: Slot, header: SlotHeader, own: np.ndarray, sequence: int) -> SlotHeader:
    header = replace(header, hashes={**header.hashes, OWN_PARITY: own}, state=State.ENCODED, sequence=sequence)
    if not slot.write(header):
        raise CheckpointError(f"rank {header.rank}: the parity slot for step {header.step} was taken by somebody else")
    return replace(header, sequence=-1)


def parity_header(stripes: Stripes, rank: int, members: Mapping[int, SlotHeader]) -> SlotHeader:
    """Return the header of a member's parity, without the hashes of its own bytes.

    It says of every member how its data is laid out and hashed, and keeps the facts of the members before this one
    (Stripes.wards): enough of them survive. They must fit a header, so what they have in common is there once
    (`member_facts` puts a member's together again).

    Raises: CheckpointError unless the headers are hashed data of one snapshot and of the sizes planned for
    """
    own = members.get(rank)
    for member, size in zip(stripes.ranks, stripes.sizes, strict=True):
        header = members.get(member)
        if header is None or own is None:
            raise CheckpointError(f"rank {rank}: parity needs the headers of {stripes.ranks}, got {sorted(members)}")
        table = header.hashes.get(member)
        if table is None or header.role != DATA or header.rank != member:
            raise CheckpointError(f"rank {rank}: the header of rank {member} is not one of hashed data")
        expected = (own.job, own.generation, own.step, stripes.chunk_bytes, size, num_chunks(size, stripes.chunk_bytes))
        if (
            header.job, header.generation, header.step, header.chunk_bytes, header.num_bytes, len(table)
        ) != expected:  # fmt: skip
            raise CheckpointError(
                f"rank {rank}: parity of step {own.step}, generation {own.generation} cannot be made with rank "
                f"{member}, which holds {header.num_bytes} bytes ({len(table)} chunks of {header.chunk_bytes}) of step "
                f"{header.step}, generation {header.generation}, job {header.job}; expected {size} bytes in chunks of "
                f"{stripes.chunk_bytes}"
            )
    assert own is not None
    return SlotHeader(
        job=own.job,
        generation=own.generation,
        step=own.step,
        rank=rank,
        world_size=own.world_size,
        role=PARITY,
        layout="",
        num_bytes=stripes.parity_bytes,
        chunk_bytes=stripes.chunk_bytes,
        state=State.FILLING,
        facts=group_facts({member: members[member].facts for member in stripes.wards(rank)}),
        hashes={member: members[member].hashes[member] for member in stripes.ranks},
        layouts={member: members[member].layout for member in stripes.ranks},
    )


def group_facts(facts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is known of several members, by rank, as facts of a parity header; what is the same only once."""
    first, *others = facts.values()
    common = {key: value for key, value in first.items() if all(key in f and f[key] == value for f in others)}
    own = {str(rank): {k: v for k, v in known.items() if k not in common} for rank, known in facts.items()}
    return {"common": common, "members": own}


def member_facts(facts: Mapping[str, Any], rank: int) -> dict[str, Any] | None:
    """Return a member's facts out of those of a parity header; None if they are not there."""
    own = facts.get("members", {}).get(str(rank))
    return None if own is None else {**facts["common"], **own}
