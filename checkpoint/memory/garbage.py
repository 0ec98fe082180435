"""What dead jobs have left in memory: a folder goes once its lease is over and nobody lives in it.

Must not know: whose job it was, what is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from windlass.checkpoint.memory.folder import NodeFolder, list_jobs
from windlass.checkpoint.memory.heartbeat import read_heartbeat
from windlass.checkpoint.memory.pids import is_alive
from windlass.checkpoint.memory.settings import Settings
from windlass.dist.errors import CheckpointError


def collect_garbage(
    base: Path,
    lease_s: float | None = None,
    *,
    spared: NodeFolder | None = None,
    refused: Callable[[CheckpointError], None] = lambda why: None,
) -> Iterator[tuple[NodeFolder, Exception | None]]:
    """Remove the folders below `base` that nobody needs; yield each, and those that stay because of an error with it.

    `lease_s`: instead of the lease that each job has set for itself. `spared`: the caller's own. `refused` hears why a
    folder is not taken for one of ours.
    """
    for folder in list_jobs(base, refused):
        try:
            if folder == spared or not is_garbage(folder, _lease_of(folder) if lease_s is None else lease_s):
                continue
            folder.remove()
        except (CheckpointError, OSError) as error:  # the leases of others are over all the same
            yield folder, error
        else:
            yield folder, None


def is_garbage(folder: NodeFolder, lease_s: float) -> bool:
    """Tell whether nobody has needed a folder for `lease_s`, and no living process serves or trains in it."""
    process = folder.read_smp()
    beats = [read_heartbeat(path) for path in folder.beating().values()]
    alive = (process is not None and process.alive) or any(b and is_alive(b.pid, b.started) for b in beats)
    return not alive and folder.lease_age_s() > lease_s


def _lease_of(folder: NodeFolder) -> float:
    return Settings.read_from(folder).lease_s
