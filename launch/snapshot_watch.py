"""Asks the snapshot process of a node what the levels hold and, where no launcher of ours does, keeps it alive.

Must not know: when snapshots are taken, who is told.
"""

from __future__ import annotations

import threading

from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.supervise import Supervisor
from windlass.dist.errors import CheckpointError
from windlass.launch.keeper import Keeper

LOOK_S = 1.0


class SnapshotWatch:
    """A thread of the first rank of a node. `levels`: the newest step of each; `problems`: what people should hear."""

    def __init__(self, folder: NodeFolder, client: SnapshotClient, *, supervise: bool, first: bool) -> None:
        self.levels: dict[str, float] = {}
        self.problems: list[str] = []
        self._told = ""
        self._client = client
        self._keeper = Keeper(Supervisor(folder)) if supervise and first else None
        self._first = first
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshot watch", daemon=True)

    def start(self) -> None:
        """Begin, on the first rank of a node."""
        if self._first:
            self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        """Ask once. Blocks: host, until the answer comes."""
        if self._keeper is not None and (news := self._keeper.look()):
            self.problems.append(news)
        try:
            status = self._client.status()
        except CheckpointError:
            return  # a process that is down is started again by whoever supervises it
        self.levels = {level: float(step) for level, step in status.newest.items() if step >= 0}
        if status.last_error and status.last_error != self._told:
            self._told = status.last_error
            self.problems.append(status.last_error)

    def stop(self) -> None:
        """End. Blocks: host, for a question under way."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
