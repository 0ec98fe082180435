"""One generation as a snapshot process lives it: its members, its settings, and what the leader has decided so far.

The leader's process decides here; the others take over what it has decided. Must not know: sockets, segments.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.votes import Ballot, Decree, Report
from windlass.dist.errors import CheckpointError


class Term:
    """The state of a generation. Any thread; `on_commit(step)` is called under the lock of the term, so that what it
    pins is part of the very decree that carries the commit."""

    def __init__(self, membership: Membership, node: str, settings: Settings, base: Base) -> None:
        self.membership, self.node, self.settings, self.base = membership, node, settings, base
        self.generation = membership.generation
        self.ranks = tuple(m.rank for m in membership.by_node.get(node, ()))
        self.leader = membership.leader.node
        self.ballot: Ballot | None = None
        if self.leader == node:
            by_node = {name: [m.rank for m in members] for name, members in membership.by_node.items()}
            self.ballot = Ballot(self.generation, by_node)
        self.on_commit: Callable[[int], None] = lambda step: None
        self._decree = Decree(self.generation)
        self.changed = threading.Condition(threading.RLock())

    @property
    def decree(self) -> Decree:
        """Return the newest that was decided."""
        return self._decree

    def hear(self, report: Report) -> Decree:
        """Take a report in, at the leader, and return the decree that holds now.

        Raises: CheckpointError if this is not the leader, or the report is none of this generation
        """
        if self.ballot is None:
            raise CheckpointError(f"node {self.node} does not lead generation {self.generation}: {self.leader} does")
        with self.changed:
            if self.ballot.hear(report):
                if self.ballot.watermark > self._decree.watermark:
                    self.on_commit(self.ballot.watermark)
                self.publish()
            self.changed.notify_all()
            return self._decree

    def publish(self, **changes: object) -> None:
        """Decide, at the leader: the ballot's marks, and `changes` of the other fields."""
        assert self.ballot is not None
        with self.changed:
            sent = max(time.monotonic_ns(), self._decree.sent + 1)
            marks = {"watermark": self.ballot.watermark, "dropped": tuple(sorted(self.ballot.dropped))}
            self._decree = replace(self._decree, sent=sent, **marks, **changes)  # type: ignore[arg-type]
            self.changed.notify_all()

    def follow(self, decree: Decree) -> bool:
        """Take over what the leader has decided; return whether it is news."""
        if decree.generation != self.generation:
            return False
        with self.changed:
            merged = self._decree.after(decree)
            if merged == self._decree:
                return False
            self._decree = merged
            self.changed.notify_all()
            return True

    def wait(self, sent: int, timeout_s: float) -> Decree:
        """Return the decree as soon as it is later than `sent`, or after the timeout.

        Blocks: host, at most `timeout_s`
        """
        with self.changed:
            self.changed.wait_for(lambda: self._decree.sent > sent, timeout_s)
            return self._decree

    def wait_committed(self, step: int, timeout_s: float) -> int:
        """Return the watermark once it has reached a step, at the leader.

        Blocks: host, at most `timeout_s`
        Raises: CheckpointError naming the ranks that are missing
        """
        assert self.ballot is not None
        with self.changed:
            if not self.changed.wait_for(lambda: self._decree.watermark >= step, timeout_s):
                missing = self.ballot.missing(step)
                raise CheckpointError(
                    f"step {step} was not protected within {timeout_s:.1f} s: waiting for {self._named(missing)}"
                )
            return self._decree.watermark

    def _named(self, ranks: list[int]) -> str:
        members = self.membership.members
        return ", ".join(f"rank {rank} on {members[rank].node}" for rank in ranks) or "the leader's decision"
