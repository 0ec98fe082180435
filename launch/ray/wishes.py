"""What a job wants of a Ray cluster, and the actors that serve it: found again by their names.

Must not know: when anything is started, what workers compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from windlass.checkpoint.memory.folder import NodeFolder
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.ray.places import Place
from windlass.launch.ray.workers import CONCURRENCY

NAMESPACE = "windlass"


@dataclass(frozen=True)
class Wishes:
    """What a job wants of a Ray cluster. `common`: variables of every worker; `base`: snapshot.folder.

    Units: `lease_s`: actors end themselves when nobody has spoken to them for so many seconds
    """

    job: str
    token: str
    command: WorkerCommand
    config: LaunchConfig
    base: str = "/dev/shm"
    local_dir: str = ""
    snapshots: bool = False
    num_nodes: int = 0
    spread: bool = False
    gpu: bool = False
    fork_server: bool = False
    lease_s: float = 30.0
    cwd: str = "."
    common: Mapping[str, str] = field(default_factory=dict)

    @property
    def worker(self) -> dict[str, float]:
        """What one worker takes of a node."""
        return {"CPU": 1.0, "GPU": 1.0} if self.gpu else {"CPU": 1.0}

    def folder(self, node: str) -> NodeFolder:
        return NodeFolder(Path(self.base), self.job, node)


def actor_prefix(job: str) -> str:
    """Return what the names of all actors of a job begin with."""
    return f"windlass-{job}"


def actor_on(place: Place, kind: type, job: str, name: str, takes: Mapping[str, float]) -> Any:
    """Return what makes an actor of a job on a node, or finds the one of this name. It outlives whoever made it."""
    return ray.remote(kind).options(
        name=f"{actor_prefix(job)}-{name}",
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=takes.get("CPU", 0),
        num_gpus=takes.get("GPU", 0),
        max_concurrency=CONCURRENCY,
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False),
    )


def cause_of(exc: BaseException) -> str:
    """Return what really happened in one line: Ray wraps it."""
    if isinstance(exc, RayActorError) and exc.actor_init_failed:  # all that is left of it is the text of a traceback
        kind, _, message = str(exc).strip().rpartition("\n")[2].partition(": ")
        return message or kind
    return str(getattr(exc, "cause", None) or exc).strip().partition("\n")[0]
