"""Channels between CPU ranks over gloo.

Every operation is direct sends and receives into slices, with sums added in rank order on the receiver: the
measured fastest form, without the full-size temporaries of gloo's own collectives, and bitwise equal on all ranks.
A small header travels beside the data of each operation and is compared before the result is used; data messages carry
a tag made of the header, so that two different operations never land in one another's memory.
Operations of a process complete in the order they were started: waiting for one completes the earlier ones, so that
those with two rounds cannot wait for each other across ranks.
Point-to-point messages are copied when they are sent, carry a header of their own, and stay outside that order. A rank
that is blocked in one does not drive the second rounds of its collectives: wait for large all-reduces somewhere else.
Must not know: units, ZeRO, meshes.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
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
    misdelivered,
    mismatch,
    nothing,
    sum_in_rank_order,
    void,
)

HEADER_BYTES = 256
GOODBYE_S = 5.0  # how long closing waits for messages that their receivers have not taken yet
FOREVER = timedelta(days=365)  # gloo breaks the connection of a send that is waited for and times out
SMALL_BYTES = 64 << 10  # up to here every rank sends the whole tensor to every other: one round instead of two


class Queue:
    """The operations of this process that are started and not complete, oldest first."""

    def __init__(self, stall: Stall) -> None:
        self.stall = stall
        self.waiting: deque[_Operation] = deque()
        self.outbox = Outbox()
        self.broken: CommError | None = None

    def complete(self, operation: _Operation) -> None:
        """Run operations in start order up to and including this one."""
        while not operation.done:
            self.check_usable()
            oldest = self.waiting.popleft()
            self.run(oldest.run)
            oldest.done = True

    def run(self, finish: Finish) -> None:
        """Run something now. If it fails, communication has failed for good."""
        self.check_usable()
        try:
            finish()
        except CommError as error:
            self.broken = error
            raise

    def check_usable(self) -> None:
        """Raise CommError if communication has failed before."""
        if self.broken is not None:
            raise CommError(f"communication has failed before: {self.broken}")

    def close(self) -> None:
        """Let what has been sent arrive, unless communication has failed."""
        self.outbox.close(0.0 if self.broken is not None else GOODBYE_S)


class _Operation:
    def __init__(self, run: Finish) -> None:
        self.run = run
        self.done = False


class Outbox:
    """Messages that are being sent and nobody waits for.

    Gloo ends a send only for a thread that waits for it, and drops one whose handle is dropped: one thread waits.
    """

    def __init__(self) -> None:
        self._works: SimpleQueue[Any] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def keep(self, work: Any) -> None:
        """Hold on to a send until it is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="windlass outbox", daemon=True)
            self._thread.start()
        self._works.put(work)

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            # A receiver that has gone is an error of the next operation that needs it, which names it.
            with suppress(RuntimeError):
                work.wait(FOREVER)
            del work  # and its tensor, before the next one comes

    def close(self, timeout_s: float) -> None:
        """Wait for what is under way, at most this long."""
        if self._thread is not None:
            self._works.put(None)
            self._thread.join(timeout_s)
            self._thread = None


class GlooChannel:
    """CPU tensors between the ranks of one gloo process group."""

    kind = "gloo"

    def __init__(
        self, name: str, ranks: tuple[int, ...], rank: int, number: int, pg: Any, timeout_s: float, queue: Queue
    ) -> None:
        self.name, self.ranks, self.rank, self.pg = name, ranks, rank, pg
        self.timeout_s, self.queue = timeout_s, queue
        self.peers = [i for i in range(len(ranks)) if i != rank]
        self.spare: list[torch.Tensor] = []
        # Groups of the same ranks share a process group: every tag depends on the group's number.
        self.number, self.header_tag, self.letter_tag = number, 2 * number, 2 * number + 1
        self.num_sent: Counter[int] = Counter()
        self.num_posted: Counter[int] = Counter()

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
        check, tag = self._header(call), self._tag(call.signature)
        receives = [(i, self._receive(call, boxes[i], i, tag)) for i in self.peers]
        buffer.sends += [(i, self._send(call, mine, i, tag)) for i in self.peers]

        def finish() -> None:
            check()
            own()
            self._wait(call, receives)

        return self._enqueue(finish)

    def reduce_scatter(self, call: Call, buffer: Buffer, out: torch.Tensor, accumulate: bool) -> Finish:
        """Receive the peers' copies of this rank's box, then sum them in rank order."""
        check, tag = self._header(call), self._tag(call.signature)
        parts, scratch = self._landing(buffer.mine)
        boxes = self._boxes(buffer.tensor)
        receives = [(i, self._receive(call, parts[i], i, tag)) for i in self.peers]
        buffer.sends += [(i, self._send(call, boxes[i], i, tag)) for i in self.peers]

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
        check, tag = self._header(call), self._tag(call.signature)
        boxes = [flat] * len(self.ranks) if small else self._boxes(flat)
        parts, scratch = self._landing(boxes[self.rank])
        receives = [(i, self._receive(call, parts[i], i, tag)) for i in self.peers]
        sends = [(i, self._send(call, boxes[i], i, tag)) for i in self.peers]

        def finish() -> None:
            check()
            self._wait(call, receives)
            self._wait(call, sends)
            combine(parts, boxes[self.rank], op)
            self.spare.append(scratch)
            if not small:
                second = self._tag(call.signature, "second round")
                receives_2 = [(i, self._receive(call, boxes[i], i, second)) for i in self.peers]
                sends_2 = [(i, self._send(call, boxes[self.rank], i, second)) for i in self.peers]
                self._wait(call, receives_2)
                self._wait(call, sends_2)

        return self._enqueue(finish)

    def broadcast(self, call: Call, tensor: torch.Tensor, src: int) -> Finish:
        flat, tag = tensor.view(-1), self._tag(call.signature)
        check = self._header(call)
        if src == self.rank:
            works = [(i, self._send(call, flat, i, tag)) for i in self.peers]
        else:
            works = [(src, self._receive(call, flat, src, tag))]

        def finish() -> None:
            check()
            self._wait(call, works)

        return self._enqueue(finish)

    def exchange(self, call: Call, payload: bytes) -> Callable[[], list[bytes]]:
        """Give every rank the bytes of every rank: lengths first, then contents."""
        check, tag = self._header(call), self._tag(call.signature)
        lengths = [torch.tensor([len(payload)]) for _ in self.ranks]
        receives = [(i, self._receive(call, lengths[i], i, tag)) for i in self.peers]
        sends = [(i, self._send(call, lengths[self.rank], i, tag)) for i in self.peers]
        out: list[bytes] = []

        def finish() -> None:
            check()
            self._wait(call, receives)
            second = self._tag(call.signature, "second round")
            texts = [torch.empty(int(n), dtype=torch.uint8) for n in lengths]
            if payload:
                texts[self.rank] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            bodies = [(i, self._receive(call, texts[i], i, second)) for i in self.peers]
            sends.extend((i, self._send(call, texts[self.rank], i, second)) for i in self.peers)
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

    def send(self, call: Call, tensor: torch.Tensor, to: Sequence[int]) -> Finish:
        """Send a header and a copy of the tensor to every receiver."""
        self.queue.check_usable()
        data = tensor.detach().view(-1).clone()
        for i in to:
            head, tag = self._letter(call, self.num_sent, i)
            works = [self._send(call, head, i, self.letter_tag), self._send(call, data, i, tag)]
            for work in filter(None, works):
                self.queue.outbox.keep(work)
        return nothing

    def receive(self, call: Call, out: torch.Tensor, source: int) -> Finish:
        """Receive the header of whatever comes next, and the tensor if it is the one that is wanted."""
        self.queue.check_usable()
        wanted, tag = self._letter(call, self.num_posted, source)
        head, body = torch.empty_like(wanted), out.detach().view(-1)
        works = [self._receive(call, head, source, self.letter_tag), self._receive(call, body, source, tag)]

        def finish() -> None:
            self._wait(call, [(source, works[0])])
            if not torch.equal(head, wanted):
                sent = _text_of(head)
                raise misdelivered(self.name, sent, self.ranks[source], call.content, self.ranks[self.rank])
            self._wait(call, [(source, works[1])])

        return lambda: self.queue.run(finish)

    def _letter(self, call: Call, count: Counter[int], peer: int) -> tuple[torch.Tensor, int]:
        """Return the header of the next message on an edge, and the tag of its data."""
        count[peer] += 1
        return _header(call, call.content), self._tag(f"{count[peer]}|{call.content}")

    def connect(self, edges: Sequence[tuple[int, int]]) -> None:
        """Gloo connects all ranks of a process group when it is formed."""

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

    def _tag(self, signature: str, round_name: str = "") -> int:
        """A positive tag made of everything that must agree. Source: torch's gloo backend takes tags below 2^31."""
        return 1 + zlib.crc32(f"{self.number}|{signature}{round_name}".encode()) % (2**31 - 2)

    def _send(self, call: Call, tensor: torch.Tensor, to: int, tag: int) -> Any:
        try:
            return dist.isend(tensor, group=self.pg, tag=tag, group_dst=to) if tensor.numel() else None
        except RuntimeError as error:
            raise self._lost(call, to, error) from error

    def _receive(self, call: Call, tensor: torch.Tensor, source: int, tag: int) -> Any:
        try:
            return dist.irecv(tensor, group=self.pg, tag=tag, group_src=source) if tensor.numel() else None
        except RuntimeError as error:
            raise self._lost(call, source, error) from error

    def _header(self, call: Call) -> Finish:
        """Announce an operation to all peers; the returned check waits for theirs and compares."""
        mine = _header(call, call.signature)
        heads = torch.empty(len(self.ranks), HEADER_BYTES, dtype=torch.uint8)
        receives = [(i, self._receive(call, heads[i], i, self.header_tag)) for i in self.peers]
        sends = [(i, self._send(call, mine, i, self.header_tag)) for i in self.peers]

        def check() -> None:
            for i, work in receives:
                self._wait(call, [(i, work)])
                if not torch.equal(heads[i], mine):
                    theirs = Call.parse(_text_of(heads[i]))
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

    def _lost(self, call: Call, peer: int, error: RuntimeError, waited_s: float = 0.0) -> CommError:
        """Say what an error of gloo means. Communication has failed for good, also where no operation was running."""
        me, them = self.ranks[self.rank], self.ranks[peer]
        if "imed out" in str(error):
            lost = CommError(
                f"group '{self.name}': rank {me} waited {waited_s:.1f} s in {call} for rank {them}, which did not "
                "come. Look at what that rank does; a longer wait is parallelism.timeout_s"
            )
        else:
            # When one peer dies, gloo fails what is under way with any of them.
            who = f"rank {them}" if len(self.peers) == 1 else f"a peer (while it dealt with rank {them})"
            lost = CommError(f"group '{self.name}': rank {me} lost {who} in {call}: {str(error).splitlines()[0]}")
        self.queue.broken = self.queue.broken or lost
        return lost


def _header(call: Call, text: str) -> torch.Tensor:
    if len(text.encode()) > HEADER_BYTES:
        raise CommError(f"label of {call.kind} is too long ({len(call.label)} characters): use at most 150")
    return torch.frombuffer(bytearray(text.encode().ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def _text_of(header: torch.Tensor) -> str:
    return header.numpy().tobytes().rstrip(b"\0").decode(errors="replace")


def _skip() -> None:
    """Own box is already in place."""
