"""A model of the snapshot protocol: nodes, trainers, snapshot processes, messages, storage, a controller; no I/O.

Everything that can happen between two instants of the real system is one call of `World.act`: a copy that begins or
lands, a hash, a parity block, a message that arrives, is lost or doubled, a process or a node that dies, one phase of a
recovery. Who acts when is the caller's choice, so a schedule is a list of names and numbers. The invariants of
checkpoint.md section 4.10 are asserted against protocol_truth.py whenever something was taken away.

The rules are not written here a second time: which step is restored, how the job goes on, what a leader decides, what a
node frees, who is in a group and which slot is picked are the functions that the runtime calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.protocol_control import Control
from tests.protocol_faults import Faults
from tests.protocol_parts import (
    CHUNK_BYTES,
    NUM_BYTES,
    Key,
    Message,
    Node,
    Persist,
    Rules,
    Run,
    Segment,
    Shape,
    Shelves,
    Slot,
    Smp,
    Trainer,
    Violation,
    Write,
    pick_parity,
)
from tests.protocol_storage import Storage
from tests.protocol_training import Training
from tests.protocol_truth import Truth
from windlass.checkpoint.memory.groups import plan_groups
from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.inventory import Held, Saved
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.votes import NOTHING, Decree, Report

PROGRESS = (
    "control", "join", "load", "update", "take", "copied", "hashed", "encode", "encoded", "abort", "report",
    "deliver",
    "respawn", "persist", "written",
)  # fmt: skip


class World(Faults, Control, Storage, Training):
    """The state of everything. `act(kind, a, b)` does one thing; the numbers choose among what is possible."""

    def __init__(self, shape: Shape | None = None, rules: Rules | None = None) -> None:
        self.shape, self.rules = shape or Shape(), rules or Rules()
        names = [f"n{i}" for i in range(self.shape.nodes + self.shape.spares)]
        self.nodes = {name: Node(name) for name in names}
        self.workers = self.shape.nodes * self.shape.per_node
        self.truth = Truth(self.shape, self.nodes)
        self.network: list[Message] = []
        self.runs: list[Run] = []
        self.log: list[dict[str, Any]] = [{"kind": "launch", "generation": 0}]
        self.phase = "bump"  # of the controller: all that it forgets when it dies
        self.decisions: dict[tuple[int, str], Any] = {}
        self.persists: list[Persist] = []
        self.writes: list[Write] = []
        self.storage: dict[Key, Key | None] = {}  # checkpoints: (generation, step) -> content
        self.clock = 0
        self.num_skips = 0

    def act(self, kind: str, a: int = 0, b: int = 0) -> bool:
        """Do one thing; False if there is nothing of the kind to do.

        Raises: Violation
        """
        return bool(getattr(self, f"do_{kind}")(a, b))

    # -- trainers ------------------------------------------------------------------------------------------------------

    def do_join(self, a: int, b: int) -> bool:
        """A worker writes its heartbeat, by which a fence finds it, and then looks whether its generation is over."""
        found = [(run, t) for run, t in self._acting() if not t.looked]
        if not found:
            return False
        run, trainer = found[a % len(found)]
        if not trainer.registered:
            trainer.registered = True
        else:
            trainer.alive = self.nodes[trainer.node].generation <= run.generation
            trainer.looked = True
        return True

    def do_load(self, a: int, b: int) -> bool:
        """Restore: all choose the same step; each loads it; when all have, nodes begin anew; each takes the base."""
        found = [r for r in self.runs if not r.training and all(t.alive and t.looked for t in r.trainers)]
        if not found:
            return False
        run = found[a % len(found)]
        if run.world is None:
            return run is self.run and self._choose(run)
        waiting = [t for t in run.trainers if not t.loaded]
        if waiting:
            trainer = waiting[b % len(waiting)]
            return trainer.acts and self._load(run, trainer)
        late = [n for n in run.world.nodes if self.nodes[n].current is not run.world]
        if late:
            return self._adopt(run, self.nodes[late[b % len(late)]])
        ready = [t for t in run.trainers if t.acts and not t.seeded and not t.copying]
        return bool(ready) and self._seed(run, ready[b % len(ready)])

    def _choose(self, run: Run) -> bool:
        there = [n for n in self.nodes.values() if n.there]
        slots = [(n, role, rank, s) for n in there for (role, rank, _), g in n.segments.items() for s in g.slots]
        if any(n.smp is None for n in there) or any(s.state == State.COPIED for *_, s in slots):
            return False  # no answer from a node, or one that is still hashing: recovery waits
        held = [
            Held(n.name, "", 0, "ram", rank, role, s.held.step, s.held.generation, state=int(s.state))
            for n, role, rank, s in slots
            if s.held is not None and s.state >= (State.FILLED if role == "data" else State.ENCODED) and s.good
        ]
        saved = [Saved(step, "storage", generation) for generation, step in self.storage]
        log = self.control_log
        choice, why = self.rules.choose(held, self.truth.worlds, saved, left=log.left())
        run.base = choice
        expected = max([*self.truth.restorable(), *(k for k in self.storage if not self.truth.void(k))], default=None)
        if run.base_key != expected:
            raise Violation(f"I9: {run.base_key} was chosen, the newest that can be restored is {expected}: {why}")
        if choice is None and self.truth.tolerable():
            raise Violation(f"I2: nothing is left of {self.truth.protected}")
        if choice is not None:
            assert expected is not None
            run.step = choice.step
            run.content = self.storage[expected] if choice.tier == "storage" else self.truth.content(expected)
            self.truth.check_samples(run.content, self.control_log.skips())
            run.anchor = self.rules.anchor(held, choice)
            self.truth.keep(run.anchor)
        run.world = self._membership(run)
        self.truth.worlds[run.generation] = run.world
        return True

    def _membership(self, run: Run) -> Membership:
        seats = [t.node for t in run.trainers]
        shape = self.shape
        groups = plan_groups(seats, {}, shape.scheme, shape.group, shape.k, degraded=True)
        members = tuple(Member(t.rank, t.node, t.node, "", 0, "", NUM_BYTES) for t in run.trainers)
        size = len(members)
        return Membership("job", run.generation, size, shape.scheme, shape.k, groups, members, False, CHUNK_BYTES)

    def _load(self, run: Run, trainer: Trainer) -> bool:
        """Read the base. What can no longer be read since the choice ends this generation."""
        if run.base is not None and run.base.tier != "storage" and run.base_key not in self.truth.restorable():
            trainer.alive = False
        else:
            trainer.loaded = True
        return True

    def _adopt(self, run: Run, node: Node) -> bool:
        """A node hears of the new generation, whose ranks have all been restored."""
        if not node.there or node.smp is None or node.generation > run.generation:
            return False
        node.membership = run.world
        node.smp.shelves.refresh()
        self.rules.begin(node.smp.shelves, run.generation, run)
        node.generation = max(node.generation, run.generation)
        self._start_term(node)
        self.truth.check(f"{node.name} began generation {run.generation}")
        return True

    # -- snapshot processes --------------------------------------------------------------------------------------------

    def do_respawn(self, a: int, b: int) -> bool:
        found = [n for n in self.nodes.values() if n.up and n.smp is None]
        if not found:
            return False
        node = found[a % len(found)]
        node.smp = Smp(Shelves(node), successor=node.membership is not None)
        self._start_term(node)
        return True

    def _start_term(self, node: Node) -> None:
        smp = node.smp
        assert smp is not None
        smp.shelves.refresh()
        smp.passed, smp.heard = None, 0
        smp.term = None if node.membership is None else self.rules.term(node.membership, node.name)
        if (term := smp.term) is not None:
            term.on_commit = lambda step: self._due(node, term, step)

    def do_hashed(self, a: int, b: int) -> bool:
        found = [s for n, _ in self._smps() for g in n.segments.values() for s in g.slots if s.state == State.COPIED]
        if found:
            found[a % len(found)].advance(State.FILLED)
        return bool(found)

    def _to_encode(self) -> Iterator[tuple[Node, Slot, Segment, list[Slot]]]:
        """Yield data slots whose parity can be made: the data of the whole group can be read."""
        for node, _ in self._smps():
            world = node.current
            for slot in self._own(node, State.FILLED):
                segment = node.segment("parity", slot.held.rank, world.world_size, self.shape.slots)
                if (read := self._read_group(node, world, slot.held.rank, slot)) is not None:
                    yield node, slot, segment, read

    def _own(self, node: Node, state: State) -> Iterator[Slot]:
        """Yield the data slots in a state that the ranks of a node filled in the present generation."""
        world = node.current
        for member in world.by_node.get(node.name, ()) if world is not None else ():
            for slot in node.slots("data", member.rank, world.world_size):
                if slot.state == state and slot.held.generation == world.generation:
                    yield slot

    def _read_group(self, node: Node, world: Membership, rank: int, slot: Slot) -> list[Slot] | None:
        out = []
        for member in world.group_of(rank):
            other = self.nodes[world.members[member].node]
            if other is not node and not (other.there and node.there and other.smp is not None):
                return None
            if self.rules.fenced and other.generation > world.generation:
                return None
            held = other.slots("data", member, world.world_size)
            theirs = next((s for s in held if s.key == slot.key and s.state >= State.FILLED and s.good), None)
            if theirs is None:
                return None
            out.append(theirs)
        return out

    def do_encode(self, a: int, b: int) -> bool:
        found = [x for x in self._to_encode() if x[2].holding(x[1].key) is None]
        if not found or self.shape.local_parity:
            return False
        node, slot, segment, _ = found[a % len(found)]
        assert slot.held is not None
        key = (slot.held.generation, slot.held.step)
        data = node.segment("data", slot.held.rank, slot.held.world_size, self.shape.slots)
        parity = pick_parity(segment, data, key)
        if parity is None:
            return False
        parity.fill(key, slot.held.rank, "parity", slot.held.world_size)
        self.truth.check(f"{node.name} makes parity of {slot.key}")
        return True

    def do_encoded(self, a: int, b: int) -> bool:
        at_least = State.FILLED if self.shape.local_parity else State.FILLING
        found = [x for x in self._to_encode() if (p := x[2].holding(x[1].key)) is not None and p.state >= at_least]
        if not found:
            return False
        _, slot, segment, read = found[a % len(found)]
        parity = segment.holding(slot.key)
        assert parity is not None
        if parity.state < State.ENCODED:
            parity.bytes_of = tuple(s.bytes_of for s in read)
            parity.advance(State.ENCODED)
        else:
            slot.advance(State.ENCODED)
        return True

    def do_abort(self, a: int, b: int) -> bool:
        """A node gives up a step that it cannot protect although all nodes answer, so that it never votes for it."""
        found = []
        for node, smp in self._smps():
            world = node.current
            nodes = [self.nodes[name] for name in world.nodes] if world is not None and node.there else []
            if nodes and all(n.there and n.smp is not None and n.current is world for n in nodes):
                decree = smp.term.decree
                for slot in self._own(node, State.FILLED):
                    if slot.held.step <= decree.watermark or slot.held.step in decree.dropped:
                        continue  # that it goes is decided already
                    parity = node.segment("parity", slot.held.rank, world.world_size, self.shape.slots)
                    unmade = self.shape.local_parity and parity.holding(slot.key) is None
                    if unmade or any(self._fails(world, m, slot.key) for m in world.group_of(slot.held.rank)):
                        found.append((node, smp, slot))
        if not found:
            return False
        node, smp, slot = found[a % len(found)]
        smp.shelves.refresh()
        smp.shelves.abort(slot.held.generation, slot.held.step, smp.term.ranks)
        return True

    def _fails(self, world: Membership, rank: int, key: Key) -> bool:
        """Whether a rank's data of a step is damaged, or not there and never will be; not if it is still copied."""
        node = self.nodes[world.members[rank].node]
        slots = node.slots("data", rank, world.world_size)
        held = next((s for s in slots if s.key == key), None)
        if held is not None:
            return not held.good
        steps = [s.key[1] for s in slots if s.key is not None and s.key[0] == world.generation]
        return max([*steps, node.beats.get((world.generation, rank), NOTHING)]) >= key[1]

    def do_report(self, a: int, b: int) -> bool:
        """A node obeys what holds and reads heartbeats, later its slots, and then tells the leader: two instants."""
        found = [(n, smp, n.current) for n, smp in self._smps() if n.current and n.name in n.current.by_node]
        if not found:
            return False
        node, smp, world = found[a % len(found)]
        assert world is not None
        ranks = [m.rank for m in world.by_node[node.name]]
        if smp.passed is None:
            if self.rules.again:
                self._obey(node, smp)
            smp.passed = {rank: node.beats.get((world.generation, rank), NOTHING) for rank in ranks}
            return True
        smp.shelves.refresh()
        smp.shelves.free_orphans(world.generation)
        self.clock += 1
        held = smp.shelves.states(world.generation, ranks)
        report = Report(node.name, world.generation, self.clock, held, smp.passed)
        smp.passed = None
        self.network.append(Message(world.leader.node, world.generation, report))
        return True

    def do_deliver(self, a: int, b: int) -> bool:
        return self._deliver(a, keep=False)

    def _deliver(self, a: int, keep: bool) -> bool:
        if not self.network:
            return False
        message = self.network[a % len(self.network)]
        if not keep:
            self.network.remove(message)
        node = self.nodes[message.to]
        world = node.membership
        if not node.there or node.smp is None or world is None:
            return True
        if self.rules.fenced and message.generation < max(node.generation, world.generation):
            return True
        if isinstance(message.body, Report):
            self._hear(node, node.smp, message.body)
        elif world.generation == message.generation:
            self._follow(node, node.smp, message.body)
        return True

    def _hear(self, node: Node, smp: Smp, report: Report) -> None:
        term = smp.term
        if term is None or term.ballot is None or report.generation != term.generation:
            return
        before = term.ballot.watermark
        decree = term.hear(report)
        if term.ballot.watermark > before:
            self.truth.committed((term.generation, term.ballot.watermark))
        self.network.append(Message(report.node, term.generation, decree))

    def _follow(self, node: Node, smp: Smp, decree: Decree) -> None:
        """A node obeys when it hears of something new."""
        if smp.term is None:
            return
        if smp.term.ballot is None:  # a leader decides; nothing that its forerunner said reaches it
            smp.term.follow(decree)
        if smp.term.decree.sent > smp.heard:
            smp.heard = smp.term.decree.sent
            self._obey(node, smp)

    def _obey(self, node: Node, smp: Smp) -> None:
        term = smp.term
        if term is None:
            return
        smp.shelves.refresh()
        self.rules.obey(smp.shelves, term.decree)
        if term.decree.watermark > NOTHING:
            for place in [p for p in node.segments if p[1] not in term.ranks or p[2] != term.membership.world_size]:
                del node.segments[place]
        self.truth.check(f"{node.name} freed")

    # -- without further faults ----------------------------------------------------------------------------------------

    def settle(self, commits: int = 2, rounds: int = 60) -> None:
        """Let everything run until as many new steps are committed, or too few nodes are left.

        Raises: Violation if neither happens (I12: every wait ends)
        """
        for kind in ("heal", "go_on"):
            while self.act(kind):
                pass
        wanted = self.truth.num_commits + commits
        for number in range(rounds):
            for kind in PROGRESS:
                for again in range(16):
                    if not self.act(kind, number + again, again) or kind in ("update", "control"):
                        break
            if self.truth.num_commits >= wanted:
                assert self.run is not None
                self.truth.check_samples(self.run.content, self.control_log.skips())
                return
            if self.phase == "decide" and not self.act("control"):
                return
        raise Violation(f"I12: no commit in {rounds} rounds\n{self.describe()}")

    def describe(self) -> str:
        """Return what is where, for people."""
        first = f"generation {self.generation}, {self.phase}, committed {self.truth.protected}, {self.run}"
        return "\n".join([first, *(node.describe() for node in self.nodes.values())])
