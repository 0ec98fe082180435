"""How long a run waits for its actors, without a cluster: those that it starts, those that another controller had."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from tests.ray_doubles import NODES, Actor, wishes
from windlass.dist.errors import WorkerError
from windlass.launch.fleet import Seating
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.ray.controller import Feed
from windlass.launch.ray.fleet import ATTACH_S, LOOK_S, RayFleet
from windlass.launch.ray.places import Place
from windlass.launch.ray.worker_actor import ActorFacts, Job
from windlass.launch.ray.workers import launch_ray
from windlass.launch.supervisor import StopRequests

NEVER = float("inf")


class Later:
    """An answer that is there at a time."""

    def __init__(self, value: Any, at: float) -> None:
        self.value, self.at = value, at


class Ray:
    """Ray, in which time passes only while answers are waited for. `look` is called with every look for some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.killed: list[Any] = []
        self.look: Callable[[], object] = lambda: None
        clock = SimpleNamespace(monotonic=lambda: self.now)
        for module in ("beats", "fleet", "workers"):
            monkeypatch.setattr(f"windlass.launch.ray.{module}.time", clock)
        for name in ("wait", "get", "kill", "nodes"):
            monkeypatch.setattr(f"ray.{name}", getattr(self, name))

    def wait(self, calls: list[Any], *, num_returns: int = 1, timeout: float) -> tuple[list[Any], list[Any]]:
        self.look()
        due = sorted(call.at if isinstance(call, Later) else 0.0 for call in calls)[num_returns - 1]
        self.now = max(self.now, min(due, self.now + timeout))
        return [call for call in calls if not isinstance(call, Later) or call.at <= self.now], []

    def get(self, call: Any) -> Any:
        assert not isinstance(call, Later) or call.at <= self.now, "nobody waits without an end"
        value = call.value if isinstance(call, Later) else call
        if isinstance(value, Exception):
            raise value
        return value

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": f"id of {name}", "NodeName": name, "Alive": True, "Resources": {}} for name in NODES]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


def facts_on(node: str) -> ActorFacts:
    return ActorFacts(f"id of {node}", "127.0.0.1", "lo", 1, ())


# -- those that another controller had ---------------------------------------------------------------------------------


@pytest.fixture
def attach(ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Attach to two actors on each of two nodes, which answer when they are told to; return the ranks that did."""

    def attach(*times: float, silent: tuple[str, ...] = (), dead: tuple[int, ...] = ()) -> list[int]:
        fleet, seating = RayFleet(wishes(tmp_path), Feed()), Seating((*(NODES[0],) * 2, *(NODES[1],) * 2))
        for name in NODES:
            fleet._places._places[name] = Place(name, name, f"id of {name}", "127.0.0.1", 1, {})
        actors = {}
        for rank, (node, at) in enumerate(zip(seating.nodes, times, strict=True)):
            job = ActorDiedError() if rank in dead else Job(rank, 7)
            actors[f"worker-{node}-{rank % 2}"] = Actor(beat=Later(job, at), facts=Later(facts_on(node), at))
        monkeypatch.setattr(fleet, "_find_worker", actors.get)
        monkeypatch.setattr(fleet._agents, "begin_fence", lambda place, generation: None)
        monkeypatch.setattr(fleet, "_watch", lambda names, *others: [name in fleet._workers for name in names])
        monkeypatch.setattr(Place, "answers", lambda place: place.name not in silent)
        there: Any = fleet.attach(7, seating)
        assert [place.name for place in fleet._places.all() if place.lost] == list(silent)
        return [rank for rank, here in enumerate(there or []) if here]

    return attach


def test_a_new_controller_keeps_actors_that_are_slow_and_waits_once_for_all(
    attach: Callable[..., list[int]], ray: Ray
) -> None:
    assert attach(0.0, 9.0, 14.0, 4.0) == [0, 1, 2, 3]
    assert ray.now == 14.0
    ray.now = 0.0
    assert attach(NEVER, 14.0, NEVER, 0.0) == [1, 3]
    assert ray.now == ATTACH_S
    ray.now = 0.0
    assert attach(0.0, 0.0, 0.0, 0.0, dead=(1, 2)) == [0, 3] and ray.now == 0.0


def test_a_new_controller_does_not_wait_for_a_node_that_is_gone(attach: Callable[..., list[int]], ray: Ray) -> None:
    assert attach(NEVER, NEVER, 0.0, 0.0, silent=NODES[:1]) == [2, 3]
    assert ray.now == LOOK_S
    assert attach(NEVER, NEVER, NEVER, NEVER, silent=NODES) == []


# -- those that a run without recovery starts --------------------------------------------------------------------------


@pytest.fixture
def launch(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Launch two workers, of which rank 1 answers one question so; that is a stop after `patience` looks for answers.

    Whatever comes of it, no actor may be left.
    """

    def launch(question: str, answer: Any, patience: int = 1 << 30) -> int:
        stop, looks = StopRequests(), iter(range(1 << 30))
        ray.look = lambda: setattr(stop, "count", int(next(looks) >= patience))
        answers = {"facts": facts_on("node-0"), "rendezvous": ("file:///nowhere", 1), "start": "begun"}
        actors = [Actor(**answers), Actor(**answers | {question: answer})]
        started = iter(actors)
        options = SimpleNamespace(options=lambda **named: SimpleNamespace(remote=lambda: next(started)))
        monkeypatch.setattr("ray.remote", lambda kind: options)
        for name, given in (("cluster_for", "local"), ("reserved", "room")):
            monkeypatch.setattr(f"windlass.launch.ray.workers.{name}", lambda *a, given=given: nullcontext(given))
        listening = SimpleNamespace(listening=lambda: nullcontext(stop))
        monkeypatch.setattr("windlass.launch.ray.workers.StopRequests", lambda: listening)
        command, config = WorkerCommand(("-c", "pass")), LaunchConfig(workers=2)
        try:
            return launch_ray(command, config, address="local", num_nodes=0, spread=False, device="cpu")
        finally:
            assert ray.killed == actors and [actor.count("clean") for actor in actors] == [1, 1]

    return launch


@pytest.mark.parametrize("question", ["facts", "start"])
def test_a_request_to_stop_ends_the_start_of_workers(
    question: str, launch: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(question, Later(None, NEVER), patience=100) == 128 + signal.SIGTERM
    assert "stopped on request before all workers had begun" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["facts", "start"])
def test_an_actor_that_does_not_answer_or_dies_is_an_error_and_leaves_no_other(
    question: str, launch: Callable[..., int], ray: Ray
) -> None:
    with pytest.raises(WorkerError, match=r"not begun.* \(after 150 s\)"):
        launch(question, Later(None, NEVER))
    ray.killed.clear()
    with pytest.raises(WorkerError, match="the Ray actors of the workers do not start"):
        launch(question, ActorDiedError())
