"""A step that the nodes hold, read as if it were the files of a checkpoint: one file for each rank that took it.

What is read comes from this node's own memory, then from its own drive and from other nodes, and what nobody has whole
is computed from the rest of its group. Everything is compared with its checksum, chunk by chunk; a damaged chunk counts
as missing, and so does a node that does not answer. With `manifest_of`, a `CheckpointReader` cuts the state anew for
any number of ranks, and each rank reads only what it needs.
Must not know: sockets, which step to read, models, who reads.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import xxhash

from windlass.checkpoint.manifest import Manifest, StoredFile, StoredPiece, StoredTensor
from windlass.checkpoint.memory.copies import Copy, Reach, Unusable, name_of
from windlass.checkpoint.memory.decode import Decoder
from windlass.checkpoint.memory.encode import member_facts
from windlass.checkpoint.memory.inventory import Choice, Held
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.stripes import DATA, PARITY
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError

THREADS = 4  # chunks under way at once; each has a connection of its own
KEPT_CHUNKS = 32  # of which a read wanted only a part: the next read wants the rest
PAUSE_S = 0.1  # before copies that could not be read are tried again


def file_of(rank: int) -> str:
    """Return the name under which the bytes of a rank are read."""
    return f"rank-{rank:05d}"


def manifest_of(layouts: Sequence[Layout], step: int, extra: dict[str, Any]) -> Manifest:
    """Return the manifest of a step in memory, from the layouts of all its ranks.

    Pieces have no checksum of their own: a MemorySource checks what it reads by chunks, so read with `verify=False`.

    Raises: CheckpointError if two ranks give a tensor different shapes or formats
    """
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    pieces: dict[str, list[StoredPiece]] = {}
    for rank, layout in enumerate(layouts):
        for f in layout.fragments:
            kind = (tuple(f.global_shape), f.dtype)
            if kinds.setdefault(f.key, kind) != kind:
                raise CheckpointError(
                    f"step {step} in memory: tensor '{f.key}' is {f.dtype} of shape {list(f.global_shape)} on rank "
                    f"{rank} and {kinds[f.key][1]} of shape {list(kinds[f.key][0])} on another"
                )
            found = pieces.setdefault(f.key, [])
            if f.num_bytes:
                found.append(StoredPiece(file_of(rank), f.offset, f.num_bytes, f.box, ""))
    return Manifest(
        step=step,
        world_size=len(layouts),
        saved_at=time.time(),
        tensors={key: StoredTensor(*kinds[key], tuple(found)) for key, found in pieces.items()},
        files={file_of(rank): StoredFile(layout.num_bytes, "") for rank, layout in enumerate(layouts)},
        extra=extra,
    )


@dataclass(frozen=True)
class RankFile:
    """The bytes of one rank, open for reading."""

    source: MemorySource
    rank: int

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from `offset` on; return how many bytes there were."""
        return self.source.read(self.rank, offset, buffer)

    def close(self) -> None:
        """Nothing: the source owns what is open."""


class MemorySource:
    """The bytes of every rank of one step: a `Files` of `checkpoint.storage`.

    `rank` is who reads, for messages and drills. A copy that cannot be read is tried again for `timeout_s`, because a
    snapshot process that ended comes back with all it held. `bad` tells which copies are to blame, and why: those that
    are damaged, and those that could not be read all that time, unless they could be later.
    """

    def __init__(
        self, choice: Choice, world: Membership, reach: Reach, *, rank: int = 0, timeout_s: float = 10.0
    ) -> None:
        self.choice, self.world, self.rank, self.timeout_s = choice, world, rank, timeout_s
        self.place = f"step {choice.step} of generation {choice.generation} in memory"
        self._damaged: dict[Held, str] = {}
        self._silent: dict[Held, str] = {}
        self._computed: dict[tuple[int, str], list[int]] = {}  # chunks by rank and reason
        self._reach = reach
        self._lock = threading.Lock()
        self._copies: dict[Held, Copy] = {}
        self._away: dict[Held, str] = {}  # could not be read just now
        self._gone: set[Held] = set()  # cannot be opened, and never will be
        self._kept: OrderedDict[tuple[int, int], memoryview] = OrderedDict()
        self._decoders: dict[tuple[int, ...], Decoder | None] = {}
        self._decoding = threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="restore")

    # -- files -------------------------------------------------------------------------------------------------------

    def open(self, name: str) -> RankFile:
        """Open the file of a rank. Raises: FileNotFoundError"""
        return RankFile(self, self._rank_of(name))

    def size(self, name: str) -> int:
        """Return the bytes of a rank. Raises: FileNotFoundError"""
        return self.world.members[self._rank_of(name)].num_bytes

    def close(self) -> None:
        """End the threads that read."""
        self._threads.shutdown(cancel_futures=True)

    def _rank_of(self, name: str) -> int:
        match = re.fullmatch(r"rank-(\d{5,})", name)
        if match is None or int(match[1]) >= self.world.world_size:
            raise FileNotFoundError(2, "there is no such rank", name)
        return int(match[1])

    @property
    def bad(self) -> dict[Held, str]:
        with self._lock:
            return {**self._silent, **self._damaged}

    def blame(self, copies: Mapping[Held, str]) -> None:
        """Take copies for damaged, for reasons that only the caller knows."""
        with self._lock:
            self._damaged.update(copies)

    # -- facts -------------------------------------------------------------------------------------------------------

    def facts(self, rank: int) -> dict[str, Any] | None:
        """Return the facts that a rank kept with its snapshot; None if they went with its node."""
        deadline = time.monotonic() + self.timeout_s
        while (found := self._facts(rank)) is None and self._once_more(deadline):
            continue
        return found

    def any_facts(self) -> dict[str, Any]:
        """Return the facts of the first rank that has any.

        Raises: CheckpointError if none can be read
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            for rank in range(self.world.world_size):
                if (found := self._facts(rank)) is not None:
                    return found
            if not self._once_more(deadline):
                why = "; ".join([*self.bad.values()][:4])
                raise CheckpointError(f"{self.place}: no header can be read: {why}")

    def _facts(self, rank: int) -> dict[str, Any] | None:
        for held in self.choice.data.get(rank, ()):
            copy = self._copy(held)
            if copy is not None:
                return copy.header.facts
        for copy in self._parity_copies(rank):
            found = member_facts(copy.header.facts, rank)
            if found is not None:
                return found
        return None

    # -- bytes -------------------------------------------------------------------------------------------------------

    def read(self, rank: int, offset: int, buffer: memoryview) -> int:
        """Fill a buffer with bytes of a rank, fewer at its end.

        Raises: CheckpointError saying what is missing, if some can be neither read nor computed
        """
        fault("restore.fetch", rank=self.rank, step=self.choice.step)
        size, end = self.world.chunk_bytes, min(offset + len(buffer), self.world.members[rank].num_bytes)
        wanted: dict[int, memoryview] = {}
        partly: list[tuple[int, int, memoryview, memoryview]] = []
        for number in range(offset // size, -(-end // size)):
            low, high = max(offset, number * size), min(end, (number + 1) * size)
            part = buffer[low - offset : high - offset]
            if len(part) == self._length(rank, number):
                wanted[number] = part  # read straight into place
                continue
            with self._lock:
                chunk = self._kept.get((rank, number))
            if chunk is None:
                chunk = wanted[number] = memoryview(bytearray(self._length(rank, number)))
            partly.append((number, low - number * size, part, chunk))
        self._get(rank, wanted)
        for number, low, part, chunk in partly:
            part[:] = chunk[low : low + len(part)]
            with self._lock:
                self._kept[rank, number] = chunk
                while len(self._kept) > KEPT_CHUNKS:
                    self._kept.popitem(last=False)
        return max(end - offset, 0)

    def _length(self, rank: int, number: int) -> int:
        return min(self.world.chunk_bytes, self.world.members[rank].num_bytes - number * self.world.chunk_bytes)

    def _get(self, rank: int, wanted: Mapping[int, memoryview]) -> None:
        """Read chunks of a rank's data, or compute them, until they are there or nothing is left to be tried."""
        deadline = time.monotonic() + self.timeout_s
        todo = dict(wanted)
        while todo := self._read_copies(rank, todo):
            todo, problem = self._compute(rank, todo)
            if not todo:
                return
            if not self._once_more(deadline):
                raise CheckpointError(f"{self.place}: chunk {min(todo)} of rank {rank} is lost: {problem}")

    def _once_more(self, deadline: float) -> bool:
        """Tell whether copies that could not be read are worth another try, after a pause; if not, they are to blame.

        Blocks: host, PAUSE_S
        """
        if not self._away:
            return False
        if time.monotonic() > deadline:
            with self._lock:
                self._silent.update(self._away)
            return False
        time.sleep(PAUSE_S)
        with self._lock:
            self._away.clear()
        return True

    def _read_copies(self, rank: int, wanted: Mapping[int, memoryview]) -> dict[int, memoryview]:
        """Read what somebody has whole; return what nobody has."""

        def one(number: int) -> bool:
            return self._read_copy(rank, DATA, number, wanted[number])

        copies = self.choice.data.get(rank, ())
        if not copies:
            return dict(wanted)
        own = any(map(self._reach.is_own, copies))
        done = map(one, wanted) if own or len(wanted) == 1 else self._threads.map(one, wanted)
        return {number: wanted[number] for number, there in zip(list(wanted), list(done), strict=True) if not there}

    def _read_copy(self, rank: int, role: str, number: int, into: memoryview) -> bool:
        """Read a chunk from the first copy that has it whole; False if none has."""
        found = (self.choice.data if role == DATA else self.choice.parity).get(rank, ())
        for held in sorted(found, key=lambda h: not self._reach.is_own(h)):
            copy = self._copy(held)
            if copy is None:
                continue
            try:
                copy.read(number, into)
                self._answered(held)
                return True
            except (CheckpointError, Unusable) as error:
                self._note(held, error)
        return False

    def _copy(self, held: Held) -> Copy | None:
        """Open a copy once; None if it cannot be read now, or is not what it should be."""
        with self._lock:
            if held in self._copies or held in self._away or held in self._gone:
                return self._copies.get(held)
        try:
            copy = self._reach.open(held)
            self._check(copy)
        except (CheckpointError, Unusable) as error:
            self._note(held, error)
            return None
        self._answered(held)
        with self._lock:
            return self._copies.setdefault(held, copy)

    def _check(self, copy: Copy) -> None:
        header, member = copy.header, self.world.members[copy.held.rank]
        stated = (self.world.job, self.world.chunk_bytes)
        if (header.job, header.chunk_bytes) != stated or (
            header.role == DATA and (header.layout, header.num_bytes) != (member.layout, member.num_bytes)
        ):
            raise Unusable(f"{copy} is of another job or layout than the membership of its generation says")

    def _note(self, held: Held, error: Exception) -> None:
        with self._lock:
            if not isinstance(error, Unusable):
                self._away[held] = str(error)
                self._copies.pop(held, None)
                return
            self._damaged.setdefault(held, str(error))
            if held not in self._copies:
                self._gone.add(held)

    def _answered(self, held: Held) -> None:
        if self._silent:
            with self._lock:
                self._silent.pop(held, None)

    @property
    def repaired(self) -> list[str]:
        """Say in a line for each rank and reason what was computed although somebody should have had it."""
        told = []
        for (rank, why), chunks in list(self._computed.items()):
            what = (
                f"chunk {chunks[0]} of rank {rank} was"
                if len(chunks) == 1
                else f"{len(chunks)} chunks of rank {rank} were"
            )
            told.append(f"{what} computed: {why}")
        return told

    # -- what nobody has ---------------------------------------------------------------------------------------------

    def _compute(self, rank: int, wanted: Mapping[int, memoryview]) -> tuple[dict[int, memoryview], str]:
        """Compute chunks from the rest of the group; return those that cannot be, and why the first cannot."""
        decoder = self._decoder_of(rank)
        if decoder is None:
            return dict(wanted), f"{self._lost(rank)}; nothing else in memory makes up for it"
        fault("restore.decode", rank=self.rank, step=self.choice.step)
        left, reason = dict(wanted), ""
        # All at once first; one by one where some are damaged, because damage in different places can be made up for.
        for run in [*_runs(wanted), *([number] for number in wanted if len(wanted) > 1)]:
            if not left.keys() >= set(run):
                continue
            start = run[0] * self.world.chunk_bytes
            stop = start + sum(len(wanted[number]) for number in run)
            try:
                with self._decoding:
                    found = decoder.read(rank, start, stop)
                self._check_computed(rank, run, found)
            except CheckpointError as error:
                reason = reason or f"{self._lost(rank)}; {error}"
                continue
            for number in run:
                low = number * self.world.chunk_bytes - start
                wanted[number][:] = found[low : low + len(wanted[number])]
                del left[number]
                if self.choice.data.get(rank):
                    self._computed.setdefault((rank, self._lost(rank)), []).append(number)
        return left, reason

    def _decoder_of(self, rank: int) -> Decoder | None:
        group = self.world.group_of(rank)
        if group not in self._decoders:
            stripes = self.world.stripes_of(rank)
            copies = {DATA: self.choice.data, PARITY: self.choice.parity}
            missing = [(member, role) for member in group for role, there in copies.items() if member not in there]
            self._decoders[group] = None if stripes is None else Decoder(stripes, missing, self._fetch)
        return self._decoders[group]

    def _fetch(self, rank: int, role: str, offset: int, into: memoryview) -> None:
        """Read whole chunks of a segment for the decoder. Raises: CheckpointError if a chunk is nowhere whole"""
        size = self.world.chunk_bytes
        for low in range(0, len(into), size):
            number = (offset + low) // size
            if not self._read_copy(rank, role, number, into[low : low + size]):
                raise CheckpointError(f"chunk {number} is nowhere whole ({self._lost(rank, role)})")

    def _check_computed(self, rank: int, run: Sequence[int], found: memoryview) -> None:
        """Compare computed chunks with the checksums that the group kept; without them, those of the sources vouch."""
        size = self.world.chunk_bytes
        for copy in self._parity_copies(rank):
            table = copy.header.hashes.get(rank)
            if table is None or run[-1] >= len(table):
                continue
            for low, number in enumerate(run):
                chunk = found[low * size : (low + 1) * size]
                if xxhash.xxh3_64_intdigest(chunk) != int(table[number]):
                    raise CheckpointError(f"chunk {number}, computed, is not what {copy} was made of")
            return

    def _parity_copies(self, rank: int) -> list[Copy]:
        held = (h for member in self.world.group_of(rank) for h in self.choice.parity.get(member, ()))
        found = (self._copy(h) for h in sorted(held, key=lambda h: not self._reach.is_own(h)))
        return [copy for copy in found if copy is not None]

    def _lost(self, rank: int, role: str = DATA) -> str:
        copies = (self.choice.data if role == DATA else self.choice.parity).get(rank, ())
        with self._lock:
            known = {**self._silent, **self._away, **self._damaged}
        return "; ".join(known.get(held, name_of(held)) for held in copies) or "no copy of it is left"


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Group numbers that follow each other."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def kept_layouts(documents: Mapping[str, Layout], world: Membership) -> list[Layout]:
    """Return the layouts of all ranks of a generation from those that were found, by digest.

    Raises: CheckpointError naming the ranks whose layout is lost
    """
    lost = [member.rank for member in world.members if member.layout not in documents]
    if lost:
        raise CheckpointError(
            f"generation {world.generation}: no node has the layout of ranks {lost} any more, so what their bytes mean "
            "is unknown"
        )
    return [documents[member.layout] for member in world.members]
