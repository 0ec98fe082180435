"""What a file system may hold after a loss of power: a record of what was done to it, and every state it allows.

Each file is a sequence of writes, each folder a sequence of changes of names. What was synced is there; of what came
later any end may be missing, of each file and folder on its own. (A sync of a file says nothing about its name.)
"""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Op = tuple[Any, ...]


@dataclass
class Recorder:
    """Keeps what this process does below `root`; with `full_after`, operations that may need room fail from that one on
    (but for renames, unless it is only `once`: on a full disk, what is there can still be renamed)."""

    root: Path
    full_after: int | None = None
    once: bool = False  # only that one fails
    log: list[Op] = field(default_factory=list)
    count: int = 0  # of operations that need room
    files: dict[int, Path] = field(default_factory=dict)  # by number

    def room(self, path: Any) -> None:
        self.count += 1
        after = self.full_after
        if after is not None and (self.count == after if self.once else self.count >= after):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def below(self, path: Any, dir_fd: int | None = None) -> Path | None:
        whole = Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else Path(path)
        return whole if self.root in (whole, *whole.parents) else None

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record until the block ends."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "close", "writev", "write", "pwrite", "posix_fallocate", "fsync", "mkdir"):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            for name in ("link", "rename", "replace", "unlink", "remove", "rmdir"):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            yield self

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        act = getattr(self, f"_{name}")

        def call(*args: Any, **options: Any) -> Any:
            return act(real, *args, **options)

        return call

    def _open(self, real: Any, path: Any, flags: int, *args: Any, dir_fd: int | None = None, **options: Any) -> int:
        found = self.below(path, dir_fd) if isinstance(path, (str, Path)) else None
        unnamed = found is not None and flags & os.O_TMPFILE == os.O_TMPFILE
        making = found is not None and flags & os.O_CREAT and not found.exists()
        if making or unnamed:
            self.room(found)
        number: int = real(path, flags, *args, dir_fd=dir_fd, **options)
        if found is not None and unnamed:
            found /= f"unnamed {len(self.log)}"
            self.log.append(("unnamed", found))
        if making:
            self.log.append(("create", found))
        if found is not None:
            self.files[number] = found
        return number

    def _close(self, real: Any, number: int) -> None:
        self.files.pop(number, None)
        real(number)

    def _data(self, number: int, real: Any, *args: Any) -> int:
        """Write, and record what was written where."""
        path = self.files.get(number)
        if path is None:
            return int(real(number, *args))
        self.room(path)
        at = os.lseek(number, 0, os.SEEK_CUR)
        count = int(real(number, *args))
        data = b"".join(bytes(b) for b in args[0])[:count]
        self.log.append(("write", path, at, data))
        return count

    def _writev(self, real: Any, number: int, buffers: Any) -> int:
        return self._data(number, real, buffers)

    def _write(self, real: Any, number: int, data: Any) -> int:
        return self._data(number, lambda file, parts: real(file, parts[0]), [data])

    def _pwrite(self, real: Any, number: int, data: Any, at: int) -> int:
        path = self.files.get(number)
        if path is not None:
            self.room(path)
            self.log.append(("write", path, at, bytes(data)))
        return int(real(number, data, at))

    def _posix_fallocate(self, real: Any, number: int, at: int, size: int) -> None:
        path = self.files.get(number)
        if path is not None:
            self.room(path)
            self.log.append(("write", path, at, bytes(size)))
        real(number, at, size)

    def _fsync(self, real: Any, number: int) -> None:
        path = self.files.get(number)
        if path is not None:
            self.room(path)
            if path.is_file():  # what went in through a mapping has not been seen
                self.log.append(("write", path, 0, path.read_bytes()))
            self.log.append(("sync", path))
        else:
            real(number)

    def _mkdir(self, real: Any, path: Any, *args: Any, **options: Any) -> None:
        found = self.below(path)
        if found is not None and not found.exists():
            self.room(found)
        real(path, *args, **options)
        if found is not None:
            self.log.append(("mkdir", found))

    def _two(self, name: str, real: Any, old: Any, new: Any, **options: Any) -> None:
        by_number = re.fullmatch(r"/proc/self/fd/(\d+)", str(old))
        found = self.files.get(int(by_number[1])) if by_number else self.below(old)
        if found is not None and (name == "link" or self.once or self.full_after is None):
            self.room(new)
        real(old, new, **options)
        if found is not None:
            self.log.append((name, found, Path(new)))

    def _link(self, real: Any, old: Any, new: Any, **options: Any) -> None:
        self._two("link", real, old, new, **options)

    def _rename(self, real: Any, old: Any, new: Any) -> None:
        self._two("rename", real, old, new)

    def _replace(self, real: Any, old: Any, new: Any) -> None:
        self._two("rename", real, old, new)

    def _gone(self, real: Any, path: Any, dir_fd: int | None = None) -> None:
        found = self.below(path, dir_fd)
        real(path, dir_fd=dir_fd)
        if found is not None:
            self.log.append(("unlink", found))

    def _unlink(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        self._gone(real, path, dir_fd)

    def _remove(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        self._gone(real, path, dir_fd)

    def _rmdir(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        self._gone(real, path, dir_fd)


@dataclass
class _Node:
    is_folder: bool
    changes: list[tuple[Any, ...]] = field(default_factory=list)
    durable: int = 0  # changes that are surely there


class Disk:
    """The file system below a folder, as the record of changes since it was last known."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.nodes: list[_Node] = []
        self.unnamed: dict[Path, int] = {}  # files that no folder has yet
        self.root = self._taken_in(base)

    def _taken_in(self, path: Path) -> int:
        """Take what is there now as durable."""
        number = len(self.nodes)
        node = _Node(path.is_dir())
        self.nodes.append(node)
        if node.is_folder:
            node.changes = [("add", p.name, self._taken_in(p)) for p in sorted(path.iterdir())]
        else:
            node.changes = [("write", 0, path.read_bytes())]
        node.durable = len(node.changes)
        return number

    def find(self, path: Path) -> int:
        """Return the number of what lies at a path when nothing is lost."""
        if path in self.unnamed:
            return self.unnamed[path]
        number = self.root
        for name in path.relative_to(self.base).parts:
            number = _names(self.nodes[number].changes)[name]
        return number

    def apply(self, op: Op) -> None:
        """Do one recorded operation."""
        kind, path = op[0], op[1]
        if kind == "sync":
            node = self.nodes[self.find(path)]
            node.durable = len(node.changes)
            return
        if kind == "write":
            self.nodes[self.find(path)].changes.append(op[:1] + op[2:])
            return
        folder = self.nodes[self.find(path.parent)].changes
        if kind == "unnamed":
            self.nodes.append(_Node(False))
            self.unnamed[path] = len(self.nodes) - 1
        elif kind in ("create", "mkdir"):
            self.nodes.append(_Node(kind == "mkdir"))
            folder.append(("add", path.name, len(self.nodes) - 1))
        elif kind == "unlink":
            folder.append(("drop", path.name))
        elif kind == "link":
            folder.append(("add", op[2].name, self.find(path)))
        else:
            assert path.parent == op[2].parent, "a rename between folders is two changes and not modelled"
            folder.append(("rename", path.name, op[2].name))

    def after_loss(self, target: Path, kept: Callable[[int, int], int]) -> None:
        """Write what is there after a loss of power; `kept(low, high)` says how many changes of each are."""
        self._write(self.root, target, {i: kept(n.durable, len(n.changes)) for i, n in enumerate(self.nodes)})

    def _write(self, number: int, target: Path, kept: dict[int, int]) -> None:
        node = self.nodes[number]
        changes = node.changes[: kept[number]]
        if node.is_folder:
            target.mkdir()
            for name, child in _names(changes).items():
                self._write(child, target / name, kept)
            return
        data = bytearray()
        for _, at, part in changes:
            data += bytes(max(at + len(part) - len(data), 0))
            data[at : at + len(part)] = part
        target.write_bytes(data)


def _names(changes: list[tuple[Any, ...]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for change in changes:
        if change[0] == "add":
            found[change[1]] = change[2]
        elif change[0] == "drop":
            found.pop(change[1], None)
        elif change[1] in found:
            found[change[2]] = found.pop(change[1])
    return found


def states_after(disk: Disk, log: list[Op], where: Path, seed: int, draws: int) -> Iterator[tuple[int, Path]]:
    """Yield (operations done, folder) for losses of power at every moment: all that can be lost is, nothing is, and
    some mixtures."""
    chance = random.Random(seed)
    for done in range(len(log) + 1):
        if done:
            disk.apply(log[done - 1])
        choices: list[Callable[[int, int], int]] = [lambda low, high: low, lambda low, high: high]
        choices += [chance.randint] * draws
        for number, kept in enumerate(choices):
            folder = where / f"{done}-{number}"
            disk.after_loss(folder, kept)
            yield done, folder
