"""Processes that a test has started and that outlive it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.folder import list_jobs


def processes_of(text: str) -> dict[int, str]:
    """Return the processes whose command line has a text."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
            if text.encode() in words:
                found[int(entry.name)] = words.replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile, or is not ours
            continue
    return found


def end_all(memory: Path) -> None:
    """End the snapshot processes whose folders are in a place, those that wait for their turn too, and remove it."""
    for folder in list_jobs(memory):
        served = folder.read_smp()
        if served is not None:
            pids.send(served.pid, served.started, signal.SIGKILL)
            pids.kill([(served.pid, served.started)], 5.0)
    for pid in processes_of(str(memory)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(memory, ignore_errors=True)
