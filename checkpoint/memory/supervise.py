"""Starts the snapshot process of a node, finds the one that runs, and replaces one that died or hangs.

Must not know: torch, what the process does, what its starter is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.folder import NodeFolder, SnapshotProcess
from windlass.dist import env
from windlass.dist.errors import CheckpointError

MODULE = "windlass.checkpoint.memory.process"
HANGS_S = 20.0  # its lease is touched every 2 s
KILL_S = 5.0
LOOK_S = 0.005
FAULT = "WINDLASS_FAULT"


def ensure_snapshot_process(
    folder: NodeFolder, timeout_s: float = 20.0, host: str = "", *, faults: bool = True
) -> SnapshotProcess:
    """Return the snapshot process that serves a folder, started if there is none. Any number of callers at once.

    It listens on `host` (default: where the one before it did, else this machine alone) and, if it can, at the port of
    the one before it; a living one that listens elsewhere is replaced. `faults`: it sees the faults that are to be
    injected; one in place of a killed one should not.

    Blocks: host, at most `timeout_s`
    Raises: CheckpointError with the end of its log
    """
    before = folder.read_smp()
    if before is not None and before.alive:
        if host in ("", before.host):
            return before
        _end(folder, before)  # nobody on another node could reach it
    arguments = [
        "--host",
        host or (before.host if before else "127.0.0.1"),
        "--port",
        str(before.port if before else 0),
    ]
    variables = env.copy() | {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "MALLOC_ARENA_MAX": "2",  # many threads, few bytes each
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if not faults:
        variables.pop(FAULT, None)
    command = [sys.executable, "-m", MODULE, str(folder.path), *arguments]
    try:
        # It leaves this process at once, so what is waited for here is only its going.
        left = subprocess.run(
            command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"the snapshot process of {folder.node} did not start within {timeout_s:g} s") from error
    if left.returncode != 0:
        why = left.stderr.decode(errors="replace")[-2000:]
        raise CheckpointError(f"the snapshot process of {folder.node} could not be started: {why}")
    end, pause = time.monotonic() + timeout_s, threading.Event()
    while time.monotonic() < end:
        served = folder.read_smp()
        if served is not None and served.alive:
            return served
        if not folder.path.exists():  # lost, or given up, meanwhile
            raise CheckpointError(f"{folder.path} is gone: there is nothing that a snapshot process could serve")
        pause.wait(LOOK_S)
    raise CheckpointError(
        f"the snapshot process of {folder.node} did not begin to serve {folder.path} within {timeout_s:g} s. "
        f"Its log ends with: {_end_of(folder.path / 'smp.log')}"
    )


def _end(folder: NodeFolder, served: SnapshotProcess) -> None:
    """Kill a snapshot process, and do not return while it lives: there must not be two.

    Blocks: host, at most KILL_S
    Raises: CheckpointError if it cannot be killed
    """
    left = pids.kill([(served.pid, served.started)], KILL_S)
    if left:
        raise CheckpointError(f"the snapshot process {left} of {folder.node} hangs and cannot be killed")


def _end_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[-2000:].strip() or "(empty)"
    except FileNotFoundError:
        return "(there is none)"


class Supervisor:
    """Keeps a node's snapshot process alive, for whoever calls `check` now and then."""

    def __init__(self, folder: NodeFolder, host: str = "", timeout_s: float = 20.0) -> None:
        self.folder, self.host, self.timeout_s = folder, host, timeout_s

    def check(self) -> bool:
        """Replace the process if it is dead or hangs; return whether it was.

        Blocks: host, only when there is something to replace
        Raises: CheckpointError if no new one can be started
        """
        served = self.folder.read_smp()
        if served is not None and served.alive:
            if self.folder.lease_age_s() < HANGS_S and pids.letter(served.pid) != pids.STOPPED:
                return False
            # A second writer beside one that wakes up again must not be.
            _end(self.folder, served)
        ensure_snapshot_process(self.folder, self.timeout_s, self.host, faults=False)
        return True
