"""Steps that become durable in the protocol model: pinned, written by all nodes, there at once. See protocol_model.py.

What a power cut leaves of files is another model: power_loss.py.
"""

from __future__ import annotations

from tests.protocol_parts import Key, Node, Persist, Shape, Violation
from tests.protocol_truth import Truth
from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.term import Term


class Storage:
    """`storage` holds checkpoints: (generation, step) -> content; `persists` what is on its way there."""

    shape: Shape
    nodes: dict[str, Node]
    truth: Truth
    storage: dict[Key, Key | None]
    persists: list[Persist]

    def _due(self, node: Node, term: Term, step: int) -> None:
        """A step is committed: begin to persist it if that is due, and pin it in the decree that says so."""
        every, smp = self.shape.persist_every, node.smp
        assert smp is not None
        busy = any(p.smp is smp for p in self.persists) or (term.generation, step) in self.storage
        if every and step % every == 0 and not busy:
            self.persists.append(Persist((term.generation, step), node, smp, term, list(term.membership.nodes)))
            term.publish(pins=(step,))

    def do_persist(self, a: int, b: int) -> bool:
        """One node writes its part of a pinned step; after the last one the step is there, at once and whole."""
        self.persists = [p for p in self.persists if p.leader.smp is p.smp and p.smp.term is p.term]
        found = [p for p in self.persists if p.leader.there]
        if not found:
            return False
        persist = found[a % len(found)]
        node, term = self.nodes[persist.waiting[0]], persist.term
        if not node.there or node.smp is None:
            return False  # the leader asks again
        world = term.membership
        held = [node.slots("data", m.rank, world.world_size) for m in world.by_node[node.name]]
        whole = all(any(s.key == persist.key and s.good and s.state >= State.ENCODED for s in slots) for slots in held)
        if whole and node.generation <= world.generation:
            persist.waiting.pop(0)
        else:
            # A leader process that was replaced meanwhile may begin again with a step that others have freed since.
            if node.current is world and not persist.smp.successor and not self.truth.hit(persist.key, node.name):
                raise Violation(f"I7: {persist.key} was freed on {node.name} while it was persisted")
            self.persists.remove(persist)
            term.publish(pins=())
            return True
        if not persist.waiting:
            self.storage[persist.key] = self.truth.content(persist.key)
            self.persists.remove(persist)
            term.publish(pins=())
        return True
