"""The fleet of this machine: one node, or several emulated ones with a snapshot memory and failure domain each.

Must not know: when workers are started again, what they compute.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CheckpointError, ConfigError
from windlass.launch import lines
from windlass.launch.drill import BY_RANK, ONLY_RAY
from windlass.launch.failure import Failure
from windlass.launch.fleet import Node, Seating
from windlass.launch.local import LaunchConfig, LocalWorkers, StartProcess, WorkerCommand, WorkerProcess, send_to_group

if TYPE_CHECKING:
    from windlass.launch.node_memory import NodeMemory


@dataclass
class _Machine:
    node: Node
    memory: NodeMemory | None


@final
class LocalFleet:
    """Workers of this machine. `memories`: the snapshot memory of each node by name, empty without snapshots."""

    def __init__(
        self,
        command: WorkerCommand,
        config: LaunchConfig,
        *,
        memories: Mapping[str, NodeMemory] | None = None,
        local_dir: str = "",
        start_process: StartProcess | None = None,
    ) -> None:
        self._command, self._config = command, config
        self._local_dir = Path(local_dir) if local_dir else None
        self._start_process = start_process
        self._folders = ExitStack()
        self._zombies: list[WorkerProcess] = []
        self._workers: LocalWorkers | None = None
        self._seating = Seating(())
        names = node_names(config)
        slots = -(-config.workers // max(config.nodes, 1))
        self._machines = {
            name: _Machine(Node(name, domain=name, slots=slots), (memories or {}).get(name)) for name in names
        }

    def nodes(self) -> Sequence[Node]:
        return [machine.node for machine in self._machines.values()]

    def fence(self, generation: int) -> None:
        if self._workers is not None:  # all have been killed: nothing is left of them but what they started
            self._workers.close()
            self._workers = None
        for machine in self._machines.values():
            if machine.node.alive and machine.memory is not None:
                try:
                    machine.memory.fence(generation)
                except CheckpointError as error:
                    if len(self._machines) == 1:
                        raise
                    lines.say(f"windlass: {error}")
                    self._lost(machine)

    def start(self, generation: int, seating: Seating, variables: Mapping[str, str]) -> LocalWorkers:
        # One for each start: whoever tidies up /tmp removes what has lain there for days.
        made = tempfile.TemporaryDirectory(prefix="windlass-", ignore_cleanup_errors=True)
        folder = Path(self._folders.enter_context(made))
        who = []
        for rank, name in enumerate(seating.nodes):
            local_rank, local_world_size, node_rank = seating.place(rank)
            who.append(
                ProcessEnv(
                    rank=rank,
                    local_rank=local_rank,
                    world_size=seating.world_size,
                    local_world_size=local_world_size,
                    node_rank=node_rank,
                    rendezvous=f"file://{folder}/store",
                    launcher="local",
                    generation=generation,
                    node=name,
                    domain=self._machines[name].node.domain,
                )
            )
        self._seating = seating

        def explain(rank: int) -> Failure | None:
            memory = self._machines[seating.nodes[rank]].memory
            return None if memory is None else memory.verdict(rank, generation)

        self._workers = LocalWorkers(self._command, self._config, folder, who, variables, self._start_process, explain)
        return self._workers

    def attach(self, generation: int, seating: Seating) -> None:
        return None  # workers of this machine die with their launcher

    def tend(self) -> list[str]:
        served = [m.memory for m in self._machines.values() if m.node.alive and m.memory is not None]
        return [news for memory in served for news in memory.tend()]

    def flush(self, deadline_s: float) -> int | None:
        """Ask the node of rank 0, which speaks for all, then the others."""
        order = sorted(self._machines.values(), key=lambda m: m.node.name not in self._seating.used[:1])
        until = time.monotonic() + deadline_s
        for machine in order:
            left = until - time.monotonic()
            if machine.memory is not None and machine.node.alive and left > 0:
                step = machine.memory.flush(left)
                if step is not None:
                    return step
        return None

    def release(self, ok: bool) -> None:
        if self._workers is not None:
            self._workers.send(range(self._workers.num_workers), signal.SIGKILL)
        for process in self._zombies:
            send_to_group(process, signal.SIGKILL)
        for machine in self._machines.values():
            if machine.memory is not None:
                machine.memory.release(ok)
                if ok:
                    machine.memory.release_others()
        self._folders.close()

    def strike(self, kind: str, target: str) -> str:
        if kind in ONLY_RAY:
            raise ConfigError(
                f"--kill {kind}={target}: without Ray the launcher is the {kind}, and the run ends with it"
            )
        if kind in BY_RANK:
            return self._strike_rank(kind, int(target))
        machine = self._machine(kind, target)
        name, memory = machine.node.name, machine.memory
        if kind == "smp":
            if memory is None or not (pid := memory.kill()):
                raise ConfigError(f"--kill smp={target}: no snapshot process runs there now")
            return f"snapshot process of {name} (process {pid}) killed"
        ranks = self._seating.ranks_of(name)
        assert self._workers is not None
        if kind == "reboot":
            self._workers.send(ranks, signal.SIGKILL)
            if (memory is None or not memory.kill()) and not ranks:
                raise ConfigError(f"--kill reboot={target}: nothing runs there")
            return f"{name}: everything killed, its folders stay"
        self._lost(machine)
        if kind == "zombie":
            self._zombies += self._workers.abandon(ranks)
            return f"{name} cut off, its processes live on"
        self._workers.send(ranks, signal.SIGKILL)
        if memory is not None:
            memory.lose(self._local_dir)
        return f"{name} lost: ranks {', '.join(map(str, ranks)) or 'none'}, its memory and its local folders"

    def _strike_rank(self, kind: str, rank: int) -> str:
        process = None if self._workers is None else self._workers.process(rank)
        if self._workers is None or process is None:
            raise ConfigError(f"--kill {kind}={rank}: no such worker is running")
        self._workers.send([rank], signal.SIGKILL if kind == "rank" else signal.SIGSTOP)
        return f"rank {rank} (process {process.pid}) {'killed' if kind == 'rank' else 'stopped'}"

    def _machine(self, kind: str, name: str) -> _Machine:
        machine = self._machines.get(name)
        if machine is None:
            raise ConfigError(f"--kill {kind}={name}: there is no such node. Use one of: {', '.join(self._machines)}")
        if not machine.node.alive:
            raise ConfigError(f"--kill {kind}={name}: this node is lost already")
        return machine

    def _lost(self, machine: _Machine) -> None:
        machine.node = replace(machine.node, alive=False)
        if machine.memory is not None:
            machine.memory.leave()


def node_names(config: LaunchConfig) -> list[str]:
    """Return the names of the nodes that this machine stands for, spares last."""
    return [f"node-{number}" for number in range(max(config.nodes, 1) + config.spares)]
