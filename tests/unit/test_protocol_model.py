"""The snapshot protocol under any schedule of faults: thousands of them over a model that calls the real decisions.

`python tests/protocol_schedules.py --schedules 100000` looks further; here is what fits into a few seconds.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.protocol_faults import DISASTER, TROUBLE
from tests.protocol_model import PROGRESS, World
from tests.protocol_parts import Key, Rules, Segment, Shape, Shelves, Slot, Violation
from tests.protocol_schedules import SHAPES, Broken, explore, play, schedule, shorten
from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.inventory import choose
from windlass.checkpoint.memory.term import Term
from windlass.checkpoint.memory.votes import NOTHING, Ballot
from windlass.launch.decide import Restart, decide

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


def settled(shape: Shape | None = None) -> World:
    world = World(shape or Shape(nodes=3))
    world.settle(commits=1)
    return world


def until(world: World, done, *kinds: str) -> None:
    """Let only these kinds of acts happen until something holds."""
    for number in range(500):
        if done():
            return
        for kind in kinds:
            world.act(kind, number, number)
    raise AssertionError(f"it never came to that: {world.describe()}")


FILL = ("update", "take", "copied", "hashed")
PROTECT = (*FILL, "encode", "encoded")
RECOVER = ("control", "join", "load", "respawn", "hashed")


# -- the model notices when a rule is broken ---------------------------------------------------------------------------


def breaks(rules: Rules, invariant: str, *shapes: Shape, schedules: int = 300, length: int = 200) -> bool:
    """Return whether some schedule violates an invariant under these rules."""
    for seed in range(schedules):
        try:
            schedule(seed, length, shapes[seed % len(shapes)], rules)
        except Broken as error:
            if f" {invariant}:" in f" {error.args[0]}" or f"{invariant}," in error.args[0]:
                return True
    return False


def test_a_slot_picked_although_it_is_the_newest_committed_is_noticed():
    def oldest(segment: Segment, generation: int) -> Slot:
        return min(segment.slots, key=lambda slot: (slot.state, slot.key or (0, 0)))

    assert breaks(Rules(pick=oldest), "I3", Shape(nodes=3))


def test_freeing_all_but_the_restored_step_is_noticed():
    assert breaks(Rules(begin=lambda shelves, _, run: free_all(shelves, run.base_key)), "I3", Shape(nodes=3))


def free_all(shelves: Shelves, but: Key | None) -> None:
    for slot, header in list(shelves.held()):
        if slot.key != but:
            slot.free(header)


def test_a_node_that_keeps_only_what_it_knows_itself_to_be_committed_is_noticed():
    def begin(shelves: Shelves, generation: int, run) -> None:
        shelves.begin(generation, run.base_key, None)

    assert breaks(Rules(begin=begin), "I3", Shape(nodes=2))


def test_a_commit_by_a_majority_is_noticed():
    class Majority(Ballot):
        def newest(self, state: State) -> int:
            counts: dict[int, int] = {}
            for steps in self._held().values():
                for step, found in steps.items():
                    counts[step] = counts.get(step, 0) + (found >= state)
            return max((s for s, n in counts.items() if 2 * n > sum(map(len, self.ranks.values()))), default=NOTHING)

    assert breaks(Rules(term=with_ballot(Majority)), "I3", Shape(nodes=3))


def test_a_commit_of_what_is_hashed_but_not_encoded_is_noticed():
    class Early(Ballot):
        def newest(self, state: State) -> int:
            return super().newest(State.FILLED)

    assert breaks(Rules(term=with_ballot(Early)), "I3", Shape(nodes=3))


def with_ballot(ballot: type[Ballot]):
    def term(world, node: str) -> Term:
        made = Term(world, node, None, NOTHING)
        if made.ballot is not None:
            made.ballot = ballot(made.ballot.generation, made.ballot.ranks)
        return made

    return term


def test_freeing_by_step_alone_when_a_new_generation_goes_on_is_noticed():
    def obey(shelves: Shelves, decree) -> None:
        Shelves.obey(shelves, decree)
        for slot, header in list(shelves.held()):
            if header.step < decree.watermark or header.generation < decree.generation:
                slot.free(header)

    assert breaks(Rules(obey=obey), "I3", Shape(nodes=3))


def zombie_that_copies(rules: Rules) -> World:
    """Return a world whose next generation takes the slot into which a stopped rank was copying."""
    world = World(Shape(nodes=2), rules)
    world.settle(commits=1)
    until(world, lambda: all(t.copying for t in world.run.trainers), "update", "take")
    zombie = world.run.trainers[1]
    zombie.stopped = True
    until(world, lambda: world.run.generation == 2 and all(t.copying for t in world.run.trainers), *RECOVER)
    zombie.stopped = False
    return world


def test_a_fence_kills_whoever_could_still_write():
    world = zombie_that_copies(Rules())
    assert not any(t.alive for t in world.runs[0].trainers)
    world.settle(commits=1)
    assert world.truth.protected[0] == 2


def test_a_slot_is_not_filled_anew_while_whoever_filled_it_may_live():
    with pytest.raises(Violation, match="no slot for what it restored"):
        zombie_that_copies(Rules(fence_kills=False))


def test_a_zombie_that_writes_into_a_slot_of_its_successor_is_noticed():
    world = zombie_that_copies(Rules(fence_kills=False, claims=False))
    with pytest.raises(Violation, match="I5"):
        until(world, lambda: False, "copied")


def test_restoring_a_lower_step_than_possible_is_noticed():
    def lowest(held, worlds, saved=(), **options):
        held = sorted(held)
        return choose(held[: len(held) // 2], worlds, saved, **options)

    assert breaks(Rules(choose=lowest), "I9", Shape(nodes=3))


def test_combining_copies_of_two_generations_is_noticed():
    def mixed(held, worlds, saved=(), **options):
        held = list(held)
        newest = max((h.generation for h in held), default=0)
        return choose([replace(h, generation=newest) for h in held], worlds, saved, **options)

    assert breaks(Rules(choose=mixed), "I9", Shape(nodes=2))


def test_damaged_bytes_that_are_taken_for_good_are_noticed():
    def trusting(held, worlds, saved=(), **options):
        held = list(held)
        copies = {(h.rank, h.role) for h in held}
        step = max(((h.generation, h.step) for h in held), default=None)
        missing = [replace(held[0], rank=0, role="data", generation=step[0], step=step[1])] if step else []
        return choose(held + [h for h in missing if (0, "data") not in copies], worlds, saved, **options)

    assert breaks(Rules(choose=trusting), "I9", Shape(nodes=3, scheme="none", spares=2))


def test_a_decision_that_depends_on_more_than_the_log_is_noticed():
    coin = random.Random(0)

    def moody(history, nodes, limits, **options):
        decision = decide(history, nodes, limits, **options)
        mood = coin.random() < 0.5
        return replace(decision, why="because") if isinstance(decision, Restart) and mood else decision

    assert breaks(Rules(decide=moody), "I13", Shape(nodes=3))


# -- what a schedule is ------------------------------------------------------------------------------------------------


def test_a_schedule_is_the_same_whenever_it_is_played():
    shape = SHAPES[1]
    first, acts = schedule(1, 80, shape)
    again = play(acts, shape, settled=True)
    assert again.truth.protected == first.truth.protected and again.log == first.log


def test_a_schedule_that_breaks_something_is_shortened():
    rules, shape = Rules(begin=lambda shelves, _, run: free_all(shelves, run.base_key)), Shape(nodes=2)
    for seed in range(400):
        try:
            schedule(seed, 80, shape, rules)
        except Broken as error:
            acts = error.args[1]
            break
    settled = seed % 4 > 0
    short = shorten(acts, shape, rules, settled=settled)
    assert len(short) < len(acts) / 2
    with pytest.raises(Violation):
        play(short, shape, rules, settled=settled)


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
    until(world, lambda: len(world.storage) >= 3, *PROTECT, "report", "deliver", "persist")
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
    until(world, lambda: key in world.storage, "persist")
    until(world, lambda: key not in world.truth.restorable(), *PROTECT, "report", "deliver")
    assert world.truth.content(world.truth.protected) != world.storage[key]


def test_parity_that_trainers_make_themselves_protects_as_well():
    world = settled(Shape(nodes=3, local_parity=True))
    protected = world.truth.protected
    world.act("lose_node", 1, 0)
    until(world, lambda: recovered(world), *RECOVER, "copied")
    assert world.run.base_key >= protected and world.run.base.decoded == (1,)
