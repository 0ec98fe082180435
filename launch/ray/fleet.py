"""The nodes of a Ray cluster as a fleet: agents, worker actors that stay when workers start again, lost nodes.

A node is lost when Ray says so, when Ray's process on it no longer listens, or when neither its agent nor any of its
workers has answered for BEAT_S x BEATS. Must not know: when workers are started again, what they compute.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from windlass.checkpoint.memory.folder import NodeFolder
from windlass.dist.errors import ConfigError, WorkerError
from windlass.launch.failure import Failure
from windlass.launch.fleet import Node, Seating
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.ray.agent import NodeAgent, Site
from windlass.launch.ray.placement import Seat, slots_of_node
from windlass.launch.ray.places import Place, Places
from windlass.launch.ray.worker_actor import ActorFacts, Job, Line, WorkerActor, meeting_point, worker_variables
from windlass.launch.ray.workers import CONCURRENCY, RayWorkers, end_actors, streams_shown

NAMESPACE = "windlass"
BEAT_S, BEATS = 1.0, 3
FENCE_S = 30.0  # for a node that answers; first of all its agent starts
ACTOR_S = 30.0
LOOK_S = 0.5  # between looks at Ray's table of nodes
STRIKE_S = 5.0


@dataclass(frozen=True)
class Wishes:
    """What a job wants of a Ray cluster. `common`: variables of every worker; `base`: snapshot.folder."""

    job: str
    token: str
    command: WorkerCommand
    config: LaunchConfig
    base: str = "/dev/shm"
    local_dir: str = ""
    snapshots: bool = False
    num_nodes: int = 0
    spread: bool = False
    gpu: bool = False
    lease_s: float = 30.0
    cwd: str = "."
    common: Mapping[str, str] = field(default_factory=dict)

    @property
    def worker(self) -> dict[str, float]:
        return {"CPU": 1.0, "GPU": 1.0} if self.gpu else {"CPU": 1.0}

    def folder(self, node: str) -> NodeFolder:
        return NodeFolder(Path(self.base), self.job, node)


class Output(Protocol):
    """Who takes the lines of workers: each once by source and number, and says up to which they are safe."""

    def put(self, source: str, number: int, stream: str, text: str) -> None: ...

    def confirmed(self, source: str) -> int: ...


@dataclass
class _Agent:
    """The agent of a place. `call` is under way since `since`; it answered last at `heard`."""

    handle: Any
    node_id: str
    call: Any = None
    since: float = 0.0
    patience: float = BEAT_S * BEATS


@dataclass(frozen=True)
class _Worker:
    """An actor that runs a worker, and where."""

    handle: Any
    facts: ActorFacts


def actor_prefix(job: str) -> str:
    """Return what the names of all actors of a job begin with."""
    return f"windlass-{job}"


@final
class RayFleet:
    """The Ray cluster this process is connected to, for one job. Used by one thread."""

    def __init__(self, wishes: Wishes, output: Output) -> None:
        self._wishes, self._output = wishes, output
        self._places = Places(wishes.worker)
        self._agents: dict[str, _Agent] = {}
        self._workers: dict[str, _Worker] = {}  # by name of the actor
        self._group: RayWorkers | None = None
        self._seating = Seating(())
        self._by_rank: list[str] = []  # names of actors
        self._generation = 0
        self._looked = self._beaten = 0.0
        self._released = False

    # -- nodes -------------------------------------------------------------------------------------------------------

    def nodes(self) -> Sequence[Node]:
        self._places.refresh()
        room, draining = self._places.room(), self._places.draining()
        alive = sum(place.usable for place in self._places.all())
        wishes = self._wishes
        return [
            Node(
                place.name,
                place.domain,
                slots_of_node(
                    room.get(place.name, 0) + len(self._workers_on(place)),
                    wishes.config.workers,
                    num_nodes=wishes.num_nodes,
                    spread=wishes.spread,
                    alive=alive,
                ),
                alive=place.usable,
                drain_deadline=draining.get(place.name),
            )
            for place in self._places.all()
        ]

    def _workers_on(self, place: Place) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.facts.node_id == place.node_id]

    def _wanted(self) -> list[Place]:
        """Return the nodes that hold the job or would be the first to: they have agents."""
        wanted, missing = [], self._wishes.config.workers
        spares = self._wishes.config.spares
        for node in self.nodes():
            if node.alive and node.slots > 0:
                used = node.name in self._agents or node.name in self._seating.used
                if used or missing > 0 or spares > 0:
                    wanted.append(self._places[node.name])
                spares -= missing <= 0
                missing -= node.slots
        return wanted

    # -- generations -------------------------------------------------------------------------------------------------

    def fence(self, generation: int) -> None:
        self._generation = generation
        for place in self._places.all():
            place.lost = ""  # it may answer again
        self._fence(self._wanted())

    def _fence(self, places: Sequence[Place]) -> None:
        """Have an agent fence every node; those where that fails count as lost."""
        waiting = {place.name: time.monotonic() + FENCE_S for place in places}
        tries = dict.fromkeys(waiting, 0)
        for place in places:
            self._call_fence(place)
        while waiting:
            self._places.refresh()
            for name, until in list(waiting.items()):
                place, agent = self._places[name], self._agents[name]
                ready, _ = ray.wait([agent.call], timeout=0.02)
                try:
                    if not place.alive or time.monotonic() > until:
                        place.lost = place.lost or "its agent does not answer"
                    elif ready:
                        ray.get(agent.call)
                    else:
                        continue
                except RayActorError:
                    tries[name] += 1
                    if tries[name] < BEATS and place.answers():
                        del self._agents[name]
                        self._call_fence(place)
                        continue
                    place.lost = "Ray's process on it is gone"
                except RayError as exc:
                    place.lost = _cause(exc)
                del waiting[name]
                if place.lost:
                    self._agents.pop(name, None)
                else:
                    agent.call = None

    def _call_fence(self, place: Place) -> None:
        agent = self._agent(place)
        agent.call, agent.since, agent.patience = agent.handle.fence.remote(self._generation), time.monotonic(), FENCE_S

    def _agent(self, place: Place) -> _Agent:
        known = self._agents.get(place.name)
        if known is not None and known.node_id == place.node_id:
            return known
        wishes = self._wishes
        site = Site(wishes.folder(place.name), wishes.token, wishes.snapshots, wishes.local_dir, wishes.lease_s)
        handle = self._actor(NodeAgent, f"agent-{place.name}", place, {}).remote(site)
        self._agents[place.name] = _Agent(handle, place.node_id)
        return self._agents[place.name]

    def _actor(self, kind: type, name: str, place: Place, takes: Mapping[str, float]) -> Any:
        """Return what makes an actor of the job on a node, or finds the one that has this name."""
        return ray.remote(kind).options(
            name=f"{actor_prefix(self._wishes.job)}-{name}",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",  # it outlives a controller that is killed
            num_cpus=takes.get("CPU", 0),
            num_gpus=takes.get("GPU", 0),
            max_concurrency=CONCURRENCY,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False),
        )

    def start(self, generation: int, seating: Seating, variables: Mapping[str, str]) -> RayWorkers:
        places = {name: self._places[name] for name in seating.used}
        self._fence([place for name, place in places.items() if name not in self._agents])
        for place in places.values():
            if not place.usable:
                raise WorkerError(f"{place.name}: {place.lost or 'Ray says that it is gone'}")
        names = [f"worker-{name}-{seating.place(rank)[0]}" for rank, name in enumerate(seating.nodes)]
        self._end_workers([name for name in self._workers if name not in names])
        self._begin_workers(dict(zip(names, [places[node] for node in seating.nodes], strict=True)))
        workers = [self._workers[name] for name in names]
        seats = [Seat(rank, rank, *seating.place(rank)) for rank in range(seating.world_size)]
        store, port = self._get(workers[0].handle.rendezvous.remote(generation), seating.nodes[0])
        meeting = meeting_point(seats, store, port, address=workers[0].facts.address)
        started = []
        for seat, worker, node in zip(seats, workers, seating.nodes, strict=True):
            given = worker_variables(
                seat,
                len(seats),
                meeting,
                [workers[rank].facts for rank in seating.ranks_of(node)],
                self._wishes.config,
                {**self._wishes.common, **variables},
                generation=generation,
                node=node,
                domain=places[node].domain,
            )
            show = streams_shown(seat.rank, self._wishes.config)
            job, folder = Job(seat.rank, generation), self._wishes.folder(node)
            started.append(worker.handle.start.remote(self._wishes.command, given, self._wishes.cwd, show, job, folder))
        for call, node in zip(started, seating.nodes, strict=True):
            self._get(call, node)
        return self._watch(names, generation, seating)

    def _get(self, call: Any, node: str, timeout_s: float = ACTOR_S) -> Any:
        try:
            return ray.get(call, timeout=timeout_s)
        except GetTimeoutError:
            raise WorkerError(
                f"{node}: a worker's actor did not start within {timeout_s:g} s. Other jobs may hold its "
                f"{' and '.join(self._wishes.worker)}"
            ) from None
        except RayError as exc:
            if not self._places[node].answers():
                self._places[node].lost = "Ray's process on it is gone"
            raise WorkerError(f"{node}: {_cause(exc)}") from exc

    def _begin_workers(self, wanted: Mapping[str, Place]) -> None:
        """Have an actor for every name, on its node."""
        for attempt in range(2):
            calls = {}
            for name, place in wanted.items():
                known = self._workers.get(name)
                handle = known.handle if known is not None and known.facts.node_id == place.node_id else None
                if handle is None:
                    handle = self._actor(WorkerActor, name, place, self._wishes.worker).remote(self._wishes.lease_s)
                calls[name] = (handle, handle.facts.remote())
            for name, (handle, call) in calls.items():
                try:
                    self._workers[name] = _Worker(handle, self._get(call, wanted[name].name))
                except WorkerError:
                    self._workers.pop(name, None)  # it died with the worker: a second one takes its place
                    if attempt or not wanted[name].answers():
                        raise
            if all(name in self._workers for name in wanted):
                return

    def _end_workers(self, names: Sequence[str]) -> None:
        gone = [self._workers.pop(name) for name in names]
        end_actors([worker.handle for worker in gone])

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
        names = [f"worker-{name}-{seating.place(rank)[0]}" for rank, name in enumerate(seating.nodes)]
        found = {}
        for rank, name in enumerate(names):
            try:
                handle = ray.get_actor(f"{actor_prefix(self._wishes.job)}-{name}", NAMESPACE)
                found[name] = (rank, handle, handle.beat.remote(), handle.facts.remote())
            except ValueError:
                continue  # there is none of this name any more
        for name, (rank, handle, job, facts) in found.items():
            try:
                if ray.get(job, timeout=BEAT_S * BEATS) == Job(rank, generation):
                    self._workers[name] = _Worker(handle, ray.get(facts, timeout=BEAT_S * BEATS))
            except (RayError, GetTimeoutError):
                continue  # its node is lost: the group will say that the rank is
        if not self._workers:
            return None
        group = self._watch(names, generation, seating)
        for node in seating.used:
            if self._places[node].usable:
                self._call_fence(self._places[node])  # finds the agent, or makes one; `tend` sees whether it answers
        return group

    # -- while workers run -------------------------------------------------------------------------------------------

    def tend(self) -> list[str]:
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._places.refresh()
            self._tell_lost()
        news = [line for name in list(self._agents) for line in self._listen(name, now)]
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            for name, agent in self._agents.items():
                if agent.call is None and self._places[name].usable:
                    agent.call, agent.since, agent.patience = agent.handle.beat.remote(), now, BEAT_S * BEATS
            for worker in self._workers.values():
                worker.handle.beat.remote()
        return news

    def _listen(self, name: str, now: float) -> list[str]:
        """Take the answer of an agent; replace one that is dead or silent, unless its whole node is."""
        agent, place = self._agents[name], self._places[name]
        if agent.call is None or not place.usable:
            return []
        ready, _ = ray.wait([agent.call], timeout=0)
        if not ready and now - agent.since < agent.patience:
            return []
        try:
            if ready:
                answer = ray.get(agent.call)
                agent.call = None
                return list(answer or [])
            if not self._workers_answer(place, now):
                place.lost = f"nothing on it has answered for {now - agent.since:.0f} s"
            ray.kill(agent.handle)
        except RayActorError:
            if not place.answers():
                place.lost = "Ray's process on it is gone"
        except RayError as exc:
            agent.call = None
            return [f"{name}: {_cause(exc)}"]
        del self._agents[name]
        if place.lost:
            self._tell_lost()
            return []
        self._call_fence(place)
        return [f"agent of {name} replaced"]

    def _workers_answer(self, place: Place, now: float) -> bool:
        heard = self._group.heard if self._group is not None else []
        times = [heard[rank] for rank in self._seating.ranks_of(place.name) if rank < len(heard)]
        return bool(times) and now - max(times) < BEAT_S * BEATS

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
        until = time.monotonic() + deadline_s
        for name in self._seating.used:  # that of rank 0 first: it speaks for all
            agent, left = self._agents.get(name), until - time.monotonic()
            if agent is None or left <= 0 or not self._places[name].usable:
                continue
            try:
                step: int | None = ray.get(agent.handle.flush.remote(left), timeout=left)
            except (RayError, GetTimeoutError):
                continue
            if step is not None:
                return step
        return None

    def release(self, ok: bool) -> None:
        if self._released:
            return
        self._released = True
        self._end_workers(list(self._workers))
        agents = [agent.handle for name, agent in self._agents.items() if self._places[name].usable]
        calls = [agent.release.remote(ok) for agent in agents]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=FENCE_S)
        for agent in self._agents.values():
            ray.kill(agent.handle)

    def _answering(self, place: Place) -> _Agent:
        """Return the agent of a place, a new one if it is dead."""
        try:
            ray.get(self._agent(place).handle.beat.remote(), timeout=STRIKE_S)
        except (RayError, GetTimeoutError):
            del self._agents[place.name]
            self._fence([place])
        if place.name not in self._agents:
            raise ConfigError(f"--kill: {place.name} is lost already ({place.lost})")
        return self._agents[place.name]

    # -- drills ------------------------------------------------------------------------------------------------------

    def strike(self, kind: str, target: str) -> str:
        if kind == "controller":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind in ("rank", "stop"):
            rank = int(target)
            worker = self._workers.get(self._by_rank[rank]) if rank < len(self._by_rank) else None
            if worker is None:
                raise ConfigError(f"--kill {kind}={target}: no such worker is running")
            ray.get(worker.handle.send.remote(signal.SIGKILL if kind == "rank" else signal.SIGSTOP), timeout=STRIKE_S)
            return f"rank {rank} {'killed' if kind == 'rank' else 'stopped'}"
        if target not in self._places:
            names = ", ".join(place.name for place in self._places.all())
            raise ConfigError(f"--kill {kind}={target}: there is no node '{target}'. Use one of: {names}")
        if kind == "smp" and not self._wishes.snapshots:
            raise ConfigError(f"--kill smp={target}: this run has no snapshot processes. Add snapshot.every=1")
        call = self._answering(self._places[target]).handle.strike.remote(kind)
        if kind == "smp":
            ray.get(call, timeout=STRIKE_S)
        return {
            "smp": f"snapshot process of {target} killed",
            "agent": f"agent of {target} killed",
            "node": f"{target} lost: its processes, its memory and its local folders",
            "reboot": f"{target} lost: its processes",
            "zombie": f"{target} cut off from Ray, its workers live on",
        }[kind]


def _cause(exc: BaseException) -> str:
    """Return the first line of what really happened: Ray wraps it."""
    return str(getattr(exc, "cause", None) or exc).strip().partition("\n")[0]
