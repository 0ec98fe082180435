"""The nodes of a Ray cluster as a fleet: worker actors that stay when workers start again, agents, lost nodes.

Must not know: when workers are started again, what they compute.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, final

import ray
from ray.exceptions import GetTimeoutError, RayError

from windlass.dist.errors import ConfigError, WorkerError
from windlass.launch.failure import Failure
from windlass.launch.fleet import Node, Seating
from windlass.launch.ray.agents import ANSWER_S, BEATS, GONE, Agents
from windlass.launch.ray.beats import BEAT_S, Beats, get_unless_stopped
from windlass.launch.ray.placement import Seat, slots_of_node
from windlass.launch.ray.places import Place, Places, refusing
from windlass.launch.ray.wishes import NAMESPACE, Wishes, actor_on, actor_prefix, cause_of
from windlass.launch.ray.worker_actor import ActorFacts, Job, Line, WorkerActor, meeting_point, worker_variables
from windlass.launch.ray.workers import START_S, RayWorkers, end_actors, streams_shown

ACTOR_S = 60.0
ATTACH_S = 15.0  # for all actors that an earlier controller had: a busy one is slow, Ray says at once that one is dead
LOOK_S = 0.5  # between looks at Ray's table of nodes
STRUCK = {
    "smp": "snapshot process of {} killed",
    "agent": "agent of {} killed",
    "node": "{} lost: its processes, its memory and its local folders",
    "reboot": "{} lost: its processes",
    "zombie": "{} cut off from Ray, its workers live on",
}


class Output(Protocol):
    """Who takes the lines of workers: each once by source and number, and says up to which they are safe."""

    def put(self, source: str, number: int, stream: str, text: str) -> None: ...

    def confirmed(self, source: str) -> int: ...


@dataclass(frozen=True)
class _Worker:
    """An actor that runs a worker, and where."""

    handle: Any
    facts: ActorFacts


@final
class RayFleet:
    """The Ray cluster this process is connected to, for one job. Used by one thread.

    While its `with` block runs the actors of the job live on, whatever is waited for.
    """

    def __init__(self, wishes: Wishes, output: Output) -> None:
        self._wishes, self._output = wishes, output
        self._places = Places(wishes.worker)
        self._agents = Agents(wishes, self._places)
        self._workers: dict[str, _Worker] = {}  # by name of the actor
        self._spares: dict[str, tuple[Any, str]] = {}  # actors that wait on spare nodes, and where
        self._begun: dict[str, Any] = {}  # actors that have not said yet that they are there
        self._group: RayWorkers | None = None
        self._seating = Seating(())
        self._by_rank: list[str] = []  # names of actors
        self._generation = 0
        self._looked = 0.0
        self._released = False
        self._beats = Beats(self._everybody)

    def __enter__(self) -> RayFleet:
        self._beats.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beats.end()

    def _everybody(self) -> list[Any]:
        """Return the actors that shall live. Called by another thread: it looks at copies, made in one go."""
        waiting = [handle for handle, node in list(self._spares.values()) if self._places[node].usable]
        workers = [worker.handle for worker in list(self._workers.values())]
        return [*workers, *waiting, *list(self._begun.values()), *self._agents.handles()]

    # -- nodes -------------------------------------------------------------------------------------------------------

    def nodes(self) -> Sequence[Node]:
        self._places.refresh()
        room, draining = self._places.room(), self._places.draining()
        rooms = {place.name: room.get(place.name, 0) + self._held(place) for place in self._places.all()}
        usable = [rooms[place.name] for place in self._places.all() if place.usable]
        wishes = self._wishes
        nodes = [
            Node(
                place.name,
                place.domain,
                slots_of_node(
                    rooms[place.name],
                    wishes.config.workers,
                    num_nodes=wishes.num_nodes,
                    spread=wishes.spread,
                    rooms=usable,
                ),
                alive=place.usable,
                drain_deadline=draining.get(place.name),
            )
            for place in self._places.all()
        ]
        return sorted(nodes, key=lambda node: -node.slots)  # filled in this order, so that few are used

    def _held(self, place: Place) -> int:
        """Return how many of our actors hold room of a node."""
        waiting = sum(node == place.name for _, node in self._spares.values())
        return waiting + sum(worker.facts.node_id == place.node_id for worker in self._workers.values())

    def _wanted(self) -> list[Place]:
        """Return the nodes that hold the job, would be the first to, or are spare: they have agents."""
        wanted, missing, spares = [], self._wishes.config.workers, self._wishes.config.spares
        for node in self.nodes():
            if not self._places[node.name].alive or node.slots <= 0:
                continue  # one that was taken for lost may answer again
            used = node.name in self._agents or node.name in self._seating.used
            if used or missing > 0 or spares > 0:
                wanted.append(self._places[node.name])
            spares -= missing <= 0
            missing -= node.slots
        return wanted

    # -- generations -------------------------------------------------------------------------------------------------

    def fence(self, generation: int) -> None:
        self._generation = generation
        self._agents.fence(self._wanted(), generation)

    def start(self, generation: int, seating: Seating, variables: Mapping[str, str]) -> RayWorkers:
        places = {name: self._places[name] for name in seating.used}
        self._agents.fence([place for name, place in places.items() if name not in self._agents], generation)
        for place in places.values():
            if not place.usable:
                raise WorkerError(f"{place.name}: {place.lost or 'Ray says that it is gone'}")
        names = _actor_names(seating)
        self._begun = {}
        self._end_workers([self._workers.pop(name) for name in list(self._workers) if name not in names])
        self._have_workers({name: places[node] for name, node in zip(names, seating.nodes, strict=True)})
        workers = [self._workers[name] for name in names]
        seats = [Seat(rank, rank, *seating.place(rank)) for rank in range(seating.world_size)]
        store, port = self._get(workers[0].handle.rendezvous.remote(generation), seating.nodes[0])
        meeting = meeting_point(seats, store, port, address=workers[0].facts.address)
        wishes, started = self._wishes, []
        for seat, worker, node in zip(seats, workers, seating.nodes, strict=True):
            given = worker_variables(
                seat,
                len(seats),
                meeting,
                [workers[rank].facts for rank in seating.ranks_of(node)],
                wishes.config,
                {**wishes.common, **variables},
                generation=generation,
                node=node,
                domain=places[node].domain,
            )
            show, job = streams_shown(seat.rank, wishes.config), Job(seat.rank, generation)
            begin = worker.handle.start.remote(wishes.command, given, wishes.cwd, show, job, wishes.folder(node))
            started.append((begin, node))
        self._have_spares(seating)  # while the workers begin: what they import beside them does not slow steps later
        for begin, node in started:
            self._get(begin, node, START_S, what="a worker has not begun to run")
        self._begun = {}
        return self._watch(names, generation, seating)

    def _have_spares(self, seating: Seating) -> None:
        """Have actors ready on nodes that have an agent and no worker. Nobody waits for them."""
        nodes, self._spares = self.nodes(), {}
        for node in nodes:
            if node.name in self._agents and node.name not in seating.used and node.alive:
                for name in _spare_names(node.name, seating)[: node.slots]:
                    self._spares[name] = (self._begin_worker(name, self._places[node.name]), node.name)

    def _have_workers(self, wanted: Mapping[str, Place]) -> None:
        """Have an actor for every name, on its node. One that died with its worker is replaced."""
        for last in (False, True):
            missing = []
            for name, place in wanted.items():
                known = self._workers.get(name)
                if known is not None and known.facts.node_id == place.node_id:
                    handle = known.handle
                else:
                    handle = self._begin_worker(name, place)
                missing.append((name, place, handle, handle.facts.remote()))
            for name, place, handle, facts in missing:
                try:
                    self._workers[name] = _Worker(handle, self._get(facts, place.name))
                except WorkerError:
                    self._workers.pop(name, None)
                    if last or not place.usable:
                        raise
            if all(name in self._workers for name in wanted):
                return

    def _end_workers(self, workers: Sequence[_Worker]) -> None:
        """End actors; those of lost nodes, which may live on there, are not waited for."""
        answering = {place.node_id for place in self._places.all() if place.usable}
        end_actors([worker.handle for worker in workers if worker.facts.node_id in answering])
        for worker in workers:
            if worker.facts.node_id not in answering:
                ray.kill(worker.handle)

    def _begin_worker(self, name: str, place: Place) -> Any:
        """Start the actor of this name, or find it: it may have been ready on a spare node."""
        wishes = self._wishes
        kind = actor_on(place, WorkerActor, wishes.job, name, wishes.worker)
        handle = self._begun[name] = kind.remote(wishes.lease_s, wishes.fork_server)
        return handle

    def _get(self, call: Any, node: str, timeout_s: float = ACTOR_S, *, what: str = "") -> Any:
        try:
            return get_unless_stopped(call, timeout_s)
        except GetTimeoutError:
            held = f"the actor of a worker has not begun. Other jobs may hold its {' and '.join(self._wishes.worker)}"
            raise WorkerError(f"{node}: {what or held} (after {timeout_s:g} s)") from None
        except RayError as exc:
            if not self._places[node].answers():
                self._places[node].lost = GONE
            raise WorkerError(f"{node}: {cause_of(exc)}") from exc

    def _watch(self, names: Sequence[str], generation: int, seating: Seating) -> RayWorkers:
        sources = [self._workers[name].facts.actor_id if name in self._workers else "" for name in names]

        def show(rank: int, line: Line) -> None:
            text = line.text if rank == 0 else f"[rank {rank}] {line.text}"
            self._output.put(sources[rank], line.number, line.stream, text)

        handles = [self._workers[name].handle if name in self._workers else None for name in names]
        self._by_rank, self._seating, self._generation = list(names), seating, generation
        self._group = RayWorkers(
            handles, generation, show=show, shown=lambda rank: self._output.confirmed(sources[rank])
        )
        return self._group

    def attach(self, generation: int, seating: Seating) -> RayWorkers | None:
        self._places.refresh()
        for node in seating.used:
            self._places.remember(node)
        names, found = _actor_names(seating), {}
        for rank, name in enumerate(names):
            if (handle := self._find_worker(name)) is not None:
                self._begun[name] = handle
                found[name] = (rank, handle, handle.beat.remote(), handle.facts.remote())
        for place in self._places.all():
            if place.name not in seating.used:
                spares = [(name, self._find_worker(name)) for name in _spare_names(place.name, seating)]
                self._spares |= {name: (handle, place.name) for name, handle in spares if handle is not None}
        until = time.monotonic() + ATTACH_S
        for name, (rank, handle, job, facts) in found.items():
            place = self._places[seating.nodes[rank]]
            try:
                if self._have_answered([job, facts], place, until) and ray.get(job) == Job(rank, generation):
                    self._workers[name] = _Worker(handle, ray.get(facts))
            except RayError:
                continue  # its node is lost: the group will say that the rank is
        self._begun = {}
        if not self._workers:
            return None
        for node in seating.used:
            if self._places[node].usable:
                self._agents.begin_fence(self._places[node], generation)
        return self._watch(names, generation, seating)

    def _have_answered(self, calls: list[Any], place: Place, until: float) -> bool:
        """Wait for the answers of an actor, or why there are none, and tell whether they are here. Nobody waits for a
        node where not even Ray's process answers: it counts as lost from here on.
        """
        while True:
            left = until - time.monotonic() if place.usable else 0.0
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=max(min(left, LOOK_S), 0.0))
            if len(ready) == len(calls) or left <= 0:
                return len(ready) == len(calls)
            if not place.answers():
                place.lost = GONE

    def _find_worker(self, name: str) -> Any:
        try:
            return ray.get_actor(f"{actor_prefix(self._wishes.job)}-{name}", NAMESPACE)
        except ValueError:
            return None  # there is none of this name any more

    # -- while workers run -------------------------------------------------------------------------------------------

    def tend(self) -> list[str]:
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._places.refresh()
        news = self._agents.tend(self._generation, self._workers_answer)
        self._look_for_gone()
        self._tell_lost()
        return news

    def _workers_answer(self, place: Place) -> bool:
        heard = self._group.heard if self._group is not None else []
        times = [heard[rank] for rank in self._seating.ranks_of(place.name) if rank < len(heard)]
        return bool(times) and time.monotonic() - max(times) < BEAT_S * BEATS

    def _look_for_gone(self) -> None:
        """Once some workers have ended, ask the nodes of the others: they may not even be there to say how theirs did.

        Ray finds that out by itself, a second or more later.
        """
        silent = self._group.silent if self._group is not None else []
        asked = [self._places[name] for name in dict.fromkeys(self._seating.nodes[rank] for rank in silent)]
        for place in refusing([place for place in asked if place.usable]):
            place.lost = GONE

    def _tell_lost(self) -> None:
        """Let the workers of lost nodes end for those who watch them."""
        for name in self._seating.used:
            place = self._places[name]
            if self._group is None or place.usable:
                continue
            for rank in self._seating.ranks_of(name):
                why = f"{name} is lost: {place.lost or 'Ray says that it is gone'}"
                self._group.give_up(rank, Failure(rank, time.time(), why, "", 1, False, "node"))

    def flush(self, deadline_s: float) -> int | None:
        return self._agents.flush(self._seating.used, deadline_s)  # that of rank 0 first: it speaks for all

    def release(self, ok: bool) -> None:
        if self._released:
            return
        self._released = True
        self._end_workers(list(self._workers.values()))
        end_actors([handle for handle, node in self._spares.values() if self._places[node].usable])
        self._workers.clear()
        self._agents.release(ok, self._generation)

    # -- drills ------------------------------------------------------------------------------------------------------

    def strike(self, kind: str, target: str) -> str:
        """Do what the protocol says; further kinds: controller (this process), reboot (a node whose folders stay)."""
        if kind == "controller":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind in ("rank", "stop"):
            return self._strike_worker(kind, int(target))
        if target not in self._places:
            names = ", ".join(place.name for place in self._places.all())
            raise ConfigError(f"--kill {kind}={target}: there is no node '{target}'. Use one of: {names}")
        if kind == "smp" and not self._wishes.snapshots:
            raise ConfigError(f"--kill smp={target}: this run has no snapshot processes. Add snapshot.every=1")
        self._agents.strike(self._places[target], kind, self._generation)
        return STRUCK[kind].format(target)

    def _strike_worker(self, kind: str, rank: int) -> str:
        what = f"--kill {kind}={rank}"
        worker = self._workers.get(self._by_rank[rank]) if rank < len(self._by_rank) else None
        if worker is None or not self._places[self._seating.nodes[rank]].usable:
            raise ConfigError(f"{what}: no such worker is running")
        signum = signal.SIGKILL if kind == "rank" else signal.SIGSTOP
        try:
            there = ray.get(worker.handle.send.remote(signum, self._generation), timeout=ANSWER_S)
        except (RayError, GetTimeoutError) as exc:  # its node may be gone, and nobody knows yet
            raise ConfigError(f"{what}: its actor does not answer ({cause_of(exc)})") from exc
        if not there:
            raise ConfigError(f"{what}: no such worker is running")
        return f"rank {rank} {'killed' if kind == 'rank' else 'stopped'}"


def _actor_names(seating: Seating) -> list[str]:
    """Return the name of the actor of every rank: those of a node are numbered."""
    return [f"worker-{node}-{seating.place(rank)[0]}" for rank, node in enumerate(seating.nodes)]


def _spare_names(node: str, seating: Seating) -> list[str]:
    """Return the names of the actors that could take over a node's work on a spare one."""
    return [f"worker-{node}-{number}" for number in range(max(map(seating.nodes.count, seating.used)))]
