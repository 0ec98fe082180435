"""This node's part in making a step durable: its data is written by a thread, the leader asks how far it is.

Must not know: which steps are due, the other nodes, how files look (persist.py).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.inventory import LOCAL, STORAGE
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.segment import Slot
from windlass.checkpoint.memory.slots import NodeSlots
from windlass.checkpoint.memory.stripes import DATA, PARITY
from windlass.dist.errors import CheckpointError

LEVELS = (STORAGE, LOCAL)
_NAME = re.compile(r"\.?\w[\w.-]*")  # of a folder inside the target
ANSWER_S = 0.05  # how long a leader that asks waits for the end; it asks nodes in turn, and hears as late of a problem


class Persister(Protocol):
    """Writes the slots of a node to a level, in two phases (windlass.checkpoint.persist has it)."""

    def begin(self, level: str, step: int, generation: int, membership: Membership) -> str: ...

    def prepare(
        self,
        level: str,
        step: int,
        generation: int,
        temporary: str,
        membership: Membership,
        data: dict[int, Slot],
        parity: dict[int, Slot],
    ) -> dict[str, Any]: ...

    def commit(
        self,
        level: str,
        step: int,
        generation: int,
        temporary: str,
        rows: dict[str, dict[str, Any]],
        membership: Membership,
    ) -> str: ...

    def abandon(self, level: str, temporary: str) -> None: ...

    def newest(self, level: str) -> int | None: ...

    def hurry(self) -> None: ...

    def sweep(self, generation: int) -> None: ...

    def fence(self, generation: int) -> None: ...


@dataclass
class _Task:
    asked: str
    temporary: str  # what is removed if nothing comes of it: "" where that is not this node's, or does not exist yet
    ended: threading.Event = field(default_factory=threading.Event)
    rows: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class Writing:
    """What this node writes in one generation, at most one step of each level at a time. Any thread."""

    def __init__(
        self,
        membership: Membership,
        node: str,
        slots: NodeSlots,
        persister: Persister,
        log: Callable[[str], None],
    ) -> None:
        self.membership, self.node, self.persister = membership, node, persister
        self._slots, self._log = slots, log
        self._tasks: dict[tuple[str, int], _Task] = {}
        self._lock = threading.Lock()

    def start(self, level: str, step: int, temporary: str) -> dict[str, Any]:
        """Begin to write a step. A request that came twice changes nothing: `temporary` names the attempt.

        Blocks: no
        Raises: CheckpointError while an attempt that was given up is still being written, or if this is no request
        """
        if level not in LEVELS or not _NAME.fullmatch(temporary):  # it will be written to, and perhaps removed
            raise CheckpointError(f"node {self.node}: nothing is written to level {level!r}, folder {temporary!r}")
        with self._lock:
            known = self._tasks.get((level, step))
            if known is not None and known.asked == temporary:
                return {}
            if known is not None and not known.ended.is_set():
                raise CheckpointError(
                    f"node {self.node} is still writing step {step}, for an attempt that was given up"
                )
            task = _Task(temporary, "" if level == LOCAL else temporary)
            threading.Thread(
                target=self._write, args=(level, step, task), name=f"snapshot-{level}", daemon=True
            ).start()
            self._tasks[level, step] = task
            return {}

    def _write(self, level: str, step: int, task: _Task) -> None:
        generation = self.membership.generation
        try:
            with self._slots.pinned(generation, step):
                data, parity = self._of(step, DATA), self._of(step, PARITY)
                missing = [m.rank for m in self.membership.by_node[self.node] if m.rank not in data]
                if missing:
                    raise CheckpointError(f"ranks {missing} of node {self.node} hold no protected step {step}")
                if level == LOCAL:
                    task.temporary = self.persister.begin(level, step, generation, self.membership)
                task.rows = self.persister.prepare(
                    level, step, generation, task.temporary, self.membership, data, parity
                )
        except (CheckpointError, OSError) as error:
            task.problem = f"node {self.node}: {error}"
        except Exception as error:
            task.problem = f"node {self.node}: {type(error).__name__}: {error}"
            self._log(f"writing step {step} to {level} failed: {task.problem}")
        finally:
            task.ended.set()

    def _of(self, step: int, role: str) -> dict[int, Slot]:
        at = (self.membership.generation, step)
        return {
            h.rank: slot
            for slot, h in self._slots.held(role)
            if (h.generation, h.step) == at and h.state >= State.ENCODED
        }

    def poll(self, level: str, step: int) -> tuple[dict[str, Any], bytes | None]:
        """Say how far a step is, as soon as it has ended: `done` with `rows`, or a `problem`; not `known` to a process
        that was started since.

        Blocks: host, at most ANSWER_S
        """
        task = self._tasks.get((level, step))
        if task is None:
            return {"known": False}, None
        done = task.ended.wait(ANSWER_S)
        rows = json.dumps(task.rows).encode() if done else None  # as payload: a row may be of megabytes
        return {"known": True, "done": done, "problem": task.problem if done else ""}, rows

    def commit_local(self, step: int) -> dict[str, Any]:
        """Make what this node has written to its drives count."""
        generation = self.membership.generation
        with self._lock:
            task = self._tasks.get((LOCAL, step))
            if task is None or not task.ended.is_set() or task.problem:
                raise CheckpointError(f"node {self.node} has not written step {step} to its drives")
            if task.temporary:
                place = self.persister.commit(
                    LOCAL, step, generation, task.temporary, {self.node: task.rows}, self.membership
                )
                self._log(f"step {step} is in {place}")
                task.temporary = ""
        return {}

    def forget(self, level: str, step: int) -> dict[str, Any]:
        """Drop what is known of a step that is done or given up; local files that do not count yet go with it."""
        with self._lock:
            task = self._tasks.get((level, step))
            if task is None or not task.ended.is_set():
                return {}
            del self._tasks[level, step]
        if level == LOCAL and task.temporary:
            self.persister.abandon(level, task.temporary)
        return {}
