"""Named records of bytes, each resting on one tier: fetched into host memory, put back, committed.

A record has one latest version. Records with two slots are written beside their committed version, which stays whole
until `commit` makes all that was put the latest at once, or `roll_back` forgets it; on NVMe a commit is durable, so the
last committed step is on the drives whatever happens. Whoever fetches gets a lease, which is put back, or given up.
Must not know: what the bytes mean, layers, ranks, why something is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from windlass.dist.errors import OffloadError
from windlass.offload.lane import PRIORITY, Lanes
from windlass.offload.slabs import Slab, SlabPool

READ, WRITE = "file read", "file write"


class RecordFile(Protocol):
    """A file with a table of extents (see `offload.nvme.StateFile`)."""

    def read(self, key: str, slot: int, offset: int, out: torch.Tensor) -> None: ...
    def write(self, key: str, slot: int, offset: int, data: torch.Tensor) -> None: ...
    def commit(self, step: int, slots: Mapping[str, int], extra: dict[str, Any]) -> None: ...


@dataclass
class _Record:
    """One record. `memory` holds its slots in host memory; on NVMe `file` says in which of the files it lies."""

    key: str
    num_bytes: int
    slots: int
    memory: list[torch.Tensor]
    file: int = -1
    committed: int = 0  # slot of the latest version
    staged: bool = False  # a newer version is in the other slot
    version: int = 0
    durable: bool = False  # commits cover it
    last_write: Future[None] | None = None
    kept: Lease | None = None  # a version newer than the one on NVMe, held in host memory
    parts: set[int] = field(default_factory=set)  # offsets that were written, of a record that is written in parts

    @property
    def on_file(self) -> bool:
        return self.file >= 0


@dataclass
class Lease:
    """A record in host memory while somebody works on it. `bytes` may be overwritten."""

    key: str
    bytes: torch.Tensor
    slab: Slab | None = None
    unwritten: bool = False  # it holds a version that is not on NVMe yet
    prepare: Callable[[], None] | None = field(default=None)  # fills `bytes` where that was left to the user's thread

    def ready(self) -> torch.Tensor:
        """Return the bytes, filled."""
        if self.prepare is not None:
            prepare, self.prepare = self.prepare, None
            prepare()
        return self.bytes


class TensorStore:
    """Records by key on host memory and NVMe files.

    `files` are those of this rank, one per drive; records on NVMe are shared out among them by `weights`.
    Blocks:     nothing here blocks; reads and writes are tasks of the lanes "file read" and "file write"
    Invariant:  a read never overtakes a write of the same record; every lease is put or dropped within a step
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._records: dict[str, _Record] = {}
        self._files: Sequence[RecordFile] = ()
        self._pool: SlabPool | None = None
        self._leased: dict[str, Lease] = {}
        self._adopted = False

    def use_files(self, files: Sequence[RecordFile]) -> None:
        """Say where records on NVMe lie."""
        self._files = files

    def use_slabs(self, pool: SlabPool) -> None:
        """Say through which slabs whole records of NVMe pass."""
        self._pool = pool

    def add_host(self, key: str, slots: Sequence[torch.Tensor]) -> None:
        """Add a record that rests in these host memories, one per slot.

        Shapes:  each (num_bytes,) uint8
        """
        self._add(_Record(key, slots[0].numel(), len(slots), list(slots)))

    def add_file(self, key: str, num_bytes: int, slots: int, file: int, *, durable: bool = False) -> None:
        """Add a record that rests in one of the files; `durable`: commits cover it."""
        self._add(_Record(key, num_bytes, slots, [], file, durable=durable))

    def adopt(self, slots: Mapping[str, int]) -> None:
        """Take the records that an earlier run left in these slots as they are."""
        self._adopted = True
        for key, slot in slots.items():
            self._record(key).committed = slot

    def _add(self, record: _Record) -> None:
        if record.key in self._records:
            raise OffloadError(f"record '{record.key}' exists already: keys are unique")
        self._records[record.key] = record

    def version(self, key: str) -> int:
        """Return how often the record was rewritten."""
        return self._record(key).version

    def stamp(self, key: str, version: int) -> None:
        """Say which version a record has now."""
        self._record(key).version = version

    def check_version(self, key: str, version: int) -> None:
        """Raise OffloadError unless the latest version is this one: nobody may compute with an older one."""
        found = self._record(key).version
        if found != version:
            raise OffloadError(
                f"record '{key}': version {found} would be read where version {version} is due. This is a defect of "
                "Windlass: please report it with RUN/plan.json"
            )

    # -- whole records -----------------------------------------------------------------------------------------------

    def fetch(self, key: str, *, priority: int = PRIORITY["prefetch"]) -> Future[Lease]:
        """Bring a record's latest version to host memory, for change: what is put back becomes the next version."""
        record = self._record(key)
        if record.kept is not None:
            self._leased[key] = lease = record.kept  # first, as reads look at both
            record.kept = None
            return self._lanes.done(lease)
        if not record.on_file:
            return self._lanes.done(self._lease_host(record))
        assert self._pool is not None
        slot, size = record.committed, record.num_bytes
        taken = self._pool.take(key)
        after = [taken] + ([record.last_write] if record.last_write is not None else [])

        def read() -> Lease:
            slab = taken.result()
            lease = Lease(key, slab.bytes[:size], slab)
            self._file(record).read(key, slot, 0, lease.bytes)
            self._leased[key] = lease
            return lease

        return self._lanes.submit(
            self._lane(READ, record), read, after=after, num_bytes=size, label=f"read {key}", priority=priority
        )

    def create(self, key: str) -> Future[Lease]:
        """Lend memory for a record whose present bytes nobody needs."""
        record = self._record(key)
        if not record.on_file:
            lease = self._lease_host(record)
            lease.prepare = None
            return self._lanes.done(lease)
        assert self._pool is not None
        taken = self._pool.take(key)

        def lend() -> Lease:
            slab = taken.result()
            lease = self._leased[key] = Lease(key, slab.bytes[: record.num_bytes], slab)
            return lease

        return self._lanes.then([taken], lend)

    def _lease_host(self, record: _Record) -> Lease:
        if record.slots == 1:
            lease = Lease(record.key, record.memory[0])
        else:
            old, new = record.memory[record.committed], record.memory[1 - record.committed]
            lease = Lease(record.key, new, prepare=lambda: _copy(new, old))
        self._leased[record.key] = lease
        return lease

    def put(
        self, key: str, fetched: Future[Lease], *, after: Sequence[Future[Any]] = (), keep: bool = False
    ) -> Future[None]:
        """Make what the lease holds once `after` is done the record's next version, staged where it has two slots.

        `keep`: it stays in host memory instead of being written, until the next fetch.
        """
        record = self._record(key)
        waits = [fetched, *after]
        if not record.on_file:

            def settle() -> None:
                record.staged = record.slots == 2
                self._leased.pop(key)

            record.last_write = self._lanes.then(waits, settle)
            return record.last_write
        if keep:

            def hold() -> None:
                record.kept = self._leased.pop(key)
                record.kept.unwritten = True

            return self._lanes.then(waits, hold)
        slot = 1 - record.committed if record.slots == 2 else 0

        def write() -> None:
            lease = fetched.result()
            self._file(record).write(key, slot, 0, lease.bytes)
            record.staged = record.slots == 2
            self._leased.pop(key)
            if lease.slab is not None:
                lease.slab.give()

        record.last_write = self._lanes.submit(
            self._lane(WRITE, record),
            write,
            after=waits,
            num_bytes=record.num_bytes,
            label=f"write {key}",
            priority=PRIORITY["write"],
        )
        return record.last_write

    def drop(self, lease: Lease) -> None:
        """Give a lease up unchanged; the record is as before."""
        self._leased.pop(lease.key, None)
        if lease.unwritten:
            self._record(lease.key).kept = lease
        elif lease.slab is not None:
            lease.slab.give()

    # -- parts of records --------------------------------------------------------------------------------------------

    def read(
        self,
        key: str,
        offset: int,
        num_bytes: int,
        out: Callable[[], torch.Tensor],
        *,
        after: Sequence[Future[Any]] = (),
        priority: int = PRIORITY["prefetch"],
    ) -> Future[None]:
        """Read bytes of the latest version from `offset` on; `out` says where to, once `after` is done."""
        record = self._record(key)
        waits = [*after, *([record.last_write] if record.last_write is not None else [])]

        def work() -> None:
            target = out()
            # What was kept may have been fetched for its update already: the file is older still.
            held = record.kept or self._leased.get(key)
            if record.on_file and held is not None and held.unwritten:
                target.copy_(held.bytes[offset : offset + num_bytes])
            elif not record.on_file:
                target.copy_(record.memory[record.committed][offset : offset + num_bytes])
            else:
                self._file(record).read(key, record.committed, offset, target)

        if not record.on_file:
            return self._lanes.then(waits, work)
        lane, label = self._lane(READ, record), f"read {key}"
        return self._lanes.submit(lane, work, after=waits, num_bytes=num_bytes, label=label, priority=priority)

    def write(
        self,
        key: str,
        offset: int,
        num_bytes: int,
        data: Callable[[], torch.Tensor],
        *,
        after: Sequence[Future[Any]] = (),
    ) -> Future[None]:
        """Overwrite bytes of the only slot from `offset` on; `data` says with what, once `after` is done."""
        record = self._record(key)
        if not record.on_file:
            target = record.memory[0][offset : offset + num_bytes]
            return self._lanes.then(after, lambda: _copy(target, data()))
        waits = [*after, *([record.last_write] if record.last_write is not None else [])]
        record.parts.add(offset)
        record.last_write = self._lanes.submit(
            self._lane(WRITE, record),
            lambda: self._file(record).write(key, 0, offset, data()),
            after=waits,
            num_bytes=num_bytes,
            label=f"write {key}",
            priority=PRIORITY["write"],
        )
        return record.last_write

    def settled(self, key: str) -> Future[Any]:
        """Return what is done when the record's latest write is."""
        return self._record(key).last_write or self._lanes.done(None)

    def memory(self, key: str) -> torch.Tensor:
        """Return the host memory of a record's latest version, to read from."""
        record = self._record(key)
        assert not record.on_file
        return record.memory[record.committed]

    def written(self, key: str, offset: int) -> bool:
        """Return whether this part of a record on NVMe was ever written, here or by the run whose file was adopted."""
        return offset in self._record(key).parts or self._adopted

    def on_file(self, key: str) -> bool:
        """Return whether the record rests on NVMe."""
        return self._record(key).on_file

    # -- versions ----------------------------------------------------------------------------------------------------

    def commit(self, keys: Sequence[str] | None = None) -> None:
        """Make everything that was put the latest version, or these records. In memory only; see `make_durable`."""
        records = self._records.values() if keys is None else [self._record(key) for key in keys]
        for record in records:
            if record.staged:
                record.committed, record.staged = 1 - record.committed, False

    def make_durable(self, step: int, extra: dict[str, Any]) -> None:
        """Write down on the drives which slots hold the state after `step`.

        Blocks:  host, until it cannot be lost
        """
        for number, file in enumerate(self._files):
            slots = {r.key: r.committed for r in self._records.values() if r.file == number and r.durable}
            file.commit(step, slots, extra)

    def roll_back(self) -> None:
        """Forget what was put since the last commit."""
        for record in self._records.values():
            record.staged = False

    @property
    def kept(self) -> list[str]:
        """Keys of the records kept in host memory."""
        return [record.key for record in self._records.values() if record.kept is not None]

    def check_balanced(self) -> None:
        """Raise OffloadError if a lease is out: at the end of a step nobody works on a record."""
        if self._leased:
            raise OffloadError(f"leases were not returned at the end of the step: {', '.join(sorted(self._leased))}")

    # ----------------------------------------------------------------------------------------------------------------

    def _record(self, key: str) -> _Record:
        record = self._records.get(key)
        if record is None:
            raise OffloadError(f"record '{key}' does not exist")
        return record

    def _file(self, record: _Record) -> RecordFile:
        return self._files[record.file]

    def _lane(self, name: str, record: _Record) -> str:
        return lane_of(name, record.file)


def lane_of(name: str, drive: int) -> str:
    """Return the lane of reads or writes of one drive."""
    return name if drive == 0 else f"{name} {drive}"


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
