"""The state of one rank in one preallocated file of one drive: extents by key and slot, commits, checksums.

Offsets and lengths are whole pages. A key has one slot, or two of which one holds the committed version while the other
is written. Calls block and may come from several threads; two that touch the same bytes at a time, one of them writing,
are refused. What a failed or unfinished write has touched counts as never written, so it cannot be read as data.
Must not know: lanes, units, what the bytes mean.
Source: DeepNVMe's swapper (arXiv:2104.07857) for one file per rank under O_DIRECT.
Differs: preallocated, every byte count checked, crash-consistent with two slots.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from windlass.dist.env import fault
from windlass.dist.errors import OffloadError, TierOutOfMemory
from windlass.offload.checksums import compare, hash_pieces, hash_remainders
from windlass.offload.claim import STATE_NAME, Claim, reserve, run_folder
from windlass.offload.commit import Commit, CommitLog
from windlass.offload.engines import REFUSED, FileEngine, page_buffer, require_pages
from windlass.offload.extents import Access, Extent, layout_of, place_extents
from windlass.offload.ranges import Piece, Ranges

_ADVICE = {
    errno.ENOSPC: "the drive is full: free space there, or add a folder of another drive to cluster.nvme_paths",
    errno.EDQUOT: "the quota of the drive is used up: raise it, or add a folder to cluster.nvme_paths",
    errno.EFBIG: "a limit on the size of files: raise it (ulimit -f unlimited)",
    errno.EIO: "the drive failed (see dmesg): take its folder out of cluster.nvme_paths and resume from a checkpoint",
    errno.ENODATA: "the file was cut short by someone else: delete its folder and resume from a checkpoint",
    errno.EROFS: "the drive has become read-only (see dmesg): take its folder out of cluster.nvme_paths",
}


class StateFile:
    """One file of extents, open and locked. Made by `create` or `reopen`."""

    def __init__(self, claim: Claim, rank: int, extents: Sequence[Extent], engine: FileEngine, checksums: bool) -> None:
        self._claim, self._rank, self._engine = claim, rank, engine
        # An engine that may lose bytes in silence is never trusted.
        self.checksums = checksums or not engine.reports_errors
        self._extents = {extent.key: extent for extent in extents}
        self._offsets, self.num_bytes = place_extents(extents)
        self._log = CommitLog(claim.folder, layout_of(extents))
        self._written: dict[tuple[str, int], Ranges] = {place: Ranges() for place in self._offsets}
        self._lock = threading.Lock()  # of the tables; nothing blocks while it is held
        self._active: list[Access] = []
        self._counts = {"read": 0, "write": 0}
        self._closing: str | None = None
        self.read_bytes = self.written_bytes = 0
        self.path = claim.folder / STATE_NAME

    @staticmethod
    def create(
        folder: Path,
        rank: int,
        extents: Sequence[Extent],
        *,
        engine: FileEngine,
        checksums: bool,
        identity: Mapping[str, Any],
        warn: Callable[[str], None],
        budget: int = 0,
    ) -> StateFile:
        """Make the file of a rank under a folder of a drive, with all its room reserved, in place of an earlier one.

        `budget`: most bytes it may take (0: no limit).

        Blocks: host
        Raises: OffloadError if the folder is not there, is in use, or has too little room; TierOutOfMemory over budget
        """
        total = place_extents(extents)[1]
        if budget and total > budget:
            raise TierOutOfMemory(
                f"rank {rank} needs {total} bytes on nvme in {folder}, {budget} are allowed. "
                f"Set offload.nvme_bytes={total}, or let more rest in host memory"
            )
        claim = Claim(run_folder(folder, rank, identity))
        try:
            file = StateFile(claim, rank, extents, engine, checksums)
            file._reserve()
            file._open(warn)
        except BaseException:
            claim.release(remove=True)
            raise
        return file

    @staticmethod
    def reopen(
        folder: Path,
        rank: int,
        extents: Sequence[Extent],
        *,
        engine: FileEngine,
        checksums: bool,
        identity: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> StateFile | None:
        """Open what an earlier run of the same identity and layout left, or return None if nothing of it is whole.

        Blocks: host
        Raises: OffloadError if the folder of the drive is not there, or another process uses it
        """
        home = run_folder(folder, rank, identity)
        if not (home / STATE_NAME).is_file():
            return None
        claim = Claim(home)
        try:
            file = StateFile(claim, rank, extents, engine, checksums)
            file._log.load()
            if file._log.records and file.path.stat().st_size == file.num_bytes:
                file._open(warn)
                file._adopt()
                return file
        except OSError as error:
            claim.release()
            raise OffloadError(f"{home} cannot be read ({error.strerror}). Delete it to begin anew") from error
        except BaseException:
            claim.release()
            raise
        claim.release()
        return None

    @property
    def direct(self) -> bool:
        """Whether transfers bypass the page cache."""
        return self._engine.direct

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        """Clear the folder and reserve the room of the whole file, so that a full drive shows now."""
        home = self._claim.folder
        try:
            self._claim.clear()
            reserve(self.path, self.num_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                others = sorted(p.name for p in home.parent.glob("windlass-*-rank*") if p != home)
                hint = f" ({len(others)} folders of other runs are there, e.g. {others[0]})" if others else ""
                raise OffloadError(
                    f"rank {self._rank} needs {self.num_bytes} bytes in {home.parent}, "
                    f"{shutil.disk_usage(home).free} are free. Free space there{hint}, add a folder of another drive "
                    "to cluster.nvme_paths, or set offload.nvme_bytes to what may be used"
                ) from error
            raise self._named(error, f"making {self.path}") from error

    def _open(self, warn: Callable[[str], None]) -> None:
        try:
            try:
                fault("nvme.open", rank=self._rank)
                self._engine.open(self.path, self.num_bytes)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self._engine.open(self.path, self.num_bytes, direct=False)
                warn(
                    f"{self.path}: direct access is refused ({error.strerror}). Transfers go through the page cache, "
                    "which takes host memory beyond offload.host_bytes and is slower; a local ext4 or xfs drive "
                    "avoids that"
                )
        except OSError as error:
            raise self._named(error, f"opening {self.path}") from error

    def _adopt(self) -> None:
        """Take as written what the commits say, and nothing else."""
        self._written = {place: Ranges() for place in self._offsets}
        for record in reversed(self._log.records):
            for key, slot in record.commit.slots.items():
                self._written[key, slot] = Ranges(record.written[key].pieces)

    # -- transfers -----------------------------------------------------------------------------------------------------

    def read(self, key: str, slot: int, offset: int, out: torch.Tensor) -> None:
        """Fill `out` with bytes of a slot from an offset on.

        Units: bytes, multiples of a page
        Blocks: host
        Raises: OffloadError naming key, place and file: never written, damaged, cut short, the drive's own errors
        """
        access = self._access("read", key, slot, offset, out)
        with self._running(access):
            with self._lock:
                written = self._written[key, slot]
                gap = written.missing(access.start, access.end)
                pieces = written.overlapping(access.start, access.end)
            if gap is not None:
                raise OffloadError(
                    f"{access} in {self.path}: bytes {gap[0]}..{gap[1]} were never written, or their write failed. "
                    "Write them first, or resume from a checkpoint"
                )
            self._transfer(access, out)
            if self.checksums:
                for piece in pieces:
                    self._verify(access, piece, out)
        with self._lock:
            self.read_bytes += out.numel()

    def write(self, key: str, slot: int, offset: int, data: torch.Tensor) -> None:
        """Write `data` into a slot from an offset on. Commits that rely on this slot end before the first byte changes.

        Units: bytes, multiples of a page
        Blocks: host
        Raises: OffloadError naming key, place and file: drive full, a limit, the drive's own errors
        """
        access = self._access("write", key, slot, offset, data)
        with self._running(access):
            pieces = self._pieces(access, data)
            try:
                self._log.end_relying(key, slot)
            except OSError as error:
                raise self._named(error, f"ending the commits that rely on '{key}' in {self._claim.folder}") from error
            with self._lock:
                self._written[key, slot].remove(access.start, access.end)
            self._transfer(access, data)
            with self._lock:
                for piece in pieces:
                    self._written[key, slot].put(piece)
                self.written_bytes += data.numel()

    def _access(self, verb: str, key: str, slot: int, offset: int, buffer: torch.Tensor) -> Access:
        if (key, slot) not in self._offsets:
            slots = self._extents[key].slots if key in self._extents else 0
            raise OffloadError(f"{verb} of '{key}' slot {slot} in {self.path}: there are {slots} slots of that key")
        access = Access(verb, key, slot, offset, offset + buffer.numel())
        require_pages(f"{access} in {self.path}", offset, buffer)
        if access.end > self._extents[key].padded_bytes:
            raise OffloadError(
                f"{access} in {self.path}: the extent ends at byte {self._extents[key].padded_bytes}. Ask for less"
            )
        return access

    @contextmanager
    def _running(self, *accesses: Access) -> Iterator[None]:
        """Hold the bytes of accesses until they end. Whoever ends last after `close` does the closing."""
        with self._lock:
            if self._closing is not None:
                raise OffloadError(f"{accesses[0]} in {self.path}: the file was closed before")
            for mine in accesses:
                for other in self._active:
                    if mine.hurts(other):
                        raise OffloadError(f"{mine} in {self.path} while a {other} is under way: wait for it first")
            self._active += accesses
        try:
            yield
        finally:
            with self._lock:
                for mine in accesses:
                    self._active.remove(mine)
                last = self._closing is not None and not self._active
            if last:
                self._finish()

    def _transfer(self, access: Access, buffer: torch.Tensor) -> None:
        with self._lock:
            self._counts[access.verb] += 1
            count = self._counts[access.verb]
        start = self._offsets[access.key, access.slot] + access.start
        try:
            fault(f"nvme.{access.verb}", rank=self._rank, step=count)
            move = self._engine.read if access.verb == "read" else self._engine.write
            move(start, buffer)
        except OSError as error:
            raise self._named(error, f"{access} at byte {start} of {self.path}") from error

    def _named(self, error: OSError, what: str) -> OffloadError:
        advice = _ADVICE.get(error.errno or 0, "see what the system says about this drive")
        return OffloadError(f"rank {self._rank}: {what} failed: {error.strerror or error}. Probably {advice}")

    def _pieces(self, access: Access, data: torch.Tensor) -> list[Piece]:
        """Return the pieces that a write leaves: its own, and what remains of those it covers in part."""
        if not self.checksums:
            return [Piece(access.start, access.end)]
        pieces = hash_pieces(access.start, data)
        with self._lock:
            covered = self._written[access.key, access.slot].overlapping(access.start, access.end)
        for piece in covered:
            if piece.digest and (piece.start < access.start or piece.end > access.end):
                pieces += hash_remainders(piece, self._whole(access, piece), access.start, access.end)
        return pieces

    def _verify(self, access: Access, piece: Piece, out: torch.Tensor) -> None:
        if not piece.digest:
            return
        if piece.start < access.start or piece.end > access.end:
            self._whole(access, piece)
        else:
            compare(f"{access} in {self.path}", piece, out[piece.start - access.start : piece.end - access.start])

    def _whole(self, access: Access, piece: Piece) -> torch.Tensor:
        """Read one piece from the drive and verify it."""
        buffer = page_buffer(piece.end - piece.start)
        self._transfer(Access("read", access.key, access.slot, piece.start, piece.end), buffer)
        compare(f"{access} in {self.path}", piece, buffer)
        return buffer

    # -- commits -------------------------------------------------------------------------------------------------------

    def commit(self, step: int, slots: Mapping[str, int], extra: dict[str, Any]) -> None:
        """Note, durably, that the given slots hold a step. The one before stays until one of its slots is written.

        Blocks: host
        Raises: OffloadError if a slot is being written or is not written whole, or the drive fails
        """
        where = f"commit of step {step} in {self._claim.folder}"
        for key, slot in slots.items():
            if (key, slot) not in self._offsets:
                raise OffloadError(f"{where}: there is no slot {slot} of '{key}'")
        held = [Access("commit", key, slot, 0, self._extents[key].padded_bytes) for key, slot in slots.items()]
        with self._running(Access("commit", f"step {step}", 0, 0, 0), *held):
            with self._lock:
                newest = self._log.records[0].commit.step if self._log.records else -1
                if step <= newest:
                    raise OffloadError(f"{where}: step {newest} is there already. Roll back first")
                for _, key, slot, start, end in held:
                    if (gap := self._written[key, slot].missing(start, end)) is not None:
                        raise OffloadError(f"{where}: '{key}' slot {slot} bytes {gap[0]}..{gap[1]} were never written")
                written = {key: Ranges(self._written[key, slot].pieces) for key, slot in slots.items()}
            try:
                fault("nvme.commit", rank=self._rank, step=step)
                self._engine.sync()
                self._log.add(Commit(step, dict(slots), dict(extra)), written)
            except OSError as error:
                raise self._named(error, where) from error

    def commits(self) -> list[Commit]:
        """Return the steps that are whole here, newest first, two at most."""
        return [record.commit for record in self._log.records]

    def roll_back(self, step: int) -> None:
        """Make a commit the newest one; what came after it is forgotten.

        Raises: OffloadError if that step is not there
        """
        steps = [commit.step for commit in self.commits()]
        if step not in steps:
            raise OffloadError(f"{self._claim.folder} holds steps {steps}, not {step}. Resume from a checkpoint")
        self._keep(step)

    def forget(self) -> None:
        """End all commits; nothing counts as written any more. For a state that comes from elsewhere."""
        self._keep(-1)

    def _keep(self, step: int) -> None:
        with self._running(Access("roll back", f"step {step}", 0, 0, 0)):
            with self._lock:
                others = [str(access) for access in self._active if access.verb in ("read", "write", "commit")]
            if others:
                raise OffloadError(f"roll back of {self._claim.folder} while a {others[0]} is under way: wait for it")
            try:
                self._log.end([commit.step for commit in self.commits() if commit.step > step])
            except OSError as error:
                raise self._named(error, f"roll back to step {step} in {self._claim.folder}") from error
            with self._lock:
                self._adopt()

    # -- the end -------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make everything written durable.

        Blocks: host
        Raises: OffloadError
        """
        with self._running(Access("sync", "everything", 0, 0, 0)):
            try:
                self._engine.sync()
            except OSError as error:
                raise self._named(error, f"flushing {self.path}") from error

    def close(self, *, remove: bool = False) -> None:
        """End all use and give the folder back; `remove` deletes it. Transfers under way fail, nobody waits for them.

        Blocks: no
        """
        with self._lock:
            if self._closing is not None:
                return
            self._closing = "remove" if remove else "keep"
            busy = bool(self._active)
        self._engine.cancel()
        if not busy:
            self._finish()

    def _finish(self) -> None:
        self._engine.close()
        try:
            self._claim.release(remove=self._closing == "remove")
        except OSError as error:
            raise self._named(error, f"removing {self._claim.folder}") from error
