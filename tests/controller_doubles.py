"""Doubles for tests of the controller: a fleet of no processes, whose workers end as a plan says."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from windlass.dist.errors import ConfigError
from windlass.launch.control_log import ControlLog
from windlass.launch.controller import Controller, Patience
from windlass.launch.decide import Limits
from windlass.launch.failure import Exit
from windlass.launch.fleet import Node, Seating


class Died(BaseException):
    """The controller was killed."""


@dataclass
class Stop:
    """How often somebody asked to stop."""

    count: int = 0


class Group:
    """Workers that end as their plan says: `done`, `kill` (rank 0 is), or `run` until they are asked to end."""

    def __init__(self, fleet: Fleet, seating: Seating, plan: str) -> None:
        self.num_workers = seating.world_size
        self._fleet, self._plan = fleet, plan
        self._alive = set(range(self.num_workers))
        self._signal = 0
        fleet.group = self
        if fleet.silent:
            return
        fleet.step += plan != "kill-again"
        with open(fleet.run / "metrics.jsonl", "a") as file:
            stamp = datetime.now(timezone.utc).isoformat()
            file.write(json.dumps({"step": fleet.step, "step_s": 1.0, "time": stamp}) + "\n")

    def wait(self, timeout_s: float) -> list[Exit]:
        code = {"done": 0, "kill": -9, "kill-again": -9, "kill-silent": -9}.get(self._plan)
        if self._signal:
            code = 0 if self._signal == signal.SIGTERM and self._plan != "stubborn" else -self._signal
        if code is None or not self._alive:
            self._fleet.turn()
            threading.Event().wait(min(timeout_s, 0.01))
            return []
        if code == 0 and self._plan == "done":
            ControlLog(self._fleet.run).append("complete", step=self._fleet.step)
        ended, self._alive = self._alive, set()
        return [Exit(rank, code if rank == 0 else 0, time.time(), None, stopped=False) for rank in sorted(ended)]

    def end(self) -> None:
        self._plan = "done"

    def send(self, ranks: Collection[int], signum: int) -> None:
        if signum == signal.SIGKILL and self._alive:
            self._fleet.killed.append(len(self._alive & set(ranks)))
        if self._plan != "stubborn" or signum == signal.SIGKILL:
            self._signal = signum if set(ranks) & self._alive else self._signal


@dataclass
class Fleet:
    """Nodes with two places each; every start follows the next plan."""

    run: Path
    plans: list[str]
    machines: list[Node] = field(default_factory=lambda: [Node(f"node-{i}", f"rack-{i}", 2) for i in range(2)])
    turn: Callable[[], None] = lambda: None
    flushed: int | None = None
    running: Seating | None = None
    step: int = 0
    fenced: list[int] = field(default_factory=list)
    seatings: list[Seating] = field(default_factory=list)
    released: list[bool] = field(default_factory=list)
    attached: int = 0
    killed: list[int] = field(default_factory=list)
    silent: bool = False  # workers make no step
    group: Group = field(init=False)

    def nodes(self) -> list[Node]:
        return list(self.machines)

    def change(self, name: str, **changes: Any) -> None:
        self.machines = [replace(node, **changes) if node.name == name else node for node in self.machines]

    def fence(self, generation: int) -> None:
        self.fenced.append(generation)

    def start(self, generation: int, seating: Seating, variables: Mapping[str, str]) -> Group:
        self.seatings.append(seating)
        self.running = seating
        return Group(self, seating, self.plans.pop(0))

    def attach(self, generation: int, seating: Seating) -> Group | None:
        if self.running is None:
            return None
        self.attached += 1
        return Group(self, self.running, self.plans.pop(0))

    def tend(self) -> list[str]:
        self.turn()
        return []

    def flush(self, deadline_s: float) -> int | None:
        return self.flushed

    def release(self, ok: bool) -> None:
        self.released.append(ok)

    def strike(self, kind: str, target: str) -> str:
        raise ConfigError("not here")


FOUR = Limits(4, (2, 4), 3)


def controller(fleet: Fleet, limits: Limits = FOUR, *, launch: str = "", **patience: float) -> Controller:
    log = ControlLog(fleet.run)
    return Controller(fleet, log, limits, Patience(**patience), fleet.run, launch=launch, say=lambda text: None)


def records(fleet: Fleet, kind: str) -> list[dict[str, Any]]:
    return [record for record in ControlLog(fleet.run).records if record["kind"] == kind]
