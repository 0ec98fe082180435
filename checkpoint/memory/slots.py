"""The segments of this node as its snapshot process holds them: found, followed through their states, freed.

Only the snapshot process frees; what may be freed is decided by decrees (votes.py), never here.
Must not know: torch, networks, who decides.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.segment import Segment, Slot
from windlass.checkpoint.memory.stripes import DATA, PARITY
from windlass.checkpoint.memory.votes import Decree
from windlass.dist.errors import CheckpointError, DamagedError


@dataclass(frozen=True)
class Shelf:
    """A segment file of the folder and its memory. `retired`: the present generation does not fill it."""

    segment: Segment
    role: str
    rank: int
    retired: bool


class NodeSlots:
    """All slots of one node. Methods may be called from any thread."""

    def __init__(self, folder: NodeFolder, log: Callable[[str], None]) -> None:
        self.folder, self._log = folder, log
        self._shelves: dict[int, Shelf] = {}  # by inode
        self._wanted: dict[tuple[str, int], int] | None = None  # bytes of a slot by role and rank
        self._refused: set[tuple[int, int]] = set()  # inode and change time: inodes are used again
        self._unmapped: dict[int, str] = {}  # why, by inode
        self._headers: dict[Slot, tuple[int, SlotHeader | None]] = {}
        self._pins: Counter[tuple[int, int]] = Counter()
        self.on_unpinned: Callable[[], None] = lambda: None  # what a pin has kept may be freed now
        self._lock = threading.RLock()

    def expect(self, membership: Membership) -> None:
        """Take note of what the present generation fills on this node; other segments are retired."""
        wanted = {}
        for member in membership.by_node.get(self.folder.node, ()):
            wanted[DATA, member.rank] = member.num_bytes
            if (stripes := membership.stripes_of(member.rank)) is not None:
                wanted[PARITY, member.rank] = stripes.parity_bytes
        self._wanted = wanted

    def refresh(self) -> None:
        """Open the segments that have appeared and let go of those that are gone."""
        with self._lock:
            found = {}
            for file in self.folder.segments():
                try:
                    status = file.path.stat()
                    inode, version = status.st_ino, (status.st_ino, status.st_ctime_ns)
                    known = self._shelves.get(inode)
                    if version in self._refused:
                        continue
                    segment = known.segment if known else Segment.open(file.path, writable=True)
                    fills = self._wanted is None or self._wanted.get((file.role, file.rank)) == segment.slot_bytes
                    found[inode] = Shelf(segment, file.role, file.rank, not fills)
                except FileNotFoundError:
                    continue
                except DamagedError as error:
                    self._refused.add(version)
                    self._log(str(error))
                except CheckpointError as error:  # tried again; told when it is something else
                    if self._unmapped.get(inode) != str(error):
                        self._unmapped[inode] = str(error)
                        self._log(str(error))
            for inode in self._shelves.keys() - found.keys():
                self._shelves[inode].segment.close()
            self._shelves = found
            # Also what a thread has put back that was looking at a segment when it went: it would keep its memory.
            open_slots = {slot for shelf in found.values() for slot in shelf.segment.slots}
            self._headers = {slot: known for slot, known in dict(self._headers).items() if slot in open_slots}

    def shelves(self) -> list[Shelf]:
        """Return all segments that are open."""
        return list(self._shelves.values())

    def current(self, role: str, rank: int) -> Segment | None:
        """Return the segment that a rank fills now: of several with other numbers of slots, the one last used."""
        found = [s.segment for s in self.shelves() if (s.role, s.rank, s.retired) == (role, rank, False)]
        return max(found, key=self._newest, default=None)

    def _newest(self, segment: Segment) -> int:
        return max((h.generation for h in map(self.header, segment.slots) if h is not None), default=0)

    def header(self, slot: Slot) -> SlotHeader | None:
        """Return what a slot holds, parsed only when it has changed."""
        sequence, known = self._headers.get(slot, (-1, None))
        if sequence != slot.sequence:
            known = slot.header()
            # What could not be read may be in the middle of a change, so it is read again.
            self._headers[slot] = (-1 if known is None else known.sequence, known)
        return None if known is None or known.state == State.FREE else known

    def held(self, role: str | None = None) -> Iterator[tuple[Slot, SlotHeader]]:
        """Yield every slot that holds something."""
        for shelf in self.shelves():
            for slot in shelf.segment.slots:
                if role in (None, shelf.role) and (header := self.header(slot)) is not None:
                    yield slot, header

    def find(self, role: str, rank: int, step: int, generation: int) -> tuple[Slot, SlotHeader] | None:
        """Return the slot that holds a rank's step, if one does."""
        wanted = (rank, step, generation)
        return next(((s, h) for s, h in self.held(role) if (h.rank, h.step, h.generation) == wanted), None)

    def states(self, generation: int, ranks: Collection[int]) -> dict[int, dict[int, int]]:
        """Return the state of every step of a generation that these ranks hold data of."""
        out: dict[int, dict[int, int]] = {rank: {} for rank in ranks}
        for _, header in self.held(DATA):
            if header.generation == generation and header.rank in out:
                out[header.rank][header.step] = int(header.state)
        return out

    def advance(self, slot: Slot, header: SlotHeader, state: State) -> bool:
        """Move a slot on to its next state; False if it holds something else by now."""
        return slot.write(replace(header, state=state))

    @contextmanager
    def pinned(self, generation: int, step: int) -> Iterator[None]:
        """Keep the slots of a step from being freed while the block runs."""
        with self._lock:
            self._pins[generation, step] += 1
        try:
            yield
        finally:
            with self._lock:
                self._pins -= Counter({(generation, step): 1})
            self.on_unpinned()

    def pinned_before(self, generation: int) -> bool:
        """Whether something of an older generation is pinned still."""
        with self._lock:
            return any(pinned < generation for pinned, _ in self._pins)

    # -- freeing -----------------------------------------------------------------------------------------------------

    def obey(self, decree: Decree) -> tuple[bool, bool]:
        """Mark what is committed, then free what is superseded; return whether there was something of each kind.

        To be called again for as long as the decree holds: what is pinned, or moves on while this looks at it, is left.

        Invariant:   nothing is freed before what supersedes it is marked
        """
        marked = freed = False
        with self._lock:
            for slot, header in list(self.held()):
                mine = header.generation == decree.generation and header.step <= decree.watermark
                if mine and header.state == State.ENCODED:
                    marked |= self.advance(slot, header, State.COMMITTED)
            for slot, header in list(self.held()):
                filling = header.generation == decree.generation and header.state <= State.FILLING  # the trainer's
                pinned = self._pins[header.generation, header.step] > 0
                if not filling and not pinned and decree.frees(header.generation, header.step, header.state):
                    freed |= slot.free(header)
        return marked, freed

    def abort(self, generation: int, step: int, ranks: Collection[int]) -> list[int]:
        """Free slots of a step that can never be encoded, so that this node can never vote for it; return the ranks.

        Invariant:   what has been encoded stays: the node may have voted for it
        """
        freed = []
        with self._lock:
            for slot, header in list(self.held(DATA)):
                known = (header.generation, header.step) == (generation, step) and header.rank in ranks
                if known and State.FILLING < header.state < State.ENCODED and slot.free(header):
                    freed.append(header.rank)
            self.free_orphans(generation)
        return freed

    def free_orphans(self, generation: int) -> None:
        """Free parity whose data is not there: no report names it, so no decree would ever free it. What is committed
        stays: its data was lost since, and it makes up for that.
        """
        with self._lock:
            for slot, header in list(self.held(PARITY)):
                made = header.generation == generation and State.FILLING < header.state < State.COMMITTED
                if made and not slot.claimed and self.find(DATA, header.rank, header.step, generation) is None:
                    slot.free(header)

    def begin(self, generation: int, restored: tuple[int, int] | None, anchor: tuple[int, int] | None = None) -> None:
        """Make room for the first snapshot of a new generation, which all of whose ranks have been restored.

        Of what older generations left, `anchor` stays: the newest snapshot that survives another node's loss, as all
        ranks have agreed. So does the restored one, unless there is no room otherwise: one that was never protected is
        worth less than an older one that is. Nothing stays by what this node alone knows, or nodes would find room for
        different steps. Where neither is in memory, the run began anew or came from storage, and nothing is needed.
        """
        with self._lock:
            self.refresh()
            for shelf in self.shelves():
                old = [(s, h) for s in shelf.segment.slots if (h := self.header(s)) and h.generation < generation]
                for slot, header in old:
                    if (header.generation, header.step) not in (anchor, restored) or header.state < State.COPIED:
                        self._free_of(slot, header)
                full = all(self.header(slot) is not None for slot in shelf.segment.slots)
                for slot, header in old:
                    at = (header.generation, header.step)
                    if full and not shelf.retired and at == restored and at != anchor:
                        self._free_of(slot, header)

    def _free_of(self, slot: Slot, header: SlotHeader) -> None:
        """Free a slot for good, though threads of the generation before still move it on from state to state."""
        now: SlotHeader | None = header
        for _ in State:
            if now is None or (now.generation, now.step) != (header.generation, header.step) or slot.free(now):
                return
            now = self.header(slot)

    def discard(self, generation: int) -> list[str]:
        """Delete the segments in which nothing of a generation rests, once that has committed a step: no rank fills
        them any more.
        """
        gone = []
        with self._lock:
            for inode, shelf in list(self._shelves.items()):
                held = [header for slot in shelf.segment.slots if (header := self.header(slot)) is not None]
                if any(h.generation == generation or self._pins[h.generation, h.step] > 0 for h in held):
                    continue
                shelf.segment.path.unlink(missing_ok=True)
                gone.append(shelf.segment.path.name)
                del self._shelves[inode]
                shelf.segment.close()
        return gone

    def close(self) -> None:
        """Let go of the memory. The files stay."""
        with self._lock:
            for shelf in self._shelves.values():
                shelf.segment.close()
            self._shelves, self._headers = {}, {}
