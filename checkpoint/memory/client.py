"""A snapshot process as trainers, launchers and commands see it: one method per verb, typed.

Must not know: torch, how a snapshot process does what it is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.channel import Buffer
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import SlotHeader
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.status import Flushed, Status
from windlass.checkpoint.memory.wire import Client
from windlass.dist.errors import CheckpointError

FENCE_S = 5.0  # what killing may take, beside the timeout
ANSWER_S = 5.0
LOST_S = 0.2  # before a process that is being replaced is asked again


@dataclass(frozen=True)
class Inventory:
    """What a node holds: each entry of `held` has tier, rank, role, step, generation, state, ok (and why not)."""

    node: str
    generation: int
    held: list[dict[str, Any]]
    memberships: list[int]


class SnapshotClient:
    """Speaks to the snapshot process at one address, for one generation. Any thread.

    Without a generation it speaks for the one the node is at, as commands and controllers do. One that was made `of` a
    folder follows the process when another one takes its place at another address.
    """

    def __init__(
        self,
        host: str,
        port: int,
        job: str,
        token: str | Callable[[], str],
        timeout_s: float = 10.0,
        *,
        generation: int | None = None,
        node: str = "",
    ) -> None:
        self._learns = generation is None
        self._folder: NodeFolder | None = None
        self.wire = Client(host, port, job, token, timeout_s, generation=generation or 0, name=node)

    @staticmethod
    def of(folder: NodeFolder, generation: int | None = None, timeout_s: float = 10.0) -> SnapshotClient:
        """Return a client of the process that serves a folder.

        Raises: CheckpointError if none does
        """
        served = folder.read_smp()
        if served is None or not served.alive:
            raise CheckpointError(
                f"node {folder.node} has no snapshot process: whoever starts workers there starts one "
                "(ensure_snapshot_process)"
            )
        client = SnapshotClient(
            served.host,
            served.port,
            folder.job,
            folder.read_token,
            timeout_s,
            generation=generation,
            node=folder.node,
        )
        client._folder = folder
        return client

    @property
    def generation(self) -> int:
        """Return the generation this client speaks for."""
        self._learn()
        return self.wire.generation

    def _learn(self) -> None:
        if self._learns and self.wire.generation == 0:
            self.wire.generation = int(self.hello()["generation"])

    def _request(
        self, verb: str, fields: dict[str, Any], into: memoryview | None = None, timeout_s: float | None = None
    ) -> tuple[dict[str, Any], memoryview]:
        self._learn()
        try:
            return self._send(verb, fields, into=into, timeout_s=timeout_s)
        except CheckpointError:
            if not (self._learns and self.wire.fenced):
                raise
            self.wire.fenced, self.wire.generation = False, 0  # a newer one has begun since
            self._learn()
            return self._send(verb, fields, into=into, timeout_s=timeout_s)

    def _send(
        self,
        verb: str,
        fields: dict[str, Any] | None = None,
        payload: Buffer | None = None,
        *,
        into: memoryview | None = None,
        timeout_s: float | None = None,
    ) -> tuple[dict[str, Any], memoryview]:
        try:
            return self.wire.request(verb, fields, payload, into, timeout_s)
        except CheckpointError:
            if not self._follow():
                raise
            return self.wire.request(verb, fields, payload, into, timeout_s)

    def _follow(self) -> bool:
        """Tell whether the process that serves the folder now listens elsewhere, and turn to it."""
        served = None if self._folder is None else self._folder.read_smp()
        if served is None or not served.alive or (served.host, served.port) == (self.wire.host, self.wire.port):
            return False
        self.wire.move(served.host, served.port)
        return True

    def hello(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Ask who is there: job, node, generation, pid, started, host, port."""
        return self._send("hello", timeout_s=timeout_s)[0]

    def status(self, timeout_s: float | None = None) -> Status:
        """Ask for the newest step of every level, the lag, and what is not protected."""
        return Status.parse(self._send("status", timeout_s=timeout_s)[0])

    # -- what is held ------------------------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """Ask for everything the node holds in memory and on its drive, and the memberships it knows."""
        answer, _ = self._request("inventory", {})
        try:
            return Inventory(
                str(answer["node"]),
                int(answer["generation"]),
                [dict(entry) for entry in answer["held"]],
                [int(g) for g in answer["memberships"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.wire.peer}: its inventory is malformed: {error}") from error

    def header(
        self, rank: int, role: str, step: int, slot_generation: int, *, tier: str = "ram", wait_s: float = 0.0
    ) -> SlotHeader | None:
        """Return the header of a slot; None if it is not hashed within `wait_s`, or not there."""
        fields = {"rank": rank, "role": role, "step": step, "slot_generation": slot_generation, "tier": tier}
        timeout_s = self.wire.timeout_s + wait_s
        answer, tables = self._request("header", {**fields, "wait_s": wait_s}, timeout_s=timeout_s)
        return SlotHeader.parse(answer["header"], tables) if "header" in answer else None

    def read(
        self,
        rank: int,
        role: str,
        step: int,
        slot_generation: int,
        offset: int,
        into: memoryview,
        *,
        tier: str = "ram",
    ) -> None:
        """Fill `into` with bytes of a slot. They are not verified: compare them with the header's hashes.

        Raises: CheckpointError if the node does not hold them
        """
        fields = {"rank": rank, "role": role, "step": step, "slot_generation": slot_generation, "tier": tier}
        _, got = self._request("read", {**fields, "offset": offset, "length": into.nbytes}, into=into)
        if got.nbytes != into.nbytes:
            raise CheckpointError(f"{self.wire.peer}: asked for {into.nbytes} bytes, got {got.nbytes}")

    def layout(self, digest: str) -> Layout:
        """Return a layout by its digest, verified."""
        return Layout.parse(bytes(self._request("layout", {"digest": digest})[1]), digest)

    def membership(self, generation: int) -> Membership:
        """Return the members of a generation."""
        return Membership.parse(bytes(self._request("membership", {"of": generation})[1]), self.wire.peer)

    # -- generations -------------------------------------------------------------------------------------------------

    def adopt(
        self,
        membership: Membership,
        restored: tuple[int, int] | None = None,
        settings: Settings | None = None,
        anchor: tuple[int, int] | None = None,
        base: Base | None = None,
    ) -> None:
        """Begin the generation of `membership`, all of whose ranks have been restored from `restored` (generation and
        step), or from elsewhere. `anchor` is the snapshot that must stay until a new one is protected (inventory.py),
        `base` where training goes on: at the beginning if not given. Every rank may say so.
        """
        fields = {
            "restored": None if restored is None else list(restored),
            "anchor": None if anchor is None else list(anchor),
            "base": (base or Base()).dump(),
            "settings": asdict(settings or Settings()),
        }
        self._send("adopt", fields, membership.dump().encode())

    def fence(self, generation: int | None = None) -> list[int]:
        """Begin a generation on this node: what older ones say is refused, and their trainers are killed. Return them.

        Raises: CheckpointError if a newer one has begun, or a trainer cannot be killed: then the node counts as lost
        """
        generation = self.generation if generation is None else generation
        answer, _ = self._send("fence", {"generation": generation}, timeout_s=self.wire.timeout_s + FENCE_S)
        self.wire.generation = max(self.wire.generation, generation)
        return [int(pid) for pid in answer["killed"]]

    def flush(self, deadline_s: float, at_least: int = -1) -> Flushed:
        """Make the newest protected step durable in storage now, once `at_least` that step is protected.

        Asked again where the process is being replaced: all who ask share one work.

        Blocks: host, at most `deadline_s` and a moment
        Raises: CheckpointError with the reason, or naming who is missing
        """
        end, pause = time.monotonic() + deadline_s, threading.Event()
        while True:
            left = max(end - time.monotonic(), 0.0)
            try:
                fields = {"deadline_s": left, "at_least": at_least}
                answer, _ = self._request("flush", fields, timeout_s=left + ANSWER_S)
                break
            except CheckpointError as error:
                if self._folder is None or not isinstance(error.__cause__, ConnectionError) or left <= LOST_S:
                    raise
                pause.wait(LOST_S)
                self._follow()
        return Flushed(int(answer["step"]), str(answer["place"]), int(answer["num_bytes"]), float(answer["seconds"]))

    def stop(self, *, remove: bool) -> None:
        """End the process; `remove` all that it holds."""
        self._send("stop", {"generation": self.generation, "remove": remove})

    def close(self) -> None:
        """End the connections."""
        self.wire.close()

    def __enter__(self) -> SnapshotClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
