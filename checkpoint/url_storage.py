"""Checkpoints at the URL of an object store, or of any other file system that fsspec knows.

A file is there, whole, when its writer has finished; folders are only names; nothing is renamed, so what counts is said
by a file that is created on condition that it is not there. Errors of the libraries below become OSError.
Must not know: what a checkpoint is, torch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from windlass.checkpoint.storage import Buffer, FileWriter, Place, RandomAccess, Storage
from windlass.dist.errors import ConfigError


class FsspecStorage:
    """A URL of any file system that fsspec knows. A file appears whole when it is finished; folders are only names."""

    renames = False

    def __init__(self, url: str) -> None:
        try:
            import fsspec

            self._system, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"'{url}' cannot be used: {error}. Install what fsspec needs for it") from error
        self.url, self._path = url.rstrip("/"), str(path).rstrip("/")

    @property
    def place(self) -> str:
        return self.url

    @property
    def address(self) -> Place:
        return self.url

    def inside(self, folder: str) -> Storage:
        return FsspecStorage(f"{self.url}/{folder}")

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def open(self, name: str) -> RandomAccess:
        self.size(name)
        return _FsspecFile(self._system, self._at(name), f"{self.url}/{name}")

    def size(self, name: str) -> int:
        with _as_os_error(f"{self.url}/{name}"):
            self._system.invalidate_cache()
            found = self._system.info(self._at(name))
        if found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "is not a file", f"{self.url}/{name}")
        return int(found["size"])

    def names(self, folder: str = "") -> list[str]:
        return sorted(name for name, _ in self._entries(folder))

    def sizes(self, folder: str = "") -> dict[str, int]:
        return {name: int(entry["size"]) for name, entry in self._entries(folder) if entry["type"] == "file"}

    def _entries(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        try:
            with _as_os_error(f"{self.url}/{folder}"):
                self._system.invalidate_cache()
                found = self._system.ls(self._at(folder), detail=True)
        except FileNotFoundError:
            return []
        here = _last(self._at(folder))  # object stores may list the folder itself
        return [(name, entry) for entry in found if (name := _last(entry["name"])) not in ("", here)]

    def make_folder(self, name: str = "") -> None:
        """Object stores have none; where there are folders, they are needed before files."""
        with _as_os_error(f"{self.url}/{name}"):
            self._system.makedirs(self._at(name), exist_ok=True)

    def start(self, name: str) -> FileWriter:
        with _as_os_error(f"{self.url}/{name}"):
            return _FsspecWriter(self._system.open(self._at(name), "wb"), f"{self.url}/{name}")

    def create(self, name: str, data: bytes) -> None:
        with _as_os_error(f"{self.url}/{name}"):
            self._system.invalidate_cache()
            self._system.pipe_file(self._at(name), data, mode="create")

    def rename(self, old: str, new: str) -> None:
        raise OSError(errno.ENOTSUP, "nothing is renamed at a URL", f"{self.url}/{old}")

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), _as_os_error(f"{self.url}/{name}"):
            self._system.invalidate_cache()
            self._system.rm(self._at(name), recursive=True)

    def sync(self, folder: str = "") -> None:
        """Nothing: what is finished is durable."""

    def free_bytes(self) -> int | None:
        return None


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


class _FsspecFile:
    def __init__(self, system: Any, path: str, place: str) -> None:
        self.system, self.path, self.place = system, path, place

    def read_into(self, buffer: memoryview, offset: int) -> int:
        with _as_os_error(self.place):
            data = self.system.cat_file(self.path, start=offset, end=offset + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None: ...


class _FsspecWriter:
    def __init__(self, file: io.IOBase | Any, place: str) -> None:
        self.file, self.place = file, place

    def write(self, *parts: Buffer) -> None:
        with _as_os_error(self.place):
            for part in parts:
                self.file.write(part)

    def finish(self) -> None:
        with _as_os_error(self.place):
            self.file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError), _as_os_error(self.place):
            self.file.close()


@contextmanager
def _as_os_error(place: str) -> Iterator[None]:
    """Report what the many libraries below fsspec raise as what it is for a caller: the storage failed."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            code = error.errno or (errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO)
            code = errno.EEXIST if isinstance(error, FileExistsError) else code
            raise OSError(code, error.strerror or str(error) or os.strerror(code), place) from error
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", place) from error
