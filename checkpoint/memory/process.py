"""The snapshot process of one node: `python -m windlass.checkpoint.memory.process NODE_FOLDER [--host H] [--port P]`.

It leaves its starter at once and outlives trainers, agents and launchers. One process serves a folder, by a lock held
for life. Must not know: torch, what it serves (service.py), who started it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

LOOK_S = 0.002
LOG_BYTES = 4 << 20
DYING_S = 2.0  # the threads of a killed process are gone by then, and with them its lock
LOCK = "smp.lock"


def detach(folder: Path) -> None:
    """Leave the starter's session, its pipes, and the list of its children: whatever ends it does not end us."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()
    if os.fork():
        os._exit(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    text = os.open(folder / "smp.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    if os.fstat(text).st_size > LOG_BYTES:
        os.ftruncate(text, 0)  # it lies in memory
    for target, source in ((0, nothing), (1, text), (2, text)):
        os.dup2(source, target)
    os.chdir("/")


def hold(folder: Path) -> int | None:
    """Take the lock that makes this the only process of a folder, for life, and return its file; None if another one
    has it.

    Blocks: host, a moment: threads of a process that was killed may hold its files a little longer than itself
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + DYING_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() >= end:
                return None
            time.sleep(LOOK_S)


def is_of(lock: int, folder: Path) -> bool:
    """Tell whether a lock is that of the folder that is there now: it may have been removed and made anew since."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False


def main(arguments: list[str]) -> int:
    """Run a snapshot process; it detaches itself unless told not to."""
    parser = argparse.ArgumentParser(prog="python -m windlass.checkpoint.memory.process")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--attached", action="store_true", help="stay in the foreground, for looking at it")
    given = parser.parse_args(arguments)
    if not given.attached:
        detach(given.folder)
    lock = hold(given.folder)
    if lock is None:
        return 0
    # Imported only now: a process that leaves its starter, or finds that it is not needed, should be quick.
    from windlass.checkpoint.memory.service import Service, log

    try:
        service = Service(given.folder.absolute(), given.host, given.port)
        if is_of(lock, given.folder):
            service.run()
    except Exception as error:
        log(f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
