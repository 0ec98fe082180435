"""What agents and workers of a Ray cluster answer, without a cluster, and where workers sit for it."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from tests.ray_doubles import NODES, Actor, answer, wishes
from windlass.dist.errors import CheckpointError
from windlass.launch.decide import History, Limits, Restart, decide
from windlass.launch.local import LaunchConfig
from windlass.launch.ray.agent import NodeAgent
from windlass.launch.ray.agents import Agents
from windlass.launch.ray.controller import Feed
from windlass.launch.ray.fleet import RayFleet
from windlass.launch.ray.places import Place, Places
from windlass.launch.ray.worker_actor import Polled
from windlass.launch.ray.workers import RayWorkers


class Nodes:
    """The agents of NODES: each that is started is the next of the given ones. Time passes only while calls are waited
    for; a call that has no answer is None.
    """

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch, actors: dict[str, list[Actor]]) -> None:
        self.now = 0.0
        self.places = Places({"CPU": 1.0})
        for name in NODES:
            self.places._places[name] = Place(name, name, f"id of {name}", "127.0.0.1", 1, {})
        self.agents = Agents(wishes(base), self.places)
        started = {name: iter(given) for name, given in actors.items()}

        def actor_on(place: Place, *arguments: Any) -> Any:
            return SimpleNamespace(remote=lambda site: next(started[place.name]))

        monkeypatch.setattr(self.places, "refresh", lambda: None)
        monkeypatch.setattr("windlass.launch.ray.agents.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("windlass.launch.ray.agents.actor_on", actor_on)
        monkeypatch.setattr("windlass.launch.ray.agents.ray.wait", self._wait)
        monkeypatch.setattr("windlass.launch.ray.agents.ray.get", answer)
        monkeypatch.setattr("windlass.launch.ray.agents.refusing", lambda places: [])
        monkeypatch.setattr(Place, "answers", lambda place: True)

    def _wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [call for call in calls if call is not None][:1]
        self.now += 0.0 if ready else timeout
        return ready, []

    def fence(self, generation: int) -> list[Place]:
        self.agents.fence(self.places.all(), generation)
        return self.places.all()


DONE = "done"  # what a call that returns nothing answers here


def test_why_a_node_is_refused_is_recorded_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "snapshot.folder = '/mnt/shm': there is no such folder on this node"
    text = f"ray::NodeAgent.__init__()\n  File agent.py\nwindlass.dist.errors.CheckpointError: {why}"
    refused = ActorDiedError(RayTaskError("__init__", text, CheckpointError(why), "", 1, "127.0.0.1"))
    dies = ActorDiedError()
    nodes = Nodes(
        tmp_path,
        monkeypatch,
        {"node-0": [Actor(fence=refused), Actor(fence=refused)], "node-1": [Actor(fence=dies) for _ in range(6)]},
    )
    for generation in (1, 2):
        assert [place.lost for place in nodes.fence(generation)] == [why, str(dies)]
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == [f"windlass: node-0 cannot be used: {why}", f"windlass: node-1 cannot be used: {dies}"]


def test_a_node_that_was_lost_is_fenced_anew_until_a_fence_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, other = Actor(fence=ActorDiedError()), Actor(fence=DONE), Actor(fence=DONE)
    nodes = Nodes(tmp_path, monkeypatch, {"node-0": [first, second], "node-1": [other]})
    nodes.places["node-0"].lost = "nothing on it has answered for 3 s"
    for generation in (2, 3):
        assert all(place.usable for place in nodes.fence(generation))
    assert [arguments for name, arguments in first.asked if name == "fence"] == [(2, True)]
    assert [arguments for name, arguments in second.asked if name == "fence"] == [(2, True), (3, False)]
    assert [arguments for name, arguments in other.asked if name == "fence"] == [(2, False), (3, False)]


def test_the_environment_of_a_node_names_its_failure_domain_where_no_label_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINDLASS_DOMAIN", "rack-a")
    named = object.__new__(NodeAgent).domain()
    nodes = Nodes(tmp_path, monkeypatch, {name: [Actor(fence=DONE, domain=named)] for name in NODES})
    nodes.places["node-1"].labelled = True
    assert [place.domain for place in nodes.fence(1)] == ["rack-a", "node-1"]


def test_a_node_that_does_not_answer_takes_no_more_than_its_share_of_the_time_to_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, saves = Actor(fence=DONE, flush=None), Actor(fence=DONE, flush=7)
    nodes = Nodes(tmp_path, monkeypatch, {"node-0": [hangs], "node-1": [saves]})
    nodes.fence(1)
    began = nodes.now
    assert nodes.agents.flush(NODES, 12.0) == 7
    assert nodes.now - began == 6.0 and saves.asked[-1] == ("flush", (6.0,))
    saves.answers["flush"] = None
    assert nodes.agents.flush(NODES, 12.0) is None
    monkeypatch.setattr("windlass.launch.ray.agents.refusing", lambda places: places)
    asked = len(hangs.asked)
    assert nodes.agents.flush(NODES, 12.0) is None and len(hangs.asked) == asked, "nobody is there to be asked"


def test_an_answer_that_is_lost_with_its_node_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = [Actor(poll=ObjectLostError("00" * 28, None, "")), Actor(poll=Polled((), None))]
    monkeypatch.setattr("windlass.launch.ray.workers.ray.wait", lambda calls, **named: (calls, []))
    monkeypatch.setattr("windlass.launch.ray.workers.ray.get", answer)
    workers = RayWorkers(actors)
    assert workers.wait(1.0) == [] and [actor.count("poll") for actor in actors] == [2, 2]
    actors[0].answers["poll"] = Polled((), 0)
    assert workers.wait(1.0) == [], "the lost one is lost again"
    actors[1].answers["poll"] = ActorDiedError()
    assert [ended.rank for ended in workers.wait(1.0)] == [0]
    assert [(ended.rank, ended.code) for ended in workers.wait(1.0)] == [(1, -signal.SIGKILL)]


@pytest.mark.parametrize(
    ("rooms", "num_nodes", "spread", "seated"),
    [
        ([2, 4], 1, False, {"node-1": 4}),
        ([1, 2, 2], 2, False, {"node-1": 2, "node-2": 2}),
        ([4, 4], 2, False, {"node-0": 2, "node-1": 2}),
        ([0, 0, 4, 4], 0, True, {"node-2": 2, "node-3": 2}),
        ([1, 8], 0, True, {"node-1": 3, "node-0": 1}),
        ([1, 2, 8], 0, False, {"node-2": 4}),
        ([1, 3, 2], 0, False, {"node-1": 3, "node-2": 1}),
        ([2, 2, 2], 0, False, {"node-0": 2, "node-1": 2}),
    ],
)
def test_a_controlled_run_keeps_what_nodes_and_spread_ask_for(
    rooms: list[int],
    num_nodes: int,
    spread: bool,
    seated: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = wishes(tmp_path, config=LaunchConfig(workers=4), num_nodes=num_nodes, spread=spread)
    fleet = RayFleet(wanted, Feed())
    places = fleet._places
    for number in range(len(rooms)):
        places._places[f"node-{number}"] = Place(f"node-{number}", "", f"id of {number}", "127.0.0.1", 1, {})
    monkeypatch.setattr(places, "refresh", lambda: None)
    monkeypatch.setattr(places, "room", lambda: {f"node-{number}": room for number, room in enumerate(rooms)})
    monkeypatch.setattr(places, "draining", dict)
    decision = decide(History(), fleet.nodes(), Limits(4))
    assert isinstance(decision, Restart), decision
    assert {name: decision.seating.nodes.count(name) for name in decision.seating.used} == seated
