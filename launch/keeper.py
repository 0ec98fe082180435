"""Keeps the snapshot process of a node alive, however often that fails, and says what happened, each thing once.

Must not know: threads, who listens.
"""

from __future__ import annotations

import time

from windlass.checkpoint.memory.supervise import Supervisor
from windlass.dist.errors import CheckpointError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class Keeper:
    """Looks after one process. What stands in the way (no memory, no process number) may pass, so it tries on."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._pause_s = FIRST_PAUSE_S
        self._not_before = 0.0
        self._failing = False

    def look(self) -> str:
        """Replace the process if it died or hangs; return what people should hear, mostly nothing.

        Blocks: host, only when there is something to replace
        """
        began = time.monotonic()
        if began < self._not_before:
            return ""
        node = self._supervisor.folder.node
        try:
            replaced = self._supervisor.check()
        except CheckpointError as error:
            said, self._failing = self._failing, True
            self._not_before = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return "" if said else f"snapshot process of {node} cannot be replaced, which is tried on: {error}"
        self._failing, self._pause_s = False, FIRST_PAUSE_S
        return f"snapshot process of {node} replaced in {time.monotonic() - began:.2f} s" if replaced else ""
