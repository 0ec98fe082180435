"""Runs in a Ray cluster of emulated nodes that lose workers, agents, controllers and nodes, without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.state import GlobalState
from ray._raylet import GcsClient, GcsClientOptions
from ray.core.generated import autoscaler_pb2

from tests.waiting import until
from windlass.checkpoint.memory.folder import list_jobs
from windlass.launch.control_log import ControlLog, job_of
from windlass.launch.controller import Patience
from windlass.launch.decide import Limits
from windlass.launch.drill import Strike
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.ray.controller import Feed
from windlass.launch.ray.driver import Recovering, launch_recovering
from windlass.launch.ray.emulated import EmulatedNodes, emulated
from windlass.launch.ray.places import natural
from windlass.launch.ray.records import recorded

STEPPING = Path(__file__).with_name("stepping.py")
DRIVER = """
import json, sys
from pathlib import Path
from tests.ray.test_ray_recovery import Job
facts, strikes = json.loads(sys.argv[1])
sys.exit(Job(**facts | {"run": Path(facts["run"])}).launch(*strikes))
"""


@dataclass
class Nodes:
    """The emulated nodes of this module; tests lose some, so each asks for as many as it needs."""

    emulated: EmulatedNodes
    added: int = 0

    @property
    def address(self) -> str:
        return self.emulated.address

    def table(self) -> dict[str, dict[str, Any]]:
        """Return the living nodes by name."""
        state = GlobalState()
        state._initialize_global_state(
            GcsClientOptions.create(self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        living = [n for n in state.node_table() if n["Alive"] and n["NodeName"] != "head"]
        return {n["NodeName"]: n for n in sorted(living, key=lambda n: natural(n["NodeName"]))}

    def have(self, count: int) -> list[str]:
        """Return the names of at least so many living nodes, in the order in which a job takes them."""
        for _ in range(count - len(self.table())):
            self.add()
        return list(self.table())

    def have_only(self, count: int) -> list[str]:
        """Return the names of exactly so many living nodes: others are lost."""
        for name in self.have(count)[count:]:
            node_id = self.table()[name]["NodeID"]
            for process in psutil.process_iter(["cmdline"]):
                command = process.info["cmdline"] or [""]
                if command[0].endswith("/raylet") and any(node_id in part for part in command):
                    process.kill()
        until(lambda: len(self.table()) == count)
        return list(self.table())

    def add(self) -> str:
        self.added += 1
        self.emulated.add(f"node-{9 + self.added}")
        return f"node-{9 + self.added}"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # as in conftest: what this process has read cannot change
        with emulated(3, 1) as made:
            yield Nodes(made)


@dataclass
class Job:
    """One run of two stand-in workers on two nodes."""

    run: Path
    address: str
    steps: int = 20
    step_s: float = 0.1
    lease_s: float = 60.0
    sizes: tuple[int, ...] = ()
    replace_s: float = 0.0
    snapshots: bool = False
    spares: int = 0

    def launch(self, *strikes: str) -> int:
        blows = tuple(_strike(text) for text in strikes)
        payload = {"run": str(self.run), "steps": self.steps, "step_s": self.step_s}
        payload["strikes"] = [blow.step for blow in blows]
        recovering = Recovering(
            self.run,
            Limits(2, self.sizes, 9, node_failures=9, replace_s=self.replace_s),
            Patience(60.0),
            snapshots=self.snapshots,
            strikes=blows,
            lease_s=self.lease_s,
        )
        return launch_recovering(
            WorkerCommand((str(STEPPING), str(self.run)), json.dumps(payload).encode()),
            LaunchConfig(workers=2, spares=self.spares, all_ranks=True),
            recovering,
            address=self.address,
            num_nodes=2,
            spread=False,
            device="cpu",
        )

    def drive(self, *strikes: str) -> subprocess.Popen[str]:
        """Run the launcher as its own process, and return once a worker has made steps."""
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps([vars(self) | {"run": str(self.run)}, strikes])],
            cwd=STEPPING.parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert driver.stdout is not None
        assert any('"step": 3' in line for line in iter(driver.stdout.readline, "")), driver.communicate()[1]
        return driver

    def all_work(self) -> bool:
        """Tell whether every worker has made a step: it hears of a request to stop then."""
        return all((self.run / f"state-{rank}").exists() for rank in (0, 1))

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in ControlLog(self.run).records if record["kind"] == kind]

    def processes(self) -> list[psutil.Process]:
        """Return the workers of this run that live."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if {str(STEPPING), str(self.run)} <= set(process.info["cmdline"] or []):
                with suppress(psutil.Error):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    @property
    def name(self) -> str:
        return job_of(self.run)

    def folders(self) -> list[Path]:
        return [folder.path for folder in list_jobs(Path("/dev/shm")) if folder.job == self.name]


@pytest.fixture
def job(tmp_path: Path, nodes: Nodes) -> Iterator[Job]:
    job = Job(tmp_path, nodes.address)
    yield job
    assert not ray.is_initialized()
    until(lambda: not job.processes() and not job.folders())


def controllers() -> set[int]:
    """Return the controllers of all jobs on this machine."""
    return {p.pid for p in psutil.process_iter(["name"]) if "JobController" in (p.info["name"] or "")}


def _strike(text: str) -> Strike:
    kind, target, step = text.replace("@step", "").split("=")
    return Strike(kind, target, int(step))


@dataclass
class Told:
    """What the launcher printed."""

    out: str
    err: str
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        plain = [line.removeprefix("[rank 1] ") for line in self.out.splitlines()]
        self.steps = [json.loads(line) for line in plain if line.startswith("{")]

    def of(self, **facts: Any) -> list[dict[str, Any]]:
        return [told for told in self.steps if facts.items() <= told.items()]


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Callable[[], Told]:
    return lambda: Told(*capfd.readouterr())


def test_a_killed_controller_disturbs_no_worker_and_loses_no_line(
    job: Job, nodes: Nodes, told: Callable[[], Told]
) -> None:
    first, second = nodes.have(2)[:2]
    job.steps = 60
    assert job.launch("rank=1@step=5", "controller=0@step=12", f"agent={second}@step=20") == 0
    seen = told()
    assert {(line["rank"], line["step"]) for line in seen.steps} == {
        (rank, step) for rank in (0, 1) for step in range(1, 61)
    }
    assert len({(line["rank"], line["step"], line["generation"]) for line in seen.steps}) == len(seen.steps)
    assert [record["why"] for record in job.records("decision")] == ["first start", "in place"]
    assert len({line["pid"] for line in seen.of(generation=2)}) == 2
    assert {(line["rank"], line["node"]) for line in seen.steps} == {(0, first), (1, second)}
    assert "a new controller takes over generation 2" in seen.err
    assert [record["what"] for record in job.records("struck")] == ["rank", "controller", "agent"]


def test_a_spare_node_takes_the_place_of_a_lost_one(job: Job, nodes: Nodes, told: Callable[[], Told]) -> None:
    lost, stays, spare = nodes.have(3)[:3]
    job.spares = 1
    assert job.launch(f"node={lost}@step=4", "rank=0@step=4") == 0
    seen = told()
    assert job.records("blow")[0]["done"]  # whether rank 0 was still there then is chance
    assert lost not in nodes.table()
    (failure,) = job.records("failure")
    (gone,) = job.records("lost")
    assert gone["nodes"] == [lost] and failure["rank"] == 0
    assert job.records("decision")[-1]["nodes"] == [spare, stays]
    assert {line["node"] for line in seen.of(rank=0, generation=2)} == {spare}
    assert f"lost {lost}" in seen.err


@pytest.mark.soak
def test_a_zombie_node_is_fenced_off_and_gone_at_the_end(job: Job, nodes: Nodes, told: Callable[[], Told]) -> None:
    stays, cut_off, spare = nodes.have(3)[:3]
    job.spares, job.steps, job.lease_s = 1, 100, 6.0
    assert job.launch(f"zombie={cut_off}@step=4") == 0
    seen = told()
    until(lambda: not job.processes() and not job.folders())
    assert job.records("lost")[0]["nodes"] == [cut_off]
    assert job.records("decision")[-1]["nodes"] == [stays, spare]
    shown = [line["generation"] for line in seen.of(rank=1)]
    assert shown == sorted(shown) and shown[-1] == 2


@pytest.mark.soak
def test_without_a_spare_a_run_waits_for_a_new_node(job: Job, nodes: Nodes) -> None:
    names = nodes.have_only(2)
    job.replace_s = 25.0
    driver = job.drive(f"node={names[0]}@step=4")
    until(lambda: len(nodes.table()) == 1)
    new = nodes.add()
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert job.records("decision")[-1]["nodes"] == [new, names[1]]
    assert "waiting" in err


@pytest.mark.soak
def test_a_run_shrinks_when_no_node_comes_and_its_snapshot_process_is_replaced(
    job: Job, nodes: Nodes, told: Callable[[], Told]
) -> None:
    names = nodes.have_only(2)
    job.sizes, job.snapshots, job.steps = (1, 2), True, 40
    assert job.launch(f"smp={names[0]}@step=2", f"node={names[1]}@step=15") == 0
    assert job.records("decision")[-1]["nodes"] == [names[0]]
    seen = told()
    assert {line["rank"] for line in seen.of(generation=2)} == {0}
    assert f"snapshot process of {names[0]} replaced" in seen.err


@pytest.mark.soak
def test_a_node_where_nothing_answers_is_fenced_and_used_again(job: Job, nodes: Nodes) -> None:
    names = nodes.have(2)[:2]
    job.steps = 60
    driver = job.drive()
    (frozen,) = [folder for folder in list_jobs(Path("/dev/shm")) if (folder.job, folder.node) == (job.name, names[1])]
    stopped = [process.pid for process in recorded(frozen)]
    assert len(stopped) == 3, "agent, actor and worker"
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert "nothing on it has answered" in job.records("failure")[0]["message"]
    assert job.records("decision")[-1]["nodes"] == names
    assert not any(psutil.pid_exists(pid) for pid in stopped)
    assert '"step": 60, "rank": 1, "generation": 2' in out


@pytest.mark.soak
def test_workers_leave_a_node_that_is_drained_before_it_goes(job: Job, nodes: Nodes, told: Callable[[], Told]) -> None:
    leaves, stays, spare = nodes.have(3)[:3]
    node_id = nodes.table()[leaves]["NodeID"]
    job.steps = 60

    def drain() -> None:
        until(lambda: len(job.records("start")) > 0)
        GcsClient(address=nodes.address).drain_node(
            node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "spot",
            int((time.time() + 20) * 1000),
        )

    draining = threading.Thread(target=drain)
    draining.start()
    assert job.launch() == 0
    draining.join()
    seen = told()
    assert [record["why"] for record in job.records("planned")] == [f"{leaves} will be taken away"]
    assert not job.records("failure")
    assert job.records("decision")[-1]["nodes"] == [spare, stays]
    assert len(seen.of(rank=0)) == 60, "a step was lost"


@pytest.mark.soak
def test_a_request_to_stop_lets_workers_save(job: Job, nodes: Nodes) -> None:
    nodes.have(2)
    job.steps = 1000
    driver = job.drive()
    until(job.all_work)
    os.kill(driver.pid, signal.SIGTERM)
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert sorted(line[:8] for line in out.splitlines() if "saved by" in line) == ["[rank 1]", "saved by"]


def test_a_job_whose_driver_is_killed_stops_and_leaves_nothing(job: Job, nodes: Nodes) -> None:
    nodes.have(2)
    job.steps, job.lease_s = 10_000, 6.0
    before = controllers()
    driver = job.drive()
    until(job.all_work)
    assert job.processes() and controllers() - before
    driver.kill()
    driver.communicate()
    until(lambda: not job.processes() and not job.folders())
    until(lambda: [record["code"] for record in job.records("end")] == [0])
    until(lambda: not controllers() - before)


def test_lines_are_kept_until_the_driver_has_them_and_shown_once() -> None:
    feed = Feed()
    feed.put("a", 1, "stdout", "one")
    feed.put("a", 1, "stdout", "one")  # polled twice
    feed.put("b", 7, "stderr", "seven")
    place, lines = feed.take(("", 0), 0.0)
    assert [(line.source, line.number) for line in lines] == [("a", 1), ("b", 7)]
    assert feed.confirmed("a") == 0, "the driver may not have got them"
    place, lines = feed.take(place, 0.0)
    assert lines == () and feed.confirmed("a") == 1 and feed.confirmed("b") == 7
    feed.put("a", 2, "stdout", "two")
    _, lines = feed.take(("another", 5), 0.0)  # of a feed that died
    assert [line.text for line in lines] == ["two"]
