"""Parts of a run in a Ray cluster without a cluster: who is spoken to, what is struck, what is swept away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from tests.ray_doubles import JOB, NODES, TOKEN, Actor, answer, wishes
from tests.waiting import until
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.segment import Segment
from windlass.dist.errors import CheckpointError, ConfigError
from windlass.launch.control_log import ControlLog
from windlass.launch.decide import Limits
from windlass.launch.fleet import Seating
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.ray import driver, records
from windlass.launch.ray.agent import NodeAgent, Site
from windlass.launch.ray.agents import Agents
from windlass.launch.ray.beats import Beats, get_unless_stopped
from windlass.launch.ray.controller import Feed, JobController, RayJob
from windlass.launch.ray.driver import Recovering, launch_recovering
from windlass.launch.ray.fleet import RayFleet
from windlass.launch.ray.places import Place, Places
from windlass.launch.ray.worker_actor import ActorFacts
from windlass.launch.run_folder import RunFolder, RunLock, alone_in
from windlass.launch.supervisor import Stopped, StopRequests, interruptible

CHILD = 2**22 + 1  # no process has this number


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.launch.ray.beats.BEAT_S", 0.02)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayFleet:
    """A fleet of two nodes, whose calls answer with what the actors were told to."""
    fleet = RayFleet(wishes(tmp_path), Feed())
    for name in NODES:
        fleet._places._places[name] = Place(name, name, f"id of {name}", "127.0.0.1", 1, {})
    monkeypatch.setattr("windlass.launch.ray.fleet.ray.get", answer)
    return fleet


# -- leases ------------------------------------------------------------------------------------------------------------


def test_actors_are_spoken_to_whatever_their_controller_waits_for(quick: None) -> None:
    everybody = [Actor()]
    beats = Beats(lambda: list(everybody))
    beats.begin()
    until(lambda: everybody[0].count("beat") > 2)
    everybody.append(Actor())
    until(lambda: everybody[1].count("beat") > 2)
    beats.end()
    assert not beats._thread.is_alive()


def test_no_actor_dies_of_its_lease_while_others_start(
    quick: None, fleet: RayFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors: dict[str, Actor] = {}

    def actor_on(place: Place, kind: type, job: str, name: str, takes: Any) -> Any:
        facts = ActorFacts(place.node_id, "127.0.0.1", "lo", 1, ())
        actors[name] = Actor(facts=facts, rendezvous=("file:///nowhere", 1), start="begun")
        return SimpleNamespace(remote=lambda *arguments: actors[name])

    def slow(call: Any, timeout_s: float) -> Any:
        """Wait until all have been spoken to since: a controller that is silent meanwhile waits for ever."""
        before = [actor.count("beat") for actor in actors.values()]
        agent_before = agent.count("beat")
        until(lambda: all(a.count("beat") > b for a, b in zip(actors.values(), before, strict=True)))
        until(lambda: agent.count("beat") > agent_before)
        return call

    agent = Actor()
    monkeypatch.setattr("windlass.launch.ray.fleet.actor_on", actor_on)
    monkeypatch.setattr("windlass.launch.ray.fleet.get_unless_stopped", slow)
    monkeypatch.setattr(fleet._agents, "fence", lambda places, generation: None)
    fleet._agents._agents = {"node-0": SimpleNamespace(handle=agent)}  # type: ignore[dict-item]
    monkeypatch.setattr(fleet, "nodes", list)
    monkeypatch.setattr(fleet, "_watch", lambda *arguments: "workers")
    with fleet:
        assert fleet.start(1, Seating(NODES), {}) == "workers"
    assert [actor.count("start") for actor in actors.values()] == [1, 1]


# -- stops -------------------------------------------------------------------------------------------------------------


def test_waits_for_actors_end_when_somebody_asks_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, looks = StopRequests(), 0

    def never(calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        nonlocal looks
        looks += 1
        stop.count = int(looks > 100)
        return [], calls

    monkeypatch.setattr("windlass.launch.ray.beats.ray.wait", never)
    with pytest.raises(GetTimeoutError):
        get_unless_stopped("call", 0.01)
    looks = 0
    with interruptible(stop), pytest.raises(Stopped):
        get_unless_stopped("call", 60)
    assert looks == 101


def test_a_fence_that_waits_for_a_node_ends_when_somebody_asks_to_stop(tmp_path: Path) -> None:
    places = Places({"CPU": 1.0})
    place = places._places["node-0"] = Place("node-0", "node-0", "id", "127.0.0.1", 1, {})
    agents = Agents(wishes(tmp_path), places)
    agents._agents["node-0"] = SimpleNamespace(handle=Actor(), node_id="id", ask=lambda call, patience: None)  # type: ignore[assignment]
    stop = StopRequests()
    stop.count = 1
    with interruptible(stop), pytest.raises(Stopped):
        agents.fence([place], 2)
    assert place.usable, "nobody knows what is with it"


# -- drills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [ActorDiedError(), GetTimeoutError("silent"), False])
def test_a_strike_on_a_worker_that_is_not_there_is_not_done_and_ends_nothing(sent: Any, fleet: RayFleet) -> None:
    fleet._seating, fleet._by_rank, fleet._generation = Seating(NODES), ["a", "b"], 3
    actor = Actor(send=sent)
    fleet._workers = {"a": SimpleNamespace(handle=actor)}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="--kill rank=0"):
        fleet.strike("rank", "0")
    assert actor.asked == [("send", (signal.SIGKILL, 3))]
    actor.answers["send"] = True
    assert fleet.strike("rank", "0") == "rank 0 killed"
    fleet._places["node-0"].lost = "the power went"
    for target in ("0", "1", "7"):
        with pytest.raises(ConfigError, match="no such worker is running"):
            fleet.strike("rank", target)


@pytest.mark.parametrize("struck", [ActorDiedError(), False])
def test_a_strike_on_a_process_of_a_node_that_is_not_there_is_not_done(
    struck: Any, tmp_path: Path, fleet: RayFleet
) -> None:
    fleet._wishes = wishes(tmp_path, snapshots=True)
    agent = Actor(beat=None, strike=struck)
    fleet._agents._agents["node-0"] = SimpleNamespace(handle=agent, node_id="id of node-0")  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="--kill smp=node-0"):
        fleet.strike("smp", "node-0")
    fleet._places["node-0"].lost = "the power went"
    with pytest.raises(ConfigError, match=r"lost already \(the power went\)"):
        fleet.strike("node", "node-0")
    assert agent.count("strike") == 1


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[[Site], NodeAgent]]:
    made: list[NodeAgent] = []

    def make(site: Site) -> NodeAgent:
        made.append(NodeAgent(site))
        return made[-1]

    yield make
    for each in made:
        each._struck = True  # its thread ends


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What agents have signalled, while nobody hears of it: their raylet has one child. They have an address."""
    monkeypatch.setattr("windlass.launch.ray.agent.ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(
        "windlass.launch.ray.agent.psutil.Process",
        lambda pid: SimpleNamespace(children=lambda **named: [SimpleNamespace(pid=CHILD)]),
    )
    signalled: list[tuple[int, int]] = []

    def kill(processes: list[tuple[int, int]], timeout_s: float) -> list[int]:
        signalled.extend((pid, signal.SIGKILL) for pid, _ in processes)
        return []

    monkeypatch.setattr("windlass.launch.ray.agent.pids.kill", kill)
    monkeypatch.setattr("windlass.launch.ray.agent.os.kill", lambda pid, signum: signalled.append((pid, signum)))
    return signalled


def test_a_lost_node_takes_its_drive_with_it_and_nothing_of_others(
    agent: Callable[[Site], NodeAgent], tmp_path: Path, signalled: list[tuple[int, int]]
) -> None:
    own, others = tmp_path / "drive", tmp_path / "others"
    for folder in (own / JOB / "node-0", own / JOB / "node-1", others / "node-0"):
        (folder / "step-00000004").mkdir(parents=True)
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / JOB).symlink_to(others)
    for drive in (own, planted):
        site = Site(NodeFolder(tmp_path, JOB, "node-0"), TOKEN, snapshots=True, local_dir=str(drive), lease_s=1e9)
        agent(site).strike("node")
    assert signalled[-1] == (os.getpid(), signal.SIGKILL)
    assert not (own / JOB / "node-0").exists() and (own / JOB / "node-1" / "step-00000004").exists()
    assert (others / "node-0" / "step-00000004").exists()


@pytest.mark.parametrize(("kind", "snapshots", "kept"), [("node", True, 0), ("node", False, 0), ("reboot", True, 1)])
def test_ray_s_process_of_a_lost_node_ends_once_the_rest_is_gone_and_tells_nobody_before(
    kind: str,
    snapshots: bool,
    kept: int,
    agent: Callable[[Site], NodeAgent],
    tmp_path: Path,
    signalled: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, there = NodeFolder(tmp_path, JOB, "node-0"), list[bool]()

    def kill(pid: int, signum: int) -> None:
        signalled.append((pid, signum))
        there.append(folder.path.exists())

    monkeypatch.setattr("windlass.launch.ray.agent.os.kill", kill)
    agent(Site(folder, TOKEN, snapshots, lease_s=1e9)).strike(kind)
    raylet = os.getppid()
    assert signalled == [
        (raylet, signal.SIGSTOP),
        (CHILD, signal.SIGKILL),
        (raylet, signal.SIGKILL),
        (os.getpid(), signal.SIGKILL),
    ]
    assert there == [True, bool(kept), bool(kept)]


def test_a_node_that_cannot_lose_everything_is_lost_all_the_same(
    agent: Callable[[Site], NodeAgent],
    tmp_path: Path,
    signalled: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = agent(Site(NodeFolder(tmp_path, JOB, "node-0"), TOKEN, snapshots=True, lease_s=1e9))
    assert ours._memory is not None
    monkeypatch.setattr(ours._memory, "lose", lambda drive: (_ for _ in ()).throw(CheckpointError("not ours")))
    with pytest.raises(CheckpointError):
        ours.strike("node")
    assert signalled[-2:] == [(os.getppid(), signal.SIGKILL), (os.getpid(), signal.SIGKILL)]


# -- the end -----------------------------------------------------------------------------------------------------------


def test_an_agent_releases_nothing_of_a_newer_generation(agent: Callable[[Site], NodeAgent], tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0")
    ours = agent(Site(folder, TOKEN, snapshots=False, lease_s=1e9))
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(150)"])
    try:
        folder.raise_generation(2)
        records.record_worker(folder, 0, 2, worker.pid)
        ours.release(False, 1)
        assert worker.poll() is None and folder.path.exists()
        ours.release(False, 2)
        assert worker.wait(60) == -signal.SIGKILL and not folder.path.exists()
    finally:
        worker.kill()
        worker.wait()


def test_the_last_of_several_actors_that_abandon_a_node_removes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0").create(TOKEN)
    both = os.getpid(), os.getppid()
    for number, pid in enumerate(both):
        records.record(folder, f"actor-{number}", pid)
    there = []
    for pid in both:  # each lives on a little after that
        monkeypatch.setattr("windlass.launch.ray.records.os.getpid", lambda pid=pid: pid)
        records.abandon(folder)
        there.append([record.pid for record in records.recorded(folder)] if folder.path.exists() else None)
    assert there == [[both[1]], None]


def test_memory_is_swept_away_only_if_nobody_needs_it_and_then_with_the_drives(tmp_path: Path) -> None:
    for name in NODES:
        folder = NodeFolder(tmp_path, JOB, name).create(TOKEN)
    Segment.create(folder.segment_path("data", 0, 4096, 2, 1), role="data", rank=0, slot_bytes=4096, num_slots=2,
                   chunk_bytes=4096, table_chunks=1).close()  # fmt: skip
    lost = tmp_path / "drive" / JOB / "a-lost-node" / "step-00000004"
    lost.mkdir(parents=True)
    wanted = wishes(tmp_path, snapshots=True, local_dir=str(tmp_path / "drive"))
    driver._sweep(wanted, done=False)
    assert folder.segments() and lost.exists()
    assert not wanted.folder("node-0").path.exists(), "there was nothing in it"
    driver._sweep(wanted, done=True)
    assert not folder.path.exists() and not (tmp_path / "drive" / JOB).exists()


def test_a_job_is_complete_once_its_newest_workers_have_said_so(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    log.bump()
    log.append("complete", step=7)
    assert driver._is_complete(tmp_path)
    log.bump()  # the same command again, which is stopped before its workers have loaded what is in memory
    assert not driver._is_complete(tmp_path)
    log.path.write_bytes(b"damaged\n" + log.path.read_bytes())
    assert not driver._is_complete(tmp_path)


# -- one folder, one run -----------------------------------------------------------------------------------------------


def test_a_folder_in_use_by_a_local_run_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "cluster_for", lambda *arguments, **named: pytest.fail("Ray was started"))
    folder = RunFolder(tmp_path)
    folder.create()
    recovering = Recovering(tmp_path, Limits(1))
    with alone_in(folder), pytest.raises(ConfigError, match=f"'{tmp_path}': in use by another run"):
        launch_recovering(
            WorkerCommand(("-c", "pass")),
            LaunchConfig(workers=1),
            recovering,
            address="local",
            num_nodes=1,
            spread=False,
            device="cpu",
        )


def test_the_controller_of_a_job_and_a_local_run_refuse_the_folder_of_the_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    controller = object.__new__(JobController)
    controller._job, controller._feed = RayJob(tmp_path, "one", wishes(tmp_path), Limits(1)), Feed()
    with alone_in(folder), pytest.raises(ConfigError, match=f"'{tmp_path}': in use by another run"):
        controller._keep_running()
    with (
        RunLock(folder),  # as the controller holds it
        pytest.raises(ConfigError, match=f"'{tmp_path}': in use by another run"),
        alone_in(folder),
    ):
        pass


def test_an_agent_forgets_a_run_whose_folder_was_begun_anew(
    agent: Callable[[Site], NodeAgent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("windlass.launch.ray.agent.ray.util.get_node_ip_address", lambda: "127.0.0.1")
    folder = NodeFolder(tmp_path, JOB, "node-0").create("33" * 32)
    Segment.create(folder.segment_path("data", 0, 4096, 2, 1), role="data", rank=0, slot_bytes=4096, num_slots=2,
                   chunk_bytes=4096, table_chunks=1).close()  # fmt: skip
    agent(Site(folder, TOKEN, snapshots=True, lease_s=1e9))
    assert not folder.segments() and folder.read_token() == TOKEN
