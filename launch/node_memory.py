"""The snapshot memory of one node as a launcher sees it: kept served, fenced, made durable, removed.

Must not know: workers, other nodes, what is in a snapshot.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import final

from windlass.checkpoint.local_level import list_local_levels, remove_local_level
from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.fencing import fence
from windlass.checkpoint.memory.folder import KEEP_S, NodeFolder, list_jobs
from windlass.checkpoint.memory.heartbeat import is_alive, read_heartbeat
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.supervise import Supervisor, ensure_snapshot_process
from windlass.dist.errors import CheckpointError
from windlass.launch.failure import Failure
from windlass.launch.keeper import Keeper

BEGIN_S = 20.0  # a snapshot process is a small interpreter; many may start at once
LOOK_S = 0.1
KILL_S = 5.0


def trainers_of(folder: NodeFolder) -> list[str]:
    """Name the living workers that train with a folder."""
    beats = {rank: read_heartbeat(path) for rank, path in folder.beating().items()}
    return [
        f"rank {rank} (process {beat.pid})" for rank, beat in beats.items() if beat and is_alive(beat.pid, beat.started)
    ]


def stop_process(folder: NodeFolder) -> int:
    """Kill the snapshot process of a folder and return its number; 0 if there was none."""
    served = folder.read_smp()
    if served is None or not pids.send(served.pid, served.started, signal.SIGKILL):
        return 0
    pids.kill([(served.pid, served.started)], KILL_S)
    return served.pid


def remove(folder: NodeFolder) -> None:
    """Remove all that a node has of a run that is complete."""
    stop_process(folder)
    with contextlib.suppress(OSError, CheckpointError):  # what stays on the drive is ignored by another run
        remove_local_level(folder)
    folder.remove()


def forget_another_run(folder: NodeFolder, token: str) -> bool:
    """Remove what is here of a run whose folder has been deleted and begun anew, which the token tells; return whether
    there was something.

    Raises:      CheckpointError if workers of it live
    """
    if not folder.token_path.exists() or folder.read_token() == token:
        return False
    if users := trainers_of(folder):
        raise CheckpointError(
            f"{folder.path} is in use by {', '.join(users)} of an earlier run in the same folder, which was deleted "
            "under it. End that run first"
        )
    stop_process(folder)
    folder.remove()
    return True


@final
class NodeMemory:
    """The folder of a job on this node and the process that serves it.

    `host`: the address at which other nodes of the job reach this one.

    Invariant:   whatever happens to the process, the memory stays: it is respawned and finds all of it
    """

    def __init__(self, folder: NodeFolder, token: str, host: str = "") -> None:
        forget_another_run(folder, token)
        self.folder, self._token, self._host = folder.create(token), token, host
        self._supervisor = Supervisor(folder, host=host)
        self._news: SimpleQueue[str] = SimpleQueue()
        self._left = threading.Event()
        self._local_dir = ""  # of the run that has ended well
        self._keeper: threading.Thread | None = None

    def fence(self, generation: int) -> None:
        """Raise the generation, kill what older ones left here, and have a snapshot process.

        Blocks:      host, at most the time that killing may take, and BEGIN_S
        Raises:      CheckpointError naming the node and what is left, or if a newer generation has begun
        """
        self.folder.create(self._token)
        fence(self.folder, generation)
        for path in (self.folder.path / "verdicts").glob("*.json"):
            path.unlink(missing_ok=True)  # they were about generations that are over
        ensure_snapshot_process(self.folder, BEGIN_S, host=self._host)
        if self._keeper is None or not self._keeper.is_alive():
            self._left.clear()
            self._keeper = threading.Thread(target=self._keep_served, name=f"keep {self.folder.node}", daemon=True)
            self._keeper.start()

    def tend(self) -> list[str]:
        """Return what has happened to the snapshot process since the last call. Blocks: no."""
        news = []
        while not self._news.empty():
            news.append(self._news.get_nowait())
        return news

    def _keep_served(self) -> None:
        """Replace the process whenever it died or hangs, so that nobody who asks for news waits for that."""
        keeper = Keeper(self._supervisor)
        kept = -KEEP_S
        while not self._left.wait(LOOK_S):
            if time.monotonic() - kept >= KEEP_S:
                kept = time.monotonic()
                with contextlib.suppress(OSError):  # the folder is gone, or memory is full: the process lives on
                    self.folder.keep()
            if news := keeper.look():
                self._news.put(news)

    def verdict(self, rank: int, generation: int) -> Failure | None:
        """Return why the watchdog of this node ended a rank, None if it did not."""
        try:
            verdict = json.loads(self.folder.verdict_path(rank).read_bytes())
            if verdict["generation"] != generation:
                return None
            where = f"{verdict['phase']} at step {verdict['step']}"
            silent = "" if verdict["silent_s"] is None else f" for {verdict['silent_s']:.1f} s"
            if verdict["limit_s"] is not None:
                silent += f", {verdict['limit_s']:.1f} s allowed"
            stopped = " (stopped by a signal)" if verdict["state"] == pids.STOPPED else ""
            if verdict["suspect"]:
                message = f"hung in {where}{silent}{stopped}; stacks of all ranks beside {verdict['stacks']}"
            else:
                message = f"waited in {where} for a rank that hung"
            code = 128 + signal.SIGKILL
            # A watchdog sees the ranks of its own node only: one that runs may wait for a rank elsewhere.
            return Failure(rank, verdict["when"], message, "", code, not verdict["suspect"], "hang", bool(stopped))
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or none of ours
            return None

    def flush(self, deadline_s: float) -> int | None:
        """Make the newest protected step durable; return it, or None."""
        try:
            with SnapshotClient.of(self.folder) as client:
                return client.flush(deadline_s).step
        except CheckpointError:
            return None

    def release(self, ok: bool) -> None:
        """End the snapshot process and remove its memory if nobody needs it any more: `ok`, or there is nothing in it.

        Else both stay for their lease.
        """
        self.leave()
        if not ok and self.folder.segments():
            return
        if ok:
            with contextlib.suppress(CheckpointError):
                self._local_dir = Settings.read_from(self.folder).local_dir
            remove(self.folder)
        else:
            stop_process(self.folder)
            self.folder.remove()

    def release_others(self) -> None:
        """Do the same, after a good end, for nodes that an earlier launch of this job had on this machine and this one
        has not, whether or not there is still something in memory that says where their drives are.
        """
        base, job = self.folder.base, self.folder.job
        for folder in list_jobs(base):
            if folder.job == job:
                remove(folder)
        if self._local_dir:
            self._clear_drive(self._local_dir)

    def _clear_drive(self, local_dir: Path | str, node: str = "") -> None:
        """Remove what the nodes of this job, or this one, have on the drive of this machine."""
        for level in list_local_levels(self.folder.base, self.folder.job, local_dir):
            if node in ("", level.node.node):
                with contextlib.suppress(OSError):  # what stays is ignored by another run
                    level.remove()

    def kill(self) -> int:
        """Kill the snapshot process, as a drill, and return its number; 0 if there was none."""
        return stop_process(self.folder)

    def lose(self, local_dir: Path | None = None) -> None:
        """Make this node lose everything: its snapshot process, its memory, its local level."""
        self.leave()
        stop_process(self.folder)
        self.folder.remove()
        if local_dir is not None:
            self._clear_drive(local_dir, self.folder.node)

    def leave(self) -> None:
        """Look after it no longer, as if the node could not be reached."""
        self._left.set()
        if self._keeper is not None:
            self._keeper.join(BEGIN_S)
