"""The snapshot protocol under any schedule of faults: thousands of them over a model that calls the real decisions.

`python tests/protocol_schedules.py --schedules 100000` looks further; here is what fits into a few seconds.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.protocol_faults import DISASTER, TROUBLE
from tests.protocol_model import PROGRESS, World
from tests.protocol_parts import Rules, Shape, Violation
from tests.protocol_schedules import (
    FILL,
    PROTECT,
    RECOVER,
    SHAPES,
    explore,
    settled,
    until,
)
from windlass.checkpoint.memory.header import State

NUMBERS = st.integers(0, 63)


def test_every_schedule_of_faults_keeps_what_was_committed_and_ends_in_new_commits():
    worlds = explore(range(240), length=100)
    assert sum(world.generation > 1 for world in worlds) > 100
    assert sum(world.truth.num_commits for world in worlds) > 480


class Protocol(RuleBasedStateMachine):
    """The same model driven by hypothesis, which shortens what it finds."""

    @initialize(shape=st.sampled_from(SHAPES), settled=st.booleans())
    def begin(self, shape: Shape, settled: bool) -> None:
        self.world = World(shape)
        if settled:
            self.world.settle(commits=1)

    @rule(kinds=st.lists(st.tuples(st.sampled_from(PROGRESS), NUMBERS, NUMBERS), min_size=4, max_size=24))
    def run_on(self, kinds: list[tuple[str, int, int]]) -> None:
        for act in kinds:
            self.world.act(*act)

    @rule(kind=st.sampled_from(TROUBLE), a=NUMBERS, b=NUMBERS)
    def get_into_trouble(self, kind: str, a: int, b: int) -> None:
        self.world.act(kind, a, b)

    @rule(kind=st.sampled_from(DISASTER), a=NUMBERS, b=NUMBERS)
    def meet_disaster(self, kind: str, a: int, b: int) -> None:
        self.world.act(kind, a, b)

    @invariant()
    def what_was_committed_can_be_restored(self) -> None:
        if hasattr(self, "world"):
            self.world.truth.check("at any instant")

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle(commits=1)


Protocol.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)
TestProtocol = Protocol.TestCase


# -- the cases of which the design speaks ------------------------------------------------------------------------------


def states(world: World, role: str = "data") -> list[set[State]]:
    """Return which states the slots of each rank are in."""
    return [
        {s.state for s in segment.slots}
        for node in world.nodes.values()
        for place, segment in node.segments.items()
        if place[0] == role
    ]


def recovered(world: World) -> bool:
    return world.run.generation == world.generation > 1 and world.run.training


def test_a_killed_rank_costs_no_step_when_its_last_one_is_filled():
    world = settled()
    until(world, lambda: world.run.step >= 2, *PROTECT, "report", "deliver")
    until(world, lambda: all(State.FILLED in s or State.ENCODED in s for s in states(world)), *FILL[1:])
    step = max(key[1] for key in world.truth.restorable())
    world.act("kill_rank", 1)
    until(world, lambda: recovered(world), *RECOVER, "copied")
    assert world.run.base.step == step


def test_with_two_slots_a_late_commit_skips_snapshots_and_blocks_nobody():
    world = settled()
    skips = world.num_skips
    until(world, lambda: world.run.step >= 20, *PROTECT)  # no message arrives
    assert world.num_skips > skips
    commits = world.truth.num_commits
    until(world, lambda: world.truth.num_commits > commits, *PROGRESS)
    assert world.truth.protected[1] < 20 < world.run.step + 1


def test_lost_commit_messages_are_made_up_for_by_later_ones():
    world = settled()
    commits = world.truth.num_commits
    until(world, lambda: world.truth.num_commits > commits, *PROTECT, "report", "deliver", "drop")
    while world.network:
        world.act("drop")
    world.settle(commits=2)
    assert world.truth.num_commits >= commits + 3


def test_a_leader_that_starts_anew_counts_again_what_was_voted():
    world = settled()
    until(world, lambda: all(State.ENCODED in s for s in states(world)), *PROTECT)
    leader = world.run.world.leader.node
    world.nodes[leader].smp = None
    commits = world.truth.num_commits
    until(world, lambda: world.truth.num_commits > commits, "respawn", "report", "deliver")
    assert world.generation == 1


def test_a_node_that_voted_and_was_lost_takes_no_committed_step_with_it():
    world = settled()
    until(world, lambda: all(State.ENCODED in s for s in states(world)), *PROTECT)
    until(world, lambda: len(world.network) >= 3, "report")
    world.act("lose_node", 2, 0)
    commits = world.truth.num_commits
    until(world, lambda: world.truth.num_commits > commits, "deliver", "report")
    protected = world.truth.protected
    until(world, lambda: recovered(world), *RECOVER, "copied")
    assert world.run.base_key == protected


def test_a_step_that_is_whole_but_not_encoded_is_restored_and_the_protected_one_before_it_is_kept():
    world = settled(Shape(nodes=3))
    until(world, lambda: all(s == {State.COMMITTED, State.FILLED} for s in states(world)), *FILL, "report", "deliver")
    world.act("kill_rank", 0)
    protected = world.truth.protected
    until(world, lambda: world.run.generation == 2 and world.run.world is not None, *RECOVER)
    assert world.run.base_key > protected == world.run.anchor
    until(world, lambda: recovered(world), *RECOVER, "copied")
    world.act("lose_node", 1, 0)
    assert protected in world.truth.restorable()


def test_a_node_that_comes_back_from_behind_a_cut_changes_nothing_and_is_passed_over():
    world = settled()
    until(world, lambda: all(State.FILLED in s for s in states(world)), *FILL)
    world.act("cut", 2)
    until(world, lambda: recovered(world), *RECOVER, "copied")
    world.settle(commits=1)
    protected = world.truth.protected
    assert all(node.there for node in world.nodes.values()) and protected[0] == 2
    world.run.trainers[0].alive = False
    until(world, lambda: recovered(world) and world.generation == 3, *RECOVER, "copied")
    assert world.run.base.generation == 2


def test_a_job_that_shrinks_keeps_the_old_snapshots_until_the_new_ones_are_committed():
    world = settled(Shape(nodes=4, spares=0, sizes=(2, 4), group=2))
    before = world.truth.protected
    world.act("lose_node", 3, 0)
    until(world, lambda: recovered(world), *RECOVER, "copied")
    assert world.run.world.world_size == 2
    assert before in world.truth.restorable()
    world.settle(commits=1)

    def sizes() -> set[int]:
        return {place[2] for name in world.run.world.nodes for place in world.nodes[name].segments}

    until(world, lambda: sizes() == {2}, *PROTECT, "report", "deliver")


def test_when_memory_is_lost_the_newest_checkpoint_in_storage_is_taken():
    world = settled(Shape(nodes=2, spares=1, persist_every=1))
    saved = world.truth.protected
    for number in range(3):
        world.act("reboot", number)
    until(world, lambda: recovered(world), *RECOVER, "copied")
    assert (world.run.base.tier, world.run.base_key) == ("storage", saved)


def test_a_rollback_is_kept_to_whatever_fails_next_and_its_batches_stay_left_out():
    world = settled(Shape(nodes=2, spares=1, slots=3, persist_every=1))
    until(world, lambda: len(world.storage) >= 3, *PROTECT, "report", "deliver", "persist", "written")
    assert world.act("roll_back", 2)
    record = next(r for r in world.log if r["kind"] == "rollback")
    until(world, lambda: recovered(world), *RECOVER, "copied")
    target = world.run.step
    assert 0 < target <= record["step"]
    world.run.trainers[0].alive = False  # before anything of the new generation is committed
    until(world, lambda: recovered(world) and world.generation == 3, *RECOVER, "copied")
    assert world.run.step == target
    world.settle(commits=2)
    skipped = world.control_log.skips()
    assert world.run.step > target and len(skipped) == 1
    world.truth.check_samples(world.run.content, skipped)


def test_a_step_on_its_way_into_storage_stays_in_memory_until_it_is_there():
    world = settled(Shape(nodes=2, spares=0, slots=3, persist_every=1))
    until(world, lambda: len(world.persists) == 1, *PROTECT, "report", "deliver")
    key, commits = world.persists[0].key, world.truth.num_commits
    until(world, lambda: world.truth.num_commits > commits + 1, *PROTECT, "report", "deliver")
    assert world.truth.protected > key and key in world.truth.restorable()
    until(world, lambda: key in world.storage, "persist", "written")
    until(world, lambda: key not in world.truth.restorable(), *PROTECT, "report", "deliver")
    assert world.truth.content(world.truth.protected) != world.storage[key]


@pytest.mark.parametrize("again", [True, False])
def test_a_write_that_outlives_the_last_decree_leaves_no_slot_behind(again):
    world = World(Shape(nodes=2, spares=0, persist_every=1), Rules(again=again))
    until(world, lambda: len(world.writes) == 2, *PROGRESS[:-1])
    assert world.act("fail_persist") and world.act("written")  # one node has failed, the other one is still writing
    commits = world.truth.num_commits
    until(world, lambda: world.truth.num_commits > commits, *PROTECT, "report", "deliver")
    world.act("fail_persist")
    tell_everybody(world)
    assert ends_in_commits(world) is again


@pytest.mark.parametrize("again", [True, False])
def test_a_slot_that_moves_on_while_it_is_to_be_freed_is_not_left_behind(again):
    world = World(Shape(nodes=2, spares=0), Rules(again=again))
    world.settle(commits=1)
    until(world, lambda: world.run.trainers[0].copying or world.run.trainers[1].copying, "update", "take")
    run = world.run
    taker = next(t for t in run.trainers if t.copying)
    for trainer in run.takers:  # it will never have the step
        world.nodes[trainer.node].beats[run.generation, trainer.rank] = run.step
    run.takers = []
    world.act("copied")
    slot = next(s for s in world.nodes[taker.node].slots("data", taker.rank, 2) if s.state == State.COPIED)
    slot.moving = True
    tell_everybody(world)
    assert ends_in_commits(world) is again


def tell_everybody(world: World) -> None:
    """Let all nodes hear of everything, so that nothing is left to decide."""
    for number in range(20):
        for kind in ("report", "report", "deliver", "deliver"):
            world.act(kind, number)


def ends_in_commits(world: World) -> bool:
    try:
        world.settle(commits=2)
    except Violation:
        return False
    return True


def test_parity_that_trainers_make_themselves_protects_as_well():
    world = settled(Shape(nodes=3, local_parity=True))
    protected = world.truth.protected
    world.act("lose_node", 1, 0)
    until(world, lambda: recovered(world), *RECOVER, "copied")
    assert world.run.base_key >= protected and world.run.base.decoded == (1,)
