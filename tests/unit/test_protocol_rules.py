"""The protocol model notices every rule that is broken, and finds the shortest schedule that shows it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.protocol_model import World
from tests.protocol_parts import Key, Rules, Segment, Shape, Shelves, Slot, Violation
from tests.protocol_schedules import (
    RECOVER,
    SHAPES,
    Broken,
    play,
    schedule,
    shorten,
    until,
)
from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.inventory import choose
from windlass.checkpoint.memory.term import Term
from windlass.checkpoint.memory.votes import NOTHING, Ballot
from windlass.launch.decide import Restart, decide

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
        made = Term(world, node, None, Base())
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


def test_a_decree_that_is_obeyed_only_when_it_is_news_is_noticed():
    assert breaks(Rules(again=False), "I12", Shape(nodes=2, spares=0, persist_every=1))


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
