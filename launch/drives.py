"""What a folder on a local drive is: its file system, whether it takes direct transfers, and what a misspelt one meant.

Nothing is left behind and nothing is measured. Must not know: what is stored there.
"""

from __future__ import annotations

import errno
import os
import re
from difflib import get_close_matches
from pathlib import Path

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the kind of file system that holds a path, such as ext4; empty when the system does not say."""
    if not mounts.is_file():
        return ""
    wanted, best, kind = path.resolve(), Path(), ""
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), left.split()[4]))
        # Of mounts at one point the last one is seen.
        if wanted.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, right.split()[0]
    return kind


def takes_direct(folder: Path) -> bool | None:
    """Whether files in a folder can bypass the page cache; None if only a file with a name could tell."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError as error:
        return False if error.errno == errno.EINVAL else None
    return True


def nearest_folder(path: Path) -> Path | None:
    """Return the folder that was most likely meant by one that does not exist, if any is likely."""
    wanted = path.absolute()
    there = next(p for p in wanted.parents if p.is_dir())
    missing = wanted.relative_to(there).parts
    try:
        names = sorted(entry.name for entry in there.iterdir() if entry.is_dir())
    except PermissionError:
        return None
    close = get_close_matches(missing[0], names, n=1, cutoff=0.6)
    if not close:
        return None
    found = there.joinpath(close[0], *missing[1:])
    return found if found.is_dir() else nearest_folder(found)


def missing_folder(path: str) -> str | None:
    """Say what is wrong with a path that should be a folder one can write into; None if nothing is."""
    folder = Path(path)
    if not folder.exists():
        match = nearest_folder(folder)
        guess = f", did you mean '{match}'?" if match else "."
        return f"no such folder{guess} It is not made, because one that is missing is a drive that is not mounted"
    if not folder.is_dir():
        return "this is a file. Give a folder on the drive"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"it cannot be written. chmod u+wx {folder}, or give another folder"
    return None
