"""Where checkpoints lie: a folder or the URL of an object store, behind the few operations that are needed.

Reading needs a `Files`: names that are opened and read at offsets. Writing needs a `Storage`, of which there are two: a
folder (renames are atomic, fsync makes durable) and a URL (a file is there when its writer has finished; `create` is
conditional; nothing is renamed). Whatever goes wrong is an OSError that names the file.
Must not know: what a checkpoint is, other ranks, torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import xxhash

from windlass.dist.errors import ConfigError

Place = Path | str  # a folder, or a URL such as s3://bucket/run
Buffer = bytes | bytearray | memoryview
SYNC_FILE_RANGE_WRITE = 2
READ_BYTES = 4 << 20
START_BYTES = 16 << 20  # written before the drive is asked to begin
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
    return FsspecStorage(place) if "://" in place else LocalStorage(Path(place))


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
        path = self.folder / folder
        return sorted(os.listdir(path)) if path.is_dir() else []

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


def _start_writing(file: int, offset: int, num_bytes: int) -> None:
    """Ask the system to begin to write a range of a file to the drive, where it can be asked (Linux)."""
    ask = getattr(ctypes.CDLL(None), "sync_file_range", None)
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
        try:
            with _as_os_error(f"{self.url}/{folder}"):
                self._system.invalidate_cache()
                found = self._system.ls(self._at(folder), detail=False)
        except FileNotFoundError:
            return []
        here = self._at(folder).rstrip("/").rsplit("/", 1)[-1]
        return sorted({name for path in found if (name := path.rstrip("/").rsplit("/", 1)[-1]) and name != here})

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
