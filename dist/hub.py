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


class Hub:
    """All operations of this process with the peers of its host, whatever their group."""

    def __init__(self, links: Links, timeout_s: float, stall: Stall) -> None:
        self.links, self.timeout_s, self.stall = links, timeout_s, stall
        self.rounds: dict[tuple[int, int], Round] = {}
        self.pending: list[Operation] = []
        self.broken: CommError | None = None
        links.deliver = self._deliver

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
        self._check_usable()
        members, call = operation.members, operation.call
        operation.body = body
        operation.round.operation = operation
        message = Message(READY, members.number, call.seq, 0, call.signature.encode(), payload, fd)
        for peer in members.peers:
            self.links.send(peer, message)
        self.pending.append(operation)
        return lambda: self.block(operation, lambda: operation.finished)

    def block(self, operation: Operation, done: Callable[[], bool]) -> None:
        """Run operations until `done`, this one first.

        Blocks: host
        Raises: CommError naming who is in another operation, is gone, or did not come in time.
        """
        try:
            self._block(operation, done)
        except CommError as error:
            if self.broken is None:
                self.broken = error
            raise

    def _block(self, operation: Operation, done: Callable[[], bool]) -> None:
        self._check_usable(unless=done)
        since, waiting = time.monotonic(), self.stall
        while True:
            if self._advance(operation):
                since = time.monotonic()
            if done():
                return
            if self.links.pump(0.0):
                continue
            if any(self._advance(other) for other in list(self.pending) if other is not operation):
                continue
            operation.check()
            self._check_present(operation)
            now = time.monotonic()
            if now - since >= self.timeout_s:
                raise self._timed_out(operation, now - since)
            with waiting:
                self.links.pump(self.timeout_s - (now - since))

    def _advance(self, operation: Operation) -> bool:
        """Run an operation as far as the peers allow; return whether it moved."""
        moved = False
        while operation.body is not None:
            operation.check()
            if operation.lacking(operation.need) or (operation.after is not None and not operation.after.finished):
                return moved
            moved = True
            try:
                operation.need = next(operation.body)
            except StopIteration:
                operation.body = None
                operation.after = None  # or finished operations would form one long chain
                self.pending.remove(operation)
                self._forget((operation.members.number, operation.call.seq), operation.round)
        return moved

    def _waiting_for(self, operation: Operation) -> list[int]:
        if operation.after is not None and not operation.after.finished:
            return self._waiting_for(operation.after)
        return operation.lacking(operation.final if operation.finished else operation.need)

    def _check_usable(self, unless: Callable[[], bool] | None = None) -> None:
        if self.broken is not None and (unless is None or not unless()):
            raise CommError(f"communication has failed before: {self.broken}")

    def _check_present(self, operation: Operation) -> None:
        me, where = self.links.rank, f"{operation.call} of group '{operation.members.name}'"
        lost = self.links.lost()
        if lost:
            who = ", ".join(map(str, lost))
            raise CommError(f"rank {me} lost rank {who} in {where}: the process ended. Its own output says why")
        gone = sorted(set(self.links.left()) & set(self._waiting_for(operation)))
        if gone:
            who = ", ".join(map(str, gone))
            raise CommError(f"rank {me} waits in {where} for rank {who}, which has closed its communication already")

    def _timed_out(self, operation: Operation, waited_s: float) -> CommError:
        who = self._waiting_for(operation)
        known = "; ".join(f"rank {p}: {self._last_known(operation.members.number, p)}" for p in who)
        return CommError(
            f"rank {self.links.rank} waited {waited_s:.1f} s in {operation.call} of group '{operation.members.name}' "
            f"for rank {', '.join(map(str, who))}, which did not come (last known: {known}). Look at what that rank "
            "does; a longer wait is parallelism.timeout_s"
        )

    def _last_known(self, number: int, peer: int) -> str:
        seen = [
            (seq, r.signatures[peer]) for (n, seq), r in self.rounds.items() if n == number and peer in r.signatures
        ]
        return str(Call.parse(max(seen)[1].decode())) if seen else "nothing under way in this group"

    def close(self) -> None:
        self.links.close()
