"""The controller of the protocol model, phase by phase; it can die between any two. See protocol_model.py."""

from __future__ import annotations

import json
from typing import Any

from tests.protocol_parts import Key, Node, Rules, Run, Shape, Trainer, Violation
from tests.protocol_truth import Truth
from windlass.launch.control_log import ControlLog
from windlass.launch.decide import History, Limits, Restart
from windlass.launch.fleet import Node as Seat


class Control:
    """`phase` is all that a controller forgets when it dies; the rest is in its log and on the nodes."""

    shape: Shape
    rules: Rules
    nodes: dict[str, Node]
    runs: list[Run]
    log: list[dict[str, Any]]
    phase: str
    decisions: dict[tuple[int, str], Any]
    workers: int
    truth: Truth

    @property
    def run(self) -> Run | None:
        return self.runs[-1] if self.runs else None

    @property
    def generation(self) -> int:
        return max((r["generation"] for r in self.log if r["kind"] == "generation"), default=0)

    @property
    def control_log(self) -> ControlLog:
        """The real log, over the records of this world."""
        log = object.__new__(ControlLog)
        log.records = self.log
        return log

    def do_roll_back(self, a: int, b: int) -> bool:
        """The loss jumped: all workers end, the run goes back some steps and leaves out what it had seen since."""
        run = self.run
        if run is None or not run.training or run.content is None or run.step < 2:
            return False
        if run.generation < self.generation or not all(t.acts and self.nodes[t.node].there for t in run.trainers):
            return False
        back = max(run.step - 1 - a % 3, 0)
        content: Key | None = run.content
        first = stop = self.truth.history[run.content][1] + 1
        while content is not None and content[1] > back:
            content, first = self.truth.history[content]
        self.log.append({"kind": "rollback", "generation": run.generation, "step": back, "first": first, "last": stop})
        self.truth.go_back(run.generation, back)
        for trainer in run.trainers:
            trainer.alive = False
        return True

    def do_control(self, a: int, b: int) -> bool:
        return bool(getattr(self, f"_{self.phase}")())

    def _look(self) -> bool:
        """A new controller process reads the log and looks at the workers."""
        run = self.run
        current = run is not None and run.generation == self.generation
        self.phase = "watch" if current else "bump"
        return True

    def _watch(self) -> bool:
        run = self.run
        assert run is not None
        if all(t.acts and self.nodes[t.node].there for t in run.trainers):
            return False
        self.log.append({"kind": "failure", "what": "worker", "generation": run.generation, "step": run.step})
        self.phase = "bump"
        return True

    def _bump(self) -> bool:
        self.log.append({"kind": "generation", "generation": self.generation + 1})
        self.phase = "announce"
        return True

    def _announce(self) -> bool:
        for node in self.nodes.values():
            if node.there:
                node.generation = max(node.generation, self.generation)
        self.phase = "kill"
        return True

    def _kill(self) -> bool:
        """SIGKILL to the recorded processes of older generations, and wait until they are gone."""
        for run in self.runs:
            for trainer in run.trainers:
                if self.nodes[trainer.node].there and trainer.registered and run.generation < self.generation:
                    trainer.alive = trainer.alive and not self.rules.fence_kills
        self.phase = "decide"
        return True

    def _decide(self) -> bool:
        if any(n.there and n.generation < self.generation for n in self.nodes.values()):
            self.phase = "announce"  # a node came back: it is fenced before anybody is seated on it
            return True
        seats = [Seat(n.name, n.name, self.shape.per_node, n.there) for n in self.nodes.values()]
        limits = Limits(self.workers, self.shape.sizes, 10**6, 10**6, 10**6, 0.0)
        decision = self.rules.decide(History.of(self.log), seats, limits)
        replayed = self.rules.decide(History.of(json.loads(json.dumps(self.log))), seats, limits)
        earlier = self.decisions.setdefault((len(self.log), str(seats)), decision)
        if decision != replayed or decision != earlier:
            raise Violation(f"I13: {decision} from the same log as {replayed} and {earlier}")
        if not isinstance(decision, Restart):
            return False  # too few nodes: look again later
        self.log.append({"kind": "decision", "generation": self.generation, "nodes": list(decision.seating.nodes)})
        self.phase = "start"
        return True

    def _start(self) -> bool:
        if any(n.there and n.generation < self.generation for n in self.nodes.values()):
            self.phase = "announce"
            return True
        names = next(r["nodes"] for r in reversed(self.log) if r["kind"] == "decision")
        self.runs.append(Run(self.generation, [Trainer(rank, name) for rank, name in enumerate(names)]))
        self.phase = "watch"
        return True
