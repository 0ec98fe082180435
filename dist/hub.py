"""Runs the operations that go through shared memory: who has said what, who may go on, who is missing.

Every operation of a group has a number and levels. READY says that a rank has started it, and what it is; each later
level says how far the rank has got. The body of an operation is a generator that yields the level every peer must have
reached before it goes on; its last level means that this rank has read all it needs from the peers.

There are no threads. While a rank is blocked, in anything, it runs whatever operations of its own have become ready,
so that no peer waits for a read that would only happen later: with every rank starting operations in the same order,
the oldest unfinished operation can always run, and waiting in any order cannot dead-lock.
Must not know: memory, tensors, what an operation does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol

from windlass.dist.errors import CommError
from windlass.dist.links import READY, STEP, Links, Message
from windlass.dist.transport import Call, Finish, Stall, mismatch

Body = Generator[int, None, None]  # yields the level that every peer must have reached before it goes on


@dataclass(frozen=True)
class Members:
    """A group as the hub sees it: its number, equal on all ranks, and the world ranks of the others."""

    name: str
    number: int
    peers: list[int]


class Waiter(Protocol):
    """What a rank can be blocked in: an operation of a group, or a message from a peer."""

    call: Call
    members: Members

    def advance(self) -> bool:
        """Go on as far as the peers allow; return whether it moved."""

    def check(self) -> None:
        """Raise CommError if a peer does something else."""

    def awaited(self) -> list[int]:
        """Return the peers (world ranks) it waits for now."""

    def last_known(self, peer: int) -> str:
        """Say what a peer did last, as far as this rank knows."""


@dataclass
class Round:
    """What is known of one operation of one group, whether this rank has started it or not."""

    levels: dict[int, int] = field(default_factory=dict)
    signatures: dict[int, bytes] = field(default_factory=dict)
    payloads: dict[int, bytes] = field(default_factory=dict)
    fds: dict[int, int] = field(default_factory=dict)
    operation: Operation | None = None


class Operation:
    """One operation as this rank sees it: a body that runs in steps as the peers' levels allow."""

    def __init__(self, hub: Hub, members: Members, call: Call, final: int, after: Operation | None = None) -> None:
        self.hub, self.members, self.call, self.final, self.after = hub, members, call, final, after
        self.round = hub.rounds.setdefault((members.number, call.seq), Round())
        self.body: Body | None = None
        self.need = 0
        self.level = 0
        self.checked = False

    @property
    def finished(self) -> bool:
        return self.body is None

    def lacking(self, level: int) -> list[int]:
        """Return the peers (world ranks) that have not reached this level."""
        return [p for p in self.members.peers if self.round.levels.get(p, -1) < level]

    def everyone_done(self) -> bool:
        """Return whether this rank and all peers have run it to its end."""
        return self.finished and not self.lacking(self.final)

    def announce(self) -> int:
        """Tell the peers that this rank has reached the next level, and return it."""
        self.level += 1
        message = Message(STEP, self.members.number, self.call.seq, self.level)
        for peer in self.members.peers:
            self.hub.links.send(peer, message)
        return self.level

    def advance(self) -> bool:
        """Run it as far as the peers allow; return whether it moved."""
        moved = False
        while self.body is not None:
            self.check()
            if self.lacking(self.need) or (self.after is not None and not self.after.finished):
                return moved
            moved = True
            try:
                self.need = next(self.body)
            except StopIteration:
                self.body = None
                self.after = None  # or finished operations would form one long chain
                self.hub.done(self)
        return moved

    def check(self) -> None:
        """Raise CommError if a peer is in another operation."""
        if self.checked:
            return
        mine = self.call.signature.encode()
        for peer, theirs in self.round.signatures.items():
            if theirs != mine:
                other = Call.parse(theirs.decode())
                raise mismatch(self.members.name, self.call, self.hub.links.rank, other, peer)
        self.checked = len(self.round.signatures) == len(self.members.peers)

    def awaited(self) -> list[int]:
        if self.after is not None and not self.after.finished:
            return self.after.awaited()
        return self.lacking(self.final if self.finished else self.need)

    def last_known(self, peer: int) -> str:
        """Name the latest operation of the group that a peer has started."""
        number = self.members.number
        seen = [
            (seq, r.signatures[peer]) for (n, seq), r in self.hub.rounds.items() if n == number and peer in r.signatures
        ]
        return str(Call.parse(max(seen)[1].decode())) if seen else "nothing under way in this group"


class Hub:
    """All operations of this process with the peers of its host, whatever their group."""

    def __init__(self, links: Links, timeout_s: float, stall: Stall) -> None:
        self.links, self.timeout_s, self.stall = links, timeout_s, stall
        self.rounds: dict[tuple[int, int], Round] = {}
        self.pending: list[Operation] = []
        self.broken: CommError | None = None
        self.routes: dict[int, Callable[[int, Message], None]] = {READY: self._deliver, STEP: self._deliver}
        links.deliver = lambda peer, message: self.routes[message.kind](peer, message)

    def _deliver(self, peer: int, message: Message) -> None:
        key = (message.group, message.seq)
        round_ = self.rounds.setdefault(key, Round())
        round_.levels[peer] = message.level
        if message.kind == READY:
            round_.signatures[peer] = message.signature
            round_.payloads[peer] = message.payload
            if message.fd is not None:
                round_.fds[peer] = message.fd
        self._forget(key, round_)

    def _forget(self, key: tuple[int, int], round_: Round) -> None:
        if round_.operation is not None and round_.operation.everyone_done():
            self.rounds.pop(key, None)

    def start(self, operation: Operation, body: Body, payload: bytes = b"", fd: int | None = None) -> Finish:
        """Announce an operation to its group and return what completes it.

        Blocks: no
        """
        self.check_usable()
        members, call = operation.members, operation.call
        operation.body = body
        operation.round.operation = operation
        message = Message(READY, members.number, call.seq, 0, call.signature.encode(), payload, fd)
        for peer in members.peers:
            self.links.send(peer, message)
        self.pending.append(operation)
        return lambda: self.block(operation, lambda: operation.finished)

    def done(self, operation: Operation) -> None:
        """Drop an operation that has run to its end here."""
        self.pending.remove(operation)
        self._forget((operation.members.number, operation.call.seq), operation.round)

    def block(self, waiter: Waiter, done: Callable[[], bool]) -> None:
        """Run operations until `done`, this one first.

        Blocks: host
        Raises: CommError naming who is in another operation, is gone, or did not come in time.
        """
        try:
            self._block(waiter, done)
        except CommError as error:
            self.fail(error)
            raise

    def _block(self, waiter: Waiter, done: Callable[[], bool]) -> None:
        since, waiting = time.monotonic(), self.stall
        while True:
            waiter.check()
            if not done():
                self.check_usable()
            if waiter.advance():
                since = time.monotonic()
            if done():
                return
            if self.links.pump(0.0):
                continue
            if any(other.advance() for other in list(self.pending) if other is not waiter):
                continue
            self.check_present(waiter.call, waiter.members, waiter.awaited())
            now = time.monotonic()
            if now - since >= self.timeout_s:
                raise self._timed_out(waiter, now - since)
            with waiting:
                self.links.pump(self.timeout_s - (now - since))

    def fail(self, error: CommError) -> None:
        """Make every later use of this hub fail, too."""
        if self.broken is None:
            self.broken = error

    def check_usable(self) -> None:
        """Raise CommError if communication has failed before."""
        if self.broken is not None:
            raise CommError(f"communication has failed before: {self.broken}")

    def check_present(self, call: Call, members: Members, wanted: list[int]) -> None:
        """Raise CommError if any peer has died, or one that is wanted has left."""
        me, where = self.links.rank, f"{call} of group '{members.name}'"
        lost = self.links.lost()
        if lost:
            who = ", ".join(map(str, lost))
            raise CommError(f"rank {me} lost rank {who} in {where}: the process ended. Its own output says why")
        gone = sorted(set(self.links.left()) & set(wanted))
        if gone:
            who = ", ".join(map(str, gone))
            raise CommError(f"rank {me} waits in {where} for rank {who}, which has closed its communication already")

    def _timed_out(self, waiter: Waiter, waited_s: float) -> CommError:
        who = waiter.awaited()
        known = "; ".join(f"rank {p}: {waiter.last_known(p)}" for p in who)
        return CommError(
            f"rank {self.links.rank} waited {waited_s:.1f} s in {waiter.call} of group '{waiter.members.name}' "
            f"for rank {', '.join(map(str, who))}, which did not come (last known: {known}). Look at what that rank "
            "does; a longer wait is parallelism.timeout_s"
        )

    def close(self) -> None:
        self.links.close()
