"""Takes snapshots of a rank: copies its state into a slot of its node's memory while forward and backward run.

    snapshot(s)  after update s: what changes during forward is taken aside, a thread copies the rest into a slot
    gate()       before update s+1: the only wait, for this rank's own copy

State that may move or change before the gate (`Source.movable`) is copied before `snapshot` returns. A process killed
at any instant leaves a slot that is marked as half filled, and every other slot untouched.
Fault points, in order: snapshot.begin, snapshot.eager, snapshot.chunk (before each bucket), snapshot.filled; gate.wait.

Must not know: who hashes, protects, commits and frees slots.
Source: Maurya et al. 2024 (DataStates), arXiv:2406.10707, section 4; parity of replicas: arXiv:2310.12670.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from windlass.checkpoint.frames import frames_of
from windlass.checkpoint.memory.copier import Copier, Fill
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.moves import (
    Move,
    Stretch,
    bytes_of,
    cut,
    data_moves,
    gaps,
    in_runs,
    layout_of,
    parity_moves,
    stretches,
)
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.memory.segment import (
    Segment,
    Slot,
    SlotHeader,
    State,
    num_chunks,
    parity_hashes,
    pick_slot,
    segment_bytes,
)
from windlass.checkpoint.memory.stripes import DATA, PARITY, Stripes
from windlass.checkpoint.policy import SnapshotConfig
from windlass.dist.device import Device
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError, PlanError, WindlassError
from windlass.dist.state import Piece
from windlass.dist.trace import Tracer

GATE_S = 600.0  # far beyond any copy: the watchdog of the node acts earlier


class Source(Protocol):
    """The state of one rank."""

    def held(self) -> Sequence[Piece]:
        """Return all state of this rank, in the same order on every replica.

        Unless it is movable, it is asked for once: the pieces must go on being views of the live state.
        """

    @property
    def replicas(self) -> tuple[int, ...]:
        """The ranks of the world that hold the same, this one included."""

    @property
    def movable(self) -> bool:
        """Whether state may be elsewhere, or change, before the next gate."""


@dataclass(frozen=True)
class LocalParity:
    """Parity made by each rank from its own copy of what the group replicates, without network.

    Differs: RAID-5 makes parity of what it is sent; here every member can read the blocks of all others at home.
    """

    group: tuple[int, ...]


@dataclass
class Counters:
    """What snapshots have cost so far. Units: seconds in which training was blocked; bytes copied."""

    taken: int = 0
    skipped: int = 0
    gate_s: float = 0.0
    eager_s: float = 0.0
    bytes: int = 0


class Capturer:
    """The snapshots of one rank. Replicas divide their state: each holds an equal share of it."""

    def __init__(
        self,
        folder: NodeFolder,
        *,
        job: str,
        generation: int,
        rank: int,
        world_size: int,
        source: Source,
        device: Device,
        policy: SnapshotConfig,
        local_parity: LocalParity | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.folder, self.rank = folder, rank
        self._counters = Counters()
        self.warnings: list[str] = []
        self._source, self._device, self._policy, self._tracer = source, device, policy, tracer
        replicas = source.replicas
        group = (rank,) if local_parity is None else local_parity.group
        if rank not in group or not set(group) <= set(replicas):
            raise PlanError(
                f"rank {rank}: group {group} cannot make parity of the state of its replicas {replicas}: a group holds "
                "the rank itself and others with the same state"
            )
        self._pieces = source.held()
        # The state is divided among all replicas, also where several groups of them protect each other.
        shares = {member: cut(self._pieces, len(replicas), replicas.index(member)) for member in group}
        layouts = {member: layout_of(self._pieces, parts) for member, parts in shares.items()}
        fills = {member: data_moves(self._pieces, shares[member], layouts[member]) for member in group}
        own = layouts[rank]
        self.layout: Layout = replace(own, frames=frames_of(own.fragments))
        self._moves: list[Move] = fills[rank]
        self._gaps = gaps(fills[rank], own.num_bytes)
        self._header = SlotHeader(
            job=job,
            generation=generation,
            step=0,
            rank=rank,
            world_size=world_size,
            role="data",
            layout=self.layout.digest,
            num_bytes=own.num_bytes,
            chunk_bytes=policy.chunk_bytes,
            state=State.FILLING,
        )
        self._stripes: Stripes | None = None
        self._parity_moves: list[Move] = []
        if local_parity is not None:
            sizes = tuple(layout.num_bytes for layout in layouts.values())
            self._stripes = Stripes(group, sizes, 1, policy.chunk_bytes)
            self._parity_moves = parity_moves([(fills[b.rank], b) for b in self._stripes.xor_sources(rank)])
        self._segments: list[Segment] = []  # parity first
        self._locked: list[Slot] = []
        self._stretches: list[Stretch] | None = None
        self._copier: Copier | None = None
        self._under_way: Fill | None = None
        self._last: Fill | None = None
        self._last_step = 0  # that a snapshot was asked for
        self._likely = 0  # to be free: the slot after the one that was filled last
        self._lazy = 0  # snapshots copied beside training

    # -- room --------------------------------------------------------------------------------------------------------

    def _wanted(self) -> list[tuple[str, int, int]]:
        """Return role, bytes of a slot, and hashes of a header of the segments that this rank fills."""
        chunk = self._policy.chunk_bytes
        wanted = [(DATA, self.layout.num_bytes, num_chunks(self.layout.num_bytes, chunk))]
        if self._stripes is not None:
            wanted.insert(0, (PARITY, self._stripes.parity_bytes, parity_hashes(self._stripes)))
        return wanted

    def wanted_bytes(self, pulled: Stripes | None = None) -> int:
        """Return the memory that this rank's snapshots will take beside what is there already. Needs no `open`.

        `pulled`: the stripes of its group, where the snapshot process makes its parity of what it pulls from others

        Units: bytes
        """
        slots, wanted = self._policy.slots, self._wanted()
        if pulled is not None:
            wanted.append((PARITY, pulled.parity_bytes, parity_hashes(pulled)))
        files = [(self.folder.segment_path(r, self.rank, size, slots, n), size, n) for r, size, n in wanted]
        return sum(segment_bytes(size, slots, n) for path, size, n in files if not path.exists())

    def open(self) -> None:
        """Take the memory for snapshots, or find what an earlier process of this rank left. Nothing in it is freed.

        Blocks: host, while the system clears the pages of new memory
        Raises: CheckpointError if the memory cannot be had, with what would work
        """
        slots, chunk = self._policy.slots, self._policy.chunk_bytes
        wanted = [
            (self.folder.segment_path(role, self.rank, size, slots, hashes), role, size, hashes)
            for role, size, hashes in self._wanted()
        ]
        what = f"{slots} snapshots of rank {self.rank} ({self.layout.num_bytes} bytes each)"
        self.folder.check_room(self.wanted_bytes(), what, slots)
        self.folder.put_layout(self.layout)
        for path, role, size, hashes in wanted:
            self._segments.append(Segment.ensure(path, role, self.rank, size, slots, chunk, hashes))
        for slot in self._slots():
            if why := self._device.register(torch.from_numpy(slot.data)):
                self.warnings.append(f"snapshots of rank {self.rank} are copied slowly: {why}")
                break
            self._locked.append(slot)
        staging = self._policy.bucket_bytes if self._stripes is not None else 0
        pace = Pace(self._policy.link_bytes_per_s)
        self._copier = Copier(self.rank, self._device, pace, self._gaps, staging, self._tracer)

    def _slots(self) -> list[Slot]:
        return [slot for segment in self._segments for slot in segment.slots]

    def close(self) -> None:
        """Wait for the copy under way and let go of the memory; what is in it stays.

        Blocks: host
        """
        if self._copier is not None:
            self._copier.close(GATE_S)
        self._copier = self._under_way = None
        while self._locked:
            self._device.unregister(torch.from_numpy(self._locked.pop().data))
        while self._segments:
            self._segments.pop().close()

    @property
    def counters(self) -> Counters:
        counted, copier = self._counters, self._copier
        if copier is None:
            return replace(counted)
        late = copier.turned_away
        return replace(counted, taken=counted.taken - late, skipped=counted.skipped + late, bytes=copier.num_bytes)

    # -- snapshots ---------------------------------------------------------------------------------------------------

    @property
    def newest(self) -> int | None:
        """The step of the last snapshot, if it is copied: None before the gate, and where its slot was busy."""
        return self._last.step if self._last is not None and self._last.copied else None

    def ready(self) -> bool:
        """Tell whether a snapshot could be taken now: a slot is free, and none waits for its gate."""
        return self._idle() and len(self._picks()) == len(self._segments)

    def _idle(self) -> bool:
        fill = self._under_way
        if fill is not None and fill.done.is_set() and fill.error is None:  # a failure is for the gate to raise
            self._under_way = None
        return self._copier is not None and self._under_way is None

    def skip(self) -> None:
        """Count a snapshot that was due but not taken."""
        self._counters.skipped += 1

    def _picks(self) -> list[tuple[Slot, int]]:
        found = (pick_slot(segment, self._header.generation, self._likely) for segment in self._segments)
        return [pick for pick in found if pick is not None]

    def snapshot(
        self, step: int, facts: dict[str, Any], eager: bool = False, later: Callable[[], dict[str, Any]] = dict
    ) -> bool:
        """Begin the snapshot of `step`, with `facts` (JSON) as they are now; False if it was skipped.

        `later` returns more facts, of now too, that are worth working out beside training; called once, by any thread.

        Invariant: until `gate` has returned, the caller changes neither the state nor `facts`
        Blocks: host, while state is copied that is movable, or if `eager`; never for anybody else
        """
        began = time.perf_counter()
        fault("snapshot.begin", rank=self.rank, step=step)
        self._last_step = step
        fill = self._claim(step, lambda: facts | later()) if self._idle() else None
        if fill is None or self._copier is None:
            self.skip()
            return False
        self._last = fill
        try:
            fault("snapshot.eager", rank=self.rank, step=step)
            fill.after = self._device.mark()
            if eager or self._source.movable:
                copied = self._copier.fill(fill, self._one_by_one())
                self._counters.eager_s += time.perf_counter() - began
            else:
                self._under_way, copied = fill, True
                self._copier.begin(fill, self._at_rest)
        except BaseException:
            fill.give_up()
            raise
        self._counters.taken += 1
        return copied

    def gate(self) -> float:
        """Wait until the state may change; return the seconds waited.

        Blocks: host, for this rank's own copy
        Raises: CheckpointError if the copy failed, or does not end
        """
        fault("gate.wait", rank=self.rank, step=self._last_step)
        fill = self._under_way
        if fill is None:
            return 0.0
        began = time.perf_counter()
        if not fill.done.wait(GATE_S):
            raise CheckpointError(
                f"rank {self.rank}: the snapshot of step {fill.step} was not copied within {GATE_S:.0f} s: "
                f"{fill.data.progress} of {self.layout.num_bytes} bytes are there"
            )
        waited = time.perf_counter() - began
        self._counters.gate_s += waited
        self._under_way = None
        if isinstance(fill.error, WindlassError):
            raise fill.error
        if fill.error is not None:
            raise CheckpointError(
                f"rank {self.rank}: the snapshot of step {fill.step} could not be copied: {fill.error}. Earlier "
                "snapshots are intact"
            ) from fill.error
        return waited

    def _claim(self, step: int, facts: Callable[[], dict[str, Any]]) -> Fill | None:
        """Take a free slot of every segment for a step; None if there is none. What it will hold is written later."""
        fill, picks = Fill(step, facts), self._picks()
        if len(picks) < len(self._segments):
            return None
        for slot, sequence in picks:
            if not slot.claim():  # another process of this rank, however old, is quicker
                fill.release()
                return None
            header = replace(self._header, step=step, sequence=sequence)
            if slot.segment.role == PARITY:
                header = replace(header, role=PARITY, layout="", num_bytes=slot.segment.slot_bytes)
            fill.slots.append((slot, header))
            self._likely = (slot.index + 1) % self._policy.slots
        return fill

    # -- what is copied ----------------------------------------------------------------------------------------------

    def _at_rest(self) -> list[Stretch]:
        """Return what is to be copied of state that stays where it is: worked out once, and checked now and then."""
        if self._stretches is None:
            most = self._policy.bucket_bytes
            self._stretches = stretches(self._pieces, self._moves, most)
            self._stretches += stretches(self._pieces, in_runs(self._parity_moves), most)
        self._lazy += 1
        if self._lazy & (self._lazy - 1) == 0:  # 1, 2, 4, ...: a state that has moved would be saved as it was before
            now, first = (
                [(p.key, p.box, p.tensor.data_ptr()) for p in pieces] for pieces in (self._source.held(), self._pieces)
            )
            if now != first:
                raise CheckpointError(
                    f"rank {self.rank}: the state has moved since the first snapshot, so copying it lazily would save "
                    "stale values. Such a state source must say that it is movable"
                )
        return self._stretches

    def _one_by_one(self) -> Iterator[Stretch]:
        """Yield what is to be copied of each piece, opening every piece once and in order."""
        wanted: dict[int, list[Move]] = {}
        for move in (*self._moves, *self._parity_moves):
            wanted.setdefault(move.piece, []).append(move)
        pieces, bucket = self._source.held(), self._policy.bucket_bytes
        if [(p.key, p.box) for p in pieces] != [(p.key, p.box) for p in self._pieces]:
            raise CheckpointError(f"rank {self.rank}: the state no longer has the pieces that its layout was made of")
        for index in sorted(wanted):
            flat = bytes_of(pieces[index].tensor)
            for move in wanted[index]:
                for low in range(move.low, move.high, bucket):
                    high = min(low + bucket, move.high)
                    yield Stretch(flat[low:high], move.at + low - move.low, move.parity)
