"""The choice of the step to restore: the highest that can be, over random worlds, losses and damage."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.checkpoint.memory.groups import num_parity
from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.inventory import Held, Saved, anchor, choose, erased
from windlass.checkpoint.memory.membership import Member, Membership

CHUNK = 64


def world(generation=1, groups=((0, 1, 2),), k=1, scheme="xor", sizes=None):
    num_ranks = sum(len(group) for group in groups)
    members = tuple(
        Member(r, f"node-{r}", f"rack-{r}", "127.0.0.1", 9000 + r, "", sizes[r] if sizes else 100 * CHUNK)
        for r in range(num_ranks)
    )
    return Membership("job", generation, num_ranks, scheme, k, tuple(groups), members, False, CHUNK)


def held(rank, step, role="data", generation=1, tier="ram", node=None, **more):
    return Held(node or f"node-{rank}", "127.0.0.1", 9000 + rank, tier, rank, role, step, generation, **more)


def slots(ranks, step, **more):
    return [held(rank, step, role, **more) for rank in ranks for role in ("data", "parity")]


SCHEMES = [(0, "none"), (1, "xor"), (1, "replica"), (1, "reed_solomon"), (2, "reed_solomon")]


@st.composite
def clusters(draw):
    """Two generations of one or two groups, with every slot of every step there, then some of it gone or damaged."""
    worlds = {}
    for generation in draw(st.sampled_from([(1,), (1, 2), (3, 7)])):
        sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        edges = list(itertools.accumulate(sizes, initial=0))
        groups = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(edges))
        worlds[generation] = world(generation, groups, *draw(st.sampled_from(SCHEMES)))
    every = [
        held(rank, step, role, generation, tier)
        for generation, there in worlds.items()
        for step in draw(st.sets(st.integers(0, 6), min_size=1, max_size=3))
        for rank in range(there.world_size)
        for tier in draw(st.sampled_from([("ram",), ("ram", "local")]))
        for role in ("data", "parity")
    ]
    fates = draw(
        st.lists(st.sampled_from(["here"] * 4 + ["gone", "damaged"]), min_size=len(every), max_size=len(every))
    )
    there = [
        h.damaged("a flipped bit") if fate == "damaged" else h
        for h, fate in zip(every, fates, strict=True)
        if fate != "gone"
    ]
    return worlds, there


def blocks_known(group, k, data, parity):
    """Tell by brute force what can be computed: any n - k known blocks of a stripe give all of them."""
    n = len(group)
    for j in range(n):
        known = [(rank in parity) if (index - j) % n < k else (rank in data) for index, rank in enumerate(group)]
        if sum(known) < n - k and not all(known[i] for i in range(n) if (i - j) % n >= k):
            return False
    return True


def possible(there, worlds):
    """Return every (step, generation) whose data is there or can be computed."""
    out = set()
    for step, generation in {(h.step, h.generation) for h in there}:
        mine = [h for h in there if h.ok and (h.step, h.generation) == (step, generation)]
        data, parity = ({h.rank for h in mine if h.role == role} for role in ("data", "parity"))
        if all(
            blocks_known(group, num_parity(worlds[generation].scheme, worlds[generation].k, len(group)), data, parity)
            for group in worlds[generation].groups
        ):
            out.add((step, generation))
    return out


def newest(allowed, loose):
    """Return the last (generation, step), or the highest step of unknown generation if it is beyond that."""
    found = max(allowed, default=None)
    top = max(loose, default=None)
    return (0, top) if top is not None and (found is None or top > found[1]) else found


@settings(max_examples=100, deadline=None)
@given(clusters(), st.one_of(st.none(), st.integers(0, 6)), st.sets(st.integers(0, 7), max_size=2), st.randoms())
def test_the_choice_is_the_newest_step_that_can_be_computed_and_every_newer_one_is_explained(
    cluster, at_most, saved_steps, rng
):
    worlds, there = cluster
    saved = [Saved(step, f"step-{step:08d}") for step in saved_steps]
    left = {} if at_most is None else {99: at_most}
    choice, passed_over = choose(there, worlds, saved, left=left)
    fits = [step for step in range(9) if at_most is None or step <= at_most]
    allowed = [(g, s) for s, g in possible(there, worlds) if s in fits]
    wanted = newest(allowed, [s for s in saved_steps if s in fits])
    assert (None if choice is None else (choice.generation, choice.step)) == wanted
    floor = max(allowed, default=(-1, -1))
    newer = {(h.generation, h.step) for h in there if (h.generation, h.step) > floor}
    explained = [text for text in passed_over if "in memory" in text]
    assert len(explained) == len(newer) and all(text.split(": ", 1)[1] for text in passed_over)
    rng.shuffle(there)
    assert choose(there, worlds, saved[::-1], left=left) == (choice, passed_over)


@settings(max_examples=100, deadline=None)
@given(clusters())
def test_what_is_read_is_sound_and_of_one_step_and_one_generation(cluster):
    worlds, there = cluster
    choice, _ = choose(there, worlds)
    copies = [] if choice is None else [h for found in (choice.data, choice.parity) for c in found.values() for h in c]
    assert all(h.ok and (h.step, h.generation) == (choice.step, choice.generation) for h in copies)
    if choice is not None:
        assert {*choice.data, *choice.decoded} == set(range(worlds[choice.generation].world_size))
        assert not set(choice.data) & set(choice.decoded)


@settings(max_examples=100, deadline=None)
@given(clusters(), st.data())
def test_one_more_copy_never_lowers_the_choice(cluster, data):
    worlds, there = cluster
    lost = data.draw(st.sampled_from(there)) if there else None
    fewer = [h for h in there if h is not lost]
    with_all, without = choose(there, worlds)[0], choose(fewer, worlds)[0]
    assert without is None or (
        with_all is not None and (with_all.generation, with_all.step) >= (without.generation, without.step)
    )


@pytest.mark.parametrize("n, k", [(n, k) for n in range(2, 9) for k in range(1, n)])
def test_any_k_members_of_a_group_may_vanish_and_no_more(n, k):
    group = tuple(range(n))
    there = world(groups=(group,), k=k, scheme="reed_solomon")
    rng = random.Random(n * 10 + k)
    for lost in [rng.sample(group, k) for _ in range(5)]:
        rest = set(group) - set(lost)
        assert not erased(there, group, rest, rest)
    lost = rng.sample(group, k + 1)
    rest = set(group) - set(lost)
    assert erased(there, group, rest, rest) == set(lost)
    assert not erased(there, group, group, ()), "parity is not needed where all data is there"


def test_a_member_without_data_is_not_missed():
    there = world(groups=((0, 1, 2, 3),), sizes=[100, 100, 100, 0])
    assert not erased(there, (0, 1, 2, 3), {0, 1, 2}, {0, 1, 2})
    assert erased(there, (0, 1, 2, 3), {1, 2}, {1, 2}) == {0}


def test_a_lost_node_is_decoded_and_two_of_one_group_are_not():
    worlds = {1: world(groups=((0, 1, 2), (3, 4, 5)))}
    choice, passed_over = choose(slots([1, 2, 3, 5], 8) + slots(range(6), 7), worlds)
    assert (choice.step, choice.decoded, choice.tier, passed_over) == (8, (0, 4), "ram", [])
    choice, passed_over = choose(slots([2, 3, 4, 5], 8) + slots(range(6), 7), worlds)
    assert choice.step == 7
    (told,) = passed_over
    assert told == (
        "step 8 of generation 1 in memory: rank 0 (no copy is left of what was on node-0), rank 1 (no copy is left of "
        "what was on node-1); ranks 0, 1 of the group 0, 1, 2 lack data or parity, of which 1 may"
    )


def test_a_damaged_copy_counts_as_missing_and_is_named():
    worlds = {1: world(groups=((0,), (1,)), k=0, scheme="none")}
    bad = held(1, 8).damaged("header does not match its checksum")
    choice, passed_over = choose([held(0, 8), bad, held(0, 7), held(1, 7)], worlds)
    assert choice.step == 7
    (told,) = passed_over
    assert told == (
        "step 8 of generation 1 in memory: rank 1 (node-1: header does not match its checksum), which nothing else in "
        "memory makes up for"
    )
    choice, _ = choose([held(0, 8), bad, held(1, 8, tier="local")], worlds)
    assert (choice.step, choice.tier, choice.data[1][0].tier) == (8, "local", "local")


def test_copies_of_two_generations_under_one_step_number_are_not_combined():
    worlds = {1: world(1, ((0,), (1,)), 0), 2: world(2, ((0,), (1,)), 0)}
    halves = [held(0, 8, generation=1), held(1, 8, generation=2)]
    choice, passed_over = choose(halves + [held(r, 5, generation=1) for r in (0, 1)], worlds)
    assert (choice.step, choice.generation) == (5, 1)
    assert [text.split(":")[0] for text in passed_over] == [
        "step 8 of generation 2 in memory",
        "step 8 of generation 1 in memory",
    ]


def test_the_later_generation_wins_even_at_a_lower_step():
    worlds = {1: world(1), 2: world(2)}
    there = slots(range(3), 9, generation=1) + slots(range(3), 8, generation=2)
    choice, _ = choose(there, worlds, [Saved(12, "step-00000012", 1)])
    assert (choice.step, choice.generation, choice.tier) == (8, 2, "ram")


def test_storage_wins_at_a_higher_step_and_memory_at_the_same():
    there = slots(range(3), 8)
    for generation in (0, 1):
        choice, _ = choose(there, {1: world()}, [Saved(8, "step-00000008", generation)])
        assert (choice.step, choice.tier) == (8, "ram")
        choice, _ = choose(there, {1: world()}, [Saved(9, "step-00000009", generation)])
        assert (choice.step, choice.tier, choice.place) == (9, "storage", "step-00000009")


def test_memory_is_read_before_local_drives_and_both_make_one_step():
    worlds = {1: world(groups=((0,), (1,)), k=0)}
    choice, _ = choose([held(0, 8, tier="local"), held(0, 8), held(1, 8, tier="local")], worlds)
    assert [[h.tier for h in choice.data[rank]] for rank in (0, 1)] == [["ram", "local"], ["local"]]
    assert choice.tier == "local" and "local drives" in str(choice)


def test_going_back_passes_over_later_steps_now_and_after_the_next_failure():
    worlds = {1: world(1), 2: world(2)}
    there = slots(range(3), 20, generation=1) + slots(range(3), 15, generation=1)
    choice, passed_over = choose(there, worlds, [Saved(20, "step-00000020", 1)], left={1: 15})
    assert passed_over == [
        "step 20 of generation 1 in memory: left behind when generation 1 went back to step 15",
        "step 20 of step-00000020: left behind when generation 1 went back to step 15",
    ]
    assert (choice.step, choice.generation) == (15, 1), "what the run went back to is not left behind"
    assert all("left behind when generation 1 went back to step 15" in text for text in passed_over)
    there += slots(range(3), 17, generation=2)
    choice, passed_over = choose(there, worlds, [Saved(20, "step-00000020", 1)], left={1: 15})
    assert (choice.step, choice.generation, passed_over) == (17, 2, [])


def test_a_generation_whose_membership_is_lost_is_passed_over():
    choice, passed_over = choose(slots(range(3), 8, generation=2) + slots(range(3), 7), {1: world()})
    assert choice.step == 7 and "no node has the membership" in passed_over[0]


def test_nothing_held_and_nothing_saved_is_no_choice():
    assert choose([], {}) == (None, [])


def states(ranks, step, state):
    return slots(ranks, step, state=state)


@pytest.mark.parametrize("last, wanted", [(State.COMMITTED, 8), (State.ENCODED, 8), (State.FILLED, 7)])
def test_what_survives_a_node_is_kept_beside_the_chosen_step(last, wanted):
    there = states(range(3), 7, State.COMMITTED) + states(range(3), 8, last)
    choice, _ = choose(there, {1: world()})
    assert choice.step == 8 and anchor(there, choice) == (1, wanted)


def test_a_commit_that_only_one_node_heard_of_is_kept_by_all():
    heard, not_heard = states([0], 8, State.COMMITTED), states([1, 2], 8, State.ENCODED)
    older = states([1, 2], 7, State.COMMITTED)
    there = heard + not_heard + older + [held(rank, 9, state=State.FILLED) for rank in range(3)]
    choice, _ = choose(there, {1: world()})
    assert choice.step == 9 and anchor(there, choice) == (1, 8)


def test_what_is_held_in_fewer_places_than_the_committed_step_is_not_relied_on():
    there = states(range(3), 7, State.COMMITTED) + states([0, 1], 8, State.ENCODED) + [held(2, 8, state=State.FILLED)]
    choice, _ = choose(there, {1: world()})
    assert choice.step == 8 and anchor(there, choice) == (1, 7)


def test_steps_beyond_the_choice_drives_and_storage_are_no_anchor():
    there = states(range(3), 7, State.COMMITTED) + states(range(3), 9, State.COMMITTED)
    choice, _ = choose(there, {1: world()}, left={1: 7})
    assert anchor(there, choice) == (1, 7)
    drives = slots(range(3), 7, tier="local")
    assert anchor(drives, choose(drives, {1: world()})[0]) is None
    assert anchor(there, choose(there, {1: world()}, [Saved(10, "step-00000010")])[0]) is None
    assert anchor(there, None) is None
