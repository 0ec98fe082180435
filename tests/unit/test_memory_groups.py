"""Groups over failure domains, the membership document, and the pace of a link."""

import dataclasses
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.checkpoint.memory.groups import cross_units, memory_factor, num_parity, plan_groups, weaknesses
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.pace import Pace
from windlass.dist.errors import CheckpointError, PlanError

SCHEMES = ("replica", "xor", "reed_solomon")


def nodes_of(*ranks_per_node: int) -> list[str]:
    return [f"node-{i}" for i, count in enumerate(ranks_per_node) for _ in range(count)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=24), st.data())
def test_groups_hold_every_rank_once_balanced_and_apart(seats: list[tuple[int, int]], draw: st.DataObject) -> None:
    nodes = [f"node-{domain}-{node}" for domain, node in seats]
    domains = {f"node-{domain}-{node}": f"rack-{domain}" for domain, node in seats}
    scheme = draw.draw(st.sampled_from(SCHEMES))
    k = 1 if scheme == "xor" else draw.draw(st.integers(1, 3))
    groups = plan_groups(nodes, domains, scheme, draw.draw(st.integers(0, 9)), k, degraded=True)
    assert sorted(rank for group in groups for rank in group) == list(range(len(nodes)))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    units = domains if len(set(domains.values())) > 1 else {node: node for node in nodes}
    assert all(len({units[nodes[rank]] for rank in group}) == len(group) for group in groups)


def test_ranks_of_a_node_fall_into_different_groups() -> None:
    assert plan_groups(nodes_of(2, 2, 2, 2), {}, "xor") == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_many_nodes_make_groups_of_at_most_eight() -> None:
    assert [len(g) for g in plan_groups(nodes_of(*[1] * 20), {}, "xor")] == [7, 7, 6]
    assert {len(g) for g in plan_groups(nodes_of(*[1] * 32), {}, "reed_solomon", 0, 2)} == {8}
    assert {len(g) for g in plan_groups(nodes_of(*[1] * 32), {}, "xor", 16)} == {16}
    assert {len(g) for g in plan_groups(nodes_of(*[1] * 12), {}, "replica", 0, 2)} == {3}


def test_members_of_a_rack_are_not_in_one_group() -> None:
    nodes, domains = nodes_of(1, 1, 1, 1), {f"node-{i}": f"rack-{i // 2}" for i in range(4)}
    groups = plan_groups(nodes, domains, "xor")
    assert groups == ((0, 2), (1, 3)) and weaknesses(groups, nodes, domains, "xor", 1) == []


def test_groups_do_not_cross_sets_of_replicas() -> None:
    groups = plan_groups(nodes_of(2, 2, 2, 2), {}, "xor", within=[(0, 3, 4, 7), (1, 2, 5, 6)])
    assert groups == ((0, 3, 4, 7), (1, 2, 5, 6))
    with pytest.raises(PlanError, match="each of 8 ranks once"):
        plan_groups(nodes_of(2, 2, 2, 2), {}, "xor", within=[(0, 3), (1, 2, 5, 6)])


def test_without_redundancy_every_rank_is_alone() -> None:
    assert plan_groups(nodes_of(2, 1), {}, "none", 8) == ((0,), (1,), (2,))
    assert weaknesses(((0,), (1,)), ["a", "b"], {}, "none", 1) == []


@pytest.mark.parametrize(
    ("scheme", "size", "k", "message"),
    [
        ("xor", 8, 1, r"snapshot\.group = 8 .* there are 3\. Use snapshot\.group = 3 or 0"),
        ("reed_solomon", 0, 3, r"groups of 4 failure domains, but there are 3\. Use snapshot\.parity = 2"),
        ("replica", 0, 4, r"groups of 5 .* Use snapshot\.parity = 2"),
        ("reed_solomon", 2, 2, r"needs at least 3 members\. Use snapshot\.group = 3"),
        ("xor", 1, 1, r"needs at least 2 members"),
        ("reed_solomon", 33, 2, r"at most 32 .* Use snapshot\.group = 32"),
    ],
)
def test_groups_that_cannot_be_are_refused_with_a_value_that_works(
    scheme: str, size: int, k: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_groups(nodes_of(1, 1, 1), {}, scheme, size, k)
    assert plan_groups(nodes_of(1, 1, 1), {}, scheme, size, k, degraded=True)


def test_a_single_node_gets_a_warning_instead_of_groups() -> None:
    nodes = nodes_of(4)
    groups = plan_groups(nodes, {}, "xor")
    assert groups == ((0,), (1,), (2,), (3,))
    assert "nothing survives its loss" in weaknesses(groups, nodes, {}, "xor", 1)[0]


def test_nodes_of_one_failure_domain_protect_each_other_with_a_warning() -> None:
    nodes, domains = nodes_of(1, 1, 1), dict.fromkeys(["node-0", "node-1", "node-2"], "rack")
    groups = plan_groups(nodes, domains, "xor")
    assert groups == ((0, 1, 2),)
    (said,) = weaknesses(groups, nodes, domains, "xor", 1)
    assert "failure domain 'rack'" in said and "not of the domain" in said


def test_ranks_that_nobody_can_protect_are_named() -> None:
    nodes = nodes_of(3, 1)
    groups = plan_groups(nodes, {}, "xor")
    assert groups == ((0, 3), (1,), (2,))
    assert "[1, 2]" in weaknesses(groups, nodes, {}, "xor", 1)[0]
    small = plan_groups(nodes_of(1, 1), {}, "reed_solomon", 0, 3, degraded=True)
    assert "survive 1 lost" in weaknesses(small, nodes_of(1, 1), {}, "reed_solomon", 3)[0]


def test_memory_factors_are_those_of_the_codes() -> None:
    found = [
        memory_factor(*case) for case in [("none", 1, 4), ("replica", 1, 2), ("xor", 1, 8), ("reed_solomon", 2, 8)]
    ]
    assert found == [1.0, 2.0, 8 / 7, 8 / 6]
    assert (num_parity("xor", 1, 1), num_parity("replica", 3, 3), num_parity("reed_solomon", 4, 3)) == (0, 2, 2)


# -- membership ------------------------------------------------------------------------------------------------------


def membership(**changes: object) -> Membership:
    members = tuple(
        Member(r, f"node-{r // 2}", f"rack-{r // 2}", "10.0.0.1", 4000 + r // 2, "d1", 100 + r) for r in range(4)
    )
    whole = Membership("0123456789abcdef", 3, 4, "xor", 1, ((0, 2), (1, 3)), members, False, 64)
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def test_a_membership_survives_its_document() -> None:
    whole = membership()
    assert Membership.parse(whole.dump()) == whole
    assert (whole.leader.rank, whole.nodes, whole.group_of(3)) == (0, ("node-0", "node-1"), (1, 3))
    assert whole.address_of("node-1") == ("10.0.0.1", 4001)
    assert [m.rank for m in whole.by_node["node-1"]] == [2, 3]


def test_the_stripes_of_a_rank_are_those_of_its_group() -> None:
    stripes = membership().stripes_of(3)
    assert stripes is not None and (stripes.ranks, stripes.sizes, stripes.k) == ((1, 3), (101, 103), 1)
    assert membership(scheme="none", groups=((0,), (1,), (2,), (3,))).stripes_of(3) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("groups"),
        lambda d: d.update(generation="3"),
        lambda d: d.update(generation=True),
        lambda d: d["members"].pop(),
        lambda d: d["members"][1].update(port=None),
        lambda d: d.update(groups=[[0, 2], [1]]),
        lambda d: d.update(groups=[[0, 2], [1, 2, 3]]),
        lambda d: d.update(members=None),
    ],
)
def test_a_document_that_is_not_a_membership_is_refused(spoil: object) -> None:
    record = json.loads(membership().dump())
    spoil(record)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="membership"):
        Membership.parse(json.dumps(record))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, b"\xff\xfe"])
def test_garbage_is_not_a_membership(text: str | bytes) -> None:
    with pytest.raises(CheckpointError, match=r"membership-3\.json"):
        Membership.parse(text, "membership-3.json")


# -- pace ------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def pace(self, rate: float) -> Pace:
        return Pace(rate, clock=lambda: self.now, sleep=self.sleep)


def test_bytes_take_the_time_of_the_link() -> None:
    clock = Clock()
    pace = clock.pace(1000)
    assert sum(pace.spend(50) for _ in range(100)) == pytest.approx(5.0) and clock.now == pytest.approx(105.0)


def test_time_in_which_nothing_was_sent_is_not_saved_up() -> None:
    clock = Clock()
    pace = clock.pace(1000)
    clock.now += 60
    assert pace.spend(1000) > 0.97


def test_a_sleep_that_lasted_too_long_is_made_up_for() -> None:
    clock = Clock()
    pace = clock.pace(1000)
    pace.spend(100)
    clock.now += 0.015
    assert pace.spend(100) == pytest.approx(0.085)


def test_threads_share_the_rate() -> None:
    pace, waits = Pace(1000, clock=lambda: 0.0, sleep=lambda s: None), []
    threads = [threading.Thread(target=lambda: waits.append(pace.spend(10))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waits) == pytest.approx([0.01 * i for i in range(1, 21)], abs=1e-9)


def test_no_limit_is_no_wait() -> None:
    assert Pace().spend(1 << 40) == 0.0


def test_replicas_of_one_rack_cannot_protect_each_other():
    racks = {"node-0": "r1", "node-1": "r1", "node-2": "r2", "node-3": "r2"}
    nodes = nodes_of(1, 1, 1, 1)
    assert not cross_units([(0, 1), (2, 3)], nodes, racks)
    assert cross_units([(0, 2), (1, 3)], nodes, racks)
    assert cross_units([(0, 1), (2, 3)], nodes, {})  # without racks nodes count
    assert weaknesses(plan_groups(nodes, racks, "xor"), nodes, racks, "xor", 1) == []


def test_a_pace_may_be_lifted_while_somebody_books() -> None:
    def lifts() -> float:
        pace.lift()
        return 0.0

    pace = Pace(1.0)
    pace._clock = lifts
    assert pace.reserve(10) >= 0.0


@pytest.mark.parametrize(("scheme", "size", "k"), [("xor", 2, 1), *(("replica", 0, k) for k in (1, 2, 3))])
@pytest.mark.parametrize("n", range(2, 13))
def test_no_rank_is_left_over_where_groups_do_not_come_out_even(scheme: str, size: int, k: int, n: int) -> None:
    nodes = nodes_of(*[1] * n)
    groups = plan_groups(nodes, {}, scheme, size, k, degraded=True)
    assert min(map(len, groups)) >= min(k + 1, n)
    assert [num_parity(scheme, k, len(group)) for group in groups] == [min(k, n - 1)] * len(groups)
    assert bool(weaknesses(groups, nodes, {}, scheme, k)) == (n <= k)
    assert n <= k or plan_groups(nodes, {}, scheme, size, k) == groups


def test_an_xor_has_no_largest_group() -> None:
    assert plan_groups(nodes_of(*[1] * 40), {}, "xor", 40) == (tuple(range(40)),)
