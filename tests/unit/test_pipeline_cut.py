"""The stage cut: never slower than the best of all cuts, within memory, and clear about what cannot be."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.cut import Blocks, Room, cut_blocks, ranges, rank_bytes


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    for bars in itertools.combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *bars, total)))


def stage_seconds(blocks: Blocks, rooms: Sequence[Room], counts: Sequence[int]) -> tuple[float, ...]:
    """Return what each stage of a cut takes for one micro-batch, forward and backward."""
    return tuple(
        (math.fsum(blocks.seconds[first:last]) + room.fixed_s) / room.speed
        for room, (first, last) in zip(rooms, ranges(counts), strict=True)
    )


def rank_seconds(blocks: Blocks, rooms: Sequence[Room], counts: Sequence[int]) -> float:
    seconds = stage_seconds(blocks, rooms, counts)
    return max(
        math.fsum(s for s, room in zip(seconds, rooms, strict=True) if room.rank == rank)
        for rank in {room.rank for room in rooms}
    )


def optimum(blocks: Blocks, rooms: Sequence[Room], limit: float) -> float:
    cuts = compositions(len(blocks.seconds), len(rooms))
    fitting = [c for c in cuts if max(rank_bytes(blocks, rooms, c).values()) <= limit]
    return min((rank_seconds(blocks, rooms, c) for c in fitting), default=math.inf)


speeds = st.sampled_from([0.5, 1.0, 1.5])
fixed = st.tuples(st.integers(0, 6), st.integers(0, 6))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Blocks, list[Room], float]:
    """Blocks that differ, one stage per rank."""
    num_stages = draw(st.integers(1, 4))
    num_blocks = draw(st.integers(num_stages, 8))
    costs = [tuple(draw(st.lists(st.integers(1, 9), min_size=num_blocks, max_size=num_blocks))) for _ in range(3)]
    ends = [draw(fixed) if s in (0, num_stages - 1) else (0, 0) for s in range(num_stages)]
    rooms = [Room(s, draw(speeds), *ends[s], in_flight=num_stages - s) for s in range(num_stages)]
    return Blocks(*costs), rooms, draw(st.sampled_from([math.inf, 100, 40]))


@st.composite
def alike_problems(draw: st.DrawFn) -> tuple[Blocks, list[Room], float]:
    """Equal blocks, any placement of stages on ranks."""
    placement = draw(st.sampled_from([(0,), (0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 1, 2), (0, 1, 2, 2, 1, 0)]))
    num_blocks = draw(st.integers(len(placement), 9))
    speed = [draw(speeds) for _ in placement]
    kept = [draw(st.integers(1, 3)) for _ in placement]
    ends = [draw(fixed) if s in (0, len(placement) - 1) else (0, 0) for s in range(len(placement))]
    rooms = [Room(r, speed[r], *ends[s], in_flight=kept[r]) for s, r in enumerate(placement)]
    blocks = Blocks((draw(st.integers(1, 4)),) * num_blocks, (3,) * num_blocks, (2,) * num_blocks)
    return blocks, rooms, draw(st.sampled_from([math.inf, 60, 25]))


@given(problems() | alike_problems())
def test_no_other_cut_is_quicker(problem: tuple[Blocks, list[Room], float]) -> None:
    blocks, rooms, limit = problem
    best = optimum(blocks, rooms, limit)
    if math.isinf(best):
        with pytest.raises(PlanError, match="no cut of"):
            cut_blocks(blocks, rooms, limit)
        return
    counts = cut_blocks(blocks, rooms, limit)
    assert sum(counts) == len(blocks.seconds) and min(counts) >= 1
    assert max(rank_bytes(blocks, rooms, counts).values()) <= limit
    assert rank_seconds(blocks, rooms, counts) == pytest.approx(best, rel=1e-12)


@given(problems(), st.integers(2, 3))
def test_of_blocks_that_differ_on_several_stages_per_rank_the_slowest_stage_is_the_quickest_possible(
    problem: tuple[Blocks, list[Room], float], ranks: int
) -> None:
    blocks, rooms, _ = problem
    shared = [Room(room.rank % ranks, 1.0, room.fixed_s) for room in rooms]
    counts = cut_blocks(blocks, shared)
    cuts = compositions(len(blocks.seconds), len(shared))
    assert max(stage_seconds(blocks, shared, counts)) == min(max(stage_seconds(blocks, shared, c)) for c in cuts)


def test_a_v_of_four_stages_gives_both_ranks_the_same() -> None:
    blocks = Blocks((1.0,) * 6, (0,) * 6, (0,) * 6)
    counts = cut_blocks(blocks, [Room(rank) for rank in (0, 1, 1, 0)])
    assert counts[0] + counts[3] == counts[1] + counts[2] == 3 and max(counts) == 2


def test_a_heavy_head_takes_blocks_from_the_last_stage_and_memory_takes_them_from_the_first() -> None:
    blocks = Blocks((1.0,) * 12, (10,) * 12, (1,) * 12)
    head = [Room(0), Room(1), Room(2, fixed_s=3.0)]
    assert cut_blocks(blocks, head) == (5, 5, 2)
    early = [Room(0, in_flight=20), Room(1), Room(2)]
    assert cut_blocks(blocks, early, 80) == (2, 5, 5)


def test_a_slow_rank_gets_fewer_blocks() -> None:
    blocks = Blocks((1.0,) * 12, (0,) * 12, (0,) * 12)
    assert cut_blocks(blocks, [Room(0, 1.0), Room(1, 0.5)]) == (8, 4)


def test_stages_are_contiguous_ranges_of_blocks() -> None:
    assert ranges((2, 1, 3)) == ((0, 2), (2, 3), (3, 6))


def test_more_stages_than_blocks_and_too_little_memory_say_what_there_is() -> None:
    blocks = Blocks((1.0,) * 3, (10**9,) * 3, (0,) * 3)
    with pytest.raises(PlanError, match=r"4 stages for 3 blocks.*at most 3"):
        cut_blocks(blocks, [Room(rank) for rank in range(4)])
    with pytest.raises(PlanError, match=r"within 1\.5 GB: the quickest puts 2 GB on pipeline rank"):
        cut_blocks(blocks, [Room(0), Room(1)], 1.5e9)


def test_a_hundred_blocks_that_differ_are_cut_at_once() -> None:
    blocks = Blocks(tuple(1.0 + i % 7 for i in range(128)), (1,) * 128, (1,) * 128)
    began = time.process_time()  # whoever else is busy here is not counted
    counts = cut_blocks(blocks, [Room(rank) for rank in range(16)])
    assert sum(counts) == 128 and time.process_time() - began < 2
