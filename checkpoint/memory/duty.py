"""What a snapshot process does for one generation: hashes, protects, reports, obeys, watches. Threads of its own.

Must not know: how requests arrive, the life of the process.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.groups import num_parity
from windlass.checkpoint.memory.heartbeat import Phase, read_heartbeat
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.peers import Own, Peers, moves_name
from windlass.checkpoint.memory.persisting import Persisting
from windlass.checkpoint.memory.protect import Protector
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.slots import NodeSlots
from windlass.checkpoint.memory.term import Term
from windlass.checkpoint.memory.votes import NOTHING, Decree, Report
from windlass.checkpoint.memory.watchdog import Stall, Watchdog
from windlass.checkpoint.memory.writing import Persister, Writing
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError

REPORT_S = 0.5  # a report that was lost is repeated after this long
LISTEN_S = 2.0  # the leader answers at the latest after this long, with what held before
RETRY_S = 0.1
PROTECT_S = 0.02
TELL_S = 1.0  # for the other nodes to hear of a rank that hangs here


class Duty:
    """One generation of this node's process, from `start` to `stop`."""

    def __init__(
        self,
        folder: NodeFolder,
        slots: NodeSlots,
        membership: Membership,
        settings: Settings,
        base: Base,
        persister: Persister,
        own: Own,
        log: Callable[[str], None],
    ) -> None:
        self.folder, self.slots, self.settings, self._log = folder, slots, settings, log
        self.term = Term(membership, folder.node, settings, base)
        self.peers = Peers(membership, folder, own, settings.peer_timeout_s)
        slots.expect(membership)
        self.protector = Protector(folder, slots, self.term, self.peers, log)
        self.watchdog = Watchdog(folder, membership.generation, settings, self._tell_stall, log)
        self.writing = Writing(membership, folder.node, slots, persister, log)
        self.persisting: Persisting | None = None
        if self.term.ballot is not None:
            self.persisting = Persisting(folder, self.term, self.peers, self.writing, log)
            self.term.on_commit = self.persisting.committed
        self.stirred = threading.Event()  # a slot has moved on or may: there is something to obey or to report
        slots.on_unpinned = self.stirred.set
        self.filled = threading.Event()  # a slot has been hashed: there is something to protect
        self._obeyed = NOTHING
        self._discarded = False
        self._stopped = threading.Event()
        jobs = {"protect": self._protect, "report": self._report, "watch": self._watch, "listen": self._listen}
        self._threads = [
            threading.Thread(target=run, name=f"snapshot-{name}", daemon=True) for name, run in jobs.items()
        ]

    def start(self) -> Duty:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End what this generation has under way, without waiting for others."""
        self._stopped.set()
        self.stirred.set()
        self.filled.set()
        if self.persisting is not None:
            self.persisting.stop()
        self.writing.stop()
        self.peers.close()

    @property
    def over(self) -> bool:
        """Whether this generation has been stopped, or fenced by a newer one: then nothing may be freed any more."""
        return self._stopped.is_set() or self.folder.read_generation() > self.term.generation

    # -- protecting --------------------------------------------------------------------------------------------------

    def _protect(self) -> None:
        self._guarded("taking memory for parity", self.protector.make_room)
        while not self._stopped.is_set():
            self.filled.wait(PROTECT_S * 10)
            self.filled.clear()
            step = None if self.over else self.protector.next_step()
            if step is None:
                continue
            done = self._guarded("protecting", lambda step=step: self.protector.protect(step))  # type: ignore[misc]
            self.stirred.set()
            self.filled.set()
            if not done:
                self._stopped.wait(RETRY_S)

    def _guarded(self, what: str, work: Callable[[], Any]) -> Any:
        """Do work whose surprises must not end a thread: they are logged, and it is tried again."""
        try:
            return work()
        except Exception as error:
            if not self._stopped.is_set():
                self._log(f"{what}: {type(error).__name__}: {error}")
            return None

    # -- voting ------------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Say what this node holds. Beats are read first: what they have passed is then surely in the slots."""
        passed = {}
        for rank, path in self.folder.beating().items():
            beat = read_heartbeat(path)
            if rank in self.term.ranks and beat is not None and beat.generation == self.term.generation:
                passed[rank] = beat.step - 2 if beat.phase == Phase.STEP else NOTHING
        held = self.slots.states(self.term.generation, self.term.ranks)
        return Report(self.folder.node, self.term.generation, time.monotonic_ns(), held, passed)

    def _report(self) -> None:
        """Obey, then report, whenever something has moved and every REPORT_S: a decree is obeyed for as long as it
        holds, because what a write or another thread kept from being freed stays behind else, and no newer one comes.
        """
        while not self._stopped.is_set():
            self.stirred.wait(REPORT_S)
            self.stirred.clear()
            self._guarded("obeying", lambda: self.obey(self.term.decree))
            if not self.over and self.term.ranks and not self._guarded("voting", self._vote):
                self._stopped.wait(RETRY_S)

    def _vote(self) -> bool:
        self.slots.free_orphans(self.term.generation)
        report = self.report()
        for rank, steps in report.held.items():
            fault("smp.vote", rank=rank, step=max(steps, default=NOTHING), generation=self.term.generation)
        if self.term.ballot is not None:
            self.term.hear(report)
            return True
        try:
            answer, _ = self.peers.ask(self.term.leader, "vote", {"report": report.dump()})
        except CheckpointError:
            return False  # it is listed as silent, and asked again
        self.term.follow(Decree.parse(answer["decree"]))
        return True

    def _listen(self) -> None:
        """Hear of decisions as they are made: the leader answers when there is a new one."""
        heard = 0
        while not self._stopped.is_set():
            try:
                if self.term.ballot is None:
                    self.term.follow(self._ask_leader(heard))
                decree = self.term.wait(heard, LISTEN_S if self.term.ballot is not None else 0.0)
            except CheckpointError:
                self._stopped.wait(RETRY_S)
                continue
            if decree.sent > heard:
                heard = decree.sent
                self.stirred.set()

    def _ask_leader(self, heard: int) -> Decree:
        fields = {"after": heard, "wait_s": LISTEN_S}
        timeout_s = LISTEN_S + self.settings.peer_timeout_s
        return Decree.parse(self.peers.ask(self.term.leader, "decree", fields, timeout_s=timeout_s)[0]["decree"])

    def obey(self, decree: Decree) -> None:
        """Carry out what was decided: mark, free, and delete what the generation before needed. Once more: what was
        left of that. One thread.
        """
        if self.over:
            return
        if decree.watermark > self._obeyed:
            for rank in self.term.ranks:
                fault("smp.commit", rank=rank, step=decree.watermark, generation=self.term.generation)
        _, freed = self.slots.obey(decree)
        if freed:
            for rank in self.term.ranks:
                fault("smp.freed", rank=rank, step=decree.watermark, generation=self.term.generation)
        self._obeyed = max(self._obeyed, decree.watermark)
        if decree.watermark > NOTHING and not self._discarded:
            for name in self.slots.discard(self.term.generation):
                self._log(f"{name} is not needed any more")
            for generation in self.folder.memberships():
                if generation < self.term.generation:
                    for name in (
                        f"membership-{generation}.json",
                        f"base-{generation}.json",
                        f"saved-{generation}.json",
                        moves_name(generation),
                    ):
                        (self.folder.path / name).unlink(missing_ok=True)
            self._discarded = not self.slots.pinned_before(self.term.generation)

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(self.watchdog.pause_s):
            if not self.over:
                self._guarded("watching", self.watchdog.look)

    def _tell_stall(self, stall: Stall) -> None:
        """Have the other nodes look at their ranks too: the cause may be there.

        Blocks: host, at most TELL_S: the ranks here end right after this, and with them those elsewhere
        """
        fields = {"rank": stall.rank, "step": stall.beat.step}

        def tell(node: str) -> None:
            with contextlib.suppress(CheckpointError):  # one that does not answer cannot help
                self.peers.ask(node, "stalled", fields, timeout_s=TELL_S)

        others = [node for node in self.peers.nodes if node != self.folder.node]
        telling = [threading.Thread(target=tell, args=(node,), name="snapshot-tell", daemon=True) for node in others]
        for thread in telling:
            thread.start()
        end = time.monotonic() + TELL_S
        for thread in telling:
            thread.join(max(end - time.monotonic(), 0.0))

    # -- status ------------------------------------------------------------------------------------------------------

    def degraded(self) -> list[int]:
        """Return the ranks that the loss of one more node may take with it: members of groups in which a process is
        silent, and all protected ranks as long as this generation has no committed step.
        """
        membership = self.term.membership
        silent = set(self.peers.silent(at_least_s=1.0))
        before_first = self.term.decree.watermark == NOTHING
        return sorted(
            rank
            for group in membership.groups
            if num_parity(membership.scheme, membership.k, len(group))
            and (before_first or any(membership.members[rank].node in silent for rank in group))
            for rank in group
        )
