"""What the snapshot process of a node is made of: its folder and slots, its server, the generation it serves.

All that it knows is in its folder, so one that is started in its place goes on. It ends when asked to, when its folder
is gone, and when nobody has needed it for a lease. Must not know: torch (it stays small), who started it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from windlass.checkpoint.local_level import remove_local_level
from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.drive import Drive
from windlass.checkpoint.memory.duty import Duty
from windlass.checkpoint.memory.folder import KEEP_S, NodeFolder, SnapshotProcess
from windlass.checkpoint.memory.garbage import collect_garbage
from windlass.checkpoint.memory.hashing import Hasher
from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.heartbeat import is_alive, process_started, read_heartbeat
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.protect import check_headers, check_room
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.slots import NodeSlots
from windlass.checkpoint.memory.status import status_of
from windlass.checkpoint.memory.verbs import OPEN, Verbs
from windlass.checkpoint.memory.wire import Server
from windlass.checkpoint.persist import Persister
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError

TOUCH_S = 2.0  # between signs of life
BUSY_S, IDLE_S = 0.002, 0.02  # between looks at slots
ANSWER_S = 0.1  # for the answer to the request to end
LANES = 8  # nodes told at once
KEPT_S = 5 * KEEP_S  # a launcher that was silent for so long looks after nothing
RETRY_S = 0.5
REFRESH_S = 0.1  # between looks for segments
DYING_S = 2.0  # the threads of a killed process are gone by then, and with them its port
MAX_CONNECTIONS = 1024


def log(line: str) -> None:
    """Write a line to standard error, which is the log in the folder once this process is detached."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # it lies in memory, which may be full
        os.write(2, f"{stamp} {line}\n".encode())


class Service:
    """All of one node's process: its folder, its slots, its server, and the generation it serves."""

    def __init__(self, path: Path, host: str, port: int) -> None:
        self.folder = NodeFolder.at(path)
        self._inode = path.stat().st_ino
        self.settings = Settings.read_from(self.folder)
        self.slots = NodeSlots(self.folder, log)
        self.drive = Drive(self.folder, self.settings.local_dir)
        self._drives = threading.Lock()
        self.duty: Duty | None = None
        self._hasher = Hasher()
        self._verbs = Verbs(self)
        self._adopting = threading.Lock()
        self._ending = threading.Event()
        self._remove = self._complete = False
        self._seen = time.monotonic()
        self._touched = 0.0

        def serve(at: int) -> Server:
            return Server(
                host,
                at,
                self.folder.job,
                self.folder.read_token,
                self._verbs.handle,
                fenced=self._fenced,
                open_verbs=OPEN,
                max_connections=MAX_CONNECTIONS,
                log=log,
            )

        end = time.monotonic() + DYING_S
        while True:
            try:
                self._server = serve(port)
                break
            except CheckpointError as error:
                if not port:
                    raise
                if time.monotonic() >= end:
                    log(f"{error}: taking another port")
                    port = 0
                time.sleep(BUSY_S)
        started = process_started(os.getpid()) or 0
        self.served = SnapshotProcess(os.getpid(), started, self._server.host, self._server.port)

    # -- generations -------------------------------------------------------------------------------------------------

    def _fenced(self, generation: int) -> str | None:
        own = self.folder.read_generation()
        if own == 0:
            return (
                f"node {self.folder.node} knows no generation yet: it must be told by a launcher or trainer of its own"
            )
        if generation < own:
            return f"generation {generation} is over: node {self.folder.node} is at {own}"
        return None

    def on_duty(self, generation: int | None = None) -> Duty:
        """Return what serves the present generation.

        Raises: CheckpointError if there is none, or not the one that is meant
        """
        duty = self.duty
        if duty is None or duty.over or generation not in (None, duty.term.generation):
            what = "any generation" if generation is None else f"generation {generation}"
            raise CheckpointError(f"node {self.folder.node} has not been told the members of {what} yet")
        return duty

    def adopt(
        self,
        membership: Membership,
        settings: Settings,
        restored: tuple[int, int] | None,
        anchor: tuple[int, int] | None,
        base: Base,
    ) -> None:
        """Begin to serve a generation, all of whose ranks have been restored. Once more: nothing happens.

        Raises: CheckpointError if it is over, was begun with other members, or there is no memory for its parity
        """
        generation = membership.generation
        with self._adopting:
            self._seen = time.monotonic()
            if membership.job != self.folder.job or self.folder.node not in membership.nodes:
                raise CheckpointError(
                    f"node {self.folder.node} of job {self.folder.job} is no member of generation {generation} of job "
                    f"{membership.job}, whose nodes are {', '.join(membership.nodes)}"
                )
            if self.folder.raise_generation(generation) > generation:
                raise CheckpointError(f"generation {generation} is over: it cannot begin on node {self.folder.node}")
            if self.duty is not None and self.duty.term.generation == generation:
                if self.duty.term.membership != membership:
                    raise CheckpointError(f"node {self.folder.node}: generation {generation} began with other members")
                return
            check_headers(membership)
            self.slots.expect(membership)
            self.slots.refresh()
            check_room(self.folder, self.slots, membership)
            if self.duty is not None:
                self.duty.stop()
            settings.keep_in(self.folder)
            self.settings = settings
            self.slots.begin(generation, restored, anchor)
            self.folder.replace(self.folder.path / f"base-{generation}.json", json.dumps(base.dump()).encode())
            # Last: a successor that finds it takes everything above for done.
            self.folder.replace(self.folder.membership_path(generation), membership.dump().encode())
            self._serve(membership, base)

    def look_at_drive(self, local_dir: str | None = None) -> Drive:
        """Return this node's drive, as the settings in its folder name it now or as given.

        Whoever starts nodes begins this process before the first trainer of a node leaves its settings there.
        """
        local_dir = Settings.read_from(self.folder).local_dir if local_dir is None else local_dir
        with self._drives:
            if local_dir != self.drive.local_dir:
                self.drive = Drive(self.folder, local_dir)
            return self.drive

    def _serve(self, membership: Membership, base: Base) -> None:
        self.look_at_drive(self.settings.local_dir)
        persister = Persister(self.folder, self.folder.node, self.settings, log)
        own = self._verbs.handle
        duty = Duty(self.folder, self.slots, membership, self.settings, base, persister, own, log)
        self.duty = duty.start()
        if duty.peers.moved(self.served):
            threading.Thread(target=self._announce, args=(self.duty,), name="snapshot-moved", daemon=True).start()
        threading.Thread(target=self._mark_storage, args=(self.duty, persister), daemon=True).start()

    def _mark_storage(self, duty: Duty, persister: Any) -> None:
        """Leave word of the new generation where checkpoints go: zombies of older ones may still write there."""
        try:
            if duty.persisting is not None:
                persister.fence(duty.term.generation)
            persister.sweep(duty.term.generation)
        except CheckpointError as error:
            log(str(error))

    def _announce(self, duty: Duty) -> None:
        """Tell each of the other nodes where this one listens now: they keep it for those that come after them."""
        waiting = [node for node in duty.peers.nodes if node != self.folder.node]

        def tell(node: str) -> None:
            with contextlib.suppress(CheckpointError):  # it is being replaced, or moved as well: asked again
                duty.peers.tell_moves(node)
                waiting.remove(node)

        with ThreadPoolExecutor(LANES, "snapshot-moved") as pool:  # several at once: one may not be there
            while waiting and not duty.over:
                list(pool.map(tell, list(waiting)))
                self._ending.wait(RETRY_S if waiting else 0.0)

    def _resume(self) -> None:
        """Go on where a predecessor ended."""
        self.slots.refresh()
        generation = self.folder.read_generation()
        path = self.folder.membership_path(generation)
        if path.exists():
            membership = Membership.parse(path.read_bytes(), str(path))
            base = Base.parse(json.loads((self.folder.path / f"base-{generation}.json").read_bytes()))
            self._serve(membership, base)
            log(f"generation {generation} goes on at {self.served.host}:{self.served.port}")

    # -- hashing -----------------------------------------------------------------------------------------------------

    def _hash(self) -> None:
        """Follow the slots that trainers fill. This is all that must keep pace with training."""
        refreshed, busy_until = 0.0, 0.0
        while not self._ending.is_set():
            now = time.monotonic()
            if now - refreshed > REFRESH_S:
                self.slots.refresh()
                self._hasher.forget({slot for shelf in self.slots.shelves() for slot in shelf.segment.slots})
                refreshed = now
            worked = False
            for slot, header in list(self.slots.held()):
                if header.state in (State.FILLING, State.COPIED):
                    busy_until = now + 1.0
                    if self._hasher.work(slot, header):
                        worked = True
                        fault("smp.checksum", rank=header.rank, step=header.step, generation=header.generation)
                        duty = self.duty
                        if header.state == State.COPIED and duty is not None:
                            duty.filled.set()
                            duty.stirred.set()
            if not worked:
                self._ending.wait(BUSY_S if now < busy_until else IDLE_S)

    def _hash_for_ever(self) -> None:
        while not self._ending.is_set():
            try:
                self._hash()
            except Exception as error:  # a slot that went away under our hands, memory that ran out: look again
                log(f"hashing: {type(error).__name__}: {error}")
                self._ending.wait(REFRESH_S)

    # -- life --------------------------------------------------------------------------------------------------------

    def seen(self) -> None:
        """Take note that somebody needs this process."""
        self._seen = time.monotonic()

    def stop(self, *, remove: bool = False) -> None:
        """End soon; `remove` the folder too, and what is on the local drive: the run is complete."""
        self._remove = self._complete = remove
        self._ending.set()

    def run(self) -> None:
        """Serve until the end."""
        signal.signal(signal.SIGTERM, self._asked_to_end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # as trainers do: into the log
        self._resume()
        self._server.start()
        self.folder.touch_lease()
        self.folder.write_smp(self.served)
        threading.Thread(target=self._hash_for_ever, name="snapshot-hash", daemon=True).start()
        # Beside the rest: freeing much memory takes seconds, and a process that is silent that long counts as hanging.
        threading.Thread(target=self._collect_garbage, name="snapshot-garbage", daemon=True).start()
        while not self._ending.wait(TOUCH_S / 4):
            if not self._is_mine():
                log("the folder is gone: so is the node, as far as the job is concerned")
                return
            if time.monotonic() - self._touched > TOUCH_S:
                self._touch()
            if time.monotonic() - self._seen > self.settings.lease_s:
                log(f"nobody has needed this node's snapshots for {self.settings.lease_s:g} s: removing them")
                self._remove = True
                break
        if self.duty is not None:
            self.duty.stop()
        time.sleep(ANSWER_S)
        self._server.close(timeout_s=1.0)
        if self._remove and self._is_mine():
            if self._complete:  # steps on drives have no lease
                with contextlib.suppress(OSError, CheckpointError):  # what stays is ignored by another run
                    remove_local_level(self.folder)
            self.folder.remove()

    def _collect_garbage(self) -> None:
        """Remove what dead jobs have left on this machine, each after its own lease."""
        for folder, error in collect_garbage(self.folder.base, spared=self.folder):
            what = "its lease is over and nobody is left: removed" if error is None else str(error)
            log(f"job {folder.job}, {folder.node}: {what}")

    def _touch(self) -> None:
        self._touched = time.monotonic()
        self.folder.touch_lease()
        beats = map(read_heartbeat, self.folder.beating().values())
        kept = self.folder.kept_age_s() < KEPT_S
        if kept or any(beat is not None and is_alive(beat.pid, beat.started) for beat in beats):
            self._seen = self._touched

    def _is_mine(self) -> bool:
        try:
            return self.folder.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def _asked_to_end(self, signum: int, frame: FrameType | None) -> None:
        self._ending.set()

    def status(self) -> dict[str, Any]:
        """Say what is held and how it goes, as JSON."""
        return status_of(self)
