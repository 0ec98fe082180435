"""Boxes: every element range of every shape is covered exactly once and in order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.box import Box, ShardSpec, ShardTable, boxes_of_range
from windlass.dist.errors import PlanError

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(ranges())
def test_the_boxes_of_a_range_are_the_range_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    elements = torch.arange(math.prod(shape)).view(shape)
    boxes = boxes_of_range(shape, start, stop)
    found = [i for box in boxes for i in elements[box.slices].reshape(-1).tolist()]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)
    assert all(elements[box.slices].is_contiguous() for box in boxes)


@given(shapes, st.data())
def test_an_intersection_holds_exactly_the_common_elements(shape: tuple[int, ...], data: st.DataObject) -> None:
    def some_box() -> Box:
        offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        return Box(offsets, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))

    elements = torch.arange(math.prod(shape)).view(shape)
    first, second = some_box(), some_box()
    both = set(elements[first.slices].reshape(-1).tolist()) & set(elements[second.slices].reshape(-1).tolist())
    common = first.intersect(second)
    assert (set() if common is None else set(elements[common.slices].reshape(-1).tolist())) == both
    if common is not None:
        assert torch.equal(elements[first.slices][common.within(first).slices], elements[common.slices])


def test_a_scalar_is_one_element_and_the_whole_box_holds_all() -> None:
    assert boxes_of_range((), 0, 1) == [Box((), ())] and Box((), ()).numel == 1
    assert Box.whole((2, 3)) == Box((0, 0), (2, 3)) and Box.whole((2, 3)).numel == 6


def test_a_range_outside_the_tensor_is_refused() -> None:
    with pytest.raises(PlanError, match=r"range \[3, 7\) lies outside a tensor of shape \(2, 3\) with 6 elements"):
        boxes_of_range((2, 3), 3, 7)


@given(st.integers(1, 5), shapes)
def test_flat_shards_make_a_complete_table(num_ranks: int, shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    cuts = [numel * r // num_ranks for r in range(num_ranks + 1)]
    specs = {
        r: [ShardSpec("w", shape, "float32", tuple(boxes_of_range(shape, cuts[r], cuts[r + 1])))]
        for r in range(num_ranks)
    }
    table = ShardTable(specs)
    table.check()
    assert table.names() == ["w"] and sum(spec.numel for _, spec in table.holders("w")) == numel


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (ShardSpec("w", (4,), "float32", (Box((2,), (2,)),)), "3 of 4 elements"),
        (ShardSpec("w", (4,), "float32", (Box((0,), (3,)),)), "ranks 0 and 1 both hold"),
        (ShardSpec("w", (5,), "float32", (Box((1,), (4,)),)), "different global shapes"),
    ],
)
def test_a_table_with_holes_overlaps_or_two_shapes_is_refused(second: ShardSpec, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        ShardTable({0: [ShardSpec("w", (4,), "float32", (Box((0,), (1,)),))], 1: [second]}).check()
