"""Trainers of the protocol model: they update together, take snapshots together, and copy each for itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.protocol_parts import Node, Rules, Run, Shape, Slot, Trainer, Violation
from tests.protocol_truth import Truth
from windlass.checkpoint.memory.header import State
from windlass.data.loader import Loader


class Training:
    """What ranks do between two meetings."""

    shape: Shape
    rules: Rules
    nodes: dict[str, Node]
    runs: list[Run]
    log: list[dict[str, Any]]
    num_skips: int
    truth: Truth

    def _seed(self, run: Run, trainer: Trainer) -> bool:
        picks = self._picks(run, trainer)
        if run.base is None:
            trainer.seeded = True
        elif not picks:
            raise Violation(f"rank {trainer.rank} of generation {run.generation} has no slot for what it restored")
        else:
            self._fill(run, trainer, picks)
        return True

    def _picks(self, run: Run, trainer: Trainer) -> list[Slot]:
        """Return a slot to fill in each segment of a rank, parity first; nothing unless all have one."""
        size = len(run.trainers)
        own_parity = self.shape.local_parity and run.world is not None and len(run.world.group_of(trainer.rank)) > 1
        roles = ("parity", "data") if own_parity else ("data",)
        segments = [self.nodes[trainer.node].segment(role, trainer.rank, size, self.shape.slots) for role in roles]
        picks = [self.rules.pick(segment, run.generation) for segment in segments]
        return [] if None in picks else picks

    def _fill(self, run: Run, trainer: Trainer, picks: list[Slot]) -> None:
        for slot, role in zip(reversed(picks), ("data", "parity"), strict=False):
            slot.fill((run.generation, run.step), trainer.rank, role, len(run.trainers))
            slot.writer = trainer if self.rules.claims else None
        trainer.copying = tuple((slot, slot.sequence) for slot in picks)
        self.nodes[trainer.node].beats[run.generation, trainer.rank] = run.step
        self.truth.check(f"rank {trainer.rank} fills step {run.step}")

    def do_update(self, a: int, b: int) -> bool:
        """All ranks finish the next step together. Each has waited for its own copy, and for nothing else."""
        found = [
            r for r in self.runs if r.training and not r.takers and all(t.acts and not t.copying for t in r.trainers)
        ]
        if not found:
            return False
        run = found[a % len(found)]
        before, run.step = run.content, run.step + 1
        run.content = (run.generation, run.step)
        following = 0 if before is None else self.truth.history[before][1] + 1
        loader: Any = SimpleNamespace(_skips=sorted(self.control_log.skips()))
        sample = Loader._behind_skips(loader, following)
        self.truth.history[run.content] = (before, sample)
        if run.step == (run.base.step if run.base else 0) + 1 and run is self.run:
            self.log.append({"kind": "recovered", "generation": run.generation})
        free = [t for t in run.trainers if self._picks(run, t)]
        if self.rules.jointly and len(free) < len(run.trainers):
            free = []
        run.takers = list(free)
        self.num_skips += not free
        for trainer in run.trainers:
            if trainer not in free:
                self.nodes[trainer.node].beats[run.generation, trainer.rank] = run.step
        return True

    def do_take(self, a: int, b: int) -> bool:
        """A rank begins the copy on which all have agreed."""
        found = [(run, t) for run in self.runs for t in run.takers if t.acts]
        if not found:
            return False
        run, trainer = found[a % len(found)]
        run.takers.remove(trainer)
        picks = self._picks(run, trainer)
        if not picks:
            raise Violation(f"rank {trainer.rank} has no slot for step {run.step} any more")
        self._fill(run, trainer, picks)
        return True

    def do_copied(self, a: int, b: int) -> bool:
        found = [(run, t) for run, t in self._acting() if t.copying]
        if not found:
            return False
        run, trainer = found[a % len(found)]
        (slot, sequence), *rest = trainer.copying
        trainer.copying, trainer.seeded, slot.writer = tuple(rest), not rest, None
        if slot.sequence != sequence:  # it was freed meanwhile, or its file deleted: then nobody reads what is written
            if slot.held is not None:
                raise Violation(f"I5: generation {run.generation} writes into a slot that is of {slot.key} by now")
            return True
        slot.bytes_of = run.content
        slot.advance(State.COPIED)
        return True
