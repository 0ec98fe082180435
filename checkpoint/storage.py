"""Where checkpoints lie: a folder or the URL of an object store, behind the few operations that are needed.

Reading needs a `Files`: names that are opened and read at offsets. Writing needs a `Storage`, of which there are two: a
folder (renames are atomic, fsync makes durable) and a URL (`url_storage.py`: a file is there when its writer has
finished; `create` is conditional; nothing is renamed). Whatever goes wrong is an OSError that names the file.
Must not know: what a checkpoint is, other ranks, torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import xxhash

from windlass.dist.errors import ConfigError

Place = Path | str  # a folder, or a URL such as s3://bucket/run
Buffer = bytes | bytearray | memoryview
SYNC_FILE_RANGE_WRITE = 2
READ_BYTES = 4 << 20
START_BYTES = 8 << 20  # written before the drive is asked to begin
MOST_PARTS = 512  # of one system call; Linux takes 1024


class RandomAccess(Protocol):
    """An open file that is read at offsets, by several threads if need be."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` with what lies at `offset`; return the bytes there were, fewer only at the end of the file."""

    def close(self) -> None: ...


class Files(Protocol):
    """What reading needs: named files, of any kind."""

    @property
    def place(self) -> str: ...  # for messages

    def open(self, name: str) -> RandomAccess: ...

    def size(self, name: str) -> int: ...


class FileWriter(Protocol):
    """A new file under way. It counts only after `finish`."""

    def write(self, *parts: Buffer) -> None: ...

    def finish(self) -> None:
        """Make the file durable and close it."""

    def abandon(self) -> None:
        """Close without a promise about what is there; to be called in place of `finish`."""


@runtime_checkable
class Storage(Files, Protocol):
    """Files that can also be made, listed and removed. Names may hold `/`; "" is the storage itself."""

    renames: bool  # whole folders, atomically: then what is being written has another name until it is complete

    @property
    def address(self) -> Place: ...  # `storage_of` makes an equal storage of it

    def inside(self, folder: str) -> Storage: ...

    def names(self, folder: str = "") -> list[str]:
        """Return the names of what lies directly in a folder, sorted; none if there is no folder."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the bytes of the files that lie directly in a folder, by name."""

    def make_folder(self, name: str = "") -> None:
        """Make a new folder; with no name this storage itself, durably, and fine if it is there."""

    def start(self, name: str) -> FileWriter:
        """Begin a file that is not there yet."""

    def create(self, name: str, data: bytes) -> None:
        """Write a file whole and durably, unless it is there: then FileExistsError, and that file is as it was."""

    def rename(self, old: str, new: str) -> None:
        """Rename a file or folder; where a folder that is not empty has the new name, OSError and no change."""

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all in it; nothing if it is not there."""

    def sync(self, folder: str = "") -> None:
        """Make what a folder lists durable."""

    def free_bytes(self) -> int | None: ...  # None: not known


def storage_of(place: Place | Storage) -> Storage:
    """Return the storage at a path or URL."""
    if isinstance(place, Path):
        return LocalStorage(place)
    if not isinstance(place, str):
        return place
    if place.startswith("file://"):
        return LocalStorage(Path(place.removeprefix("file://")))
    if "://" not in place:
        return LocalStorage(Path(place))
    from windlass.checkpoint.url_storage import FsspecStorage  # fsspec only where it is needed

    return FsspecStorage(place)


def files_of(place: Place | Files) -> Files:
    """Return what reads the files at a path or URL."""
    return storage_of(place) if isinstance(place, (Path, str)) else place


def read_file(files: Files, name: str) -> bytes:
    """Read a whole file."""
    data = bytearray(files.size(name))
    with opened(files, name) as file, memoryview(data) as view:
        count = file.read_into(view, 0)
    return bytes(data[:count])


def write_new(storage: Storage, name: str, data: bytes) -> None:
    """Write a whole file that is not there yet, durably; only its name may still be lost."""
    file = storage.start(name)
    try:
        file.write(data)
    except BaseException:
        file.abandon()
        raise
    file.finish()


def file_hash(files: Files, name: str) -> str:
    """Return the xxh3 of a whole file, reading it once from front to back."""
    hasher, offset = xxhash.xxh3_64(), 0
    buffer = memoryview(bytearray(READ_BYTES))
    with opened(files, name) as file:
        while count := file.read_into(buffer, offset):
            hasher.update(buffer[:count])
            offset += count
    return hasher.hexdigest()


@contextmanager
def opened(files: Files, name: str) -> Iterator[RandomAccess]:
    """Open a file and close it in the end."""
    file = files.open(name)
    try:
        yield file
    finally:
        file.close()


def exists(files: Files, name: str) -> bool:
    """Tell whether a file is there."""
    try:
        files.size(name)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def named(place: Place) -> Iterator[None]:
    """Add the file to errors of calls that only know a number."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(place)) from error
        raise


class LocalStorage:
    """A folder. Relative names only; nothing is made durable but by `finish`, `create` and `sync`."""

    renames = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> str:
        return str(self.folder)

    @property
    def address(self) -> Place:
        return self.folder

    def inside(self, folder: str) -> Storage:
        return LocalStorage(self.folder / folder)

    def open(self, name: str) -> RandomAccess:
        return _LocalFile(self.folder / name)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.folder / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: str = "") -> dict[str, int]:
        path = self.folder / folder
        if not path.is_dir():
            return {}
        with os.scandir(path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def make_folder(self, name: str = "") -> None:
        if name:
            (self.folder / name).mkdir()
            return
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            LocalStorage(path.parent).sync()

    def start(self, name: str) -> FileWriter:
        return _LocalWriter(self.folder / name)

    def create(self, name: str, data: bytes) -> None:
        path = self.folder / name
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            write_new(self, str(partial.relative_to(self.folder)), data)
            os.link(partial, path)  # unlike a rename, this fails where the name is taken
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        self.sync(str(path.parent.relative_to(self.folder)))

    def rename(self, old: str, new: str) -> None:
        os.rename(self.folder / old, self.folder / new)

    def remove(self, name: str) -> None:
        path = self.folder / name
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def sync(self, folder: str = "") -> None:
        path = self.folder / folder
        with named(path):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def free_bytes(self) -> int | None:
        disk = os.statvfs(self.folder)
        return disk.f_bavail * disk.f_frsize


@cache
def _sync_file_range() -> Any:
    return getattr(ctypes.CDLL(None), "sync_file_range", None)


def _start_writing(file: int, offset: int, num_bytes: int) -> None:
    """Ask the system to begin to write a range of a file to the drive, where it can be asked (Linux)."""
    ask = _sync_file_range()
    if ask is not None:
        ask(file, ctypes.c_int64(offset), ctypes.c_int64(num_bytes), SYNC_FILE_RANGE_WRITE)


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        done = 0
        with named(self.path):
            while done < len(buffer) and (count := os.preadv(self.number, [buffer[done:]], offset + done)):
                done += count
        return done

    def close(self) -> None:
        os.close(self.number)


class _LocalWriter:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.position = self.started = 0

    def write(self, *parts: Buffer) -> None:
        pending = [view for part in parts if len(view := memoryview(part).cast("B"))]
        with named(self.path):
            while pending:
                count = os.writev(self.number, pending[:MOST_PARTS])
                self.position += count
                while pending and count >= len(pending[0]):
                    count -= len(pending.pop(0))
                if count:
                    pending[0] = pending[0][count:]
        if self.position - self.started >= START_BYTES:
            # The drive begins now, while more is prepared, instead of at fsync. No promise, so no error is looked at.
            _start_writing(self.number, self.started, self.position - self.started)
            self.started = self.position

    def finish(self) -> None:
        try:
            with named(self.path):
                os.fsync(self.number)
        finally:
            os.close(self.number)

    def abandon(self) -> None:
        os.close(self.number)


def check_url(url: str) -> None:
    """Raise ConfigError unless checkpoints can be written at a URL: a probe is written, read and removed."""
    storage, probe = storage_of(url), f".probe-{secrets.token_hex(4)}"
    try:
        storage.make_folder()
        storage.create(probe, b"windlass")
        try:
            if read_file(storage, probe) != b"windlass":
                raise ConfigError(f"checkpoint.url = '{url}': what is written there is not what is read back")
        finally:
            storage.remove(probe)
    except OSError as error:
        raise ConfigError(
            f"checkpoint.url = '{url}': cannot be written ({error.strerror or error}). Check the address and the "
            "permissions, or leave checkpoint.url empty for the run folder"
        ) from error
