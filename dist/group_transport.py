"""Channels over torch process groups: gloo between CPU ranks, NCCL between CUDA ranks.

On gloo every operation is direct sends and receives into slices, with sums added in rank order on the receiver: the
measured fastest form, without the full-size temporaries of gloo's own collectives, and bitwise equal on all ranks.
A small header travels beside the data of each operation and is compared before the result is used; data messages carry
a tag made of the header, so that two different operations never land in one another's memory.
Operations of a process complete in the order they were started: waiting for one completes the earlier ones, so that
those with two rounds cannot wait for each other across ranks.
Must not know: units, ZeRO, meshes.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from windlass.dist.errors import CommError
from windlass.dist.transport import (
    Buffer,
    Call,
    Finish,
    Stall,
    box_of,
    combine,
    mismatch,
    sum_in_rank_order,
    void,
)

HEADER_BYTES = 256
HEADER_TAG = 0
SMALL_BYTES = 64 << 10  # up to here every rank sends the whole tensor to every other: one round instead of two


class Queue:
    """The operations of this process that are started and not complete, oldest first."""

    def __init__(self, stall: Stall) -> None:
        self.stall = stall
        self.waiting: deque[_Operation] = deque()
        self.broken: CommError | None = None

    def complete(self, operation: _Operation) -> None:
        """Run operations in start order up to and including this one."""
        while not operation.done:
            if self.broken is not None:
                raise CommError(f"communication has failed before: {self.broken}")
            oldest = self.waiting.popleft()
            try:
                oldest.run()
            except CommError as error:
                self.broken = error
                raise
            oldest.done = True


class _Operation:
    def __init__(self, run: Finish) -> None:
        self.run = run
        self.done = False


class GlooChannel:
    """CPU tensors between the ranks of one gloo process group."""

    kind = "gloo"

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int, pg: Any, timeout_s: float, queue: Queue) -> None:
        self.name, self.ranks, self.rank, self.pg = name, ranks, rank, pg
        self.timeout_s, self.queue = timeout_s, queue
        self.peers = [i for i in range(len(ranks)) if i != rank]
        self.spare: list[torch.Tensor] = []

    def allocate(self, call: Call, numel: int, dtype: torch.dtype, *, full: bool) -> Buffer:
        self._enqueue(self._header(call))()
        tensor = torch.zeros(numel, dtype=dtype)
        return Buffer(tensor, box_of(tensor, self.rank, len(self.ranks)) if full else tensor, full)

    def all_gather(self, call: Call, buffer: Buffer) -> Finish:
        boxes = self._boxes(buffer.tensor)
        return self._gather(call, buffer, buffer.mine, boxes, _skip)

    def gather_into(self, call: Call, buffer: Buffer, out: torch.Tensor) -> Finish:
        boxes = self._boxes(out)
        return self._gather(call, buffer, buffer.tensor, boxes, lambda: void(boxes[self.rank].copy_(buffer.tensor)))

    def _gather(self, call: Call, buffer: Buffer, mine: torch.Tensor, boxes: list[torch.Tensor], own: Finish) -> Finish:
        check, tag = self._header(call), _tag(call)
        receives = [(i, self._receive(boxes[i], i, tag)) for i in self.peers]
        buffer.sends += [(i, self._send(mine, i, tag)) for i in self.peers]

        def finish() -> None:
            check()
            own()
            self._wait(call, receives)

        return self._enqueue(finish)

    def reduce_scatter(self, call: Call, buffer: Buffer, out: torch.Tensor, accumulate: bool) -> Finish:
        """Receive the peers' copies of this rank's box, then sum them in rank order."""
        check, tag = self._header(call), _tag(call)
        parts, scratch = self._landing(buffer.mine)
        boxes = self._boxes(buffer.tensor)
        receives = [(i, self._receive(parts[i], i, tag)) for i in self.peers]
        buffer.sends += [(i, self._send(boxes[i], i, tag)) for i in self.peers]

        def finish() -> None:
            check()
            self._wait(call, receives)
            sum_in_rank_order(parts, out, accumulate=accumulate)
            self.spare.append(scratch)

        return self._enqueue(finish)

    def all_reduce(self, call: Call, tensor: torch.Tensor, op: str) -> Finish:
        """Send whole small tensors to all; reduce and then gather boxes of large ones."""
        flat = tensor.view(-1)
        small = flat.numel() * flat.element_size() <= SMALL_BYTES
        check, tag = self._header(call), _tag(call)
        boxes = [flat] * len(self.ranks) if small else self._boxes(flat)
        parts, scratch = self._landing(boxes[self.rank])
        receives = [(i, self._receive(parts[i], i, tag)) for i in self.peers]
        sends = [(i, self._send(boxes[i], i, tag)) for i in self.peers]

        def finish() -> None:
            check()
            self._wait(call, receives)
            self._wait(call, sends)
            combine(parts, boxes[self.rank], op)
            self.spare.append(scratch)
            if not small:
                second = _tag(call, "second round")
                receives_2 = [(i, self._receive(boxes[i], i, second)) for i in self.peers]
                sends_2 = [(i, self._send(boxes[self.rank], i, second)) for i in self.peers]
                self._wait(call, receives_2)
                self._wait(call, sends_2)

        return self._enqueue(finish)

    def broadcast(self, call: Call, tensor: torch.Tensor, src: int) -> Finish:
        flat, tag = tensor.view(-1), _tag(call)
        check = self._header(call)
        if src == self.rank:
            works = [(i, self._send(flat, i, tag)) for i in self.peers]
        else:
            works = [(src, self._receive(flat, src, tag))]

        def finish() -> None:
            check()
            self._wait(call, works)

        return self._enqueue(finish)

    def exchange(self, call: Call, payload: bytes) -> Callable[[], list[bytes]]:
        """Give every rank the bytes of every rank: lengths first, then contents."""
        check, tag = self._header(call), _tag(call)
        lengths = [torch.tensor([len(payload)]) for _ in self.ranks]
        receives = [(i, self._receive(lengths[i], i, tag)) for i in self.peers]
        sends = [(i, self._send(lengths[self.rank], i, tag)) for i in self.peers]
        out: list[bytes] = []

        def finish() -> None:
            check()
            self._wait(call, receives)
            second = _tag(call, "second round")
            texts = [torch.empty(int(n), dtype=torch.uint8) for n in lengths]
            if payload:
                texts[self.rank] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            bodies = [(i, self._receive(texts[i], i, second)) for i in self.peers]
            sends.extend((i, self._send(texts[self.rank], i, second)) for i in self.peers)
            self._wait(call, bodies)
            self._wait(call, sends)
            out.extend(t.numpy().tobytes() for t in texts)

        complete = self._enqueue(finish)

        def result() -> list[bytes]:
            complete()
            return out

        return result

    def wait_free(self, buffer: Buffer) -> None:
        self._wait(Call(-1, "wait_free", ""), buffer.sends)
        buffer.sends.clear()

    def _boxes(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [box_of(flat, i, len(self.ranks)) for i in range(len(self.ranks))]

    def _landing(self, own: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return one tensor like `own` per rank (own itself in its place), and the reused memory they lie in."""
        wanted = own.numel() * own.element_size() * len(self.peers)
        fitting = [s for s in self.spare if s.numel() >= wanted]
        scratch = min(fitting, key=torch.Tensor.numel, default=None)
        if scratch is None:
            if self.spare:
                self.spare.remove(self.spare[0])  # grow instead of hoarding one scratch per size
            scratch = torch.empty(wanted, dtype=torch.uint8)
        else:
            self.spare = [s for s in self.spare if s is not scratch]
        landed = list(scratch[:wanted].view(own.dtype).view(len(self.peers), -1)) if wanted else [own] * len(self.peers)
        landed.insert(self.rank, own)
        return landed, scratch

    def _enqueue(self, run: Finish) -> Finish:
        operation = _Operation(run)
        self.queue.waiting.append(operation)
        return lambda: self.queue.complete(operation)

    def _send(self, tensor: torch.Tensor, to: int, tag: int) -> Any:
        return dist.isend(tensor, group=self.pg, tag=tag, group_dst=to) if tensor.numel() else None

    def _receive(self, tensor: torch.Tensor, source: int, tag: int) -> Any:
        return dist.irecv(tensor, group=self.pg, tag=tag, group_src=source) if tensor.numel() else None

    def _header(self, call: Call) -> Finish:
        """Announce an operation to all peers; the returned check waits for theirs and compares."""
        mine = torch.frombuffer(bytearray(_header_bytes(call)), dtype=torch.uint8)
        heads = torch.empty(len(self.ranks), HEADER_BYTES, dtype=torch.uint8)
        try:
            receives = [(i, self._receive(heads[i], i, HEADER_TAG)) for i in self.peers]
            sends = [(i, self._send(mine, i, HEADER_TAG)) for i in self.peers]
        except RuntimeError as error:
            raise self._lost(call, self.peers[0], error, 0.0) from error

        def check() -> None:
            for i, work in receives:
                self._wait(call, [(i, work)])
                if not torch.equal(heads[i], mine):
                    theirs = Call.parse(heads[i].numpy().tobytes().rstrip(b"\0").decode(errors="replace"))
                    raise mismatch(self.name, call, self.ranks[self.rank], theirs, self.ranks[i])
            self._wait(call, sends)

        return check

    def _wait(self, call: Call, works: list[tuple[int, Any]]) -> None:
        for peer, work in works:
            if work is None:
                continue
            start = time.monotonic()
            try:
                with self.queue.stall:
                    work.wait(timedelta(seconds=self.timeout_s))
            except RuntimeError as error:
                raise self._lost(call, peer, error, time.monotonic() - start) from error

    def _lost(self, call: Call, peer: int, error: RuntimeError, waited_s: float) -> CommError:
        me, them = self.ranks[self.rank], self.ranks[peer]
        if "imed out" in str(error):
            return CommError(
                f"group '{self.name}': rank {me} waited {waited_s:.1f} s in {call} for rank {them}, which did not "
                "come. Look at what that rank does; a longer wait is parallelism.timeout_s"
            )
        return CommError(f"group '{self.name}': rank {me} lost rank {them} in {call}: {str(error).splitlines()[0]}")


class NcclChannel:
    """CUDA tensors between the ranks of one NCCL process group. Sums are in NCCL's order."""

    kind = "nccl"

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int, pg: Any, device: torch.device) -> None:
        self.name, self.ranks, self.rank, self.pg, self.device = name, ranks, rank, pg, device

    def allocate(self, call: Call, numel: int, dtype: torch.dtype, *, full: bool) -> Buffer:
        tensor = torch.zeros(numel, dtype=dtype, device=self.device)
        return Buffer(tensor, box_of(tensor, self.rank, len(self.ranks)) if full else tensor, full)

    def all_gather(self, call: Call, buffer: Buffer) -> Finish:
        return _waiting(dist.all_gather_into_tensor(buffer.tensor, buffer.mine, group=self.pg, async_op=True))

    def gather_into(self, call: Call, buffer: Buffer, out: torch.Tensor) -> Finish:
        return _waiting(dist.all_gather_into_tensor(out, buffer.tensor, group=self.pg, async_op=True))

    def reduce_scatter(self, call: Call, buffer: Buffer, out: torch.Tensor, accumulate: bool) -> Finish:
        direct = not accumulate and out.dtype == buffer.tensor.dtype
        landing = out if direct else torch.empty_like(buffer.mine)
        work = dist.reduce_scatter_tensor(landing, buffer.tensor, group=self.pg, async_op=True)

        def finish() -> None:
            work.wait()
            if accumulate:
                out.add_(landing)
            elif not direct:
                out.copy_(landing)

        return finish

    def all_reduce(self, call: Call, tensor: torch.Tensor, op: str) -> Finish:
        kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        return _waiting(dist.all_reduce(tensor, op=kinds[op], group=self.pg, async_op=True))

    def broadcast(self, call: Call, tensor: torch.Tensor, src: int) -> Finish:
        return _waiting(dist.broadcast(tensor, group=self.pg, async_op=True, group_src=src))

    def exchange(self, call: Call, payload: bytes) -> Callable[[], list[bytes]]:
        raise CommError(f"group '{self.name}': {call}: bytes travel on the host's channel, not on NCCL")

    def wait_free(self, buffer: Buffer) -> None:
        """Later work of the current stream is ordered behind the collectives by their `wait`."""


def _waiting(work: Any) -> Finish:
    return lambda: void(work.wait())


def _header_bytes(call: Call) -> bytes:
    text = call.signature.encode()
    if len(text) > HEADER_BYTES:
        raise CommError(f"label of {call.kind} is too long ({len(call.label)} characters): use at most 150")
    return text.ljust(HEADER_BYTES, b"\0")


def _tag(call: Call, round_name: str = "") -> int:
    """A positive tag made of everything that must agree. Source: torch's gloo backend takes tags below 2^31."""
    return 1 + zlib.crc32((call.signature + round_name).encode()) % (2**31 - 2)


def _skip() -> None:
    """Own box is already in place."""
