"""Parity made of members' segments and data rebuilt from it, over real slots, for every pattern of lost members."""

import itertools
import threading
from collections import Counter
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.checkpoint.memory import encode
from windlass.checkpoint.memory.decode import Decoder
from windlass.checkpoint.memory.encode import Fetch, checked_in_order, encode_parity, piece_bytes
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.memory.segment import hash_chunks
from windlass.checkpoint.memory.stripes import DATA, PARITY, Stripes
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
            table = encode_parity(self.stripes, rank, self.pulled(), parity)
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

    def pulled(self) -> Fetch:
        """Return what parity is made with."""
        tables = {rank: self.tables[rank, DATA] for rank in self.stripes.ranks}
        sizes = dict(zip(self.stripes.ranks, self.stripes.sizes, strict=True))
        return checked_in_order(self.fetch, tables, sizes, self.stripes.chunk_bytes)

    def sound(self, rank: int, role: str, offset: int, into: memoryview) -> None:
        """Read whole chunks and compare them with their hashes, as what is given to a decoder has to."""
        self.fetch(rank, role, offset, into)
        first, partial = divmod(offset, self.stripes.chunk_bytes)
        found = hash_chunks(np.frombuffer(into, np.uint8), into.nbytes, self.stripes.chunk_bytes)
        wrong = np.flatnonzero(found != self.tables[rank, role][first : first + len(found)])
        assert partial == 0
        if len(wrong):
            raise CheckpointError(f"chunk {first + int(wrong[0])} is damaged")

    def decoder(self, missing: Collection[tuple[int, str]]) -> Decoder:
        return Decoder(self.stripes, missing, self.sound)

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
    found = group.decoder(lost_members({rank, *others})).read(rank, start, stop, memoryview(into))
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


def test_scratch_is_bounded_whatever_the_chunks_are() -> None:
    for n, chunk in itertools.product((2, 8, 32), (64, 1 << 20, 3 << 20, 32 << 20)):
        stripes = Stripes(tuple(range(n)), (1 << 30,) * n, 1, chunk)
        piece = piece_bytes(stripes)
        assert 0 < piece <= encode.PIECE_BYTES and 2 * stripes.num_data * piece <= encode.SCRATCH_BYTES
        assert piece % chunk == 0 or piece < chunk


@pytest.mark.parametrize("k", [1, 2])
def test_parity_pulled_in_parts_of_chunks_is_the_same_and_damage_is_found(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 640
    group = Group((5000, 640, 3001, 0), k, chunk)
    stripes = group.stripes
    monkeypatch.setattr(encode, "PIECE_BYTES", 150)
    assert piece_bytes(stripes) == 128
    for rank in stripes.ranks:
        out = np.zeros(stripes.parity_bytes, np.uint8)
        own = encode_parity(stripes, rank, group.pulled(), out)
        assert np.array_equal(out, group.held[rank, PARITY]) and np.array_equal(own, group.tables[rank, PARITY])
    assert max(length for *_, length in group.calls) == 128
    assert group.rebuilds(3, lost_members({3})), "whole chunks are read to rebuild, so that each can be verified"
    group.held[3, DATA][1] ^= 1
    with pytest.raises(CheckpointError, match="rank 3, data: chunk 0 is damaged"):
        for rank in stripes.ranks:
            encode_parity(stripes, rank, group.pulled(), out)


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
