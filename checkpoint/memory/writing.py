"""This node's part in making a step durable: its data is written by a thread, the leader asks how far it is.

Must not know: which steps are due, the other nodes, how files look (persist.py).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
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
        come_further: Callable[[], None],
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

    def retire(self, step: int, generation: int) -> None: ...

    def hurry(self) -> None: ...

    def sweep(self, generation: int) -> None: ...

    def fence(self, generation: int) -> None: ...


@dataclass
class _Task:
    step: int
    asked: str
    temporary: str  # what is removed if nothing comes of it: "" where that is not this node's, or does not exist yet
    moved: int = 0  # grows whenever it has come further
    given_up: bool = False
    pin: ExitStack = field(default_factory=ExitStack)  # keeps the slots of the step
    settling: threading.Lock = field(default_factory=threading.Lock)  # while it is decided what becomes of its folder
    ended: threading.Event = field(default_factory=threading.Event)
    rows: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    def come_further(self) -> None:
        if self.given_up:
            raise CheckpointError(f"step {self.step} was given up while it was written")
        self.moved += 1

    def give_up(self) -> None:
        self.given_up = True
        self.pin.close()


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
        self._tasks: dict[str, _Task] = {}  # by level, the newest
        self._lock = threading.Lock()

    def start(self, level: str, step: int, temporary: str) -> dict[str, Any]:
        """Begin to write a step. A request that came twice changes nothing: `temporary` names the attempt.

        Blocks: no
        Raises: CheckpointError while an earlier attempt, which is given up, is still being written, or if this is no
                request
        """
        if level not in LEVELS or not _NAME.fullmatch(temporary):  # it will be written to, and perhaps removed
            raise CheckpointError(f"node {self.node}: nothing is written to level {level!r}, folder {temporary!r}")
        with self._lock:
            known = self._tasks.get(level)
            if known is not None and (known.step, known.asked) == (step, temporary):
                return {}
            if known is not None and not known.ended.is_set():  # what is begun now would remove its files
                known.give_up()  # who led it may have been killed, and its successor asks for another attempt
                raise CheckpointError(
                    f"node {self.node} is still writing step {known.step}, for an attempt that is given up"
                )
            task = self._tasks[level] = _Task(step, temporary, "" if level == LOCAL else temporary)
            task.pin.enter_context(self._slots.pinned(self.membership.generation, step))
            threading.Thread(target=self._write, args=(level, task), name=f"snapshot-{level}", daemon=True).start()
            return {}

    def _write(self, level: str, task: _Task) -> None:
        generation, step = self.membership.generation, task.step
        try:
            data, parity = self._of(step, DATA), self._of(step, PARITY)
            missing = [m.rank for m in self.membership.by_node[self.node] if m.rank not in data]
            if missing:
                raise CheckpointError(f"ranks {missing} of node {self.node} hold no protected step {step}")
            if level == LOCAL:
                task.temporary = self.persister.begin(level, step, generation, self.membership)
            task.rows = self.persister.prepare(
                level, step, generation, task.temporary, self.membership, data, parity, task.come_further
            )
        except (CheckpointError, OSError) as error:
            task.problem = f"node {self.node}: {error}"
        except Exception as error:
            task.problem = f"node {self.node}: {type(error).__name__}: {error}"
            self._log(f"writing step {step} to {level} failed: {task.problem}")
        finally:
            self._unpin(task)
            task.ended.set()

    def _unpin(self, task: _Task) -> None:
        with self._lock:
            task.pin.close()

    def _of(self, step: int, role: str) -> dict[int, Slot]:
        at = (self.membership.generation, step)
        return {
            h.rank: slot
            for slot, h in self._slots.held(role)
            if (h.generation, h.step) == at and h.state >= State.ENCODED
        }

    def _task(self, level: str, step: int) -> _Task | None:
        task = self._tasks.get(level)
        return task if task is not None and task.step == step else None

    def poll(self, level: str, step: int) -> tuple[dict[str, Any], bytes | None]:
        """Say how far a step is, as soon as it has ended: `done` with `rows`, or a `problem`; not `known` to a process
        that was started since. `moved` grows as long as it comes further.

        Blocks: host, at most ANSWER_S
        """
        task = self._task(level, step)
        if task is None:
            return {"known": False}, None
        done = task.ended.wait(ANSWER_S)
        rows = json.dumps(task.rows).encode() if done else None  # as payload: a row may be of megabytes
        return {"known": True, "done": done, "moved": task.moved, "problem": task.problem if done else ""}, rows

    def commit_local(self, step: int) -> dict[str, Any]:
        """Make what this node has written to its drives count; not `known` to a process that was started since."""
        generation, task = self.membership.generation, self._task(LOCAL, step)
        if task is None:
            return {"known": False}
        if not task.ended.is_set() or task.problem:
            raise CheckpointError(f"node {self.node} has not written step {step} to its drives")
        with task.settling:
            if task.temporary:
                rows = {self.node: task.rows}
                place = self.persister.commit(LOCAL, step, generation, task.temporary, rows, self.membership)
                self._log(f"step {step} is in {place}")
                task.temporary = ""
        return {"known": True}

    def forget(self, level: str, step: int) -> dict[str, Any]:
        """Drop what is known of a step that is done or given up; local files that do not count yet go with it.

        What is being written keeps no slot any more and stops with its next part; where that is filled anew before, it
        notices.
        """
        with self._lock:
            task = self._task(level, step)
            if task is None:
                return {}
            task.give_up()
            if not task.ended.is_set():
                return {}
            del self._tasks[level]
        with task.settling:
            if level == LOCAL and task.temporary:
                self.persister.abandon(level, task.temporary)
                task.temporary = ""
        return {}

    def stop(self) -> None:
        """Give up what is under way, because a newer generation has begun: its leader waits for none of it."""
        with self._lock:
            for task in self._tasks.values():
                task.give_up()
