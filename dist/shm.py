"""Channels between CPU ranks of one host: shared memory for the bytes, tiny messages on Unix sockets for the order.

Every rank owns its buffers (memory files that exist only as descriptors, passed over the sockets) and peers read them
in place. The protocol, for each operation of a group:

    start    sends READY to every peer: this rank's box may be read, and this is what I am doing (compared by all)
    run      once READY has come from every peer: copy or sum straight out of the peers' memory
    DONE     the last level of the operation, sent when this rank has read all it needs

Operations in several rounds (large tensors outside shared buffers) pass through one scratch buffer per group, piece by
piece and one operation after the other; small tensors travel inside READY. Point-to-point messages: `mail.py`.
Must not know: units, ZeRO, meshes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from windlass.dist.hub import Body, Hub, Members, Operation
from windlass.dist.mail import Mail
from windlass.dist.memfd import bytes_of, map_memory, new_memory
from windlass.dist.transport import (
    Buffer,
    Call,
    Finish,
    box_of,
    combine,
    sum_in_rank_order,
)

INLINE_BYTES = 16 << 10  # tensors up to this size travel inside the message
SCRATCH_BYTES = 4 << 20  # per rank and group; a piece of it stays in the last-level cache between the rounds


@dataclass
class Shared:
    """A buffer's memory on every rank of the group, and the operations whose readers may not be done."""

    by_rank: list[torch.Tensor]
    readers: list[Operation] = field(default_factory=list)


class ShmChannel:
    """One group of ranks of this host."""

    kind = "shm"

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int, number: int, hub: Hub, mail: Mail) -> None:
        self.ranks, self.rank, self.hub, self.mail = ranks, rank, hub, mail
        self.members = Members(name, number, [r for r in ranks if r != ranks[rank]])
        self._scratch: Shared | None = None
        self._last_in_scratch: Operation | None = None

    def _operation(self, call: Call, final: int, after: Operation | None = None) -> Operation:
        return Operation(self.hub, self.members, call, final, after)

    def allocate(self, call: Call, numel: int, dtype: torch.dtype, *, full: bool) -> Buffer:
        """Allocate on every rank and map the peers' memory. Blocks: host."""
        fd, tensor = new_memory(call.label, numel, dtype)
        shared = Shared([])
        operation = self._operation(call, final=0)

        def body() -> Body:
            yield 0
            shared.by_rank = self._map_peers(operation, tensor)

        try:
            self.hub.start(operation, body(), fd=fd)()
        finally:
            os.close(fd)
        mine = box_of(tensor, self.rank, len(self.ranks)) if full else tensor
        return Buffer(tensor, mine, full, kept=shared)

    def _map_peers(self, operation: Operation, own: torch.Tensor) -> list[torch.Tensor]:
        return [
            own if r == self.ranks[self.rank] else map_memory(operation.round.fds.pop(r), own.numel(), own.dtype)
            for r in self.ranks
        ]

    def all_gather(self, call: Call, buffer: Buffer) -> Finish:
        return self._gather(call, buffer, buffer.tensor, own=False)

    def gather_into(self, call: Call, buffer: Buffer, out: torch.Tensor) -> Finish:
        return self._gather(call, buffer, out, own=True)

    def _gather(self, call: Call, buffer: Buffer, out: torch.Tensor, *, own: bool) -> Finish:
        size, shared = len(self.ranks), buffer.kept
        operation = self._reading(call, shared)

        def body() -> Body:
            yield 0
            # Starting from the right neighbour spreads the ranks over one another's memory.
            for i in (*range(self.rank + 1, size), *range(self.rank + own)):
                source = shared.by_rank[i]
                box_of(out, i, size).copy_(box_of(source, i, size) if buffer.full else source)
            operation.announce()

        return self.hub.start(operation, body())

    def reduce_scatter(self, call: Call, buffer: Buffer, out: torch.Tensor, accumulate: bool) -> Finish:
        shared = buffer.kept
        operation = self._reading(call, shared)

        def body() -> Body:
            yield 0
            parts = [box_of(t, self.rank, len(self.ranks)) for t in shared.by_rank]
            sum_in_rank_order(parts, out, accumulate=accumulate)
            operation.announce()

        return self.hub.start(operation, body())

    def _reading(self, call: Call, shared: Shared) -> Operation:
        operation = self._operation(call, final=1)
        shared.readers = [o for o in shared.readers if not o.everyone_done()]
        shared.readers.append(operation)
        return operation

    def wait_free(self, buffer: Buffer) -> None:
        for operation in buffer.kept.readers:
            self.hub.block(operation, operation.everyone_done)
        buffer.kept.readers.clear()

    def all_reduce(self, call: Call, tensor: torch.Tensor, op: str) -> Finish:
        """Send small tensors inside READY; reduce and then gather boxes of large ones in the scratch."""
        flat, size = tensor.view(-1), len(self.ranks)
        if flat.nbytes <= INLINE_BYTES:
            operation = self._operation(call, final=0)

            def inline() -> Body:
                yield 0
                parts = [self._received(operation, r, flat) for r in self.ranks]
                combine(parts, flat, op)

            return self.hub.start(operation, inline(), payload=bytes_of(flat).numpy().tobytes())

        def rounds(piece: torch.Tensor, scratch: list[torch.Tensor], operation: Operation) -> Body:
            scratch[self.rank].copy_(piece)
            yield operation.announce()
            combine([box_of(t, self.rank, size) for t in scratch], box_of(scratch[self.rank], self.rank, size), op)
            yield operation.announce()
            for i, source in enumerate(scratch):
                box_of(piece, i, size).copy_(box_of(source, i, size))
            yield operation.announce()

        return self._through_scratch(call, flat, 3, rounds)

    def broadcast(self, call: Call, tensor: torch.Tensor, src: int) -> Finish:
        """Send small tensors inside READY; pass large ones through the source's scratch."""
        flat = tensor.view(-1)
        if flat.nbytes <= INLINE_BYTES:
            operation = self._operation(call, final=0)

            def inline() -> Body:
                yield 0
                if self.rank != src:
                    flat.copy_(self._received(operation, self.ranks[src], flat))

            return self.hub.start(
                operation, inline(), payload=bytes_of(flat).numpy().tobytes() if self.rank == src else b""
            )

        def rounds(piece: torch.Tensor, scratch: list[torch.Tensor], operation: Operation) -> Body:
            if self.rank == src:
                scratch[src].copy_(piece)
            yield operation.announce()
            if self.rank != src:
                piece.copy_(scratch[src])
            yield operation.announce()

        return self._through_scratch(call, flat, 2, rounds)

    def exchange(self, call: Call, payload: bytes) -> Callable[[], list[bytes]]:
        """Give every rank the bytes of every rank, inside READY."""
        operation = self._operation(call, final=0)
        out: list[bytes] = []

        def body() -> Body:
            yield 0
            out.extend(payload if r == self.ranks[self.rank] else operation.round.payloads[r] for r in self.ranks)

        finish = self.hub.start(operation, body(), payload=payload)

        def result() -> list[bytes]:
            finish()
            return out

        return result

    def send(self, call: Call, tensor: torch.Tensor, to: Sequence[int]) -> Finish:
        return self.mail.send(self.members, call, tensor, [self.ranks[i] for i in to])

    def receive(self, call: Call, out: torch.Tensor, source: int) -> Finish:
        return self.mail.receive(self.members, call, out, self.ranks[source])

    def connect(self, edges: Sequence[tuple[int, int]]) -> None:
        """All ranks of a host are connected from the start."""

    def _received(self, operation: Operation, rank: int, like: torch.Tensor) -> torch.Tensor:
        if rank == self.ranks[self.rank]:
            return like
        payload = operation.round.payloads[rank]
        return torch.frombuffer(bytearray(payload), dtype=like.dtype) if payload else like

    def _through_scratch(
        self,
        call: Call,
        flat: torch.Tensor,
        levels: int,
        rounds: Callable[[torch.Tensor, list[torch.Tensor], Operation], Body],
    ) -> Finish:
        """Pass a large tensor through the group's scratch, piece by piece, once earlier ones are through."""
        pieces = flat.view(torch.uint8).split(SCRATCH_BYTES)
        operation = self._operation(call, levels * len(pieces), self._last_in_scratch)
        self._last_in_scratch = operation
        # All ranks come here first in the same operation, so its READY can carry the scratch's descriptor.
        fd: int | None = None
        if self._scratch is None:
            fd, own = new_memory(f"scratch {self.members.name}", SCRATCH_BYTES, torch.uint8)
            self._scratch = Shared([own])
        scratch = self._scratch

        def body() -> Body:
            yield 0
            if len(scratch.by_rank) < len(self.ranks):
                scratch.by_rank = self._map_peers(operation, scratch.by_rank[0])
            for piece in pieces:
                windows = [t[: piece.numel()].view(flat.dtype) for t in scratch.by_rank]
                yield from rounds(piece.view(flat.dtype), windows, operation)

        try:
            return self.hub.start(operation, body(), fd=fd)
        finally:
            if fd is not None:
                os.close(fd)
