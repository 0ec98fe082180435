"""Steps that become durable in the protocol model: pinned, written by all nodes, there at once. See protocol_model.py.

What a power cut leaves of files is another model: power_loss.py.
"""

from __future__ import annotations

from contextlib import ExitStack

from tests.protocol_parts import Key, Node, Persist, Shape, Violation, Write
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
    writes: list[Write]

    def _due(self, node: Node, term: Term, step: int) -> None:
        """A step is committed: begin to persist it if that is due, and pin it in the decree that says so."""
        every, smp = self.shape.persist_every, node.smp
        assert smp is not None
        busy = any(p.smp is smp for p in self.persists) or (term.generation, step) in self.storage
        if every and step % every == 0 and not busy:
            self.persists.append(Persist((term.generation, step), node, smp, term, list(term.membership.nodes)))
            term.publish(pins=(step,))

    def do_persist(self, a: int, b: int) -> bool:
        """A node begins to write its part of a step: from here on it keeps its slots itself, whatever is decreed."""
        self.persists = [p for p in self.persists if p.leader.smp is p.smp and p.smp.term is p.term]
        begun = {(w.persist, w.node.name) for w in self.writes}
        found = [(p, n) for p in self.persists if p.leader.there for n in p.waiting if (p, n) not in begun]
        if not found:
            return False
        persist, name = found[a % len(found)]
        node = self.nodes[name]
        if not node.there or node.smp is None or any(w.smp is node.smp for w in self.writes):
            return False  # the leader asks again
        pin = ExitStack()
        pin.enter_context(node.smp.shelves.pinned(*persist.key))
        self.writes.append(Write(persist, node, node.smp, pin))
        return True

    def do_written(self, a: int, b: int) -> bool:
        """A node has written its part, wanted still or not; after the last one the step is there, at once and whole."""
        self.writes = [w for w in self.writes if w.node.smp is w.smp]
        if not self.writes:
            return False
        write = self.writes.pop(a % len(self.writes))
        write.pin.close()
        node, persist, world = write.node, write.persist, write.persist.term.membership
        if persist not in self.persists or not node.there:
            return True
        held = [node.slots("data", m.rank, world.world_size) for m in world.by_node[node.name]]
        whole = all(any(s.key == persist.key and s.good and s.state >= State.ENCODED for s in slots) for slots in held)
        if not whole or node.generation > world.generation:
            # A leader process that was replaced meanwhile may begin again with a step that others have freed since.
            kept = not persist.smp.successor and not persist.let_go
            if node.current is world and kept and not self.truth.hit(persist.key, node.name):
                raise Violation(f"I7: {persist.key} was freed on {node.name} while it was persisted")
            self._end(persist)
            return True
        persist.waiting.remove(node.name)
        if not persist.waiting:
            self.storage[persist.key] = self.truth.content(persist.key)
            self._end(persist)
        return True

    def do_fail_persist(self, a: int, b: int) -> bool:
        """A drive fails: the leader gives the step up. Other nodes are in the middle of writing it."""
        if not self.persists:
            return False
        self._end(self.persists[a % len(self.persists)])
        return True

    def do_hang_persist(self, a: int, b: int) -> bool:
        """Storage does not come back to the leader, which lets the slots of a step go; it may still be written."""
        found = [p for p in self.persists if not p.let_go]
        if found:
            persist = found[a % len(found)]
            persist.let_go = True
            persist.term.publish(pins=())
        return bool(found)

    def do_unpin(self, a: int, b: int) -> bool:
        """A node that still writes a step which the leader has given up hears of that, and lets its slots go."""
        found = [w for w in self.writes if w.persist not in self.persists]
        if found:
            found[a % len(found)].pin.close()
        return bool(found)

    def _end(self, persist: Persist) -> None:
        self.persists.remove(persist)
        persist.term.publish(pins=())
