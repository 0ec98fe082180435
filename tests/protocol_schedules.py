"""Random schedules of the protocol model, and the shortest form of one that breaks an invariant.

python tests/protocol_schedules.py --schedules 100000       as many as there is time for
python tests/protocol_schedules.py --seed 4711              one again, shortened
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.protocol_faults import DISASTER, TROUBLE
from tests.protocol_model import PROGRESS, World
from tests.protocol_parts import Rules, Shape, Violation

FILL = ("update", "take", "copied", "hashed")
PROTECT = (*FILL, "encode", "encoded")
RECOVER = ("control", "join", "load", "respawn", "hashed")
Act = tuple[str, int, int]
PACE = dict.fromkeys(PROGRESS, 10.0) | {"deliver": 20.0, "report": 20.0, "persist": 10.0, "written": 0.7, "abort": 0.3}
REPAIR = {"go_on": 1.0, "heal": 0.5}
FAULTS = tuple(kind for kind in (*TROUBLE, *DISASTER) if kind not in REPAIR)
SHAPES = (
    Shape(nodes=3),
    Shape(nodes=3, slots=3),
    Shape(nodes=4, group=2),
    Shape(nodes=4, scheme="reed_solomon", k=2),
    Shape(nodes=2, per_node=2, group=2),
    Shape(nodes=3, spares=0, sizes=(2, 3), persist_every=2),
    Shape(nodes=3, scheme="replica", k=1, slots=3, persist_every=1),
    Shape(nodes=3, local_parity=True),
)


class Broken(AssertionError):
    """A schedule after which an invariant did not hold."""


def play(acts: Sequence[Act], shape: Shape, rules: Rules | None = None, *, settled: bool = False) -> World:
    """Do these acts (`settled`: after a first commit), then let everything settle.

    Raises: Violation
    """
    world = World(shape, rules)
    if settled:
        world.settle(commits=1)
    for act in acts:
        world.act(*act)
    world.settle()
    return world


def schedule(seed: int, length: int, shape: Shape, rules: Rules | None = None) -> tuple[World, list[Act]]:
    """Do `length` random acts that each do something, then settle.

    Raises: Broken with the acts
    """
    rng = random.Random(seed)
    # Few kinds of faults in one schedule: with all of them at once hardly anything would ever get anywhere.
    faults = {kind: rng.choice((0.2, 0.6, 2.0)) for kind in rng.sample(FAULTS, rng.randint(1, 4))}
    kinds = {**PACE, **REPAIR, **faults}
    world, acts = World(shape, rules), []
    try:
        if seed % 4:
            world.settle(commits=1)
        before = -1
        while before < len(acts) < length:  # too few nodes may be left for anything to happen
            before = len(acts)
            for kind in rng.choices(list(kinds), list(kinds.values()), k=length):
                act = (kind, rng.getrandbits(6), rng.getrandbits(6))
                if len(acts) == length:
                    break
                acts.append(act)
                if not world.act(*act):
                    acts.pop()
        world.settle()
    except Violation as error:
        raise Broken(f"seed {seed} of {shape}: {error}", acts) from error
    return world, acts


def explore(
    seeds: Sequence[int], length: int = 150, rules: Rules | None = None, shapes: Sequence[Shape] = SHAPES
) -> list[World]:
    """Run a schedule for each seed.

    Raises: Broken for the first that violates an invariant
    """
    return [schedule(seed, length, shapes[seed % len(shapes)], rules)[0] for seed in seeds]


def shorten(acts: Sequence[Act], shape: Shape, rules: Rules | None = None, *, settled: bool = False) -> list[Act]:
    """Leave acts out for as long as an invariant is still violated."""

    def breaks(some: Sequence[Act]) -> bool:
        try:
            play(some, shape, rules, settled=settled)
        except Violation:
            return True
        return False

    left, size = list(acts), max(len(acts) // 2, 1)
    while size:
        at, before = 0, len(left)
        while at < len(left):
            without = left[:at] + left[at + size :]
            if breaks(without):
                left = without
            else:
                at += size
        size = size if size == 1 and len(left) < before else size // 2
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--length", type=int, default=200, help="acts of each (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="first seed (%(default)s)")
    parser.add_argument("--seed", type=int, help="only this one, and shorten it if it breaks something")
    given = parser.parse_args()
    if given.seed is not None:
        shape = SHAPES[given.seed % len(SHAPES)]
        try:
            world, _ = schedule(given.seed, given.length, shape)
        except Broken as error:
            print(error.args[0])
            for act in shorten(error.args[1], shape, settled=given.seed % 4 > 0):
                print("   ", act)
            return 1
        print(world.describe())
        return 0
    began, commits, generations, broken = time.perf_counter(), 0, 0, 0
    for seed in range(given.first, given.first + given.schedules):
        try:
            world, _ = schedule(seed, given.length, SHAPES[seed % len(SHAPES)])
        except Broken as error:
            print(error.args[0])
            broken += 1
            continue
        commits += world.truth.num_commits
        generations += world.generation
    print(
        f"{given.schedules} schedules of {given.length} acts in {time.perf_counter() - began:.1f} s: "
        f"{commits} commits, {generations} generations, {broken} broken"
    )
    return 1 if broken else 0


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


if __name__ == "__main__":
    sys.exit(main())
