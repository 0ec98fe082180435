"""What the keys of snapshots, checkpoints and recovery must fulfil together, before any process starts.

Must not know: how snapshots are taken, protected or restored.
"""

from __future__ import annotations

import os
from pathlib import Path

from windlass.dist.device import num_accelerators
from windlass.dist.errors import ConfigError
from windlass.dist.mesh import Mesh, plan_mesh
from windlass.launch.check_unused import unused
from windlass.launch.job import Loaded

WITHOUT_PEERS = ("group", "parity")
BY_WATCHDOG = ("hang_s", "start_s")
WITHOUT_PROCESS = ("slots", "folder", "bucket_bytes", "chunk_bytes", "link_bytes_per_s", "lease_s", "peer_timeout_s")


def uses_snapshots(loaded: Loaded) -> bool:
    """Tell whether a snapshot process runs beside the workers of this job."""
    return needs_process(loaded.config.snapshot.every, loaded.config.checkpoint.mode)


def needs_process(snapshot_every: int, checkpoint_mode: str) -> bool:
    """Tell the same from the two keys that decide it."""
    return snapshot_every > 0 or checkpoint_mode != "sync"


def check_recovery(loaded: Loaded, mesh: Mesh, *, to_run: bool) -> None:
    """Check snapshots, background checkpoints and recovery.

    Raises:      ConfigError naming the key and what would work
    """
    _check_snapshots(loaded, mesh)
    _check_levels(loaded)
    _check_restarts(loaded, mesh)
    if to_run and uses_snapshots(loaded):
        _check_folders(loaded)


def check_without_controller(loaded: Loaded, *, ray: bool) -> None:
    """Check what only a controller knows, for a run that has none; Ray places workers on nodes without one too.

    Raises:      ConfigError for emulated nodes, of which there will be none, and for what only a controller waits for
    """
    why = (
        "without a controller (snapshot.every = 0, checkpoint.mode = 'sync', recovery.max_restarts = 0 and "
        "recovery.spike_factor = 0)"
    )
    if loaded.config.launch.nodes > 1 and not ray:
        unused(loaded, "launch.nodes", f"{why}: this machine is one node then")
    unused(loaded, "launch.spares", f"{why}: nothing takes the place of a lost node then")
    unused(loaded, "recovery.grace_s", f"{why}: a request to stop waits as long as the workers need then")


def check_emulated(loaded: Loaded) -> None:
    """Check a run under a controller on this machine, which may stand for several nodes.

    Raises:      ConfigError naming the numbers of nodes that work, and for what needs real nodes; PlanError
    """
    workers, nodes = loaded.config.launch.workers, loaded.config.launch.nodes
    if nodes and workers % nodes:
        fitting = ", ".join(str(n) for n in range(1, workers + 1) if workers % n == 0)
        raise ConfigError(
            f"{loaded.at('launch.nodes')}: launch.workers = {workers} cannot be divided evenly among {nodes} nodes. "
            f"Use one of {fitting}; further nodes for when one is lost are launch.spares."
        )
    check_controlled(loaded, nodes, emulated=True)
    for name in ("replace_s", "grow_s"):
        if getattr(loaded.config.recovery, name):
            unused(loaded, f"recovery.{name}", "without Ray: no node of this machine comes back")


def check_controlled(loaded: Loaded, nodes: int, *, emulated: bool) -> None:
    """Check what a controller and its nodes (0: nobody knows yet how many) cannot do for a run.

    Raises:      ConfigError naming the key; PlanError for nodes that cannot protect each other as asked for
    """
    unused(loaded, "launch.grace_s", "with a controller, which kills at once what is left of a failed generation")
    if emulated:
        check_shared_devices(loaded, nodes)
    if nodes > 1 and uses_snapshots(loaded):
        from windlass.launch.plan_snapshots import planned_groups

        planned_groups(loaded.config, plan_mesh(loaded.config.parallelism, loaded.config.launch.workers), nodes)


def check_shared_devices(loaded: Loaded, nodes: int) -> None:
    """Check that the nodes which this machine stands for need no accelerator: the first rank of each would take the
    first one.

    Raises:      ConfigError
    """
    if nodes > 1 and loaded.config.train.device != "cpu" and num_accelerators():
        raise ConfigError(
            f"{loaded.at('train.device')}: {nodes} emulated nodes cannot share the GPUs of this machine. Use "
            "train.device=cpu, or a single node."
        )


def _check_snapshots(loaded: Loaded, mesh: Mesh) -> None:
    snapshot = loaded.config.snapshot
    if not uses_snapshots(loaded):
        for name in ("redundancy", *WITHOUT_PEERS, *WITHOUT_PROCESS):
            unused(loaded, f"snapshot.{name}", "without snapshots (snapshot.every = 0 and checkpoint.mode = 'sync')")
    elif snapshot.redundancy == "none":
        for name in WITHOUT_PEERS:
            unused(loaded, f"snapshot.{name}", "with snapshot.redundancy = 'none'")
    elif snapshot.redundancy == "xor":
        unused(loaded, "snapshot.parity", "with snapshot.redundancy = 'xor', which has one parity block")
    if snapshot.every > loaded.config.train.steps:
        raise ConfigError(
            f"{loaded.at('snapshot.every')}: more than train.steps = {loaded.config.train.steps}, so none is ever "
            "taken. Use 1 for one after every step."
        )
    if snapshot.chunk_bytes % 64 or snapshot.bucket_bytes % snapshot.chunk_bytes:
        raise ConfigError(
            f"{loaded.at('snapshot.chunk_bytes')}: must be a multiple of 64 that divides snapshot.bucket_bytes = "
            f"{snapshot.bucket_bytes}. Use 1048576."
        )
    size = {"replica": snapshot.parity + 1, "reed_solomon": snapshot.parity + 2}.get(snapshot.redundancy, 2)
    if snapshot.redundancy != "none" and snapshot.group and snapshot.group < size:
        raise ConfigError(
            f"{loaded.at('snapshot.group')}: snapshot.redundancy = '{snapshot.redundancy}' with snapshot.parity = "
            f"{snapshot.parity} needs groups of {size} nodes or more. Use snapshot.group=0 or {size}."
        )
    if snapshot.redundancy == "replica" and snapshot.group not in (0, size):
        raise ConfigError(
            f"{loaded.at('snapshot.group')}: with snapshot.redundancy = 'replica' a group is one node and its "
            f"snapshot.parity = {snapshot.parity} copies. Use snapshot.group=0."
        )
    if snapshot.redundancy != "none" and mesh.world_size < size:
        raise ConfigError(
            f"{loaded.at('snapshot.redundancy')}: needs at least {size} workers, there are {mesh.world_size}. Use "
            f"snapshot.redundancy=none, or launch.workers={size} on as many nodes."
        )


def _check_levels(loaded: Loaded) -> None:
    checkpoint, snapshot = loaded.config.checkpoint, loaded.config.snapshot
    if checkpoint.mode == "sync":
        for name in ("url", "local_every", "local_dir", "bandwidth_bytes_per_s"):
            unused(loaded, f"checkpoint.{name}", "with checkpoint.mode = 'sync'. Use lazy: the snapshot process writes")
    if bool(checkpoint.local_every) != bool(checkpoint.local_dir):
        raise ConfigError(
            f"{loaded.at('checkpoint.local_every')} and {loaded.at('checkpoint.local_dir')}: give both, such as "
            "checkpoint.local_every=10 checkpoint.local_dir=/nvme/windlass, or none."
        )
    # Levels meet on common steps, so that one snapshot serves all that are due.
    finer = snapshot.every or 1
    for name in ("local_every", "every"):
        every = getattr(checkpoint, name)
        if every and every % finer and checkpoint.mode != "sync":
            below = "checkpoint.local_every" if finer != (snapshot.every or 1) else "snapshot.every"
            raise ConfigError(
                f"{loaded.at(f'checkpoint.{name}')}: must be a multiple of {below} = {finer}, the cadence of the level "
                f"before it. Use {every // finer * finer or finer}."
            )
        finer = every or finer
    if checkpoint.url and "://" not in checkpoint.url:
        raise ConfigError(
            f"{loaded.at('checkpoint.url')}: must be a URL such as s3://bucket/run or file:///mnt/run. Without one, "
            "checkpoints go to the run folder."
        )


def _check_restarts(loaded: Loaded, mesh: Mesh) -> None:
    recovery = loaded.config.recovery
    if not uses_snapshots(loaded):
        why = "without a snapshot process, which looks for hangs (snapshot.every = 0 and checkpoint.mode = 'sync')"
        for name in BY_WATCHDOG:
            unused(loaded, f"recovery.{name}", why)
    if not recovery.max_restarts:
        for name in ("min_workers", "replace_s", "grow_s", "crash_loops", "node_failures", "window_s", "fork_server"):
            unused(loaded, f"recovery.{name}", "with recovery.max_restarts = 0, which gives up at once")
    if recovery.min_workers > mesh.world_size:
        raise ConfigError(f"{loaded.at('recovery.min_workers')}: there are only {mesh.world_size} workers. Use fewer.")
    if not recovery.min_workers:
        unused(loaded, "recovery.grow_s", "with recovery.min_workers = 0: there are never fewer workers")
    if not recovery.spike_factor:
        for name in ("spike_window", "spike_back", "spike_attempts"):
            unused(loaded, f"recovery.{name}", "with recovery.spike_factor = 0")
    else:
        _check_rollback(loaded)


def _check_rollback(loaded: Loaded) -> None:
    """Refuse settings with which the checkpoint to go back to may be gone when the loss jumps."""
    checkpoint, recovery = loaded.config.checkpoint, loaded.config.recovery
    if recovery.spike_factor <= 1:
        raise ConfigError(f"{loaded.at('recovery.spike_factor')}: must be greater than 1, or 0 for never. Use 3.")
    if not (checkpoint.every or checkpoint.local_every):
        raise ConfigError(
            f"{loaded.at('recovery.spike_factor')}: there is nothing to go back to: memory holds the last steps only. "
            "Set checkpoint.every as well, such as checkpoint.every=50."
        )
    from windlass.checkpoint.local_level import KEEP
    from windlass.checkpoint.persist import LEAST_VALID

    # The newest one may be of the step before the jump.
    back, keep = recovery.spike_back, checkpoint.keep
    kept = max(keep, LEAST_VALID) if checkpoint.mode != "sync" else keep
    reach, local_reach = (kept - 1) * checkpoint.every, (KEEP - 1) * checkpoint.local_every
    if (checkpoint.every and (not keep or reach >= back)) or local_reach >= back:
        return
    needs = f"a rollback may need one that is recovery.spike_back = {back} steps older than the newest"
    if not checkpoint.every:
        finer = loaded.config.snapshot.every or 1
        raise ConfigError(
            f"{loaded.at('checkpoint.local_every')}: the {KEEP} newest steps stay on local drives, and {needs}. Use "
            f"checkpoint.local_every={-(-back // finer) * finer}, or set checkpoint.every as well."
        )
    fewer = f", or recovery.spike_back={reach}" if reach else ""
    raise ConfigError(
        f"{loaded.at('checkpoint.keep')}: with checkpoint.every = {checkpoint.every} what is kept goes back {reach} "
        f"steps from the newest, and {needs}. Use checkpoint.keep={-(-back // checkpoint.every) + 1}{fewer}."
    )


def _check_folders(loaded: Loaded) -> None:
    config = loaded.config
    for path in ("snapshot.folder", "checkpoint.local_dir"):
        value = loaded.value(path)
        if value and not (Path(value).is_dir() and os.access(value, os.W_OK | os.X_OK)):
            what = "is no folder" if not Path(value).is_dir() else "may not be written by this user"
            works = "/dev/shm" if path == "snapshot.folder" else "a folder on a local drive"
            raise ConfigError(f"{loaded.at(path)}: {what}. Use {works}.")
    if config.checkpoint.url:
        from windlass.checkpoint.storage import check_url

        check_url(config.checkpoint.url)
