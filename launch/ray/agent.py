"""The actor that looks after one node of a job: its snapshot process, its fencing, its remains.

It keeps the snapshot process running, kills workers of older generations when told of a newer one, and ends itself
and the workers when nobody has spoken to it for `lease_s`, or when Ray's own process of the node is gone. Snapshots
outlive all of that. Must not know: other nodes, when workers are started again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import ray

from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.heartbeat import process_started
from windlass.dist import env
from windlass.dist.errors import CheckpointError
from windlass.launch.ray import records

if TYPE_CHECKING:
    from windlass.launch.node_memory import NodeMemory

KILL_S = 5.0
LOOK_S = 0.25


@dataclass(frozen=True)
class Site:
    """What an agent needs to know. `snapshots`: the job has snapshot processes; `local_dir`: its level on drives."""

    folder: NodeFolder
    token: str
    snapshots: bool
    local_dir: str = ""
    lease_s: float = 30.0


class NodeAgent:
    """Looks after `site.folder`. Its methods may run at the same time."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._folder = site.folder
        self._raylet = os.getppid()
        records.end([r for r in records.recorded(self._folder) if r.path.stem == "agent"], KILL_S)  # it may hang
        self._memory = _memory(site)  # forgets a run whose folder was begun anew, which its token tells
        self._folder.create(site.token)
        self._struck = False
        self._busy = threading.Lock()
        self._heard = time.monotonic()
        records.record(self._folder, "agent", os.getpid())
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    def _watch(self) -> None:
        while not self._struck:
            if self._memory is None:  # else the lease tells whether the snapshot process lives
                with contextlib.suppress(OSError):
                    self._folder.touch_lease()
            alone = os.getppid() != self._raylet or time.monotonic() - self._heard > self._site.lease_s
            if alone and not self._struck:
                records.end([r for r in records.recorded(self._folder) if r.pid != os.getpid()], KILL_S)
                self._leave()
            time.sleep(LOOK_S)

    def _leave(self) -> None:
        if self._memory is None:
            self._folder.remove()  # nobody else would; with snapshots it is theirs, until their own lease ends
        os._exit(0)  # from a thread; Ray does not start this actor again

    def beat(self) -> None:
        """Say that somebody still needs this node."""
        self._heard = time.monotonic()

    def news(self) -> list[str]:
        """Return what people should hear."""
        self.beat()
        return [] if self._memory is None else self._memory.tend()

    def domain(self) -> str:
        """Return the failure domain that the environment of this node names; empty if it names none."""
        return env.get("WINDLASS_DOMAIN")

    def fence(self, generation: int, anew: bool = False) -> None:
        """Let nothing of an older generation change anything here, and have a snapshot process.

        `anew`: nothing here has answered, so the actors of workers go too.

        Blocks:      host, some seconds
        Raises:      CheckpointError naming the node and what is left
        """
        self.beat()
        with self._busy:
            self._folder.create(self._site.token)
            self._folder.raise_generation(generation)
            older = records.recorded(self._folder) if anew else records.workers(self._folder, older_than=generation)
            if left := records.end(older, KILL_S):
                raise CheckpointError(f"{self._folder.node}: processes {left} of before cannot be killed")
            if self._memory is not None:
                self._memory.fence(generation)
        self.beat()

    def flush(self, deadline_s: float) -> int | None:
        """Make the newest step that all nodes have durable, and return it."""
        self.beat()
        return None if self._memory is None else self._memory.flush(deadline_s)

    def release(self, ok: bool, generation: int) -> None:
        """End what is left of the job on this node; without `ok` snapshots stay for their lease.

        Invariant:   nothing of a newer generation is touched: the node is another controller's then
        """
        self.beat()
        with self._busy:
            if self._folder.read_generation() > generation:
                return
            records.end(records.workers(self._folder, older_than=generation + 1), KILL_S)
            if self._memory is None:
                self._folder.remove()
            else:
                self._memory.release(ok)

    def strike(self, kind: str) -> bool:
        """Break this node on purpose: agent, smp, node, reboot (folders stay) or zombie (only Ray loses it).

        Return False if there was nothing to break. All but smp end this actor: nobody gets an answer.
        """
        if kind == "smp":
            return self._memory is not None and self._memory.kill() != 0
        self._struck = True  # from here on nobody looks after anything
        try:
            if kind in ("node", "reboot"):
                self._lose_power(folders=kind == "node")
        finally:
            if kind != "agent":
                os.kill(self._raylet, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def _lose_power(self, *, folders: bool) -> None:
        """Kill everything here at once but Ray's process, with the folders if they are lost too.

        That process is stopped first, so that it can tell nobody. It ends last: Ray ends this actor without it.
        """
        if self._memory is not None:
            self._memory.leave()
        os.kill(self._raylet, signal.SIGSTOP)
        children = [child.pid for child in psutil.Process(self._raylet).children(recursive=True)]
        pids.kill([(pid, process_started(pid) or 0) for pid in children if pid != os.getpid()], KILL_S)
        records.end([r for r in records.recorded(self._folder) if r.pid != os.getpid()], KILL_S)
        if self._memory is not None:
            self._memory.kill()
        if folders and self._memory is not None:
            self._memory.lose(Path(self._site.local_dir) if self._site.local_dir else None)
        elif folders:
            self._folder.remove()


def _memory(site: Site) -> NodeMemory | None:
    if not site.snapshots:
        return None
    from windlass.launch.node_memory import NodeMemory

    return NodeMemory(site.folder, site.token, ray.util.get_node_ip_address())
