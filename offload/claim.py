"""The folder of one rank's state on a drive: named after the run, claimed by one live process.

    windlass-<run>-rank00003/
        lock                  held by the process that uses the folder; says who that is
        state.bin             the bytes of all extents
        commit-00000007.json  what is whole (commit.py)

Must not know: what the bytes mean.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from windlass.dist.errors import OffloadError

STATE_NAME = "state.bin"
_LOCK_NAME = "lock"


def run_folder(folder: Path, rank: int, identity: Mapping[str, Any]) -> Path:
    """Return where a rank of a run keeps its state under a folder of a drive.

    Raises: OffloadError if that folder is not there: a misspelt one must not be created
    """
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "does not exist"
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, 1)
        meant = f" Did you mean {folder.parent / near[0]}?" if near else ""
        raise OffloadError(f"cluster.nvme_paths: {folder} {why}.{meant} Name a folder on a drive; it is never created")
    try:
        text = json.dumps(identity, sort_keys=True)
    except TypeError as error:
        raise OffloadError(f"identity of a run: {error}. Give plain numbers, texts, lists and maps") from error
    return folder / f"windlass-{xxhash.xxh3_64_hexdigest(text.encode())[:12]}-rank{rank:05d}"


class Claim:
    """A run's folder that belongs to this process until `release`."""

    def __init__(self, folder: Path) -> None:
        """Claim it, creating it if it is not there.

        Raises: OffloadError naming the process that holds it, or why it cannot be written
        """
        self.folder = folder
        self._fd = -1
        try:
            while self._fd < 0:
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    sync_folder(folder.parent)
                self._take(folder / _LOCK_NAME)
        except OSError as error:
            raise OffloadError(
                f"cluster.nvme_paths: {folder} cannot be used ({error.strerror}). Name a folder that can be written"
            ) from error

    def _take(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            return  # removed by its last owner just now; it is made again
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 200).decode(errors="replace").strip() or "another process"
            os.close(fd)
            if holder == _name():
                raise OffloadError(
                    f"{self.folder} is open here already. Does cluster.nvme_paths name it twice?"
                ) from error
            raise OffloadError(
                f"{self.folder} is in use by {holder}. Wait for it to end or stop it, or give this run another name"
            ) from error
        except OSError:
            os.close(fd)
            raise
        # Whoever held it before may have removed the folder between our open and our lock.
        try:
            current = os.stat(path).st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            current = False
        if not current:
            os.close(fd)
            return
        os.ftruncate(fd, 0)
        os.pwrite(fd, _name().encode(), 0)
        self._fd = fd

    def release(self, *, remove: bool = False) -> None:
        """Give the folder back, or delete it with all that is in it."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            if remove:
                self.clear()
                (self.folder / _LOCK_NAME).unlink()
                # Another process may have claimed it from the moment the lock was gone.
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
        finally:
            os.close(fd)

    def clear(self) -> None:
        """Delete what an earlier run left here.

        Raises: OSError
        """
        for path in self.folder.iterdir():
            if path.name != _LOCK_NAME:
                path.unlink()


def _name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def reserve(path: Path, num_bytes: int) -> None:
    """Make a new file with room for all its bytes.

    Raises: OSError with ENOSPC if there is less
    """
    if num_bytes > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
