"""Which start of the workers this is, and what the run's control log says to it.

A controller counts generations before it starts workers; where there is none, rank 0 does.
Must not know: how state is stored or restored.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.checkpoint.fence import read_fence
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.inventory import void
from windlass.checkpoint.storage import Place, storage_of
from windlass.dist.env import ProcessEnv, get
from windlass.launch.check_recovery import needs_process
from windlass.launch.control_log import ControlLog, job_of
from windlass.launch.run_folder import RunFolder

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig


@dataclass(frozen=True)
class Start:
    """One start of the workers.

    `restarted`: it follows a failure or a move, so it goes on from what generations from `since` on have made, whatever
    the user asked for at first. `skips`: samples that are left out.
    `left`: by generation the step to which it went back; what it and earlier ones hold beyond that is of a past that
    the run has left.
    """

    generation: int = 0
    restarted: bool = False
    since: int = 0
    skips: tuple[tuple[int, int], ...] = ()
    left: Mapping[int, int] = field(default_factory=dict)

    def admits(self, generation: int, step: int) -> bool:
        """Tell whether a step belongs to the history that goes on."""
        return not void(generation, step, self.left)


def checkpoints_of(config: JobConfig) -> Place:
    """Return where the checkpoints of a run are."""
    return config.checkpoint.url or RunFolder(Path(config.train.run_dir)).checkpoints


def is_restart(config: JobConfig, env: ProcessEnv) -> bool:
    """Tell whether the launcher has started this job before in the same launch."""
    if env.generation:
        return ControlLog(Path(config.train.run_dir)).restarted()
    return _torchrun_restarts() > 0


def _torchrun_restarts() -> int:
    return int(get("TORCHELASTIC_RESTART_COUNT", "0"))


def node_of(env: ProcessEnv) -> str:
    """Name the machine of this process within the job."""
    return env.node or socket.gethostname().replace("/", "-")


def highest_generation(config: JobConfig, nodes: Iterable[str] = ()) -> int:
    """Return the newest generation that storage, or the memory of nodes on this host, has heard of: the next one must
    be later, also where the run folder has been begun anew.
    """
    base, job = Path(config.snapshot.folder), job_of(config.train.run_dir)
    folders = [NodeFolder(base, job, node) for node in nodes]
    return max(
        [read_fence(storage_of(checkpoints_of(config))).generation, *(folder.read_generation() for folder in folders)]
    )


def begin_generation(config: JobConfig, env: ProcessEnv, world: Peers) -> Start:
    """Return which start this is; without a controller that counts them, rank 0 does where something depends on it:
    whose snapshot it is, and whether a step was made before a rollback or after it.

    Collective: every rank of the world
    """

    def read() -> list[Any]:
        if world.rank != 0:
            return []
        log = ControlLog(Path(config.train.run_dir), env.generation)
        generation, restarts = env.generation, _torchrun_restarts()
        counted = needs_process(config.snapshot.every, config.checkpoint.mode) or config.recovery.spike_factor
        if not generation and counted:
            generation = log.bump(at_least=highest_generation(config, [node_of(env)]) + 1, by=env.launcher)
        since = log.first_since_launch() if env.generation else generation - restarts
        left = [[g, step] for g, step in log.left().items()]
        restarted = is_restart(config, env)
        return [generation, restarted, since, [list(skip) for skip in log.skips()], left]

    generation, restarted, since, skips, left = on_all_ranks(world, read).check()[0]
    return Start(generation, restarted, since, tuple((first, stop) for first, stop in skips), dict(left))
