"""The agents of a job's nodes from the controller's side: started, asked to fence, listened to, replaced.

An agent that dies or falls silent is replaced while its node lives. A node is lost when Ray says so, when Ray's
process on it no longer listens, or when nothing on it has answered for BEAT_S x BEATS. Must not know: workers.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import ray
from ray.exceptions import RayActorError, RayError

from windlass.dist.errors import ConfigError
from windlass.launch.lines import say
from windlass.launch.ray.agent import NodeAgent, Site
from windlass.launch.ray.beats import BEAT_S
from windlass.launch.ray.places import Place, Places, refusing
from windlass.launch.ray.wishes import Wishes, actor_on, cause_of
from windlass.launch.supervisor import check_stop

BEATS = 3
FENCE_S = 30.0  # for a node that answers; first of all its agent starts
ANSWER_S = 5.0
GONE = "Ray's process on it is gone"


@dataclass
class _Agent:
    """The agent of a place, its answer which domain that is in, and the call to it that is under way since `since`."""

    handle: Any
    node_id: str
    domain: Any
    call: Any = None
    since: float = 0.0
    patience: float = BEAT_S * BEATS

    def ask(self, call: Any, patience: float) -> None:
        self.call, self.since, self.patience = call, time.monotonic(), patience


@final
class Agents:
    """One agent on each node that holds the job or may come to."""

    def __init__(self, wishes: Wishes, places: Places) -> None:
        self._wishes, self._places = wishes, places
        self._agents: dict[str, _Agent] = {}
        self._dropped: Counter[str] = Counter()
        self._anew: set[str] = set()  # nodes that were lost and have not been fenced since
        self._refused: dict[str, str] = {}  # why nodes could not be fenced, as people have heard
        self._beaten = 0.0

    def __contains__(self, name: str) -> bool:
        return name in self._agents

    def handles(self) -> list[Any]:
        """Return the agents that shall live; for any thread."""
        return [agent.handle for name, agent in list(self._agents.items()) if self._places[name].usable]

    def _on(self, place: Place) -> _Agent:
        """Return the agent of a place, a new one if there is none."""
        known = self._agents.get(place.name)
        if known is None or known.node_id != place.node_id:
            wishes = self._wishes
            site = Site(wishes.folder(place.name), wishes.token, wishes.snapshots, wishes.local_dir, wishes.lease_s)
            name = f"agent-{place.name}-{self._dropped[place.name]}"  # one that hangs keeps its name
            handle = actor_on(place, NodeAgent, wishes.job, name, {}).remote(site)
            known = self._agents[place.name] = _Agent(handle, place.node_id, handle.domain.remote())
        return known

    def _drop(self, name: str) -> None:
        """Have nothing more to do with an agent; its successor ends what is left of it."""
        del self._agents[name]
        self._dropped[name] += 1

    def begin_fence(self, place: Place, generation: int) -> None:
        """Have the agent of a place, and let it fence; `tend` sees what comes of it. What was lost begins anew."""
        agent = self._on(place)
        if place.lost:
            self._anew.add(place.name)
        agent.ask(agent.handle.fence.remote(generation, place.name in self._anew), FENCE_S)
        place.lost = ""

    def fence(self, places: Sequence[Place], generation: int) -> None:
        """Fence nodes, all at once; those where that fails count as lost, and people hear why.

        Blocks:      host, at most FENCE_S
        Raises:      Stopped, if waits were made interruptible
        """
        tries = {place.name: 0 for place in places if not place.lost or place.answers()}
        for name in tries:
            self.begin_fence(self._places[name], generation)
        while tries:
            check_stop()
            self._places.refresh()
            for name in list(tries):
                place, agent = self._places[name], self._agents[name]
                ready, _ = ray.wait([agent.call], timeout=0.02)
                try:
                    if not place.alive:
                        place.lost = "Ray says that it is gone"
                    elif time.monotonic() - agent.since > FENCE_S:
                        place.lost = "its agent does not answer"
                    elif not ready:
                        continue
                    else:
                        ray.get(agent.call)
                        place.told(ray.get(agent.domain, timeout=ANSWER_S))
                        self._anew.discard(name)
                except RayActorError as exc:
                    tries[name] += 1
                    self._drop(name)
                    answers = place.answers()
                    if answers and not exc.actor_init_failed and tries[name] < BEATS:
                        self.begin_fence(place, generation)
                        continue
                    place.lost = cause_of(exc) if answers else GONE
                except RayError as exc:
                    place.lost = cause_of(exc)
                del tries[name]
                agent.call = None
                if place.lost and name in self._agents:
                    self._drop(name)
                self._tell_refused(place)

    def _tell_refused(self, place: Place) -> None:
        """Let people hear why a node could not be fenced, once for each reason."""
        if place.lost and self._refused.get(place.name) != place.lost:
            say(f"windlass: {place.name} cannot be used: {place.lost}")
        self._refused[place.name] = place.lost

    def tend(self, generation: int, answers: Callable[[Place], bool]) -> list[str]:
        """Listen to every agent, ask it once in BEAT_S, and return news. `answers`: something else of a node does.

        Blocks:      no
        """
        news = [line for name in list(self._agents) for line in self._listen(name, generation, answers)]
        now = time.monotonic()
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            for name, agent in self._agents.items():
                if agent.call is None and self._places[name].usable:
                    agent.ask(agent.handle.news.remote(), BEAT_S * BEATS)
        return news

    def _listen(self, name: str, generation: int, answers: Callable[[Place], bool]) -> list[str]:
        agent, place = self._agents[name], self._places[name]
        if agent.call is None or not place.usable:
            return []
        ready, _ = ray.wait([agent.call], timeout=0)
        silent_s = time.monotonic() - agent.since
        if not ready and silent_s < agent.patience:
            return []
        try:
            if ready:
                answer = ray.get(agent.call)
                agent.call = None
                return list(answer or [])
            if not answers(place):
                place.lost = f"nothing on it has answered for {silent_s:.0f} s"
            ray.kill(agent.handle)
        except RayActorError:
            if not place.answers():
                place.lost = GONE
        except RayError as exc:
            agent.call = None
            return [f"{name}: {cause_of(exc)}"]
        self._drop(name)
        if place.lost:
            return []
        self.begin_fence(place, generation)
        return [f"agent of {name} replaced"]

    def flush(self, names: Sequence[str], deadline_s: float) -> int | None:
        """Ask agents in this order to make the newest common step durable, and return it.

        Each has a share of the time before the next one is asked as well: one that hangs costs the others only that,
        and one that is slow goes on, because nodes that are asked at once share the work.
        """
        until = time.monotonic() + deadline_s
        places = [self._places[name] for name in names if name in self._agents and self._places[name].usable]
        gone = refusing(places)
        asked = [place for place in places if place not in gone]
        calls: list[Any] = []
        for number, place in enumerate(asked):
            left = max(until - time.monotonic(), 0.0)
            calls.append(self._agents[place.name].handle.flush.remote(left))
            if (step := _first_step(calls, left / (len(asked) - number))) is not None:
                return step
        return None

    def release(self, ok: bool, generation: int) -> None:
        """End the agents, and what is left of this generation on their nodes. One that died gets a successor for it.

        Blocks:      host, at most FENCE_S
        """
        until = time.monotonic() + FENCE_S
        todo = [self._places[name] for name in self._agents if self._places[name].usable]
        for _ in range(2):
            calls = [(place, self._on(place).handle.release.remote(ok, generation)) for place in todo]
            todo = []
            for place, call in calls:
                try:
                    ray.get(call, timeout=max(until - time.monotonic(), 0.0))
                except RayActorError:
                    self._drop(place.name)
                    if place.answers():
                        todo.append(place)
                except RayError:
                    continue  # what is left there ends with its lease
        for agent in self._agents.values():
            ray.kill(agent.handle)
        self._agents.clear()

    def strike(self, place: Place, kind: str, generation: int) -> None:
        """Break a node on purpose through its agent.

        Raises:      ConfigError if it is lost already, or there is nothing to break
        """
        if place.usable:
            try:
                ray.get(self._on(place).handle.beat.remote(), timeout=ANSWER_S)
            except RayError:  # struck before
                self._drop(place.name)
                self.fence([place], generation)
        if place.name not in self._agents or not place.usable:
            raise ConfigError(f"--kill {kind}={place.name}: it is lost already ({place.lost or 'Ray says so'})")
        call = self._agents[place.name].handle.strike.remote(kind)
        if kind != "smp":
            return
        try:
            if not ray.get(call, timeout=ANSWER_S):
                raise ConfigError(f"--kill {kind}={place.name}: no snapshot process runs there now")
        except RayError as exc:
            raise ConfigError(f"--kill {kind}={place.name}: its agent does not answer ({cause_of(exc)})") from exc


def _first_step(calls: list[Any], timeout_s: float) -> int | None:
    """Wait for the first of these calls that returns a step; those that end without one are taken off the list."""
    until = time.monotonic() + timeout_s
    while calls and (ready := ray.wait(calls, timeout=max(until - time.monotonic(), 0.0))[0]):
        calls.remove(ready[0])
        with contextlib.suppress(RayError):
            step: int | None = ray.get(ready[0])
            if step is not None:
                return step
    return None
