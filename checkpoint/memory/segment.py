"""Segments: the preallocated files in a node's memory in which snapshots rest, one per rank and role, cut in slots.

    page 0      geometry of the file, written once
    slot 0..    words page: [0] sequence of the header that holds, [64] progress of a fill in bytes
                header copy 0, header copy 1: magic, sequence, length, xxh3_64, JSON, hash tables
                data: `slot_bytes`

A header is written into the copy that does not hold, and then one aligned 8-byte store of its sequence makes it hold:
a process killed at any instant leaves the old header or the new one. A header that begins a fill (or frees the slot)
also wipes the other copy before a byte of data changes, so no header ever speaks of data that is not its own.
Plain files and mmap, because a killed process must not take the memory with it, as multiprocessing's would.
Must not know: torch, who fills slots, who reads them, networks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from windlass.checkpoint.memory.header import FACTS_BYTES, SlotHeader, State, pack, unpack
from windlass.checkpoint.memory.heartbeat import is_alive, process_started
from windlass.checkpoint.memory.stripes import Stripes
from windlass.dist.errors import CheckpointError, DamagedError

PAGE = 4096
_FILE = struct.Struct("<8sQQ")  # magic, length, xxh3_64
_FILE_MAGIC = b"WLSEG001"
_HEAD = struct.Struct("<QQQQ")  # magic, sequence, length, xxh3_64
_MAGIC = int.from_bytes(b"WLSLOT01", "little")
_FLOCK = "hhqqi0q"  # struct flock: kind, whence, start, length, process
_PROGRESS = 8  # index of the progress word: on a cache line of its own
_UNNAMED = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_DRAFT = re.compile(r"\..+\.(\d+)-(\d+)\.making")


def _seal(sequence: int, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(_HEAD.pack(_MAGIC, sequence, len(body), 0) + body)


class Slot:
    """One snapshot of one rank.

    Invariant: `data` and `progress` are written only by whoever has claimed the slot, from before its FILLING header to
    COPIED; whatever the headers say meanwhile, nobody else can claim it until that process has let go or is dead
    """

    def __init__(self, segment: Segment, index: int) -> None:
        self.segment, self.index = segment, index
        start = PAGE + index * segment.stride
        end = start + PAGE + 2 * segment.header_bytes
        self._words = segment.memory[start : start + PAGE].view("<u8")
        self._copies = [
            segment.memory[low : low + segment.header_bytes] for low in (start + PAGE, end - segment.header_bytes)
        ]
        self.data = segment.memory[end : end + segment.slot_bytes]
        self._writing = threading.Lock()
        self._claiming = threading.Lock()
        self._claimed = False

    @property
    def sequence(self) -> int:
        """The number of the header that holds: it grows with every header and every `free`."""
        return int(self._words[0])

    @property
    def progress(self) -> int:
        """How many bytes of a fill are there, from the first on."""
        return int(self._words[_PROGRESS])

    @progress.setter
    def progress(self, num_bytes: int) -> None:
        self._words[_PROGRESS] = num_bytes

    def header(self) -> SlotHeader | None:
        """Return what the slot holds; None if nothing, or nothing that can be trusted."""
        for _ in range(8):  # the holding copy is only overwritten once another one holds: then look again
            sequence = self.sequence
            # The older copy counts where the newer is damaged: it was wiped unless it speaks of the same data.
            found = self._read(sequence) or self._read(sequence - 1)
            if self.sequence == sequence:
                return None if found is None else replace(found, sequence=sequence)
        return None

    def _read(self, sequence: int) -> SlotHeader | None:
        copy = self._copies[sequence % 2]
        magic, number, length, seal = _HEAD.unpack_from(copy.data)
        if magic != _MAGIC or number != sequence or sequence < 1 or length > len(copy) - _HEAD.size:
            return None
        body = copy[_HEAD.size : _HEAD.size + length].tobytes()
        if _seal(sequence, body) != seal:
            return None
        header = replace(unpack(body), sequence=sequence)
        return header if header.num_bytes <= len(self.data) else None

    def write(self, header: SlotHeader, wait_s: float = 1.0) -> bool:
        """Make this header hold; False if the slot has moved on since `header` was read, or another writer is busy.

        A header without a sequence is written whatever the slot holds.

        Blocks: host, for another writer of this slot, up to `wait_s`
        Raises: CheckpointError if it does not fit
        """
        body = pack(header)
        hashes, room = sum(len(table) for table in header.hashes.values()), self.segment.table_chunks
        if hashes > room or header.num_bytes > len(self.data):
            raise CheckpointError(
                f"{self.segment.path}: {hashes} hashes for {header.num_bytes} bytes of data do not fit into a slot "
                f"made for {room} and {len(self.data)}: make the segment with larger table_chunks or slot_bytes"
            )
        with self._alone(wait_s) as alone:
            now = self.sequence
            if not alone or header.sequence not in (-1, now):
                return False
            copy = self._copies[(now + 1) % 2]
            copy[_HEAD.size : _HEAD.size + len(body)] = np.frombuffer(body, np.uint8)
            head = _HEAD.pack(_MAGIC, now + 1, len(body), _seal(now + 1, body))
            copy[: _HEAD.size] = np.frombuffer(head, np.uint8)
            if header.state <= State.FILLING:
                self.progress = 0
            self._words[0] = now + 1
            if header.state <= State.FILLING:
                self._wipe(now)
            return True

    def free(self, header: SlotHeader | None = None, wait_s: float = 1.0) -> bool:
        """Make the slot hold nothing; False as `write` (with `header`: only if that is still what it holds)."""
        with self._alone(wait_s) as alone:
            now = self.sequence
            if not alone or (header is not None and header.sequence != now):
                return False
            # The number last: whoever read the old header under the new number would take it for the newest.
            self._wipe(now + 1)
            self._wipe(now)
            self._words[0] = now + 1
            return True

    # -- the right to fill -------------------------------------------------------------------------------------------

    def claim(self) -> bool:
        """Take the right to fill this slot; False if somebody has it. Only the end of its process takes it away.

        A process that was stopped, or has been fenced off, may wake in the middle of its copy: its generation being
        over does not keep it from writing, so its claim keeps others from filling the same bytes.
        """
        with self._claiming:
            if self._claimed or not self._lock(fcntl.F_WRLCK, self._claim_byte):
                return False
            self._claimed = True
            return True

    def release(self) -> None:
        """Give the right to fill back; nothing where it is not held."""
        with self._claiming:
            if self._claimed and self.segment.fd >= 0:
                self._lock(fcntl.F_UNLCK, self._claim_byte)
            self._claimed = False

    @property
    def claimed(self) -> bool:
        """Whether somebody, in this process or another one, may be writing `data`."""
        if self._claimed:
            return True
        wish = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, self._claim_byte, 1, 0)
        return bool(struct.unpack(_FLOCK, fcntl.fcntl(self.segment.fd, fcntl.F_OFD_GETLK, wish))[0] != fcntl.F_UNLCK)

    @property
    def _claim_byte(self) -> int:
        return self.segment.num_slots + self.index  # of the file, behind those that guard headers

    def _wipe(self, sequence: int) -> None:
        self._copies[sequence % 2][:8].view("<u8")[0] = 0

    @contextlib.contextmanager
    def _alone(self, wait_s: float) -> Iterator[bool]:
        """Exclude other writers: threads by a lock, processes by a lock of the file that dies with its holder."""
        deadline = time.monotonic() + wait_s
        got = self._writing.acquire(timeout=wait_s) if wait_s > 0 else self._writing.acquire(blocking=False)
        locked = got and self._lock(fcntl.F_WRLCK, self.index)
        while got and not locked and time.monotonic() < deadline:
            time.sleep(0.0002)
            locked = self._lock(fcntl.F_WRLCK, self.index)
        try:
            yield locked
        finally:
            if locked:
                self._lock(fcntl.F_UNLCK, self.index)
            if got:
                self._writing.release()

    def _lock(self, kind: int, byte: int) -> bool:
        """Set or end a lock that is held by the open file, so that it ends with the last process that has it open."""
        wish = struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
        try:
            fcntl.fcntl(self.segment.fd, fcntl.F_OFD_SETLK, wish)
        except BlockingIOError:
            return False
        return True


class Segment:
    """The slots of one rank and role.

    Invariant: every page is there, so no copy is killed by a full file system; `populate` has them mapped too, so that
    none is slowed by a first touch: for whoever fills it. Else pages are mapped as they are looked at, because mapping
    takes 0.2 s/GiB, and the file may lie on a drive.
    """

    def __init__(self, path: Path, fd: int, geometry: Mapping[str, Any], *, writable: bool, populate: bool) -> None:
        self.path, self.fd, self.writable = path, fd, writable
        self.role, self.rank = str(geometry["role"]), int(geometry["rank"])
        self.slot_bytes, self.num_slots = int(geometry["slot_bytes"]), int(geometry["num_slots"])
        self.chunk_bytes, self.table_chunks = int(geometry["chunk_bytes"]), int(geometry["table_chunks"])
        self.header_bytes = _header_bytes(self.table_chunks)
        self.stride = _stride(self.slot_bytes, self.table_chunks)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        size = segment_bytes(self.slot_bytes, self.num_slots, self.table_chunks)
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0), protection)
        self.memory = np.frombuffer(self._map, np.uint8)
        self.slots = tuple(Slot(self, i) for i in range(self.num_slots))

    @staticmethod
    def create(
        path: Path, role: str, rank: int, slot_bytes: int, num_slots: int, chunk_bytes: int, table_chunks: int
    ) -> Segment:
        """Make a segment of free slots, with all its memory; `table_chunks`: hashes a header has room for.

        Blocks: host, while the system clears the pages
        Raises: CheckpointError if the memory cannot be had, or the file is there
        """
        needed = segment_bytes(slot_bytes, num_slots, table_chunks)
        geometry: dict[str, Any] = {"role": role, "rank": rank, "slot_bytes": slot_bytes, "num_slots": num_slots}
        geometry |= {"chunk_bytes": chunk_bytes, "table_chunks": table_chunks}
        body = json.dumps(geometry).encode()
        try:
            with _appearing(path) as fd:
                # Allocates now: a page that cannot be had later would kill the process that touches it (SIGBUS).
                os.posix_fallocate(fd, 0, needed)
                os.pwrite(fd, _FILE.pack(_FILE_MAGIC, len(body), xxhash.xxh3_64_intdigest(body)) + body, 0)
        except OSError as error:
            raise CheckpointError(
                f"segment {path} of {needed} bytes ({num_slots} slots of {slot_bytes}) could not be made: {error}. Use "
                "fewer snapshot.slots, or a snapshot.folder with more room"
            ) from error
        return Segment.open(path, writable=True, populate=True)

    @staticmethod
    def ensure(
        path: Path, role: str, rank: int, slot_bytes: int, num_slots: int, chunk_bytes: int, table_chunks: int
    ) -> Segment:
        """Map the segment that is there with what it holds, or make it; one whose first page is damaged is replaced.

        Raises: CheckpointError if it cannot be mapped now: then it stays as it is
        """
        try:
            return Segment.open(path, writable=True, populate=True)
        except FileNotFoundError:
            return Segment.create(path, role, rank, slot_bytes, num_slots, chunk_bytes, table_chunks)
        except DamagedError:  # nobody can read it
            path.unlink(missing_ok=True)
            return Segment.create(path, role, rank, slot_bytes, num_slots, chunk_bytes, table_chunks)

    @staticmethod
    def open(path: Path, writable: bool = False, *, populate: bool = False) -> Segment:
        """Map a segment that is there.

        Raises: DamagedError if it is no segment or not whole; CheckpointError if it cannot be mapped now;
                FileNotFoundError
        """
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            page = os.pread(fd, PAGE, 0)
            magic, length, seal = _FILE.unpack_from(page)
            body = page[_FILE.size : _FILE.size + length]
            if magic != _FILE_MAGIC or xxhash.xxh3_64_intdigest(body) != seal:
                raise ValueError("its first page is damaged")
            return Segment(path, fd, json.loads(body), writable=writable, populate=populate)
        except OSError as error:  # no address space, no memory for the map: what it holds is as good as before
            os.close(fd)
            raise CheckpointError(f"{path} cannot be mapped: {error}") from error
        except (ValueError, KeyError, struct.error) as error:
            os.close(fd)
            raise DamagedError(f"{path} is not a whole segment: {error}. Its snapshots are lost") from error

    def close(self) -> None:
        """Close the file. The memory stays mapped as long as somebody holds `data` of a slot."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd, self.slots = -1, ()
        del self.memory
        with contextlib.suppress(BufferError):  # views of it are still held: it is unmapped with the last of them
            self._map.close()


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[int]:
    """Open a new file that appears at `path` at the end. It has no name before, so that a kill leaves nothing of it."""
    draft = None
    try:
        fd = os.open(path.parent, _UNNAMED, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        fd, draft = _draft(path)
    try:
        yield fd
        # Naming a folder, which absolute paths have no use for, has Python make the call that follows links.
        os.link(draft or f"/proc/self/fd/{fd}", path.absolute(), src_dir_fd=fd, follow_symlinks=True)
    finally:
        os.close(fd)
        if draft is not None:
            draft.unlink(missing_ok=True)


def _draft(path: Path) -> tuple[int, Path]:
    """Open a file under a name of this process, and remove those that dead ones have left.

    For file systems that have no files without a name.
    """
    folder = path.parent.absolute()
    for left in folder.iterdir():
        match = _DRAFT.fullmatch(left.name)
        if match and not is_alive(int(match[1]), int(match[2])):
            left.unlink(missing_ok=True)
    draft = folder / f".{path.name}.{os.getpid()}-{process_started(os.getpid())}.making"
    return os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), draft


def _header_bytes(table_chunks: int) -> int:
    return _round(_HEAD.size + FACTS_BYTES + 8 * table_chunks)


def _stride(slot_bytes: int, table_chunks: int) -> int:
    return PAGE + 2 * _header_bytes(table_chunks) + _round(slot_bytes)


def _round(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def segment_bytes(slot_bytes: int, num_slots: int, table_chunks: int) -> int:
    """Return the size of a segment's file."""
    return PAGE + num_slots * _stride(slot_bytes, table_chunks)


def num_chunks(num_bytes: int, chunk_bytes: int) -> int:
    """Return in how many chunks this many bytes are hashed."""
    return -(-num_bytes // chunk_bytes)


def parity_hashes(stripes: Stripes) -> int:
    """Return how many hashes the header of a parity slot has: of its own bytes, and of all members' data."""
    return sum(num_chunks(size, stripes.chunk_bytes) for size in (stripes.parity_bytes, *stripes.sizes))


def hash_chunks(data: np.ndarray, num_bytes: int, chunk_bytes: int, first: int = 0) -> np.ndarray:
    """Return xxh3_64 of each chunk from number `first` on; the last may be shorter."""
    view = data.data
    return np.array(
        [
            xxhash.xxh3_64_intdigest(view[low : min(low + chunk_bytes, num_bytes)])
            for low in range(first * chunk_bytes, num_bytes, chunk_bytes)
        ],
        dtype="<u8",
    )


def verify(slot: Slot, header: SlotHeader) -> list[int]:
    """Return the numbers of the chunks whose bytes are not those that were hashed (all, if the slot was refilled).

    Raises: CheckpointError if the slot was never hashed
    """
    table = header.hashes.get(header.own_key)
    if table is None or len(table) != header.num_chunks:
        raise CheckpointError(
            f"rank {header.rank}, {header.role} of step {header.step} ({header.state.name}): not hashed, so nothing "
            "vouches for its bytes"
        )
    found = hash_chunks(slot.data, header.num_bytes, header.chunk_bytes)
    if header.sequence >= 0 and slot.sequence > header.sequence:
        now = slot.header()
        if now is None or (now.generation, now.step) != (header.generation, header.step):
            return list(range(header.num_chunks))
    return [int(i) for i in np.flatnonzero(found != table)]


def pick_slot(segment: Segment, generation: int, first: int = 0) -> tuple[Slot, int] | None:
    """Choose the slot to fill next, and say at which number it was found so: one that holds nothing, or one that a
    dead generation left half filled; none that a process, however old, may still write. None: skip this snapshot.

    Whoever commits snapshots frees what they replace, so nothing that may be the newest is ever chosen. `first`: the
    slot to look at first, because it is likely to be free.
    """
    for slot in (*segment.slots[first:], *segment.slots[:first]):
        sequence = slot.sequence
        header = slot.header()
        holds_nothing = header is None or (header.state == State.FILLING and header.generation < generation)
        if holds_nothing and not slot.claimed:
            return slot, sequence
    return None
