"""Signals to processes of this machine, by number and start time: a number that means another one now is left alone.

Must not know: ranks, folders, why somebody is to be signalled.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from windlass.checkpoint.memory.heartbeat import is_alive

STOPPED = "T"


def letter(pid: int) -> str:
    """Return the state of a process as ps shows it (R, S, D, T, Z, ...), or an empty text when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rpartition(")")[2].split()[0]


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal."""
    return _has(pid, "SigCgt:", signum)


def is_handling(pid: int, signum: int) -> bool:
    """Whether the handler of a signal runs in a process's first thread: the kernel blocks the signal that long."""
    return _has(pid, "SigBlk:", signum)


def _has(pid: int, field: str, signum: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    mask = next((line.split()[1] for line in text.splitlines() if line.startswith(field)), "0")
    return bool(int(mask, 16) >> (signum - 1) & 1)


def send(pid: int, started: int, signum: int) -> bool:
    """Signal a process and return whether it was there."""
    try:
        handle = os.pidfd_open(pid)
    except (OSError, ValueError):
        return False
    try:
        if not is_alive(pid, started):  # asked while the handle keeps the number from meaning another process
            return False
        signal.pidfd_send_signal(handle, signum)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def kill(processes: Iterable[tuple[int, int]], timeout_s: float) -> list[int]:
    """Kill processes (number, start) and wait until they are gone; return the numbers of those that are not.

    Stopped ones go first: they would be the last to notice anything.
    Blocks: host, at most `timeout_s`
    """
    handles: dict[int, tuple[int, int]] = {}
    try:
        for pid, started in sorted(processes, key=lambda who: letter(who[0]) != STOPPED):
            with contextlib.suppress(OSError, ValueError):  # gone already
                handles[os.pidfd_open(pid)] = (pid, started)
            send(pid, started, signal.SIGKILL)
        end = time.monotonic() + timeout_s
        for handle, who in handles.items():
            if is_alive(*who):
                ended = select.poll()
                ended.register(handle, select.POLLIN)
                ended.poll(max(end - time.monotonic(), 0.0) * 1000)
        return [who[0] for who in handles.values() if is_alive(*who)]
    finally:
        for handle in handles:
            os.close(handle)


def resident_bytes(pid: int | str = "self") -> dict[str, int]:
    """Return the memory of a process: `own` (no file behind it), `files` (code), `shared` (mapped segments).

    Units: bytes
    """
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
    return {name: found[f"Rss{field}"] for name, field in (("own", "Anon"), ("files", "File"), ("shared", "Shmem"))}
