"""Parity in real slots: made by snapshot processes or trainers, sealed, rebuilt from, also over the wire."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from windlass.checkpoint.memory import encode
from windlass.checkpoint.memory.decode import Decoder
from windlass.checkpoint.memory.encode import (
    encode_slot,
    member_facts,
    parity_header,
    seal_slot,
)
from windlass.checkpoint.memory.header import OWN_PARITY, SlotHeader, State
from windlass.checkpoint.memory.segment import Segment, Slot, hash_chunks, num_chunks
from windlass.checkpoint.memory.stripes import DATA, PARITY, Stripes
from windlass.checkpoint.memory.wire import Client, Server
from windlass.dist.errors import CheckpointError

CHUNK = 64
SMALL = [(n, k) for n in range(2, 7) for k in range(1, n)]
SIZES = (1003, 0, 640, 777, 1, 64)


class Node:
    """The segments of one rank with one hashed snapshot."""

    def __init__(self, folder: Path, stripes: Stripes, rank: int, step: int = 7, **changes: Any) -> None:
        size = stripes.sizes[stripes.ranks.index(rank)]
        chunks = sum(num_chunks(s, CHUNK) for s in stripes.sizes) + stripes.parity_bytes // CHUNK
        self.data = Segment.create(folder / f"data-{rank}", DATA, rank, max(size, 1), 2, CHUNK, chunks)
        self.parity = Segment.create(folder / f"parity-{rank}", PARITY, rank, stripes.parity_bytes, 2, CHUNK, chunks)
        slot = self.data.slots[0]
        slot.data[:size] = np.random.default_rng(rank).integers(0, 256, size, dtype=np.uint8)
        facts = {"step": step, "rng": f"of rank {rank}"}
        header = SlotHeader("ab" * 8, 2, step, rank, 4, DATA, f"layout-{rank}", size, CHUNK, State.FILLED, facts)
        slot.write(replace(header, hashes={rank: hash_chunks(slot.data, size, CHUNK)}, **changes))

    @property
    def header(self) -> SlotHeader:
        found = self.data.slots[0].header()
        assert found is not None
        return found

    def close(self) -> None:
        self.data.close()
        self.parity.close()


STRIPES = Stripes((0, 1, 2, 3), (1003, 640, 0, 700), 2, CHUNK)


@pytest.fixture
def nodes(tmp_path: Path) -> dict[int, Node]:
    return {rank: Node(tmp_path, STRIPES, rank) for rank in STRIPES.ranks}


def fetch_of(nodes: Mapping[int, Node]) -> encode.Fetch:
    def fetch(rank: int, role: str, offset: int, into: memoryview) -> None:
        slot: Slot = (nodes[rank].data if role == DATA else nodes[rank].parity).slots[0]
        into[:] = memoryview(slot.data)[offset : offset + into.nbytes]

    return fetch


def encoded(nodes: Mapping[int, Node], rank: int) -> SlotHeader:
    members = {r: node.header for r, node in nodes.items()}
    return encode_slot(nodes[rank].parity.slots[0], STRIPES, rank, members, fetch_of(nodes))


def test_a_parity_slot_says_all_that_must_be_known_of_a_lost_member(nodes: dict[int, Node]) -> None:
    headers = {rank: encoded(nodes, rank) for rank in STRIPES.ranks}
    for rank, header in headers.items():
        assert nodes[rank].parity.slots[0].header() == header and header.state == State.ENCODED
        assert (header.role, header.rank, header.step, header.generation) == (PARITY, rank, 7, 2)
        assert header.layouts == {r: f"layout-{r}" for r in STRIPES.ranks}
        assert set(header.hashes) == {OWN_PARITY, *STRIPES.ranks} and len(header.hashes[0]) == 16
    for lost in itertools.combinations(STRIPES.ranks, 2):
        left = [header.facts for rank, header in headers.items() if rank not in lost]
        known = {rank: [f for facts in left if (f := member_facts(facts, rank)) is not None] for rank in lost}
        assert all(
            known[rank] and all(f == {"step": 7, "rng": f"of rank {rank}"} for f in known[rank]) for rank in lost
        )


def test_lost_members_are_rebuilt_from_slots_and_match_the_hashes_the_survivors_keep(nodes: dict[int, Node]) -> None:
    headers = {rank: encoded(nodes, rank) for rank in STRIPES.ranks}
    for lost in itertools.combinations(STRIPES.ranks, 2):
        left = {rank: node for rank, node in nodes.items() if rank not in lost}
        decoder = Decoder(STRIPES, {(rank, role) for rank in lost for role in (DATA, PARITY)}, fetch_of(left))
        survivor = next(headers[r] for r in left)
        for rank in lost:
            size = STRIPES.sizes[rank]
            found = np.frombuffer(decoder.read(rank, 0, size), np.uint8)
            assert np.array_equal(hash_chunks(found, size, CHUNK), survivor.hashes[rank])
            assert np.array_equal(found, nodes[rank].data.slots[0].data[:size])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 8}, "of step 8"),
        ({"generation": 1}, "generation 1"),
        ({"job": "00" * 8}, "job 0000"),
        ({"num_bytes": 512}, "holds 512 bytes"),
        ({"hashes": {}}, "not one of hashed data"),
        ({"role": PARITY}, "not one of hashed data"),
        ({"rank": 3}, "not one of hashed data"),
    ],
)
def test_headers_that_do_not_belong_together_make_no_parity(
    nodes: dict[int, Node], changes: dict[str, Any], message: str
) -> None:
    members = {rank: node.header for rank, node in nodes.items()}
    members[1] = replace(members[1], **changes)
    with pytest.raises(CheckpointError, match=message):
        encode_slot(nodes[0].parity.slots[0], STRIPES, 0, members, fetch_of(nodes))
    assert nodes[0].parity.slots[0].header() is None
    del members[1]
    with pytest.raises(CheckpointError, match=r"got \[0, 2, 3\]"):
        parity_header(STRIPES, 0, members)


def test_damage_in_a_members_memory_is_found_before_it_gets_into_parity(nodes: dict[int, Node]) -> None:
    nodes[1].data.slots[0].data[70] ^= 4
    holders = [r for r in STRIPES.ranks if r != 1]
    failed = 0
    for rank in holders:
        try:
            encoded(nodes, rank)
        except CheckpointError as exc:
            failed += 1
            assert "rank 1, data: chunk 1 is damaged" in str(exc)
            header = nodes[rank].parity.slots[0].header()
            assert header is not None and header.state == State.FILLING
    assert failed == STRIPES.k  # that block is in the parity of k members


def test_a_slot_that_was_taken_meanwhile_is_left_alone(nodes: dict[int, Node]) -> None:
    slot, members = nodes[0].parity.slots[0], {rank: node.header for rank, node in nodes.items()}
    before = slot.sequence
    newer = replace(parity_header(STRIPES, 0, members), step=9, generation=3)
    assert slot.write(newer)
    with pytest.raises(CheckpointError, match="taken by somebody else"):
        encode_slot(slot, STRIPES, 0, members, fetch_of(nodes), sequence=before)

    def steal(rank: int, role: str, offset: int, into: memoryview) -> None:
        fetch_of(nodes)(rank, role, offset, into)
        slot.write(newer)

    with pytest.raises(CheckpointError, match="taken by somebody else"):
        encode_slot(slot, STRIPES, 0, members, steal)
    header = slot.header()
    assert header is not None and (header.step, header.state) == (9, State.FILLING)


# -- local parity ----------------------------------------------------------------------------------------------------

LOCAL = Stripes((0, 1, 2), (1003, 640, 300), 1, CHUNK)


@pytest.mark.parametrize("hashed", [False, True])
def test_parity_that_a_trainer_made_of_its_own_replica_is_that_of_the_members(tmp_path: Path, hashed: bool) -> None:
    nodes = {rank: Node(tmp_path, LOCAL, rank) for rank in LOCAL.ranks}
    members = {rank: node.header for rank, node in nodes.items()}
    for rank in LOCAL.ranks:
        local, pulled = nodes[rank].parity.slots
        encode_slot(pulled, LOCAL, rank, members, fetch_of(nodes))
        local.data[:] = 0
        for block in LOCAL.xor_sources(rank):
            source = nodes[block.rank].data.slots[0].data[block.start : block.start + block.length]
            local.data[: block.length] ^= source
        state = State.FILLED if hashed else State.COPIED
        table = {OWN_PARITY: hash_chunks(local.data, LOCAL.parity_bytes, CHUNK)} if hashed else {}
        local.write(replace(parity_header(LOCAL, rank, members), state=state, hashes=table))
        sealed = seal_slot(local, LOCAL, rank, members)
        theirs, mine = pulled.header(), local.header()
        assert sealed == mine == theirs and mine is not None and theirs is not None
        assert np.array_equal(local.data, pulled.data)
        assert all(np.array_equal(mine.hashes[key], theirs.hashes[key]) for key in theirs.hashes)


def test_only_parity_of_the_same_snapshot_is_sealed(tmp_path: Path) -> None:
    nodes = {rank: Node(tmp_path, LOCAL, rank) for rank in LOCAL.ranks}
    members, slot = {rank: node.header for rank, node in nodes.items()}, nodes[0].parity.slots[0]
    with pytest.raises(CheckpointError, match="does not hold"):
        seal_slot(slot, LOCAL, 0, members)
    good = parity_header(LOCAL, 0, members)
    for wrong in [{"step": 6}, {"generation": 1}, {"num_bytes": 64}, {"state": State.FILLING}]:
        slot.write(replace(good, **{"state": State.COPIED, "hashes": {}, **wrong}))
        with pytest.raises(CheckpointError, match="does not hold"):
            seal_slot(slot, LOCAL, 0, members)
    slot.write(replace(good, state=State.COPIED, hashes={}))
    assert seal_slot(slot, LOCAL, 0, members).state == State.ENCODED


# -- over the wire ---------------------------------------------------------------------------------------------------


def test_members_protect_each_other_over_the_wire(nodes: dict[int, Node]) -> None:
    def serve(rank: int) -> Server:
        def handle(verb: str, fields: dict[str, Any], payload: memoryview) -> tuple[dict[str, Any], memoryview]:
            slot = (nodes[rank].data if fields["role"] == DATA else nodes[rank].parity).slots[0]
            return {}, memoryview(slot.data)[fields["offset"] : fields["offset"] + fields["length"]]

        return Server("127.0.0.1", 0, "ab" * 8, "token", handle).start()

    servers = {rank: serve(rank) for rank in nodes}
    clients = {rank: Client("127.0.0.1", server.port, "ab" * 8, "token") for rank, server in servers.items()}

    def fetch(rank: int, role: str, offset: int, into: memoryview) -> None:
        clients[rank].request("read", {"role": role, "offset": offset, "length": into.nbytes}, into=into)

    members = {rank: node.header for rank, node in nodes.items()}
    for rank, node in nodes.items():
        encode_slot(node.parity.slots[0], STRIPES, rank, members, fetch)
    servers[0].close()  # without a word: its client finds out
    decoder = Decoder(STRIPES, {(0, DATA)}, fetch)
    assert bytes(decoder.read(0, 0, 1003)) == nodes[0].data.slots[0].data[:1003].tobytes()
    for server in servers.values():
        server.close()
