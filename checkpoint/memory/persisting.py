"""Which committed steps become durable, and how all nodes are brought to write one: two phases, led by one process.

A step that is due while an earlier one is still being written is left out and counted: training never waits for
storage. What is written keeps its slots: with two of them no snapshot is taken meanwhile, with a third one they go on.
Storage that comes no further is not waited for: the slots are let go, and the step counts as failed.
Must not know: files, sockets (nodes are asked by name), segments.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.inventory import LOCAL, STORAGE
from windlass.checkpoint.memory.peers import Peers
from windlass.checkpoint.memory.status import Flushed
from windlass.checkpoint.memory.term import Term
from windlass.checkpoint.memory.votes import NOTHING
from windlass.checkpoint.memory.writing import LEVELS, Writing
from windlass.dist.errors import CheckpointError

RETRY_S = 0.2
ATTEMPTS = 3
TOLD_S = 10.0  # whoever asks now and then has seen a problem by then
PATIENCE_S = 60.0  # with storage that shows no progress, at least; and, as a system may take a whole file in and write
SLOW_BYTES_PER_S = 16 << 20  # it at the end without a sign, the time that takes: storage that is slower counts as hung


class Cadence:
    """Says when a level is due: at the first committed step at or after each multiple of `every` beyond `last`, which
    is durable."""

    def __init__(self, every: int, last: int) -> None:
        self.every, self.last = every, max(last, 0)
        self.skipped = 0

    def due(self, step: int, busy: bool) -> bool:
        """Take note of a committed step and return whether it is to be written; if not because of `busy`, count it."""
        if self.every <= 0 or step // self.every <= self.last // self.every:
            return False
        self.last = step
        self.skipped += busy
        return not busy


@dataclass
class _Attempt:
    """One try to write a step: `temporary` once it has begun, `place` once it counts."""

    level: str
    step: int
    temporary: str = ""
    place: str = ""


class Persisting:
    """Leads the writing of one generation: lives in the leader's process, above its own and the others' `Writing`."""

    def __init__(
        self, folder: NodeFolder, term: Term, peers: Peers, writing: Writing, log: Callable[[str], None]
    ) -> None:
        self.folder, self.term, self.peers, self.writing, self._log = folder, term, peers, writing, log
        self._path = folder.path / f"saved-{term.generation}.json"
        self._saved: dict[str, Flushed] = self._remembered()
        self._cadences = {
            level: Cadence(term.settings.every_of(level), self._durable(level, term.base)) for level in LEVELS
        }
        self.patience_s = _patience_s(term)
        self._running: dict[str, int] = {}  # step by level
        self._pinned: dict[str, int] = {}  # those of them whose slots must stay
        self._failed: dict[tuple[str, int], tuple[float, str]] = {}  # when and why
        self._failed_at = -TOLD_S
        self._stopped = threading.Event()

    def _remembered(self) -> dict[str, Flushed]:
        """Return what an earlier process of this generation has made durable."""
        try:
            return {level: Flushed(**values) for level, values in json.loads(self._path.read_bytes()).items()}
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    def _durable(self, level: str, base: Base) -> int:
        return self._saved[level].step if level in self._saved else base.durable.get(level, 0)

    def committed(self, step: int) -> None:
        """Begin to write a step to the levels for which it is due. Called under the lock of the term."""
        for level, cadence in self._cadences.items():
            if cadence.due(step, level in self._running):
                self._start(level, step)
            elif cadence.skipped:
                self._publish()

    def _start(self, level: str, step: int) -> None:
        self._running[level] = self._pinned[level] = step
        self._failed.pop((level, step), None)
        self._publish()
        threading.Thread(target=self._lead, args=(level, step), name=f"snapshot-lead-{level}", daemon=True).start()

    def _publish(self, **changes: Any) -> None:
        saved = {level: done.step for level, done in self._saved.items()}
        pins = tuple(sorted(set(self._pinned.values())))
        skipped = sum(cadence.skipped for cadence in self._cadences.values())
        self.term.publish(pins=pins, saved=saved, skipped=skipped, **changes)

    def _lead(self, level: str, step: int) -> None:
        """Write one step, from the first phase to the end."""
        try:
            for _ in range(ATTEMPTS):
                attempt = _Attempt(level, step)
                try:
                    ended = self._try(attempt)
                finally:
                    self._clear(attempt)
                if ended:
                    return
            self._give_up(level, step, f"a snapshot process ended {ATTEMPTS} times while it was written")
        finally:
            with self.term.changed:
                del self._running[level]
                self._publish()

    def _try(self, attempt: _Attempt) -> bool:
        """Write a step once and tell how it went; False if a node's process was replaced meanwhile: then try again."""
        began = time.monotonic()
        level, step = attempt.level, attempt.step
        try:
            num_bytes = self._two_phases(attempt)
        except CheckpointError as error:
            self._give_up(level, step, str(error))
        except Exception as error:  # a thread that dies silently would look like one that writes for ever
            self._give_up(level, step, f"{type(error).__name__}: {error}")
        else:
            if num_bytes is None:
                return False
            self._keep(level, Flushed(step, attempt.place, num_bytes, time.monotonic() - began), began)
        return True

    def _keep(self, level: str, done: Flushed, began: float) -> None:
        """Tell that a step is durable, before anything is cleared up, which may take long."""
        with self.term.changed:
            self._saved[level] = done
            self._pinned.pop(level, None)
            self._remember()
            if began - self._failed_at > TOLD_S:
                self._publish(problem="")
            else:
                self._publish()  # the problem is still news

    def _give_up(self, level: str, step: int, problem: str) -> None:
        """Tell that a step will not be waited for any more, and let its slots go. Whatever still writes it notices when
        they are filled anew; a step that becomes durable all the same counts.
        """
        with self.term.changed:
            if self._pinned.get(level) != step:
                return  # it is known already how it went
            del self._pinned[level]
            self._failed_at = time.monotonic()
            self._failed[level, step] = (self._failed_at, problem)
            self._log(f"step {step} could not be written to {level}: {problem}")
            self._publish(problem=f"step {step} could not be written to {level}: {problem}")

    @contextlib.contextmanager
    def _bounded(self, attempt: _Attempt, what: str) -> Iterator[None]:
        """Give a step up if a call into storage does not come back: the thread that waits for it cannot be ended."""
        why = f"{what} has not come to an end for {self.patience_s:.0f} s: the storage hangs"
        timer = threading.Timer(self.patience_s, self._give_up, (attempt.level, attempt.step, why))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _remember(self) -> None:
        """Note what is durable, for the next process of this node, which would else write it once more."""
        try:
            self.folder.replace(self._path, json.dumps({k: vars(v) for k, v in self._saved.items()}).encode())
        except OSError as error:  # memory is full: nobody shall wait for a note
            self._log(f"{self._path} could not be written: {error}")

    def _two_phases(self, attempt: _Attempt) -> int | None:
        """Write one step once; return its bytes, None if a node's process was replaced meanwhile."""
        generation, membership, persister = self.term.generation, self.term.membership, self.writing.persister
        level, step = attempt.level, attempt.step
        with self._bounded(attempt, "beginning"):
            if level == LOCAL:
                attempt.temporary = f"attempt-{time.monotonic_ns()}"  # every node names its own folder
            else:
                attempt.temporary = persister.begin(level, step, generation, membership)
            self._ask_all("persist_start", attempt)
        rows = self._wait(attempt)
        if rows is None:
            return None
        with self._bounded(attempt, "publishing"):
            if level == LOCAL:
                if not all(answer["known"] for answer in self._ask_all("persist_commit", attempt)):
                    return None
                attempt.place = self.term.settings.local_dir
            else:
                attempt.place = persister.commit(level, step, generation, attempt.temporary, rows, membership)
        return sum(int(row.get("num_bytes", 0)) for row in rows.values())

    def _ask_all(self, verb: str, attempt: _Attempt) -> list[dict[str, Any]]:
        return [self._patiently(node, verb, self._fields(attempt))[0] for node in self.peers.nodes]

    def _fields(self, attempt: _Attempt) -> dict[str, Any]:
        """Return what names an attempt, with its generation: a call into storage may come back in a later one."""
        named = {"level": attempt.level, "step": attempt.step, "temporary": attempt.temporary}
        return {**named, "generation": self.term.generation}

    def _patiently(self, node: str, verb: str, fields: dict[str, Any]) -> tuple[dict[str, Any], memoryview]:
        """Ask a node, again while it does not answer: its process may be in the middle of being replaced.

        Raises: CheckpointError naming the node, after twice the peer timeout
        """
        end = time.monotonic() + 2 * self.peers.timeout_s
        while True:
            try:
                return self.peers.ask(node, verb, fields)
            except CheckpointError:
                if time.monotonic() >= end or self._stopped.wait(RETRY_S):
                    raise

    def _wait(self, attempt: _Attempt) -> dict[str, dict[str, Any]] | None:
        """Return the rows of all nodes once each has written its part; None if one of them knows nothing of it.

        Raises: CheckpointError if a node has a problem, or comes no further
        """
        step, rows, now = attempt.step, {}, time.monotonic()
        waiting = dict.fromkeys(self.peers.nodes, (NOTHING, now))  # how far each was, and when that was news
        while waiting:
            for node, (moved, since) in list(waiting.items()):
                # One that is still writing answers late, so nothing is to be waited for here.
                answer, payload = self._patiently(node, "persist_poll", self._fields(attempt))
                now = time.monotonic()
                if not answer["known"]:
                    return None
                if answer["problem"]:
                    raise CheckpointError(answer["problem"])
                if answer["done"]:
                    rows[node] = json.loads(bytes(payload))
                    del waiting[node]
                elif answer["moved"] != moved:
                    waiting[node] = (answer["moved"], now)
                elif now - since > self.patience_s:
                    raise CheckpointError(
                        f"node {node} has written nothing more of it for {self.patience_s:.0f} s: the storage hangs "
                        "there, or writes less than the slowest that is waited for"
                    )
                if waiting and self._stopped.is_set():
                    raise CheckpointError(f"step {step} was given up: a new generation began")
        return rows

    def _clear(self, attempt: _Attempt) -> None:
        """Remove what is not needed any more; whoever waits for the step knows already how it went."""
        if not attempt.temporary:
            return
        for node in self.peers.nodes:
            try:
                self.peers.ask(node, "persist_forget", self._fields(attempt))
            except CheckpointError as error:
                self._log(f"node {node} keeps what it has written of step {attempt.step} for now: {error}")
        if attempt.level == LOCAL:
            return
        if attempt.place:
            self.writing.persister.retire(attempt.step, self.term.generation)
        else:
            self.writing.persister.abandon(attempt.level, attempt.temporary)

    def flush(self, deadline_s: float, at_least: int = NOTHING) -> Flushed:
        """Make the newest committed step, which shall be `at_least` this one, durable in storage, and wait for it.

        Any number of callers at once share the work.

        Blocks: host, at most `deadline_s`
        Raises: CheckpointError with the reason, or naming who is missing
        """
        asked = time.monotonic()
        end = asked + deadline_s
        self._hurry()
        if not self.term.settings.storage:
            raise CheckpointError("flush: the snapshot process was given no storage (a folder or checkpoint.url)")
        if at_least > NOTHING:
            self.term.wait_committed(at_least, deadline_s)
        with self.term.changed:
            wanted = step = self.term.decree.watermark
            if wanted <= NOTHING:
                raise CheckpointError(f"flush: no step of generation {self.term.generation} is committed yet")
            while True:
                done = self._saved.get(STORAGE)
                if done is not None and done.step >= wanted:
                    return done
                if (known := self.term.base.durable.get(STORAGE, NOTHING)) >= wanted:  # where this generation began
                    return Flushed(known, self.term.settings.storage, 0, 0.0)
                when, why = self._failed.get((STORAGE, step), (0.0, ""))
                if when > asked:
                    raise CheckpointError(why)
                if STORAGE not in self._running:
                    step = self.term.decree.watermark  # the one before may have been freed meanwhile
                    self._start(STORAGE, step)
                if not self.term.changed.wait(max(end - time.monotonic(), 0.0)) and time.monotonic() >= end:
                    silent = ", ".join(self.peers.silent()) or "the storage"
                    raise CheckpointError(
                        f"flush: step {step} was not durable within {deadline_s:g} s: waiting for {silent}"
                    )

    def _hurry(self) -> None:
        """Have all nodes write without a limit of bandwidth: whoever flushes waits for it."""

        def tell(node: str) -> None:
            with contextlib.suppress(CheckpointError):  # it writes later than it could
                self.peers.ask(node, "hurry", {})

        for node in self.peers.nodes:
            threading.Thread(target=tell, args=(node,), name="snapshot-hurry", daemon=True).start()

    def stop(self) -> None:
        """Give up what is under way, because a newer generation has begun."""
        self._stopped.set()


def _patience_s(term: Term) -> float:
    """Return how long storage that works may show no progress: no longer than a rank's whole file takes."""
    settings, rate = term.settings, float(SLOW_BYTES_PER_S)
    if settings.bandwidth_bytes_per_s:
        rate = min(rate, settings.bandwidth_bytes_per_s / len(LEVELS))
    largest = max(member.num_bytes for member in term.membership.members)
    return max(PATIENCE_S, 10 * settings.peer_timeout_s) + largest / rate
