"""Which committed steps become durable, and how all nodes are brought to write one: two phases, led by one process.

A step that is due while an earlier one is still being written is left out and counted: training and snapshots never
wait for storage. Must not know: files, sockets (nodes are asked by name), segments.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.inventory import LOCAL, STORAGE
from windlass.checkpoint.memory.peers import Peers
from windlass.checkpoint.memory.term import Term
from windlass.checkpoint.memory.votes import NOTHING
from windlass.checkpoint.memory.writing import LEVELS, Writing
from windlass.dist.errors import CheckpointError

RETRY_S = 0.2
ATTEMPTS = 3
TOLD_S = 10.0  # whoever asks now and then has seen a problem by then
LONGEST_S = 24 * 3600.0  # for one checkpoint; a node that does not answer is noticed after the peer timeout


class Cadence:
    """Says when a level is due: at the first committed step at or after each multiple of `every`."""

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


@dataclass(frozen=True)
class Saved:
    """A step that is durable. Units: bytes, seconds."""

    step: int
    place: str
    num_bytes: int
    seconds: float


class Persisting:
    """Leads the writing of one generation: lives in the leader's process, above its own and the others' `Writing`."""

    def __init__(
        self, folder: NodeFolder, term: Term, peers: Peers, writing: Writing, log: Callable[[str], None]
    ) -> None:
        self.folder, self.term, self.peers, self.writing, self._log = folder, term, peers, writing, log
        self._path = folder.path / f"saved-{term.generation}.json"
        self._saved: dict[str, Saved] = self._remembered()
        self._cadences = {
            level: Cadence(term.settings.every_of(level), self._step_of(level, term.base)) for level in LEVELS
        }
        self._running: dict[str, int] = {}  # step by level
        self._failed: dict[tuple[str, int], tuple[float, str]] = {}  # when and why
        self._failed_at = -TOLD_S
        self._stopped = threading.Event()

    def _remembered(self) -> dict[str, Saved]:
        """Return what an earlier process of this generation has made durable."""
        try:
            return {level: Saved(**values) for level, values in json.loads(self._path.read_bytes()).items()}
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    def _step_of(self, level: str, otherwise: int = NOTHING) -> int:
        return self._saved[level].step if level in self._saved else otherwise

    def committed(self, step: int) -> None:
        """Begin to write a step to the levels for which it is due. Called under the lock of the term."""
        for level, cadence in self._cadences.items():
            if cadence.due(step, level in self._running):
                self._start(level, step)
            elif cadence.skipped:
                self._publish()

    def _start(self, level: str, step: int) -> None:
        self._running[level] = step
        self._failed.pop((level, step), None)
        self._publish()
        threading.Thread(target=self._lead, args=(level, step), name=f"snapshot-lead-{level}", daemon=True).start()

    def _publish(self, **changes: Any) -> None:
        saved = {level: done.step for level, done in self._saved.items()}
        pins = tuple(sorted(set(self._running.values())))
        skipped = sum(cadence.skipped for cadence in self._cadences.values())
        self.term.publish(pins=pins, saved=saved, skipped=skipped, **changes)

    def _lead(self, level: str, step: int) -> None:
        """Write one step, from the first phase to the end."""
        began = time.monotonic()
        problem = f"a snapshot process ended {ATTEMPTS} times while it was written"
        done: Saved | None = None
        try:
            for _ in range(ATTEMPTS):
                if (written := self._two_phases(level, step)) is not None:
                    done = Saved(step, *written, time.monotonic() - began)
                    break
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:  # a thread that dies silently would look like one that writes for ever
            problem = f"{type(error).__name__}: {error}"
        with self.term.changed:
            del self._running[level]
            if done is not None:
                self._saved[level] = done
                self._remember()
                if began - self._failed_at > TOLD_S:
                    self._publish(problem="")
                else:
                    self._publish()  # the problem is still news
            else:
                self._failed_at = time.monotonic()
                self._failed[level, step] = (self._failed_at, problem)
                self._log(f"step {step} could not be written to {level}: {problem}")
                self._publish(problem=f"step {step} could not be written to {level}: {problem}")

    def _remember(self) -> None:
        """Note what is durable, for the next process of this node, which would else write it once more."""
        try:
            self.folder.replace(self._path, json.dumps({k: vars(v) for k, v in self._saved.items()}).encode())
        except OSError as error:  # memory is full: nobody shall wait for a note
            self._log(f"{self._path} could not be written: {error}")

    def _two_phases(self, level: str, step: int) -> tuple[str, int] | None:
        """Write one step once; return where it is and its bytes, None if a node's process was replaced meanwhile."""
        generation, membership = self.term.generation, self.term.membership
        persister = self.writing.persister
        if level == LOCAL:
            temporary = f"attempt-{time.monotonic_ns()}"  # every node names its own folder
        else:
            temporary = persister.begin(level, step, generation, membership)
        fields = {"level": level, "step": step, "temporary": temporary}
        committed = False
        try:
            for node in self.peers.nodes:
                self._patiently(node, "persist_start", fields)
            rows = self._wait(fields)
            if rows is None:
                return None
            if level == LOCAL:
                for node in self.peers.nodes:
                    self._patiently(node, "persist_commit", fields)
                place = self.term.settings.local_dir
            else:
                place = persister.commit(level, step, generation, temporary, rows, membership)
            committed = True
        finally:
            self._forget(fields)
            if not committed and level != LOCAL:
                persister.abandon(level, temporary)
        return place, sum(int(row.get("num_bytes", 0)) for row in rows.values())

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

    def _wait(self, fields: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
        """Return the rows of all nodes once each has written its part; None if one of them knows nothing of it."""
        step, rows, waiting = fields["step"], {}, list(self.peers.nodes)
        end = time.monotonic() + LONGEST_S
        while waiting:
            for node in list(waiting):  # one that is still writing answers late, so nothing is to be waited for here
                answer, payload = self._patiently(node, "persist_poll", fields)
                if not answer["known"]:
                    return None
                if answer["problem"]:
                    raise CheckpointError(answer["problem"])
                if answer["done"]:
                    rows[node] = json.loads(bytes(payload))
                    waiting.remove(node)
                if waiting and self._stopped.is_set():
                    raise CheckpointError(f"step {step} was given up: a new generation began")
            if time.monotonic() > end:
                raise CheckpointError(f"step {step} was not written within {LONGEST_S:g} s: waiting for {waiting}")
        return rows

    def _forget(self, fields: dict[str, Any]) -> None:
        for node in self.peers.nodes:
            try:
                self.peers.ask(node, "persist_forget", fields)
            except CheckpointError as error:
                self._log(f"node {node} keeps what it has written of step {fields['step']} for now: {error}")

    def flush(self, deadline_s: float, at_least: int = NOTHING) -> Saved:
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
