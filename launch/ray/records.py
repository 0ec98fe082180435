"""Which processes of a job run on a node, written down in its folder: whoever comes later can still end them.

    <node folder>/processes/worker-00003-<g>.json   worker-actor-.., agent..   {"pid", "started"}

Must not know Ray, nor what the processes do.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.heartbeat import is_alive, process_started

_WORKER = re.compile(r"worker-(\d{5})-(\d+)\.json")


@dataclass(frozen=True)
class Recorded:
    """A process by number and start; `rank` and `generation` of a worker, -1 and 0 of others."""

    path: Path
    pid: int
    started: int
    rank: int = -1
    generation: int = 0

    @property
    def alive(self) -> bool:
        return is_alive(self.pid, self.started)


def record(folder: NodeFolder, name: str, pid: int) -> None:
    """Write a process down under a name, in place of the one that had it."""
    (folder.path / "processes").mkdir(mode=0o700, exist_ok=True)
    content = json.dumps({"pid": pid, "started": process_started(pid) or 0}).encode()
    folder.replace(folder.path / "processes" / f"{name}.json", content)


def record_worker(folder: NodeFolder, rank: int, generation: int, pid: int) -> None:
    """Write a worker down."""
    record(folder, f"worker-{rank:05d}-{generation}", pid)


def recorded(folder: NodeFolder) -> list[Recorded]:
    """Return every process that was written down, alive or not."""
    found = []
    for path in sorted((folder.path / "processes").glob("*.json")):
        try:
            facts = json.loads(path.read_bytes())
            who = _WORKER.fullmatch(path.name)
            rank, generation = (int(who[1]), int(who[2])) if who else (-1, 0)
            found.append(Recorded(path, int(facts["pid"]), int(facts["started"]), rank, generation))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # removed meanwhile, or not ours
    return found


def workers(folder: NodeFolder, *, older_than: int) -> list[Recorded]:
    """Return the workers that were written down, of generations before this one."""
    return [r for r in recorded(folder) if r.rank >= 0 and r.generation < older_than]


def end(processes: list[Recorded], timeout_s: float) -> list[int]:
    """Kill processes, wait until they are gone, and forget them; return the numbers of those that are still there.

    Blocks:      host, at most `timeout_s`
    """
    ours = [r for r in processes if r.pid != os.getpid()]
    left = pids.kill([(r.pid, r.started) for r in ours], timeout_s)
    for r in ours:
        if r.pid not in left:
            r.path.unlink(missing_ok=True)
    return left


def abandon(folder: NodeFolder) -> None:
    """Remove the folder of a node that nobody looks after any more, unless a snapshot process or somebody else does.

    Of several that abandon it at the same time the last one removes it: each is forgotten before it looks for others.
    """
    for r in recorded(folder):
        if r.pid == os.getpid():
            r.path.unlink(missing_ok=True)
    if folder.read_smp() is None and not any(r.alive for r in recorded(folder)):
        folder.remove()
