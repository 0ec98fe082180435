"""What the control groups of this process still let it take: of Slurm, systemd, Docker or Kubernetes, versions 1 and 2.

Libraries tell the memory of the host, or of a group mounted at one fixed place, which is not where Slurm and systemd
have theirs. Must not know: torch, what the memory is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_FILES = {  # limit, use, and the name in memory.stat of pages that can be dropped, by type of file system
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_left(process: Path = Path("/proc/self")) -> int | None:
    """Return the bytes that can still be had in the group of a process and all those around it; None: no limit.

    Pages of files that were read count as use, but give way: those not read lately are counted as free.
    """
    with contextlib.suppress(OSError):
        found = [left for kind, group in _groups(process) if (left := _left(group, *_FILES[kind])) is not None]
        return min(found, default=None)
    return None


def memory_limit(process: Path = Path("/proc/self")) -> int | None:
    """Return the bytes that the group of a process and all those around it may take at most; None: no limit."""
    found = []
    with contextlib.suppress(OSError):
        for kind, group in _groups(process):
            with contextlib.suppress(OSError, ValueError):  # as in `_left`
                found.append(int((group / _FILES[kind][0]).read_text()))
    return min(found, default=None)


def _groups(process: Path) -> Iterator[tuple[str, Path]]:
    """Yield the groups of a process that may limit memory, as far up as they are mounted, with their version."""
    paths = {}
    for line in (process / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            paths["cgroup2" if number == "0" else "cgroup"] = PurePosixPath(path)
    for line in (process / "mountinfo").read_text().splitlines():
        mount, _, system = line.partition(" - ")
        (root, point), kind = mount.split()[3:5], system.split()[0]
        if kind in paths and (kind == "cgroup2" or "memory" in system.split()[-1].split(",")):
            # A container may see its own group as the root of the mount, and may be told of a path outside.
            inside = paths[kind].relative_to(root) if paths[kind].is_relative_to(root) else PurePosixPath()
            inside = PurePosixPath() if ".." in inside.parts else inside
            yield from ((kind, Path(point, above)) for above in (inside, *inside.parents))


def _left(group: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        room = int((group / limit).read_text()) - int((group / used).read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(room + int(facts.get(cache, 0)), 0)
    except (OSError, ValueError):  # the root of all, a group without this controller, or "max"
        return None
