"""The parts of a modelled cluster: slots, nodes, snapshot processes, trainers, and the rules that they follow.

A slot and a segment have the faces of the real ones (header, write, free), so that the runtime's own functions work on
them: `NodeSlots` frees them, `pick_slot` picks among them. See protocol_model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.inventory import Choice, anchor, choose
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.segment import pick_slot
from windlass.checkpoint.memory.slots import NodeSlots, Shelf
from windlass.checkpoint.memory.term import Term
from windlass.checkpoint.memory.votes import Decree, Report
from windlass.launch.decide import decide

Key = tuple[int, int]  # generation and step of a snapshot
Place = tuple[str, int, int]  # role, rank and world size: what makes up the name of a segment's file
NUM_BYTES, CHUNK_BYTES = 64 * 12, 64  # of every rank's data, whatever the world


class Violation(AssertionError):
    """An invariant of the protocol does not hold."""


class Slot:
    """`bytes_of`: the update whose result the bytes are (truth: no process sees it). `good`: they verify."""

    def __init__(self) -> None:
        self.held: SlotHeader | None = None
        self.sequence = 0
        self.bytes_of: Any = None
        self.good = True
        self.writer: Trainer | None = None  # holds the claim: it may still write, whatever the header says
        self.moving = False  # another thread is about to write its next state: whoever frees it first comes too late

    @property
    def claimed(self) -> bool:
        return self.writer is not None and self.writer.alive

    def header(self) -> SlotHeader | None:
        return self.held

    def write(self, header: SlotHeader, wait_s: float = 0.0) -> bool:
        if header.sequence not in (-1, self.sequence):
            return False
        self.sequence += 1
        self.held = replace(header, sequence=self.sequence)
        return True

    def free(self, header: SlotHeader | None = None, wait_s: float = 0.0) -> bool:
        if self.moving:
            self.moving = False
            if self.state == State.COPIED:
                self.advance(State.FILLED)
        if header is not None and header.sequence != self.sequence:
            return False
        self.sequence += 1
        self.held, self.bytes_of, self.good = None, None, True
        return True

    @property
    def key(self) -> Key | None:
        return None if self.held is None else (self.held.generation, self.held.step)

    @property
    def state(self) -> State:
        return State.FREE if self.held is None else self.held.state

    def fill(self, key: Key, rank: int, role: str, world_size: int) -> None:
        """Begin a fill, as a trainer or an encoder does."""
        generation, step = key
        self.bytes_of, self.good = None, True
        self.write(
            SlotHeader("job", generation, step, rank, world_size, role, "", NUM_BYTES, CHUNK_BYTES, State.FILLING)
        )

    def advance(self, state: State) -> None:
        assert self.held is not None
        self.write(replace(self.held, state=state))


@dataclass(eq=False)
class Segment:
    slots: tuple[Slot, ...]

    def holding(self, key: Key | None) -> Slot | None:
        return next((s for s in self.slots if s.key == key), None)


class Shelves(NodeSlots):
    """The real bookkeeping of a snapshot process over the segments of a modelled node."""

    def __init__(self, node: Node) -> None:
        super().__init__(None, lambda line: None)  # type: ignore[arg-type]
        self.node = node

    def refresh(self) -> None:
        world = self.node.membership
        size = world.world_size if world is not None else 0
        self._shelves = {
            number: Shelf(segment, role, rank, world_size != size)  # type: ignore[arg-type]
            for number, ((role, rank, world_size), segment) in enumerate(self.node.segments.items())
        }


@dataclass
class Smp:
    """What a snapshot process forgets when it dies."""

    shelves: Shelves
    term: Term | None = None
    passed: dict[int, int] | None = None  # first half of a report
    heard: int = 0  # when the newest decree that was obeyed was sent
    successor: bool = False  # of a process that was killed while a generation ran


@dataclass
class Node:
    """A machine. `segments`, `generation`, `membership` and `beats` are files in its memory: they outlive processes."""

    name: str
    up: bool = True
    reachable: bool = True
    segments: dict[Place, Segment] = field(default_factory=dict)
    generation: int = 0
    membership: Membership | None = None
    beats: dict[Key, int] = field(default_factory=dict)  # (generation, rank) -> newest step decided about
    smp: Smp | None = None

    @property
    def there(self) -> bool:
        return self.up and self.reachable

    @property
    def current(self) -> Membership | None:
        """The membership that its snapshot process acts for: none while a newer generation is only announced."""
        world = self.membership
        return world if world is not None and world.generation >= self.generation else None

    def segment(self, role: str, rank: int, world_size: int, num_slots: int) -> Segment:
        place = (role, rank, world_size)
        if place not in self.segments:
            self.segments[place] = Segment(tuple(Slot() for _ in range(num_slots)))
        return self.segments[place]

    def slots(self, role: str, rank: int, world_size: int) -> tuple[Slot, ...]:
        found = self.segments.get((role, rank, world_size))
        return found.slots if found is not None else ()

    def describe(self) -> str:
        """Return what it holds, for people."""
        held = {place: [(s.key, s.state.name, s.good) for s in g.slots] for place, g in self.segments.items()}
        where = f"up {self.up}, reachable {self.reachable}, generation {self.generation}"
        return f"{self.name}: {where}, {self.smp and self.smp.term and self.smp.term.decree}, {held}"


@dataclass(eq=False)
class Trainer:
    rank: int
    node: str
    alive: bool = True
    stopped: bool = False
    looked: bool = False  # at the generation of its node
    registered: bool = False  # its heartbeat names it, so a fence finds it
    loaded: bool = False
    seeded: bool = False
    copying: tuple[tuple[Slot, int], ...] = ()  # slots and their sequences when the copy began, parity first

    @property
    def acts(self) -> bool:
        return self.alive and not self.stopped


@dataclass(eq=False)
class Run:
    """The workers of one generation, in lockstep. `content` names the update whose result they hold."""

    generation: int
    trainers: list[Trainer]
    content: Key | None = None
    base: Choice | None = None
    anchor: Key | None = None
    world: Membership | None = None
    step: int = 0
    takers: list[Trainer] = field(default_factory=list)

    @property
    def base_key(self) -> Key | None:
        return None if self.base is None else (self.base.generation, self.base.step)

    @property
    def training(self) -> bool:
        return all(t.seeded for t in self.trainers)


@dataclass(eq=False)
class Persist:
    """A step on its way into storage, led by the process `smp` in a term of it."""

    key: Key
    leader: Node
    smp: Smp
    term: Term
    waiting: list[str]  # nodes that have not written theirs
    let_go: bool = False  # its slots may be freed, though it may still come to an end


@dataclass(eq=False)
class Write:
    """A node's part of a step on its way into storage: its slots are pinned, in the process `smp`, until it has ended,
    which may be long after the leader has given the step up, or until the leader says so then."""

    persist: Persist
    node: Node
    smp: Smp
    pin: ExitStack


@dataclass(frozen=True)
class Message:
    to: str
    generation: int
    body: Report | Decree


def pick(segment: Segment, generation: int) -> Slot | None:
    """Pick a slot to fill, with the runtime's function."""
    found = pick_slot(segment, generation)  # type: ignore[arg-type]
    return None if found is None else found[0]  # type: ignore[return-value]


def pick_parity(segment: Segment, data: Segment, key: Key) -> Slot | None:
    """Pick a slot for parity: an empty one, one half made of another step, or one whose data are no longer there."""
    for slot in segment.slots:
        torn = slot.state == State.FILLING and slot.key != key
        stale = slot.held is not None and slot.held.generation == key[0] and slot.state < State.COMMITTED
        if slot.held is None or torn or (stale and data.holding(slot.key) is None):
            return slot
    return None


def begin(shelves: Shelves, generation: int, run: Run) -> None:
    """Make room for a new generation, with the runtime's function."""
    shelves.begin(generation, run.base_key, run.anchor)


@dataclass(frozen=True)
class Rules:
    """The decisions of the protocol: the runtime's own, so that a test can break one and see that it is noticed."""

    choose: Callable[..., tuple[Choice | None, list[str]]] = choose
    anchor: Callable[..., Key | None] = anchor
    decide: Callable[..., Any] = decide
    pick: Callable[[Segment, int], Slot | None] = pick
    begin: Callable[[Shelves, int, Run], None] = begin
    obey: Callable[[Shelves, Decree], Any] = Shelves.obey
    term: Callable[[Membership, str], Term] = lambda world, node: Term(world, node, None, Base())  # type: ignore[arg-type]
    jointly: bool = True  # all ranks take a snapshot or none
    fence_kills: bool = True  # and waits until they are dead
    claims: bool = True  # who fills a slot holds it until it has finished or is dead
    fenced: bool = True  # requests of older generations are refused
    again: bool = True  # a decree is obeyed with every report, not only when it is news


@dataclass(frozen=True)
class Shape:
    """What a world is made of."""

    nodes: int = 4
    spares: int = 1
    per_node: int = 1
    scheme: str = "xor"
    group: int = 0
    k: int = 1
    slots: int = 2
    persist_every: int = 0
    sizes: tuple[int, ...] = ()
    local_parity: bool = False
