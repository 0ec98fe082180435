"""Codes and stripes: whatever k blocks or members are lost, for every group size, the data comes back bit for bit."""

import itertools
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.checkpoint.memory import codes
from windlass.checkpoint.memory.codes import Code
from windlass.checkpoint.memory.stripes import DATA, PARITY, Stripes
from windlass.dist.errors import CheckpointError, PlanError

SMALL = [(n, k) for n in range(2, 7) for k in range(1, n)]
LENGTHS = (1, 7, 64, 4099)


def encode(code: Code, data: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the parity blocks, as long as the longest data block."""
    parity = [np.empty(max(map(len, data)), np.uint8) for _ in range(code.k)]
    for index, block in enumerate(parity):
        code.encode_one(index, data, block)
    return parity


def blocks_of(num: int, length: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (num, length), dtype=np.uint8))


@pytest.mark.parametrize(("n", "k"), SMALL)
def test_every_erasure_pattern_up_to_k_is_decoded(n: int, k: int) -> None:
    code = Code(n, k)
    for length in LENGTHS:
        data = blocks_of(n - k, length, seed=n * k)
        blocks = [*data, *encode(code, data)]
        for lost in itertools.chain.from_iterable(itertools.combinations(range(n), i) for i in range(k + 1)):
            found = code.decode({i: block for i, block in enumerate(blocks) if i not in lost})
            assert sorted(found) == [i for i in lost if i < n - k]
            assert all(np.array_equal(found[i], data[i]) for i in found), (length, lost)


@pytest.mark.parametrize(("n", "k"), [(8, 2), (16, 2), (16, 3), (32, 2)])
def test_larger_groups_are_decoded_too(n: int, k: int) -> None:
    code, rng = Code(n, k), np.random.default_rng(0)
    data = blocks_of(n - k, 129)
    blocks = [*data, *encode(code, data)]
    for lost in [tuple(range(k)), tuple(range(n - k, n)), *(tuple(rng.permutation(n)[:k]) for _ in range(40))]:
        found = code.decode({i: block for i, block in enumerate(blocks) if i not in lost})
        assert all(np.array_equal(found[i], data[i]) for i in found) and len(found) == sum(i < n - k for i in lost)


@pytest.mark.parametrize(("n", "k"), SMALL)
def test_ranges_of_blocks_decode_alone(n: int, k: int) -> None:
    code = Code(n, k)
    data = blocks_of(n - k, 1000)
    blocks = [*data, *encode(code, data)]
    for low, high in [(0, 1), (3, 500), (999, 1000)]:
        found = code.decode({i: blocks[i][low:high] for i in range(k, n)})
        assert all(np.array_equal(found[i], data[i][low:high]) for i in found) and found


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SMALL), st.data())
def test_shorter_blocks_go_on_with_zeros(shape: tuple[int, int], draw: st.DataObject) -> None:
    n, k = shape
    sizes = draw.draw(st.lists(st.integers(0, 300), min_size=n - k, max_size=n - k))
    lost = draw.draw(st.sets(st.integers(0, n - 1), max_size=k))
    code, length = Code(n, k), max(sizes)
    whole = np.zeros((n - k, length), np.uint8)
    for row, size, block in zip(whole, sizes, blocks_of(n - k, 300), strict=True):
        row[:size] = block[:size]
    cut = [row[:size] for row, size in zip(whole, sizes, strict=True)]
    parity = encode(code, cut)
    assert all(np.array_equal(a, b) for a, b in zip(parity, encode(code, list(whole)), strict=True))
    found = code.decode({i: b for i, b in enumerate([*cut, *parity]) if i not in lost}, length)
    assert all(np.array_equal(found[i], whole[i]) for i in found)


@pytest.mark.parametrize(("n", "k"), [(3, 2), (4, 1), (5, 2)])
def test_blocks_longer_than_a_tile_are_the_sum_of_their_tiles(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    code, data = Code(n, k), blocks_of(n - k, 1000)
    whole = encode(code, data)
    monkeypatch.setattr(codes, "TILE", 96)
    assert all(np.array_equal(a, b) for a, b in zip(encode(code, data), whole, strict=True))
    found = code.decode({i: b for i, b in enumerate([*data, *whole]) if i >= k})
    assert found and all(np.array_equal(found[i], data[i]) for i in found)


def test_one_parity_block_of_xor_is_the_xor() -> None:
    data = blocks_of(3, 77)
    (parity,) = encode(Code(4, 1), data)
    assert np.array_equal(parity, data[0] ^ data[1] ^ data[2])


def test_copies_are_copies() -> None:
    (data,) = blocks_of(1, 77)
    assert all(np.array_equal(copy, data) and copy is not data for copy in encode(Code(3, 2), [data]))


def test_parity_overwrites_what_was_there() -> None:
    data, out = blocks_of(3, 64), np.full(128, 255, np.uint8)
    Code(4, 1).encode_one(0, data, out)
    assert np.array_equal(out[:64], data[0] ^ data[1] ^ data[2]) and not out[64:].any()


def test_too_few_blocks_are_refused_with_how_many_it_takes() -> None:
    with pytest.raises(CheckpointError, match="2 are needed"):
        Code(4, 2).decode({3: np.zeros(8, np.uint8)})


@pytest.mark.parametrize(("n", "k"), [(1, 0), (4, 0), (4, 4), (40, 3)])
def test_codes_that_cannot_be_are_refused(n: int, k: int) -> None:
    with pytest.raises(PlanError, match=str(n)):
        Code(n, k)


def test_reed_solomon_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
    codes._driver.cache_clear()
    codes._heads.cache_clear()
    with pytest.raises(CheckpointError, match=r"pip install 'pyeclib>=1\.7'.*'xor'"):
        encode(Code(5, 2), blocks_of(3, 64))
    assert len(encode(Code(5, 1), blocks_of(4, 64))) == 1  # which needs nothing


def test_the_layer_of_the_snapshot_process_does_not_import_torch() -> None:
    names = "pace membership stripes groups channel wire codes encode decode"
    program = "import sys\n" + "".join(f"import windlass.checkpoint.memory.{name}\n" for name in names.split())
    program += "import numpy\nblock = numpy.zeros(8, 'u1')\n"
    program += "windlass.checkpoint.memory.codes.Code(4, 2).encode_one(0, [block, block], block.copy())\n"
    program += "print(sorted({'torch', 'ray', 'fsspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


# -- stripes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), SMALL)
def test_every_data_block_is_used_once_and_every_member_holds_k_parity_blocks(n: int, k: int) -> None:
    stripes = Stripes(tuple(range(10, 10 + n)), tuple(1000 + i for i in range(n)), k, 64)
    found = [(b.rank, b.role, b.start) for j in range(n) for b in stripes.stripe(j)]
    assert len(found) == len(set(found)) == n * n
    for rank in stripes.ranks:
        size = stripes.block_bytes
        assert sorted(s for r, role, s in found if (r, role) == (rank, DATA)) == [i * size for i in range(n - k)]
        assert sorted(s for r, role, s in found if (r, role) == (rank, PARITY)) == [i * size for i in range(k)]


@pytest.mark.parametrize(("n", "k"), SMALL)
def test_the_blocks_of_a_stripe_are_on_different_members(n: int, k: int) -> None:
    stripes = Stripes(tuple(range(n)), (640,) * n, k, 64)
    assert all(sorted(b.rank for b in stripes.stripe(j)) == list(range(n)) for j in range(n))
    for rank, block in itertools.product(range(n), range(n - k)):
        found = stripes.stripe(stripes.stripe_of_data(rank, block))[block]
        assert (found.rank, found.role, found.start) == (rank, DATA, block * stripes.block_bytes)
    for rank, block in itertools.product(range(n), range(k)):
        found = stripes.stripe(stripes.stripe_of_parity(rank, block))[n - k + block]
        assert (found.rank, found.role, found.start) == (rank, PARITY, block * stripes.block_bytes)


@settings(deadline=None)
@given(st.sampled_from(SMALL), st.data())
def test_blocks_cover_every_byte_of_a_member_and_no_more(shape: tuple[int, int], draw: st.DataObject) -> None:
    n, k = shape
    sizes = tuple(draw.draw(st.lists(st.integers(0, 2000), min_size=n, max_size=n)))
    stripes = Stripes(tuple(range(n)), sizes, k, 64)
    assert stripes.block_bytes % 64 == 0 and stripes.block_bytes * (n - k) >= max(sizes)
    assert stripes.block_bytes * (n - k) < max(sizes) + 64 * (n - k)
    for rank, size in enumerate(sizes):
        mine = sorted(
            (b.start, b.length) for j in range(n) for b in stripes.stripe(j) if (b.rank, b.role) == (rank, DATA)
        )
        assert sum(length for _, length in mine) == size
        assert all(start + length == min(start + stripes.block_bytes, size) for start, length in mine if length)


@pytest.mark.parametrize(("n", "k"), SMALL)
def test_of_any_k_lost_members_each_is_the_ward_of_a_survivor(n: int, k: int) -> None:
    stripes = Stripes(tuple(range(n)), (64,) * n, k, 64)
    for lost in itertools.combinations(range(n), k):
        known = {ward for rank in range(n) if rank not in lost for ward in stripes.wards(rank)}
        assert set(lost) <= known


def test_xor_sources_are_the_data_blocks_of_the_stripe_that_hold_bytes() -> None:
    stripes = Stripes((4, 5, 6), (200, 64, 0), 1, 64)
    assert [(b.rank, b.start, b.length) for b in stripes.xor_sources(5)] == [(4, 128, 72)]
    assert [(b.rank, b.start, b.length) for b in stripes.xor_sources(6)] == [(4, 0, 128)]
    assert [(b.rank, b.start, b.length) for b in stripes.xor_sources(4)] == [(5, 0, 64)]


@pytest.mark.parametrize("k", [0, 3])
def test_stripes_that_cannot_be_are_refused(k: int) -> None:
    with pytest.raises(PlanError, match="1 to 2 parity blocks"):
        Stripes((0, 1, 2), (1, 1, 1), k, 64)
    with pytest.raises(PlanError, match="only one of them can be an XOR"):
        Stripes((0, 1, 2), (1, 1, 1), 2, 64).xor_sources(0)
