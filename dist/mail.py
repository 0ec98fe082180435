"""Messages from one rank to another of the same host: sent at once, received when the receiver likes.

    send      copies the tensor into a slot of shared memory (a small one into the letter itself) and writes a LETTER
    receive   says where the next letter from a rank goes; it is copied as soon as both are there
    FREE      tells the sender that a receiver has copied; a slot that all its receivers have freed is used again

Letters from one rank to another within one group are received in the order in which they were sent. Nothing else is
ordered, and a send waits for nothing: letters lie where the receiver finds them, whatever the sender does meanwhile.
(Some hundreds of unread letters, that is; more of them wait with the sender until it comes to the hub again.)
Must not know: operations of whole groups, why something is sent.
"""

from __future__ import annotations

import os
import struct
from collections import defaultdict, deque
from dataclasses import dataclass, field

import torch

from windlass.dist.errors import CommError
from windlass.dist.hub import Hub, Members
from windlass.dist.links import FREE, LETTER, REFUSED, Message
from windlass.dist.memfd import bytes_of, map_memory, new_memory
from windlass.dist.transport import Call, Finish, misdelivered, nothing

INLINE_BYTES = 2 << 10  # larger letters would fill the sockets of a receiver that is busy
SLAB_BYTES = 32 << 20  # slots are allocated together up to this size: descriptors are scarcer than memory
_IN_LETTER = 0  # the slot of letters that need none
_PLACE = struct.Struct("<IQQ")  # slab, its bytes, offset of the slot


@dataclass
class Slab:
    """One piece of this rank's shared memory, and the peers that have its descriptor."""

    number: int
    fd: int
    memory: torch.Tensor
    known: set[int] = field(default_factory=set)


@dataclass
class Slot:
    """A part of a slab that carries one message at a time, to `readers` that are not done."""

    number: int
    slab: Slab
    offset: int
    size: int
    readers: int = 0

    @property
    def memory(self) -> torch.Tensor:
        return self.slab.memory[self.offset : self.offset + self.size]


class Pool:
    """The shared memory that carries this rank's messages: slots of few sizes, reused, never given back."""

    def __init__(self) -> None:
        self.slabs: list[Slab] = []
        self.slots: list[Slot] = []
        self._free: defaultdict[int, list[Slot]] = defaultdict(list)

    def has_free(self, num_bytes: int) -> bool:
        return bool(self._free[_slot_size(num_bytes)])

    def take(self, num_bytes: int) -> Slot:
        """Return a slot that holds this many bytes, a fresh one if need be."""
        free = self._free[_slot_size(num_bytes)]
        if not free:
            self._grow(_slot_size(num_bytes))
        return free.pop()  # the last one freed is still in the cache

    def free(self, number: int) -> None:
        """Note that one reader of a slot is done."""
        slot = self.slots[number - 1]
        slot.readers -= 1
        if slot.readers == 0:
            self._free[slot.size].append(slot)

    def _grow(self, size: int) -> None:
        """Add a quarter to the slots of a size, as far as one slab allows."""
        present = sum(slot.size == size for slot in self.slots)
        count = max(min(present // 4, SLAB_BYTES // size), 1)
        slab = Slab(len(self.slabs), *new_memory("mail", count * size, torch.uint8))
        self.slabs.append(slab)
        for i in range(count):
            slot = Slot(len(self.slots) + 1, slab, i * size, size)
            self.slots.append(slot)
            self._free[size].append(slot)

    def close(self) -> None:
        for slab in self.slabs:
            os.close(slab.fd)
        self.slabs.clear()


def _slot_size(num_bytes: int) -> int:
    """Round up to one of four sizes per power of two, at least a page."""
    step = max(1 << max((num_bytes - 1).bit_length() - 3, 0), 4096)
    return -(-num_bytes // step) * step


class Receipt:
    """A receive that has been posted: where the message goes, whether it is there, or what came instead."""

    def __init__(self, members: Members, call: Call, out: torch.Tensor, source: int, edge: Edge) -> None:
        self.members, self.call, self.source, self.edge = members, call, source, edge
        self.out = bytes_of(out)
        self.arrived = False
        self.error: CommError | None = None

    def advance(self) -> bool:
        """Messages arrive by themselves."""
        return False

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def awaited(self) -> list[int]:
        return [] if self.arrived else [self.source]

    def last_known(self, peer: int) -> str:
        return f"{self.edge.num_received} messages before"


@dataclass
class Edge:
    """What one rank sends here within one group: letters nobody wants yet, or receipts without a letter."""

    letters: deque[Message] = field(default_factory=deque)
    posted: deque[Receipt] = field(default_factory=deque)
    num_received: int = 0


class Mail:
    """All messages between this process and the peers of its host, whatever their group."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.pool = Pool()
        self.edges: defaultdict[tuple[int, int], Edge] = defaultdict(Edge)
        self._maps: dict[tuple[int, int], torch.Tensor] = {}
        hub.routes |= {LETTER: self._arrived, FREE: self._freed, REFUSED: self._refused}

    def send(self, members: Members, call: Call, tensor: torch.Tensor, to: list[int]) -> Finish:
        """Copy a tensor for the peers (world ranks) that want it next from this rank.

        Blocks: no
        Raises: CommError if one of them has gone
        """
        hub, data, content = self.hub, bytes_of(tensor), call.content.encode()
        hub.check_usable()
        hub.check_present(call, members, to)
        if data.numel() <= INLINE_BYTES:
            letter = Message(LETTER, members.number, call.seq, _IN_LETTER, content, data.numpy().tobytes())
            for peer in to:
                hub.links.send(peer, letter)
            return nothing
        if not self.pool.has_free(data.numel()):
            hub.links.pump(0.0)  # word of free slots may have come
        slot = self.pool.take(data.numel())
        slot.memory[: data.numel()].copy_(data)
        slot.readers = len(to)
        slab = slot.slab
        place = _PLACE.pack(slab.number, slab.memory.numel(), slot.offset)
        for peer in to:
            fd = None if peer in slab.known else slab.fd
            slab.known.add(peer)
            hub.links.send(peer, Message(LETTER, members.number, call.seq, slot.number, content, place, fd))
        return nothing

    def receive(self, members: Members, call: Call, out: torch.Tensor, source: int) -> Finish:
        """Say where the next message of this group from a peer (world rank) goes.

        Blocks: no
        """
        self.hub.check_usable()
        edge = self.edges[members.number, source]
        receipt = Receipt(members, call, out, source, edge)
        edge.posted.append(receipt)
        self._match(edge)
        return lambda: self.hub.block(receipt, lambda: receipt.arrived)

    def _arrived(self, peer: int, letter: Message) -> None:
        if letter.fd is not None:
            # Now and not when it is wanted: a later letter of another group may lie in the same slab.
            slab, num_bytes, _ = _PLACE.unpack(letter.payload)
            self._maps[peer, slab] = map_memory(letter.fd, num_bytes, torch.uint8)
        edge = self.edges[letter.group, peer]
        edge.letters.append(letter)
        self._match(edge)

    def _match(self, edge: Edge) -> None:
        while edge.letters and edge.posted and self.hub.broken is None:
            self._hand_over(edge.letters.popleft(), edge.posted.popleft())

    def _hand_over(self, letter: Message, receipt: Receipt) -> None:
        links, peer, sent = self.hub.links, receipt.source, letter.signature.decode()
        if sent != receipt.call.content:
            error = misdelivered(receipt.members.name, sent, peer, receipt.call.content, links.rank)
            links.send(peer, Message(REFUSED, letter.group, letter.seq, payload=str(error).encode()))
            receipt.error = error
            self.hub.fail(error)
            return
        if letter.level == _IN_LETTER:
            if letter.payload:
                receipt.out.copy_(torch.frombuffer(bytearray(letter.payload), dtype=torch.uint8))
        else:
            slab, _, offset = _PLACE.unpack(letter.payload)
            receipt.out.copy_(self._maps[peer, slab][offset : offset + receipt.out.numel()])
            links.send(peer, Message(FREE, 0, 0, letter.level))
        receipt.edge.num_received += 1
        receipt.arrived = True

    def _freed(self, peer: int, message: Message) -> None:
        self.pool.free(message.level)

    def _refused(self, peer: int, message: Message) -> None:
        self.hub.fail(CommError(message.payload.decode()))

    def close(self) -> None:
        """Release the descriptors. Peers keep what they have mapped."""
        self.pool.close()
