"""Placement of workers in a Ray cluster, without Ray."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.errors import PlanError
from windlass.launch.ray.placement import check_fits, plan_placement, seat_workers, slots_of_node


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=24))
def test_ranks_of_a_node_are_contiguous_and_every_worker_has_one_seat(nodes: list[str]) -> None:
    seats = seat_workers(nodes)
    assert [seat.rank for seat in seats] == list(range(len(nodes)))
    assert sorted(seat.worker for seat in seats) == list(range(len(nodes)))
    where = [nodes[seat.worker] for seat in seats]
    assert sum(a != b for a, b in pairwise(where)) == len(set(nodes)) - 1
    count = Counter(nodes)
    for seat in seats:
        assert 0 <= seat.local_rank < seat.local_world_size == count[nodes[seat.worker]]
        assert seats[seat.rank - seat.local_rank].local_rank == 0
    assert [seat.node_rank for seat in seats] == sorted(seat.node_rank for seat in seats)


@given(st.integers(1, 16), st.integers(0, 16), st.booleans(), st.booleans())
def test_bundles_hold_exactly_the_workers_assigned_to_them(workers: int, nodes: int, spread: bool, gpu: bool) -> None:
    if nodes and (workers % nodes or (spread and nodes == 1)):
        with pytest.raises(PlanError, match="--nodes"):
            plan_placement(workers, num_nodes=nodes, spread=spread, gpu=gpu)
        return
    placement = plan_placement(workers, num_nodes=nodes, spread=spread, gpu=gpu)
    held = Counter(placement.bundle_of_worker)
    assert sum(held.values()) == workers
    for index, bundle in enumerate(placement.bundles):
        assert bundle == dict.fromkeys(("CPU", "GPU") if gpu else ("CPU",), held[index])


@pytest.mark.parametrize(
    ("nodes", "spread", "strategy"),
    [(0, False, "PACK"), (0, True, "SPREAD"), (1, False, "STRICT_PACK"), (2, False, "STRICT_SPREAD")],
)
def test_the_strategy_follows_nodes_and_spread(nodes: int, spread: bool, strategy: str) -> None:
    assert plan_placement(4, num_nodes=nodes, spread=spread, gpu=False).strategy == strategy


@pytest.mark.parametrize(
    ("num_nodes", "spread", "slots"), [(0, False, 8), (0, True, 2), (2, False, 3), (6, False, 1), (1, False, 6)]
)
def test_a_node_takes_as_many_workers_as_nodes_and_spread_ask_for(num_nodes: int, spread: bool, slots: int) -> None:
    rooms = [8, 0, 8, 8, 8]
    assert slots_of_node(8, 6, num_nodes=num_nodes, spread=spread, rooms=rooms) == slots
    assert slots_of_node(0, 6, num_nodes=num_nodes, spread=spread, rooms=rooms) == 0


def test_a_cluster_that_is_too_small_is_refused_with_what_it_has_and_what_is_needed() -> None:
    two_on_each_of_two = plan_placement(4, num_nodes=2, spread=True, gpu=False)
    check_fits(two_on_each_of_two, {"a": {"CPU": 2}, "b": {"CPU": 3}})
    with pytest.raises(PlanError, match=r"2 x \(CPU=2\) each on its own node needed, room for 1 \(a: CPU=8\)"):
        check_fits(two_on_each_of_two, {"a": {"CPU": 8}})
    with pytest.raises(PlanError, match=r"4 x \(CPU=1 GPU=1\) on any node needed, room for 2"):
        check_fits(plan_placement(4, num_nodes=0, spread=False, gpu=True), {"a": {"CPU": 8, "GPU": 2}, "b": {"CPU": 8}})
