"""Which start of the workers this is, and what the run's control log says to it.

A controller counts generations before it starts workers; where there is none, rank 0 does. A launch is everything that
one call of a launcher starts: under torchrun a start belongs to the launch of the one before if an agent of that one
still starts workers. Must not know: how state is stored or restored.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.checkpoint.fence import read_fence
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.heartbeat import process_started
from windlass.checkpoint.memory.inventory import void
from windlass.checkpoint.storage import Place, storage_of
from windlass.dist.env import ProcessEnv, get
from windlass.launch.check_recovery import needs_process
from windlass.launch.control_log import ControlLog, job_of
from windlass.launch.run_folder import RunFolder

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig

BY_TORCHRUN = "TORCHELASTIC_RESTART_COUNT"  # in the environment of whatever it starts, and of what that starts


@dataclass(frozen=True)
class Start:
    """One start of the workers.

    `restarted`: it follows a failure or a move in the same launch, so it goes on from what that has made, whatever the
    user asked for at first. `since`: the first generation that counts, 0 where all do. `skips`: samples left out.
    `left`: by generation the step to which it went back; what it and earlier ones hold beyond that is of a past that
    the run has left.
    """

    generation: int = 0
    restarted: bool = False
    since: int = 0
    skips: tuple[tuple[int, int], ...] = ()
    left: Mapping[int, int] = field(default_factory=dict)

    @property
    def past(self) -> dict[int, int]:
        """As `left`, with all that was made before `since`: whatever nobody goes on from, wherever it is kept."""
        return {**self.left, self.since - 1: -1} if self.since else dict(self.left)

    def admits(self, generation: int, step: int) -> bool:
        """Tell whether a step belongs to the history that goes on."""
        return not void(generation, step, self.past)


def checkpoints_of(config: JobConfig) -> Place:
    """Return where the checkpoints of a run are."""
    return config.checkpoint.url or RunFolder(Path(config.train.run_dir)).checkpoints


def is_restart(config: JobConfig, env: ProcessEnv) -> bool:
    """Tell whether the launcher has started this job before in the same launch; ask before `begin_generation`."""
    log = ControlLog(Path(config.train.run_dir))
    return log.restarted() if env.generation else log.begun_by([torchrun_agent()])


def torchrun_agent() -> str:
    """Name the process of torchrun that starts workers here, maybe through a script; empty where there is none.

    It lives as long as a launch. A run id may be used again by the next one, and how often workers were started again
    is not known to an agent that has joined later.
    """
    if not get(BY_TORCHRUN):
        return ""
    agent = next((process.pid for process in psutil.Process().parents() if not _is_by_torchrun(process)), 0)
    started = process_started(agent)
    return f"{socket.gethostname()}:{agent}:{started}" if started else ""


def _is_by_torchrun(process: psutil.Process) -> bool:
    try:
        return BY_TORCHRUN in process.environ()
    except psutil.Error:  # of another user, or gone
        return False


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
    whose snapshot it is, whether a step was made before a rollback or after it, and where torchrun would start workers
    again that are not to go on from what they find at first.

    Collective: every rank of the world
    """
    agents = sorted(set(world.gather_objects(torchrun_agent())) - {""})

    def read() -> list[Any]:
        if world.rank != 0:
            return []
        log = ControlLog(Path(config.train.run_dir), env.generation)
        generation, restarted = env.generation, bool(env.generation) and log.restarted()
        if not generation and _is_counted(config, agents):
            restarted = log.begun_by(agents)
            if agents and not restarted:
                log.append("launch", launch=agents[0], workers=world.size)
            floor = highest_generation(config, [node_of(env)])
            generation = log.bump(at_least=floor + 1, by=env.launcher, agents=agents)
        since = log.first_since_launch() if restarted else generation
        left = [[g, step] for g, step in log.left().items()]
        return [generation, restarted, since, [list(skip) for skip in log.skips()], left]

    generation, restarted, since, skips, left = on_all_ranks(world, read).check()[0]
    return Start(
        generation,
        restarted,
        0 if config.checkpoint.resume == "auto" else since,
        tuple((first, stop) for first, stop in skips),
        dict(left),
    )


def _is_counted(config: JobConfig, agents: Sequence[str]) -> bool:
    """Tell whether something depends on which start this is."""
    others = bool(agents) and config.checkpoint.resume != "auto"
    snapshots = needs_process(config.snapshot.every, config.checkpoint.mode)
    return others or snapshots or config.recovery.spike_factor > 0
