"""From a checked job to a controlled run on this machine: workers are started again, nodes keep their memory.

Must not know: what is done when something fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from windlass.dist.errors import ConfigError
from windlass.dist.mesh import plan_mesh
from windlass.launch.check import check_job
from windlass.launch.check_recovery import check_emulated, uses_snapshots
from windlass.launch.control_log import ControlLog, job_of, job_token
from windlass.launch.controller import Controller, Patience, allowed_sizes, limits_of
from windlass.launch.decide import Limits
from windlass.launch.drill import Strike
from windlass.launch.generation import highest_generation
from windlass.launch.job import Loaded
from windlass.launch.local_fleet import LocalFleet, node_names
from windlass.launch.run_folder import RunFolder, alone_in
from windlass.launch.supervisor import StopRequests
from windlass.launch.worker import worker_command

if TYPE_CHECKING:
    from windlass.launch.node_memory import NodeMemory


FLUSH_SHARE = 0.4  # of the time from SIGTERM to the end, when workers do not make it


def needs_controller(loaded: Loaded) -> bool:
    """Tell whether a run of several workers, or of one, needs somebody beside it."""
    config = loaded.config
    return bool(config.recovery.max_restarts or config.recovery.spike_factor) or uses_snapshots(loaded)


def with_fixed_batch(loaded: Loaded) -> Loaded:
    """Return the job with its global batch as a number, so that fewer workers go on with the same one."""
    config = loaded.config
    if config.train.global_batch or not config.recovery.min_workers:
        return loaded
    ranks = plan_mesh(config.parallelism, config.launch.workers).size("dp")
    train = replace(config.train, global_batch=config.train.micro_batch * ranks)
    return replace(loaded, config=replace(config, train=train))


def sizes_of(loaded: Loaded) -> tuple[int, ...]:
    """Return the numbers of workers with which a job works, from recovery.min_workers on.

    Raises:      ConfigError if recovery.min_workers asks for fewer workers but no smaller number works
    """
    config = loaded.config
    workers, smallest = config.launch.workers, config.recovery.min_workers
    sizes = allowed_sizes(workers, smallest, lambda size: check_job(loaded, size, to_run=False))
    if 0 < smallest < workers and sizes == (workers,):
        raise ConfigError(
            f"{loaded.at('recovery.min_workers')}: the job works with {workers} workers only (its mesh and "
            f"train.global_batch = {config.train.global_batch} must fit). Use 0, or a batch that fewer workers can "
            "share"
        )
    return sizes


def prepared(loaded: Loaded) -> tuple[Loaded, Limits]:
    """Return the job as all its starts run it, and how far its recovery may go.

    Raises:      ConfigError as `sizes_of`
    """
    loaded = with_fixed_batch(loaded)
    config = loaded.config
    return loaded, limits_of(config.recovery, config.launch.workers, sizes_of(loaded))


def patience_of(loaded: Loaded) -> Patience:
    """Return how long the controller of a job waits for what."""
    recovery = loaded.config.recovery
    flush_s = FLUSH_SHARE * recovery.grace_s if uses_snapshots(loaded) else 0.0
    return Patience(recovery.grace_s, recovery.grow_s, flush_s)


def run_controlled(loaded: Loaded, strikes: Sequence[Strike] = ()) -> int:
    """Run a job on this machine under a controller and return its exit code; `strikes`: what a drill breaks.

    Blocks:      host, until the job has ended
    """
    check_emulated(loaded)
    loaded, limits = prepared(loaded)
    config = loaded.config
    run = RunFolder(Path(config.train.run_dir).resolve())
    run.create(controlled=True)
    with ExitStack() as stack:
        stack.enter_context(alone_in(run))
        stop = stack.enter_context(StopRequests().listening())
        start_process = None
        if config.recovery.max_restarts and config.recovery.fork_server:
            from windlass.launch.forkserver import ForkServer

            server = ForkServer()
            stack.callback(server.close)
            server.warm_up()
            start_process = server.spawn
        token = job_token(run.root)
        fleet = LocalFleet(
            worker_command(loaded),
            config.launch,
            memories=_memories(loaded, token) if uses_snapshots(loaded) else {},
            local_dir=config.checkpoint.local_dir,
            start_process=start_process,
        )
        log = ControlLog(run.root)
        log.floor = highest_generation(config, node_names(config.launch))
        patience = patience_of(loaded)
        limits = replace(limits, replace_s=0.0)  # no node of this machine comes back
        return Controller(fleet, log, limits, patience, run.root, strikes=strikes).run(stop)


def _memories(loaded: Loaded, token: str) -> dict[str, NodeMemory]:
    """Return the snapshot memory of every node; imported here, because most runs have none."""
    from windlass.checkpoint.memory.folder import NodeFolder
    from windlass.launch.node_memory import NodeMemory

    config = loaded.config
    base = Path(config.snapshot.folder)
    return {
        name: NodeMemory(NodeFolder(base, job_of(config.train.run_dir), name), token)
        for name in node_names(config.launch)
    }
