"""What runs workers: the nodes of this machine or of a Ray cluster behind one protocol, for the controller and drills.

Must not know: when to restart, how a node is watched, what a worker computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from windlass.launch.supervisor import WorkerGroup


@dataclass(frozen=True)
class Node:
    """A machine of the job. `slots`: workers it can hold. `drain_deadline`: Unix seconds at which it will be taken."""

    name: str
    domain: str
    slots: int
    alive: bool = True
    drain_deadline: float | None = None


@dataclass(frozen=True)
class Seating:
    """The node of every rank. Ranks of one node are contiguous."""

    nodes: tuple[str, ...]

    @property
    def world_size(self) -> int:
        return len(self.nodes)

    @property
    def used(self) -> tuple[str, ...]:
        """The nodes in the order of their ranks."""
        return tuple(dict.fromkeys(self.nodes))

    def ranks_of(self, node: str) -> tuple[int, ...]:
        return tuple(rank for rank, name in enumerate(self.nodes) if name == node)

    def place(self, rank: int) -> tuple[int, int, int]:
        """Return local rank, local world size and node rank of a rank."""
        node = self.nodes[rank]
        mine = self.ranks_of(node)
        return mine.index(rank), len(mine), self.used.index(node)


class Fleet(Protocol):
    """The nodes of one job."""

    def nodes(self) -> Sequence[Node]:
        """Return every node that is or was part of the job, spares too, in the order in which to fill them; lost ones
        are not alive.
        """

    def fence(self, generation: int) -> None:
        """Make sure nothing of an older generation can change anything: kill its workers on every node that can be
        reached, tell the snapshot processes the new generation, and start those that should run and do not.

        Blocks:      at most some seconds for each node, all at once; a node that does not answer counts as lost
        Raises:      Stopped, if waits were made interruptible
        """

    def start(self, generation: int, seating: Seating, variables: Mapping[str, str]) -> WorkerGroup:
        """Start the workers of a generation, with further variables in their environment.

        Blocks:      until all run: the first time, while a process imports everything
        Raises:      WorkerError naming the node if one cannot be used; the controller then decides anew. Stopped, if
                     waits were made interruptible
        """

    def attach(self, generation: int, seating: Seating) -> WorkerGroup | None:
        """Return the workers of a generation that an earlier controller started and that still run.

        Ranks that are missing are reported as killed. None: nothing of it is left, or this fleet ends with its
        controller.
        """

    def tend(self) -> list[str]:
        """Look after everything but the workers (snapshot processes, agents, leases) and return news for people.

        Blocks:      milliseconds, longer only while something is replaced; called some times a second
        """

    def flush(self, deadline_s: float) -> int | None:
        """Ask the snapshot processes to make their newest common step durable, and return it; None if there is none
        or time was too short.
        """

    def release(self, ok: bool) -> None:
        """End what is left of the job; `ok`: it is complete, so snapshots are removed, else they stay for their lease.

        Invariant:   may be called once, at any time after the constructor, also after an error; not when another
                     controller has begun a newer generation, whose nodes and workers these are
        """

    def strike(self, kind: str, target: str) -> str:
        """Break something on purpose and return in words what was done.

        Kinds: rank, stop (SIGSTOP) with the number of a rank; smp, agent, node, zombie, reboot with the name of a
        node; controller. node: everything of it is killed, its memory and local folders are deleted; reboot: the
        folders stay; zombie: it counts as lost but its processes live on.

        Raises:      ConfigError if this fleet has no such thing, or it does not run
        """
