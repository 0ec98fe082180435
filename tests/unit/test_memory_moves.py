"""Which bytes of live state go where: shares of replicas, layouts, moves, and parity that no network made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.snapshot_state import HeldState, capturer, contents, mixed_tensors, same, slots
from windlass.checkpoint.memory.moves import Move, Part, cut, data_moves, gaps, in_runs, layout_of, stretches
from windlass.checkpoint.memory.segment import State
from windlass.checkpoint.memory.stripes import Stripes
from windlass.dist.box import Box
from windlass.dist.errors import PlanError
from windlass.dist.state import Piece

SHAPES = st.lists(
    st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.int8])),
    min_size=1,
    max_size=6,
)


def elements(pieces: Sequence[Piece], part: Part) -> torch.Tensor:
    return pieces[part.piece].tensor.reshape(-1)[part.first : part.first + part.box.numel]


@settings(max_examples=40)
@given(SHAPES, st.integers(1, 5))
def test_shares_hold_every_element_once_and_are_equal_up_to_a_granule(shapes, n):
    tensors = {
        f"k{i}": torch.arange(math.prod(shape), dtype=torch.float32).to(dtype).view(shape)
        for i, (shape, dtype) in enumerate(shapes)
    }
    pieces = HeldState(tensors).held()
    shares = [cut(pieces, n, i) for i in range(n)]
    for index, piece in enumerate(pieces):
        count = torch.zeros(piece.global_shape, dtype=torch.int64)
        for part in (part for parts in shares for part in parts if part.piece == index):
            assert torch.equal(elements(pieces, part).view(part.box.sizes), piece.tensor[part.box.slices])
            count[part.box.slices] += 1
        assert torch.equal(count, torch.ones_like(count))
    assert {part.piece for parts in shares for part in parts} == set(range(len(pieces)))
    total = sum(-(-p.nbytes // 64) * 64 for p in pieces)
    held = [sum(part.box.numel * pieces[part.piece].dtype.itemsize for part in parts) for parts in shares]
    assert max(held) <= total / n + 64


def test_shares_of_shards_are_boxes_of_the_whole_tensor():
    shard = torch.arange(24.0).view(4, 6)  # rows 2 to 5 of a matrix of 8
    pieces = [Piece("model.w", (8, 6), Box((2, 0), (4, 6)), shard)]
    assert [[part.box for part in cut(pieces, 2, i)] for i in range(2)] == [
        [Box((2, 0), (2, 6)), Box((4, 0), (1, 4))],  # 64 of 96 bytes: granules are not cut
        [Box((4, 4), (1, 2)), Box((5, 0), (1, 6))],
    ]


@settings(max_examples=40)
@given(SHAPES, st.integers(1, 4), st.sampled_from([64, 100, 1 << 20]))
def test_layouts_are_sound_and_stretches_carry_every_byte_to_its_place(shapes, n, most):
    buffer = torch.arange(4096, dtype=torch.float32)
    tensors, at = {}, 0
    for i, (shape, dtype) in enumerate(shapes):  # some share a buffer, as parameters of a unit do
        count = math.prod(shape)
        shared = dtype == torch.float32
        tensors[f"k{i}"] = (buffer[at : at + count] if shared else torch.ones(count).to(dtype)).view(shape)
        at += count
    pieces = HeldState(tensors).held()
    for i in range(n):
        parts = cut(pieces, n, i)
        layout = layout_of(pieces, parts)
        layout.check()
        moves = data_moves(pieces, parts, layout)
        data = np.full(layout.num_bytes, 0xAA, np.uint8)
        for low, high in gaps(moves, layout.num_bytes):
            data[low:high] = 0
        for stretch in stretches(pieces, moves, most):
            assert stretch.source.numel() <= most
            data[stretch.at : stretch.at + stretch.source.numel()] = stretch.source.numpy()
        expected = {}
        for part in parts:
            expected.setdefault(pieces[part.piece].key, []).append(elements(pieces, part))
        assert same(contents(layout, data), {k: torch.cat(v) for k, v in expected.items()})


def test_neighbours_in_memory_and_in_the_slot_are_copied_as_one():
    buffer = torch.arange(4096, dtype=torch.float32)
    pieces = HeldState({f"k{i}": buffer[i * 64 : (i + 1) * 64] for i in range(64)}).held()
    parts = cut(pieces, 1, 0)
    moves = data_moves(pieces, parts, layout_of(pieces, parts))
    assert len(moves) == 64 and len(stretches(pieces, moves, 1 << 20)) == 1


def test_runs_of_parity_are_made_of_all_members_one_after_the_other():
    moves = [Move(m, 0, 3 << 20, 0, parity=True) for m in (0, 1)]
    runs = in_runs(moves)
    assert [(r.piece, r.at >> 20) for r in runs] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert all(r.low == r.at and r.high - r.low == 1 << 20 for r in runs)


# -- parity of replicas ------------------------------------------------------------------------------------------------


GROUPS = [(2, (0, 1)), (3, (0, 1, 2)), (4, (0, 1, 2, 3)), (5, (1, 2, 4))]  # replicas, and those that share parity


@pytest.mark.parametrize(("num_replicas", "group"), GROUPS)
@pytest.mark.parametrize("movable", [False, True])
def test_any_lost_member_is_rebuilt_from_parity_that_no_network_made(tmp_path, num_replicas, group, movable):
    data, parity, sizes = {}, {}, ()
    for rank in group:
        source = HeldState(mixed_tensors(), replicas=range(num_replicas), movable=movable)
        taker = capturer(tmp_path, source, rank, parity=group)
        for step in (1, 2, 3):  # slots are used again, in turns
            for tensor in source.tensors.values():
                tensor.add_(1)
            assert taker.snapshot(step, {})
            taker.gate()
            found = [slots(taker.folder, role)[(step - 1) % 2] for role in ("data", "parity")]
            headers = [slot.header() for slot in found]
            assert [h and (h.step, h.state, h.role) for h in headers] == [
                (step, State.COPIED, "data"),
                (step, State.COPIED, "parity"),
            ]
            data[rank], parity[rank] = (slot.data.copy() for slot in found)
            assert all(slot.free() for slot in found)
        sizes = (*sizes, taker.layout.num_bytes)
        taker.close()
    stripes = Stripes(group, sizes, 1, 4096)
    for lost in group:
        for block in range(len(group) - 1):
            mixed = np.zeros(stripes.block_bytes, np.uint8)
            for b in stripes.stripe(stripes.stripe_of_data(lost, block)):
                if (b.rank, b.role) != (lost, "data"):
                    part = (parity if b.role == "parity" else data)[b.rank][b.start : b.start + b.length]
                    mixed[: len(part)] ^= part
            wanted = data[lost][block * stripes.block_bytes :][: stripes.block_bytes]
            assert np.array_equal(mixed[: len(wanted)], wanted) and not mixed[len(wanted) :].any()


def test_memory_of_replicas_is_divided_among_them(tmp_path):
    source = HeldState({"model.w": torch.zeros(3 << 20)}, replicas=range(4))  # S = 12 MiB
    taker = capturer(tmp_path, source, 2, parity=True)
    files = taker.folder.segments()
    assert {file.role: file.slot_bytes for file in files} == {"data": 3 << 20, "parity": 1 << 20}  # S/n, S/(n(n-1))
    assert sum(file.path.stat().st_size for file in files) <= 2 * (4 << 20) + (3 << 20)
    taker.close()


@pytest.mark.parametrize("group", [(0, 2), (1,)])
def test_a_group_that_does_not_hold_the_same_state_is_refused(tmp_path, group):
    with pytest.raises(PlanError, match="cannot make parity of the state of its replicas"):
        capturer(tmp_path, HeldState(mixed_tensors(), replicas=(0, 1)), parity=group)
