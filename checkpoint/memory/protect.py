"""Brings the data of this node's ranks from FILLED to ENCODED: parity made, or nothing to be made.

A slot is ENCODED only when everything that its loss would need is here: parity of the rank's group, the hash tables
and facts of all its members, and their layouts. Must not know: torch, who votes, sockets (nodes are asked by name).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from windlass.checkpoint.memory.encode import encode_slot, seal_slot
from windlass.checkpoint.memory.folder import NodeFolder, SegmentFile
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.memory.peers import Peers
from windlass.checkpoint.memory.segment import Segment, Slot, num_chunks, parity_hashes, segment_bytes
from windlass.checkpoint.memory.slots import NodeSlots
from windlass.checkpoint.memory.stripes import DATA, PARITY, Stripes
from windlass.checkpoint.memory.term import Term
from windlass.checkpoint.memory.wire import MAX_PAYLOAD
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError

HASH_BYTES = 8
ATTEMPTS = 3  # with all peers there: then the step is given up


def parity_files(folder: NodeFolder, slots: NodeSlots, membership: Membership) -> dict[int, SegmentFile]:
    """Return the segments that a snapshot process itself fills with parity, by rank of its node."""
    files = {}
    for member in membership.by_node.get(folder.node, ()):
        stripes, data = membership.stripes_of(member.rank), slots.current(DATA, member.rank)
        if stripes is not None and data is not None and not membership.local_parity:
            sizes = (stripes.parity_bytes, data.num_slots, parity_hashes(stripes))
            path = folder.segment_path(PARITY, member.rank, *sizes)
            files[member.rank] = SegmentFile(path, PARITY, member.rank, *sizes)
    return files


def check_room(folder: NodeFolder, slots: NodeSlots, membership: Membership) -> None:
    """Raise CheckpointError unless there is memory for the parity that this node is going to hold."""
    files = parity_files(folder, slots, membership).values()
    missing = [file for file in files if not file.path.exists()]
    needed = sum(segment_bytes(file.slot_bytes, file.num_slots, file.table_chunks) for file in missing)
    if missing:
        folder.check_room(needed, f"parity of ranks {[file.rank for file in missing]}", missing[0].num_slots)


def check_headers(membership: Membership) -> None:
    """Raise CheckpointError where the hashes of a header are more than one answer carries: nobody could fetch them
    when a node is lost.
    """
    needed, works = _most_hash_bytes(membership), membership.chunk_bytes
    if needed <= MAX_PAYLOAD:
        return
    while _most_hash_bytes(replace(membership, chunk_bytes=works)) > MAX_PAYLOAD:
        works *= 2
    largest = max(member.num_bytes for member in membership.members)
    raise CheckpointError(
        f"snapshot.chunk_bytes = {membership.chunk_bytes}: with {largest} bytes of state in a rank and groups of up to "
        f"{max(map(len, membership.groups))}, one header has {needed} bytes of hashes; nodes can send each other "
        f"{MAX_PAYLOAD}. Use snapshot.chunk_bytes={works}, with a snapshot.bucket_bytes that is a multiple of it"
    )


def _most_hash_bytes(membership: Membership) -> int:
    stripes = [found for group in membership.groups if (found := membership.stripes_of(group[0])) is not None]
    data = [num_chunks(member.num_bytes, membership.chunk_bytes) for member in membership.members]
    return HASH_BYTES * max(*data, *map(parity_hashes, stripes), 0)


class NotYet(Exception):
    """A member is alive and its snapshot on its way: no failure, however long it takes. That its copy ends is the
    business of its trainer's gate and of its watchdog; if it never does, the generation ends with it.
    """


class Protector:
    """Protects the steps of one generation, newest first. One thread."""

    def __init__(
        self, folder: NodeFolder, slots: NodeSlots, term: Term, peers: Peers, log: Callable[[str], None]
    ) -> None:
        self.folder, self.slots, self.term, self.peers, self._log = folder, slots, term, peers, log
        self._pace = Pace(term.settings.link_bytes_per_s)
        self._failures: dict[int, int] = {}  # by step
        self._layouts: set[str] = set()  # that are surely here
        self.problem = ""

    def next_step(self) -> int | None:
        """Return the newest step of which all data is here and not all of it protected."""
        decree = self.term.decree
        states = self.slots.states(self.term.generation, self.term.ranks)
        if not states:
            return None
        common = set.intersection(*(set(steps) for steps in states.values()))
        todo = [
            step
            for step in common
            if step > decree.watermark
            and step not in decree.dropped
            and all(State.FILLED <= steps[step] <= State.ENCODED for steps in states.values())
            and any(steps[step] == State.FILLED for steps in states.values())
        ]
        return max(todo, default=None)

    def protect(self, step: int) -> bool:
        """Make this node's data of a step ENCODED; False when that did not work now.

        Blocks: host, for other nodes, at most the peer timeout each time
        """
        try:
            for rank in self.term.ranks:
                fault("smp.encode", rank=rank, step=step, generation=self.term.generation)
                self._protect_rank(rank, step)
                fault("smp.encoded", rank=rank, step=step, generation=self.term.generation)
        except NotYet as waiting:
            self.problem = str(waiting)
            return False
        except CheckpointError as error:
            self.problem = str(error)
            self._failed(step, self.problem)
            return False
        self._failures.pop(step, None)
        self.problem = ""
        return True

    def _failed(self, step: int, why: str) -> None:
        """Give a step up that fails although every peer answers: it would occupy its slots for ever."""
        if self.peers.silent():
            return
        self._failures[step] = self._failures.get(step, 0) + 1
        if self._failures[step] >= ATTEMPTS:
            del self._failures[step]
            freed = self.slots.abort(self.term.generation, step, self.term.ranks)
            self._log(f"step {step} of ranks {freed} cannot be protected and is given up: {why}")

    def _protect_rank(self, rank: int, step: int) -> None:
        found = self.slots.find(DATA, rank, step, self.term.generation)
        if found is None or found[1].state != State.FILLED:
            return
        stripes = self.term.membership.stripes_of(rank)
        if stripes is not None:
            headers = {member: self._header_of(member, step) for member in stripes.ranks if member != rank}
            headers[rank] = found[1]
            for member, header in headers.items():
                self._fetch_layout(member, header.layout)
            if self.term.membership.local_parity:
                self._seal(stripes, rank, step, headers)
            else:
                self._encode(stripes, rank, step, headers)
        if not self.slots.advance(found[0], found[1], State.ENCODED):
            raise CheckpointError(f"rank {rank}: the slot of step {step} was filled anew while it was protected")

    def _encode(self, stripes: Stripes, rank: int, step: int, headers: dict[int, SlotHeader]) -> None:
        if (done := self.slots.find(PARITY, rank, step, self.term.generation)) is not None:
            if done[1].state >= State.ENCODED:
                return
            done[0].free(done[1])  # the work of a process that was killed
        slot = self._free_slot(rank)

        def fetch(member: int, role: str, offset: int, into: memoryview) -> None:
            self._read(member, step, offset, into)

        try:
            encode_slot(slot, stripes, rank, headers, fetch, sequence=slot.sequence, pace=self._pace)
        except CheckpointError:
            torn = slot.header()
            if torn is not None and torn.state == State.FILLING:
                slot.free(torn)
            raise

    def _seal(self, stripes: Stripes, rank: int, step: int, headers: dict[int, SlotHeader]) -> None:
        """Complete the header of parity that the trainer has made while it copied."""
        found = self.slots.find(PARITY, rank, step, self.term.generation)
        if found is None:
            raise CheckpointError(f"rank {rank}: its trainer has not made the parity of step {step}")
        if found[1].state < State.ENCODED:
            seal_slot(found[0], stripes, rank, headers)

    def make_room(self) -> None:
        """Take the memory for parity before the first snapshot needs it: the system clears new pages slowly.

        Blocks: host
        Raises: CheckpointError if it cannot be had
        """
        for rank in parity_files(self.folder, self.slots, self.term.membership):
            self._segment(rank)

    def _segment(self, rank: int) -> Segment:
        file = parity_files(self.folder, self.slots, self.term.membership)[rank]
        found = next((s.segment for s in self.slots.shelves() if s.segment.path == file.path), None)
        if found is not None:
            return found
        chunk_bytes = self.term.membership.chunk_bytes
        sizes = (file.slot_bytes, file.num_slots, chunk_bytes, file.table_chunks)
        Segment.ensure(file.path, PARITY, rank, *sizes).close()
        self.slots.refresh()
        return next(s.segment for s in self.slots.shelves() if s.segment.path == file.path)

    def _free_slot(self, rank: int) -> Slot:
        segment = self._segment(rank)
        for slot in segment.slots:
            header = self.slots.header(slot)
            if (header is None or header.state <= State.FILLING) and not slot.claimed:  # torn, or free
                return slot
        raise CheckpointError(f"rank {rank}: no slot for parity is free yet")

    # -- from other nodes --------------------------------------------------------------------------------------------

    def _node_of(self, rank: int) -> str:
        return self.term.membership.members[rank].node

    def _slot_fields(self, rank: int, step: int) -> dict[str, object]:
        return {"rank": rank, "role": DATA, "step": step, "slot_generation": self.term.generation}

    def _header_of(self, rank: int, step: int) -> SlotHeader:
        """Return the header of a member's data once that is hashed."""
        timeout_s = self.term.settings.peer_timeout_s
        end = time.monotonic() + timeout_s
        fields = {**self._slot_fields(rank, step), "wait_s": timeout_s / 2}
        while True:  # twice, because a request must be answered within the time given to peers
            answer, payload = self.peers.ask(self._node_of(rank), "header", fields)
            if answer.get("header"):
                return SlotHeader.parse(answer["header"], payload)
            if answer.get("gone"):
                raise CheckpointError(f"rank {rank} on {self._node_of(rank)} has no snapshot of step {step}")
            if time.monotonic() >= end:
                raise NotYet(f"rank {rank} on {self._node_of(rank)} is still taking its snapshot of step {step}")

    def _read(self, rank: int, step: int, offset: int, into: memoryview) -> None:
        fields = {**self._slot_fields(rank, step), "offset": offset, "length": into.nbytes}
        _, payload = self.peers.ask(self._node_of(rank), "read", fields, into=into)
        if payload.nbytes != into.nbytes:
            raise CheckpointError(f"rank {rank}: asked for {into.nbytes} bytes, got {payload.nbytes}")
        if self._node_of(rank) == self.folder.node:
            into[:] = payload

    def _fetch_layout(self, rank: int, digest: str) -> None:
        if digest not in self._layouts:  # of this term: a file that was damaged before it is replaced
            _, payload = self.peers.ask(self._node_of(rank), "layout", {"digest": digest})
            self.folder.put_layout(Layout.parse(bytes(payload), digest))
            self._layouts.add(digest)
