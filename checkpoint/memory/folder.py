"""The folder of one job on one node, in memory: where everything lies that must outlive the processes of the node.

    <base>/windlass-<uid>/<job>/<node>/   token  generation  settings.json  lease  kept  reserve
        smp.json  smp.log  smp.lock  processes/
        membership-<g>.json  base-<g>.json  saved-<g>.json  moved-<g>.json
        layouts/<digest>.json  beats/00003  verdicts/00003.json
        data-00003-<slot bytes>x<slots>-<hashes>.seg  parity-00003-...seg
    <base>/windlass-<uid>/<job>/<node>.gone-<nonce>/   one that is being removed

Every file is the user's alone (0600 in folders of 0700) and replaced as a whole, so a kill leaves the old or the new.
The base is everybody's: what somebody else made there under our name, or a link, is neither believed nor removed.
Must not know: torch, what segments hold, networks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windlass.checkpoint.memory.heartbeat import is_alive
from windlass.checkpoint.memory.layout import Layout
from windlass.dist import control_group
from windlass.dist.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SEGMENT = re.compile(r"(data|parity)-(\d{5,})-(\d+)x(\d+)-(\d+)\.seg")
KEEP_S = 2.0  # between two signs of a launcher that looks after a node
MAKE_TRIES = 20
RESERVE_BYTES = 1 << 20  # held back for small files, such as who is a member
SPARE_BYTES = 8 << 20  # of the base: headers of other files, what other programs take meanwhile


@dataclass(frozen=True)
class SnapshotProcess:
    """Who serves this folder: the process, by number and creation time, and where it listens."""

    pid: int
    started: int
    host: str
    port: int

    @property
    def alive(self) -> bool:
        return is_alive(self.pid, self.started)


@dataclass(frozen=True)
class SegmentFile:
    """One segment of the folder and its geometry, which is its name: one of another geometry is another file, so that
    old snapshots stay until newer ones are protected."""

    path: Path
    role: str
    rank: int
    slot_bytes: int
    num_slots: int
    table_chunks: int


@dataclass(frozen=True)
class NodeFolder:
    """The folder of `job` on `node` below `base`."""

    base: Path
    job: str
    node: str

    def __post_init__(self) -> None:
        for what, name in (("job", self.job), ("node", self.node)):
            if not is_name(name):
                raise CheckpointError(
                    f"{what} = {name!r} cannot name a folder of snapshots: letters, digits, dot, dash and underscore "
                    "can, beginning with a letter or digit, e.g. node-0"
                )

    @staticmethod
    def at(path: Path | str) -> NodeFolder:
        """Return the node folder that lies at `path`."""
        path = Path(path).absolute()
        return NodeFolder(path.parents[2], path.parent.name, path.name)

    @property
    def path(self) -> Path:
        return _root(self.base) / self.job / self.node

    def check(self) -> None:
        """Raise CheckpointError if what is here, or above it, is somebody else's, or a link to elsewhere."""
        with contextlib.suppress(FileNotFoundError):
            for folder in (_root(self.base), self.path.parent, self.path):
                _check_owner(folder)

    def create(self, token: str | None = None) -> NodeFolder:
        """Make the folder where it is missing, with the job's token (a new one if none is given and none is there).

        Raises: CheckpointError if the base is not a folder, or what is there belongs to somebody else
        """
        if not Path(self.base).is_dir():
            raise CheckpointError(
                f"snapshot.folder = '{self.base}': there is no such folder on this node. Use /dev/shm, or another "
                "folder in memory (tmpfs)"
            )
        try:
            self._make()
            self._reserve()
            if token is not None or not self.token_path.exists():
                self.replace(self.token_path, (token or secrets.token_hex(32)).encode())
            self.touch_lease()  # whoever collects what dead jobs have left may come before the snapshot process does
        except OSError as error:
            raise CheckpointError(f"the folder of snapshots {self.path} could not be made: {error}") from error
        return self

    def _make(self) -> None:
        for left in reversed(range(MAKE_TRIES)):
            try:
                for folder in (_root(self.base), self.path.parent, self.path):
                    folder.mkdir(mode=0o700, exist_ok=True)
                    _check_owner(folder)
                for name in ("layouts", "beats", "verdicts"):
                    (self.path / name).mkdir(mode=0o700, exist_ok=True)
                return
            except (FileNotFoundError, FileExistsError):  # whoever leaves removes what is above it, if it is empty
                if not left:
                    raise

    def _reserve(self) -> None:
        """Hold some room back for small files; give it up, for them, where others have filled the file system."""
        disk = os.statvfs(self.base)
        free = disk.f_bavail * disk.f_frsize
        if free < RESERVE_BYTES // 4:
            self._reserve_path.unlink(missing_ok=True)
        elif free > 2 * RESERVE_BYTES and not self._reserve_path.exists():
            fd = os.open(self._reserve_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, RESERVE_BYTES)
            finally:
                os.close(fd)

    @property
    def _reserve_path(self) -> Path:
        return self.path / "reserve"

    def replace(self, path: Path, data: bytes) -> None:
        """Write a file of this folder so that readers see the old bytes or the new ones."""
        try:
            self._replace(path, data)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._reserve_path.exists():
                raise
            self._reserve_path.unlink(missing_ok=True)
            self._replace(path, data)

    def _replace(self, path: Path, data: bytes) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as stream:
                stream.write(data)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Remove the folder, and what is above it if nothing else is there.

        It leaves its place at once: whoever touches its lease meanwhile would keep a folder that is half removed. What
        is cut off in between is collected as any folder that nobody needs.

        Raises: CheckpointError if it is not ours
        """
        self.check()
        gone = self.path.with_name(f"{self.node[:180]}.gone-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        for folder in (self.path.parent, _root(self.base)):
            with contextlib.suppress(OSError):  # other nodes, or other jobs
                folder.rmdir()

    # -- who is who -------------------------------------------------------------------------------------------------

    @property
    def token_path(self) -> Path:
        return self.path / "token"

    def read_token(self) -> str:
        """Return the job's token as it is now.

        Raises: CheckpointError if there is none
        """
        data = _read(self.token_path)
        if data is None:
            raise CheckpointError(f"{self.token_path} is missing: nobody can prove that it belongs to job {self.job}")
        return data.decode().strip()

    @property
    def smp_path(self) -> Path:
        return self.path / "smp.json"

    def read_smp(self) -> SnapshotProcess | None:
        """Return who said last that it serves this folder, alive or not; None where anybody could have said so."""
        try:
            self.check()
            values = _json(self.smp_path)
            return None if values is None else SnapshotProcess(**values)
        except (TypeError, CheckpointError):
            return None

    def write_smp(self, process: SnapshotProcess) -> None:
        self.replace(self.smp_path, json.dumps(vars(process)).encode())

    @property
    def lease_path(self) -> Path:
        return self.path / "lease"

    @property
    def kept_path(self) -> Path:
        return self.path / "kept"

    def touch_lease(self) -> None:
        """Say that somebody needs this folder: its snapshot process lives, or is about to."""
        self._touch(self.lease_path)

    def keep(self) -> None:
        """Say that a launcher looks after this node: its snapshots are needed though nobody trains with them now."""
        self._touch(self.kept_path)

    def _touch(self, path: Path) -> None:
        try:
            os.utime(path)  # takes no room
        except FileNotFoundError:
            self.replace(path, b"")

    def lease_age_s(self) -> float:
        """Return the seconds since somebody needed this folder."""
        age = _age_s(self.lease_path)
        return _age_s(self.path) if age == float("inf") else age

    def kept_age_s(self) -> float:
        """Return the seconds since a launcher looked after this node; infinite if none ever did."""
        return _age_s(self.kept_path)

    # -- generations ------------------------------------------------------------------------------------------------

    def read_generation(self) -> int:
        """Return the newest generation this node has heard of; 0 if none."""
        data = _read(self.path / "generation")
        return int.from_bytes(data[:8], "little") if data else 0

    def raise_generation(self, generation: int) -> int:
        """Make the node's generation at least this one; return what it is now. It never falls."""
        fd = os.open(self.path / "generation", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # held for microseconds, and gone with its holder
            now = max(int.from_bytes(os.pread(fd, 8, 0), "little"), generation)
            os.pwrite(fd, now.to_bytes(8, "little"), 0)
            return now
        finally:
            os.close(fd)

    def membership_path(self, generation: int) -> Path:
        return self.path / f"membership-{generation}.json"

    def memberships(self) -> list[int]:
        """Return the generations whose membership is known here, oldest first."""
        names = (re.fullmatch(r"membership-(\d+)\.json", p.name) for p in _entries(self.path))
        return sorted(int(found[1]) for found in names if found)

    # -- layouts, beats, verdicts -----------------------------------------------------------------------------------

    def layout_path(self, digest: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{32}", digest):
            raise CheckpointError(f"{digest!r} is not the digest of a layout (32 hexadecimal digits)")
        return self.path / "layouts" / f"{digest}.json"

    def put_layout(self, layout: Layout) -> None:
        """Keep a layout under its digest, also in place of one that was damaged."""
        path, body = self.layout_path(layout.digest), layout.dump()
        if _read(path) != body:
            self.replace(path, body)

    def read_layout(self, digest: str) -> Layout | None:
        """Return the layout of this digest, None if it is not here.

        Raises: CheckpointError if it is damaged
        """
        data = _read(self.layout_path(digest))
        return None if data is None else Layout.parse(data, digest)

    def beat_path(self, rank: int) -> Path:
        return self.path / "beats" / f"{rank:05d}"

    def beating(self) -> dict[int, Path]:
        """Return the heartbeat files of this node by rank."""
        return {int(p.name): p for p in sorted(_entries(self.path / "beats")) if p.name.isdigit()}

    def verdict_path(self, rank: int) -> Path:
        return self.path / "verdicts" / f"{rank:05d}.json"

    # -- segments ---------------------------------------------------------------------------------------------------

    def segment_path(self, role: str, rank: int, slot_bytes: int, num_slots: int, table_chunks: int) -> Path:
        return self.path / f"{role}-{rank:05d}-{slot_bytes}x{num_slots}-{table_chunks}.seg"

    def segments(self) -> list[SegmentFile]:
        """Return the segments that are here, also of ranks and sizes that are of an older generation."""
        found = ((path, _SEGMENT.fullmatch(path.name)) for path in sorted(_entries(self.path)))
        return [SegmentFile(path, f[1], int(f[2]), int(f[3]), int(f[4]), int(f[5])) for path, f in found if f]

    def room(self) -> int:
        """Return the bytes that can still be had: of the file system, and of the memory in which it lies."""
        disk = os.statvfs(self.base)
        return min(disk.f_bavail * disk.f_frsize, _memory_left())

    def shortage(self, num_bytes: int, what: str, slots: int) -> str:
        """Say that this many more bytes cannot be had, and what would work; empty if they can."""
        free = max(self.room() - SPARE_BYTES, 0)
        if num_bytes <= free:
            return ""
        held = sum(s.path.stat().st_size for s in self.segments())
        fewer = "snapshot.slots=2, " if slots > 2 else ""
        return (
            f"snapshot.folder = '{self.base}' on {self.node}: {what} need {_mib(num_bytes)}, {_mib(free)} can be had "
            f"(segments of this job hold {_mib(held)}). Give it {_mib(num_bytes - free)} more (a larger tmpfs or "
            f"memory limit), use more ranks per replica, {fewer}or snapshot.every=0 for none"
        )

    def check_room(self, num_bytes: int, what: str, slots: int) -> None:
        """Raise CheckpointError with the shortage, if there is one."""
        if problem := self.shortage(num_bytes, what, slots):
            raise CheckpointError(problem)


def _root(base: Path) -> Path:
    return Path(base) / f"windlass-{os.getuid()}"


def is_name(name: str) -> bool:
    """Tell whether a job or node may be called so."""
    return _NAME.fullmatch(name) is not None


def is_own(folder: Path) -> bool:
    """Tell whether there is a folder of this user, not a link to one."""
    try:
        return _is_ours(folder.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_ours(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _check_owner(folder: Path) -> None:
    found = folder.lstat()  # once: it may be removed at any time
    if not _is_ours(found) or stat.S_IMODE(found.st_mode) & 0o077:
        raise CheckpointError(
            f"{folder} must be a folder of user {os.getuid()} that nobody else can enter (mode 0700); it is "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}. Remove it, or use another snapshot.folder"
        )


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _json(path: Path) -> dict[str, Any] | None:
    data = _read(path)
    try:
        return None if data is None else dict(json.loads(data))
    except (ValueError, TypeError):
        return None


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except FileNotFoundError:
        return


def _memory_left() -> int:
    """Return the memory that the host, and the control groups this process is in, can still give."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    left, of_groups = int(found[1]) * 1024 if found else 1 << 62, control_group.memory_left()
    return left if of_groups is None else min(left, of_groups)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def list_jobs(base: Path, refused: Callable[[CheckpointError], None] = lambda why: None) -> list[NodeFolder]:
    """Return the node folders of all jobs of this user below `base`; `refused` hears why others are passed over."""

    def own(folders: Iterable[Path]) -> Iterator[Path]:
        for folder in folders:
            try:
                _check_owner(folder)
                yield folder
            except FileNotFoundError:  # removed meanwhile
                continue
            except CheckpointError as error:
                refused(error)

    def inside(folder: Path) -> list[Path]:
        return sorted(path for path in _entries(folder) if is_name(path.name))

    roots = own([_root(base)])
    nodes = [node for root in roots for job in own(inside(root)) for node in own(inside(job))]
    return [NodeFolder(Path(base), node.parent.name, node.name) for node in nodes]
