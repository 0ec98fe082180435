"""Geometry of saved pieces: the index finds what brute force finds, cheaply, and tilings are told from others."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from windlass.checkpoint.cover import PieceIndex, flat_span, tiling_problem
from windlass.dist.box import Box, boxes_of_range

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


@st.composite
def boxes_in(draw, shape):
    offsets = tuple(draw(st.integers(0, d - 1)) for d in shape)
    return Box(offsets, tuple(draw(st.integers(1, d - o)) for d, o in zip(shape, offsets, strict=True)))


@given(st.data())
def test_the_index_finds_exactly_the_boxes_that_share_an_element(data):
    shape = data.draw(shapes)
    saved = data.draw(st.lists(boxes_in(shape), max_size=8))
    wanted = data.draw(boxes_in(shape))
    found = dict(PieceIndex(shape, saved).meeting(wanted))
    brute = {i: box.intersect(wanted) for i, box in enumerate(saved) if box.intersect(wanted) is not None}
    assert found == brute


@given(st.data())
def test_flat_shards_tile_and_lose_that_with_one_box_missing_or_doubled(data):
    shape = data.draw(shapes)
    numel = math.prod(shape)
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, numel), max_size=4))), numel]
    boxes = [b for low, high in itertools.pairwise(edges) for b in boxes_of_range(shape, low, high)]
    assert tiling_problem(shape, boxes) is None
    assert "elements are held" in str(tiling_problem(shape, boxes[1:]))
    assert "held twice" in str(tiling_problem(shape, [*boxes, boxes[-1]]))


def test_a_box_outside_its_tensor_is_no_tiling():
    assert "outside" in str(tiling_problem((4,), [Box((2,), (4,))]))


def test_flat_span_bounds_a_box_in_row_major_order():
    assert flat_span((4, 5), Box((1, 2), (2, 2))) == (7, 14)
    assert flat_span((), Box((), ())) == (0, 1)


def test_ten_thousand_flat_pieces_are_looked_at_once_each(monkeypatch):
    pieces = [Box((i,), (1,)) for i in range(10_000)]
    index = PieceIndex((10_000,), pieces)
    looked_at = 0
    intersect = Box.intersect

    def counting(self, other):
        nonlocal looked_at
        looked_at += 1
        return intersect(self, other)

    monkeypatch.setattr(Box, "intersect", counting)
    assert all([i for i, _ in index.meeting(box)] == [n] for n, box in enumerate(pieces))
    assert looked_at == 10_000
