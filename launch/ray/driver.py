"""A run with recovery in a Ray cluster, from the shell's side: starts the controller, shows its lines, takes all down.

The controller may be killed and come back meanwhile; every line is shown once. Must not know how a run is kept going.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private import worker
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util import list_named_actors

from windlass.checkpoint.local_level import list_local_levels
from windlass.checkpoint.memory.folder import list_jobs
from windlass.dist.errors import CheckpointError, PlanError, WorkerError
from windlass.launch.control_log import ControlLog, job_of, job_token
from windlass.launch.controller import Patience
from windlass.launch.decide import Limits
from windlass.launch.drill import Strike
from windlass.launch.lines import say
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.node_memory import stop_process
from windlass.launch.ray import records
from windlass.launch.ray.cluster import cluster_for, wants_gpu
from windlass.launch.ray.controller import JobController, RayJob
from windlass.launch.ray.placement import plan_placement
from windlass.launch.ray.wishes import NAMESPACE, Wishes, actor_prefix
from windlass.launch.ray.worker_actor import forwarded
from windlass.launch.run_folder import RunFolder, RunLock
from windlass.launch.supervisor import StopCount, StopRequests

HEAD = "node:__internal_head__"  # a resource that Ray gives to its head only
FOLLOW_S = 0.5
SILENT_S = 60.0  # Ray starts a controller again within seconds; after this it will not
TAKE_DOWN_S = 5.0
KILL_S = 5.0


@dataclass(frozen=True)
class Recovering:
    """What a run with recovery needs besides its workers. `snapshots`: it has snapshot processes, below `base`."""

    run: Path
    limits: Limits
    patience: Patience = field(default_factory=Patience)
    snapshots: bool = False
    base: str = "/dev/shm"
    local_dir: str = ""
    strikes: tuple[Strike, ...] = ()
    fork_server: bool = False
    floor: int = 0  # the newest generation that others than the run folder have heard of
    lease_s: float = 30.0


def launch_recovering(
    command: WorkerCommand,
    config: LaunchConfig,
    recovering: Recovering,
    *,
    address: str,
    num_nodes: int,
    spread: bool,
    device: str,
) -> int:
    """Run `config.workers` workers in a Ray cluster, starting them again after failures; return the run's exit code.

    With the address `local` this machine emulates the nodes, and `config.spares` more.

    Raises:      ConfigError if another run uses the run folder; PlanError
    """
    plan_placement(config.workers, num_nodes=num_nodes, spread=spread, gpu=False)  # mistakes show before Ray starts
    if address == "local":
        _check_alone(recovering.run)
    with (
        _without_news(),
        cluster_for(address, config, num_nodes, emulate=True, namespace=NAMESPACE) as where,
        StopRequests().listening() as stop,
    ):
        wishes = Wishes(
            job=job_of(recovering.run),
            token=job_token(recovering.run),
            command=command,
            config=config,
            base=recovering.base,
            local_dir=recovering.local_dir,
            snapshots=recovering.snapshots,
            num_nodes=num_nodes,
            spread=spread,
            gpu=wants_gpu(device, config.workers),
            fork_server=recovering.fork_server,
            lease_s=recovering.lease_s,
            cwd=str(Path.cwd()),
            common=forwarded(),
        )
        job = RayJob(
            run=recovering.run.absolute(),
            launch=secrets.token_hex(8),
            floor=recovering.floor,
            wishes=wishes,
            limits=recovering.limits,
            patience=recovering.patience,
            strikes=recovering.strikes,
            lease_s=recovering.lease_s,
        )
        controller, code = _start(job), 1
        try:
            code = follow(controller, stop)
            return code
        finally:
            end_job(wishes.job)
            if where != address:
                _sweep(wishes, done=code == 0 and _is_complete(recovering.run))


def _check_alone(run: Path) -> None:
    """Refuse a folder in which another run writes, whose snapshots are in the same place here. Its lock is the
    controller's to keep.

    Raises:      ConfigError
    """
    folder = RunFolder(run)
    folder.create()
    RunLock(folder).release()


def _is_complete(run: Path) -> bool:
    """Tell whether nobody needs the snapshots of a run any more."""
    try:
        log = ControlLog(run)
    except CheckpointError:
        return False
    return log.complete(log.generation)


@contextlib.contextmanager
def _without_news() -> Iterator[None]:
    """Keep Ray from printing a page about every process that ends, which it does whatever it is told about logs."""
    printed = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *args, **kwargs: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printed


def _start(job: RayJob) -> Any:
    """Start the controller on the head, in place of what an earlier driver may have left.

    Everything ends with the head anyway. A mere wish to be there would not hold when Ray starts the controller again.

    Raises:      PlanError if the job runs already
    """
    name = actor_prefix(job.wishes.job)
    with contextlib.suppress(ValueError, RayActorError, GetTimeoutError):
        followed = ray.get(ray.get_actor(name, NAMESPACE).follow.remote(("", 0), 0, 0.0), timeout=TAKE_DOWN_S)
        if followed.code is None:
            raise PlanError(
                f"train.run_dir = '{job.run}': the Ray cluster runs this job already (actor {name}). Wait for it, or "
                "give another train.run_dir"
            )
    end_job(job.wishes.job)
    return (
        ray.remote(JobController)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            max_concurrency=4,
            resources={HEAD: 0.001},
        )
        .remote(job)
    )


def follow(controller: Any, stop: StopCount) -> int:
    """Show what a job says until it ends, and return its exit code.

    Raises:      WorkerError if its controller does not come back
    """
    place, has = ("", 0), dict[str, int]()
    heard = time.monotonic()
    while True:
        try:
            followed = ray.get(controller.follow.remote(place, stop.count, FOLLOW_S), timeout=SILENT_S)
        except (RayActorError, GetTimeoutError) as exc:
            if time.monotonic() - heard > SILENT_S:
                raise WorkerError(
                    f"the controller of the job has not answered for {SILENT_S:g} s: {str(exc).partition(chr(10))[0]}. "
                    "What it decided is in control/log.jsonl of the run folder; start the job again to go on"
                ) from exc
            time.sleep(0.1)
            continue
        heard, place = time.monotonic(), followed.place
        for line in followed.lines:
            if line.number > has.get(line.source, 0):
                has[line.source] = line.number
                say(line.text, sys.stdout if line.stream == "stdout" else sys.stderr)
        if followed.code is not None:
            return int(followed.code)


def end_job(job: str) -> None:
    """End every actor of a job that is still there, its controller first."""
    for name in sorted(_actors(job), key=len):
        with contextlib.suppress(ValueError):  # it ended meanwhile
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
    until = time.monotonic() + TAKE_DOWN_S
    while _actors(job) and time.monotonic() < until:
        time.sleep(0.02)


def _actors(job: str) -> Sequence[str]:
    return [name for name in list_named_actors() if name.startswith(actor_prefix(job))]


def _sweep(wishes: Wishes, *, done: bool) -> None:
    """End what emulated nodes left here: processes that Ray had lost sight of, folders without snapshots, and all
    snapshots once the job is done.
    """
    base = Path(wishes.base)
    for folder in list_jobs(base):
        if folder.job != wishes.job:
            continue
        records.end(records.recorded(folder), KILL_S)
        if done or not folder.segments():
            stop_process(folder)
            folder.remove()
    levels = list_local_levels(base, wishes.job, wishes.local_dir) if done and wishes.local_dir else []
    for level in levels:  # also of nodes that were lost
        with contextlib.suppress(OSError):  # what stays on the drive is ignored by another run
            level.remove()
