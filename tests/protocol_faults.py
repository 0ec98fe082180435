"""What goes wrong in the protocol model: messages, processes, memory, nodes, the network. See protocol_model.py."""

from __future__ import annotations

from abc import abstractmethod

from tests.protocol_parts import Message, Node, Run, Slot, Smp, Trainer
from tests.protocol_truth import Truth
from windlass.checkpoint.memory.header import State

TROUBLE = (
    "roll_back",
    "drop",
    "double",
    "kill_rank",
    "stop_rank",
    "go_on",
    "kill_smp",
    "kill_controller",
    "damage",
    "forget",
    "fail_persist",
    "hang_persist",
    "unpin",
    "race",
)
DISASTER = ("lose_node", "cut", "heal", "reboot")


class Faults:
    """Each act does one thing to the world and tells the truth what is gone."""

    nodes: dict[str, Node]
    runs: list[Run]
    network: list[Message]
    truth: Truth
    phase: str

    @abstractmethod
    def _deliver(self, a: int, keep: bool) -> bool:
        """Hand over one message, or lose it."""

    def _acting(self) -> list[tuple[Run, Trainer]]:
        return [(run, t) for run in self.runs for t in run.trainers if t.acts]

    def _smps(self) -> list[tuple[Node, Smp]]:
        return [(n, n.smp) for n in self.nodes.values() if n.up and n.smp is not None]

    def do_drop(self, a: int, b: int) -> bool:
        if self.network:
            del self.network[a % len(self.network)]
            return True
        return False

    def do_double(self, a: int, b: int) -> bool:
        return self._deliver(a, keep=True)

    def do_kill_rank(self, a: int, b: int) -> bool:
        found = [t for run in self.runs for t in run.trainers if t.alive]
        if found:
            found[a % len(found)].alive = False
        return bool(found)

    def do_stop_rank(self, a: int, b: int) -> bool:
        found = self._acting()
        if found:
            found[a % len(found)][1].stopped = True
        return bool(found)

    def do_go_on(self, a: int, b: int) -> bool:
        found = [t for run in self.runs for t in run.trainers if t.alive and t.stopped]
        if found:
            found[a % len(found)].stopped = False
        return bool(found)

    def do_kill_smp(self, a: int, b: int) -> bool:
        found = [n for n, _ in self._smps()]
        if found:
            found[a % len(found)].smp = None
        return bool(found)

    def do_kill_controller(self, a: int, b: int) -> bool:
        self.phase = "look"
        return True

    def _kept(self) -> list[tuple[int, Slot]]:
        return [
            (rank, s)
            for n in self.nodes.values()
            for (_, rank, _), segment in n.segments.items()
            for s in segment.slots
            if s.state >= State.FILLED and s.good
        ]

    def do_damage(self, a: int, b: int) -> bool:
        """Bytes of a snapshot change: they no longer verify."""
        found = self._kept()
        if found:
            rank, slot = found[a % len(found)]
            slot.good = False
            self.truth.spoiled(slot.key, rank)
        return bool(found)

    def do_race(self, a: int, b: int) -> bool:
        """A thread is about to make a slot FILLED while another one decides about it."""
        slots = [s for n in self.nodes.values() for g in n.segments.values() for s in g.slots]
        found = [s for s in slots if s.state == State.COPIED and not s.moving]
        if found:
            found[a % len(found)].moving = True
        return bool(found)

    def do_forget(self, a: int, b: int) -> bool:
        """Both copies of a header are damaged: the slot counts as empty."""
        found = self._kept()
        if found:
            rank, slot = found[a % len(found)]
            self.truth.spoiled(slot.key, rank)
            slot.free()
        return bool(found)

    def do_lose_node(self, a: int, b: int) -> bool:
        """Memory, processes and all. Another machine may take its name at once (b odd) or never."""
        node = self._wipe(a)
        if node is not None:
            node.up = bool(b % 2)
        return node is not None

    def do_reboot(self, a: int, b: int) -> bool:
        return self._wipe(a) is not None

    def _wipe(self, a: int) -> Node | None:
        found = [n for n in self.nodes.values() if n.up]
        if not found:
            return None
        node = found[a % len(found)]
        self.truth.lost(node)
        for run in self.runs:
            for trainer in run.trainers:
                trainer.alive = trainer.alive and trainer.node != node.name
        vars(node).update(vars(Node(node.name, reachable=node.reachable)))
        return node

    def do_cut(self, a: int, b: int) -> bool:
        """The network to a node fails; everything on it lives on: a zombie once the others have gone on."""
        found = [n for n in self.nodes.values() if n.there]
        if not found:
            return False
        node = found[a % len(found)]
        self.truth.lost(node)
        node.reachable = False
        return True

    def do_heal(self, a: int, b: int) -> bool:
        found = [n for n in self.nodes.values() if n.up and not n.reachable]
        if found:
            found[a % len(found)].reachable = True
        return bool(found)
