"""Parity made of members' segments and data rebuilt from it, over real slots, for every pattern of lost members."""

import itertools
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.checkpoint.memory import encode
from windlass.checkpoint.memory.decode import Decoder
from windlass.checkpoint.memory.encode import checked, encode_parity, encode_slot, parity_header, piece_bytes, seal_slot
from windlass.checkpoint.memory.header import OWN_PARITY, SlotHeader, State
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.memory.segment import Segment, Slot, hash_chunks, num_chunks
from windlass.checkpoint.memory.stripes import DATA, PARITY, Stripes
from windlass.checkpoint.memory.wire import Client, Server
from windlass.dist.errors import CheckpointError

CHUNK = 64
SMALL = [(n, k) for n in range(2, 7) for k in range(1, n)]
SIZES = (1003, 0, 640, 777, 1, 64)


class Group:
    """The data and parity of a group in memory, read as by its peers."""

    def __init__(self, sizes: tuple[int, ...], k: int, chunk_bytes: int = CHUNK) -> None:
        self.stripes = Stripes(tuple(range(3, 3 + len(sizes))), sizes, k, chunk_bytes)
        rng = np.random.default_rng(sum(sizes))
        self.held: dict[tuple[int, str], np.ndarray] = {
            (rank, DATA): rng.integers(0, 256, size, dtype=np.uint8)
            for rank, size in zip(self.stripes.ranks, sizes, strict=True)
        }
        self.read: Counter[int] = Counter()
        self.fail: set[tuple[int, str]] = set()
        self.calls: list[tuple[int, str, int, int]] = []
        self._lock = threading.Lock()
        for rank in self.stripes.ranks:
            parity = np.full(self.stripes.parity_bytes, 255, np.uint8)
            self.tables = {key: hash_chunks(b, len(b), chunk_bytes) for key, b in self.held.items() if key[1] == DATA}
            table = encode_parity(self.stripes, rank, checked(self.fetch, self.tables, chunk_bytes), parity)
            assert np.array_equal(table, hash_chunks(parity, len(parity), chunk_bytes))
            self.held[rank, PARITY] = parity
        self.tables = {key: hash_chunks(block, len(block), chunk_bytes) for key, block in self.held.items()}
        self.read.clear()
        self.calls.clear()

    def fetch(self, rank: int, role: str, offset: int, into: memoryview) -> None:
        with self._lock:
            self.read[rank] += into.nbytes
            self.calls.append((rank, role, offset, into.nbytes))
        if (rank, role) in self.fail:
            raise CheckpointError(f"node of rank {rank} is gone")
        block = self.held[rank, role][offset : offset + into.nbytes]
        assert len(block) == into.nbytes > 0
        into[:] = memoryview(block)

    def decoder(self, missing: Collection[tuple[int, str]]) -> Decoder:
        return Decoder(self.stripes, missing, checked(self.fetch, self.tables, self.stripes.chunk_bytes))

    def rebuilds(self, rank: int, missing: Collection[tuple[int, str]]) -> bool:
        size = len(self.held[rank, DATA])
        return bytes(self.decoder(missing).read(rank, 0, size)) == self.held[rank, DATA].tobytes()


def lost_members(ranks: Collection[int]) -> set[tuple[int, str]]:
    return {(rank, role) for rank in ranks for role in (DATA, PARITY)}


# -- every pattern ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), SMALL)
def test_every_pattern_of_up_to_k_lost_members_is_rebuilt(n: int, k: int) -> None:
    for sizes in (SIZES[:n], (513,) * n, (0,) * n):
        group = Group(sizes, k)
        for count in range(1, k + 1):
            for lost in itertools.combinations(group.stripes.ranks, count):
                assert all(group.rebuilds(rank, lost_members(lost)) for rank in lost), (sizes, lost)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2), (5, 2), (5, 3)])
def test_data_and_parity_segments_may_be_lost_on_different_members(n: int, k: int) -> None:
    group = Group(SIZES[:n], k)
    segments = [(rank, role) for rank in group.stripes.ranks for role in (DATA, PARITY)]
    for lost in itertools.combinations(segments, k):
        assert all(group.rebuilds(rank, lost) for rank, role in lost if role == DATA), lost


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2), (6, 3), (3, 2)])
def test_one_more_lost_member_is_an_error_that_names_what_is_missing(n: int, k: int) -> None:
    group = Group((640,) * n, k)
    lost = group.stripes.ranks[: k + 1]
    with pytest.raises(CheckpointError, match=rf"rank {lost[0]}: block \d .*rank {lost[1]}: missing"):
        group.decoder(lost_members(lost)).read(lost[0], 0, 640)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SMALL), st.data())
def test_any_range_is_rebuilt_by_itself(shape: tuple[int, int], draw: st.DataObject) -> None:
    n, k = shape
    sizes = tuple(draw.draw(st.lists(st.integers(0, 900), min_size=n, max_size=n)))
    group = Group(sizes, k)
    rank = draw.draw(st.sampled_from(group.stripes.ranks))
    size = len(group.held[rank, DATA])
    start = draw.draw(st.integers(0, size))
    stop = draw.draw(st.integers(start, size))
    others = draw.draw(st.sets(st.sampled_from(group.stripes.ranks), max_size=k - 1))
    into = bytearray(stop - start)
    checked_fetch = checked(group.fetch, group.tables, CHUNK)
    decoder = Decoder(group.stripes, lost_members({rank, *others}), checked_fetch)
    found = decoder.read(rank, start, stop, memoryview(into))
    assert bytes(found) == bytes(into) == group.held[rank, DATA][start:stop].tobytes()


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 641)])
def test_a_range_outside_the_data_is_refused(start: int, stop: int) -> None:
    with pytest.raises(CheckpointError, match="640 bytes of data"):
        Group((640, 640), 1).decoder(()).read(3, start, stop)


# -- how it is read --------------------------------------------------------------------------------------------------


def test_whole_chunks_are_read_so_that_hashes_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_BYTES", 2 * CHUNK)
    group = Group((1003, 900, 700, 1003), 2)
    group.decoder(lost_members((3,))).read(3, 100, 1003)
    assert len(group.calls) > 8
    for rank, role, offset, length in group.calls:
        end = offset + length
        assert offset % CHUNK == 0 and (end % CHUNK == 0 or end == len(group.held[rank, role])) and length <= 2 * CHUNK


@pytest.mark.parametrize(("n", "k"), [(4, 1), (6, 2), (6, 3), (4, 3)])
def test_the_work_of_rebuilding_is_spread_over_the_survivors(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_BYTES", 4 * CHUNK)
    group = Group((60 * 12 * CHUNK,) * n, k)
    decoder = group.decoder(lost_members((3,)))
    decoder.read(3, 0, 60 * 12 * CHUNK)
    assert set(group.read) == set(group.stripes.ranks) - {3} and group.read == decoder.loads
    assert max(group.read.values()) <= 1.1 * min(group.read.values())
    if k == 1:  # each survivor contributes its share once: the bytes of the lost member from each
        assert sum(group.read.values()) == (n - 1) * 60 * 12 * CHUNK


def test_a_holder_that_fails_is_replaced_and_not_asked_first_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_BYTES", 4 * CHUNK)
    group = Group((100 * CHUNK,) * 6, 3)
    group.fail = lost_members((5,))
    assert group.rebuilds(3, lost_members((3,)))
    assert group.read[5] < 0.2 * max(group.read.values())


def test_too_many_failing_holders_are_all_named_with_their_reasons() -> None:
    group = Group((640,) * 4, 2)
    group.fail = lost_members((4, 5))
    with pytest.raises(CheckpointError, match=r"rank 4: node of rank 4 is gone.*rank 5: node of rank 5 is gone"):
        group.decoder(lost_members((3,))).read(3, 0, 640)


@pytest.mark.parametrize(("role", "chunk"), [(DATA, 4), (PARITY, 1)])
def test_a_damaged_chunk_is_an_erasure(role: str, chunk: int) -> None:
    group = Group((768,) * 5, 2)
    group.held[4, role][chunk * CHUNK + 5] ^= 1
    assert group.rebuilds(3, lost_members((3,)))
    weak = Group((768,) * 5, 1)
    weak.held[4, role][chunk * CHUNK + 5] ^= 1
    with pytest.raises(CheckpointError, match=rf"{role} of rank 4: .*chunk {chunk} is damaged"):
        weak.decoder(lost_members((3,))).read(3, 0, 768)


def test_a_damaged_chunk_of_a_member_that_is_there_is_rebuilt_from_one_chunk_of_the_others() -> None:
    group = Group((768,) * 5, 1)
    found = group.decoder(()).read(4, 2 * CHUNK, 3 * CHUNK)
    assert bytes(found) == group.held[4, DATA][2 * CHUNK : 3 * CHUNK].tobytes()
    assert len(group.calls) == 4 and group.read.total() == 4 * CHUNK


def test_members_without_bytes_in_a_range_are_not_asked() -> None:
    group = Group((640, 0, 64, 640), 1)
    assert group.rebuilds(3, lost_members((3,)))
    assert (4, DATA) not in {(rank, role) for rank, role, _, _ in group.calls}
    assert group.rebuilds(3, {(3, DATA), (3, PARITY), (4, DATA)})  # nothing is lost with it


def test_pieces_are_whole_chunks_and_scratch_is_bounded() -> None:
    for n, chunk in itertools.product((2, 8, 32), (64, 1 << 20, 3 << 20)):
        stripes = Stripes(tuple(range(n)), (1 << 30,) * n, 1, chunk)
        piece = piece_bytes(stripes)
        assert piece % chunk == 0
        assert piece == chunk or (piece <= encode.PIECE_BYTES and 2 * stripes.num_data * piece <= encode.SCRATCH_BYTES)


# -- encoding --------------------------------------------------------------------------------------------------------


def test_encoding_pulls_every_byte_once_at_the_given_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_BYTES", 2 * CHUNK)
    group = Group((640, 500, 640), 1)
    slept: list[float] = []
    pace = Pace(1e6, clock=lambda: 0.0, sleep=slept.append)
    out = np.zeros(group.stripes.parity_bytes, np.uint8)
    encode_parity(group.stripes, 4, group.fetch, out, pace=pace)
    wanted = {(b.rank, b.start): b.length for b in group.stripes.xor_sources(4)}
    assert sum(length for *_, length in group.calls) == sum(wanted.values())
    assert max(slept) == pytest.approx(sum(wanted.values()) / 1e6, abs=1e-6)
    assert len({(rank, offset) for rank, _, offset, _ in group.calls}) == len(group.calls) > 2


def test_a_member_that_fails_ends_encoding_with_its_reason() -> None:
    group = Group((6400,) * 4, 1)
    group.fail = {(5, DATA)}
    with pytest.raises(CheckpointError, match="node of rank 5 is gone"):
        encode_parity(group.stripes, 3, group.fetch, np.zeros(group.stripes.parity_bytes, np.uint8))
    assert not [t for t in threading.enumerate() if t.name.startswith("snapshot-pull")]


def test_a_fetch_is_not_trusted_beyond_its_table() -> None:
    group = Group((640, 640), 1)
    fetch = checked(group.fetch, {(3, DATA): group.tables[3, DATA][:5]}, CHUNK)
    fetch(3, DATA, 4 * CHUNK, memoryview(bytearray(CHUNK)))
    for rank, offset in [(3, 5 * CHUNK), (3, 32), (4, 0)]:
        with pytest.raises(CheckpointError, match="nothing vouches"):
            fetch(rank, DATA, offset, memoryview(bytearray(CHUNK)))


# -- slots -----------------------------------------------------------------------------------------------------------


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
        assert header.sizes == dict(zip(STRIPES.ranks, STRIPES.sizes, strict=True))
        assert header.layouts == {r: f"layout-{r}" for r in STRIPES.ranks}
        assert set(header.hashes) == {OWN_PARITY, *STRIPES.ranks} and len(header.hashes[0]) == 16
    for lost in itertools.combinations(STRIPES.ranks, 2):
        known = {r: f for rank, h in headers.items() if rank not in lost for r, f in h.facts["members"].items()}
        assert all(known[str(rank)] == {"step": 7, "rng": f"of rank {rank}"} for rank in lost)


def test_lost_members_are_rebuilt_from_slots_and_match_the_hashes_the_survivors_keep(nodes: dict[int, Node]) -> None:
    headers = {rank: encoded(nodes, rank) for rank in STRIPES.ranks}
    for lost in itertools.combinations(STRIPES.ranks, 2):
        tables = {(r, PARITY): h.hashes[OWN_PARITY] for r, h in headers.items() if r not in lost}
        tables |= {(r, DATA): nodes[r].header.hashes[r] for r in STRIPES.ranks if r not in lost}
        decoder = Decoder(STRIPES, lost_members(lost), checked(fetch_of(nodes), tables, CHUNK))
        survivor = next(headers[r] for r in STRIPES.ranks if r not in lost)
        for rank in lost:
            size = survivor.sizes[rank]
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
    decoder = Decoder(STRIPES, {(0, DATA)}, checked(fetch, tables_of(nodes), CHUNK))
    assert bytes(decoder.read(0, 0, 1003)) == nodes[0].data.slots[0].data[:1003].tobytes()
    for server in servers.values():
        server.close()


def tables_of(nodes: Mapping[int, Node]) -> dict[tuple[int, str], np.ndarray]:
    tables = {(rank, DATA): node.header.hashes[rank] for rank, node in nodes.items()}
    for rank, node in nodes.items():
        header = node.parity.slots[0].header()
        assert header is not None
        tables[rank, PARITY] = header.hashes[OWN_PARITY]
    return tables
