"""What the nodes say about the snapshots they hold: copies in memory and on drives, memberships and layouts.

Snapshot processes are asked, because they alone know what is being hashed. A report is JSON.
Must not know: torch, which step to take, other ranks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from windlass.checkpoint.local_level import LocalLevel
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.copies import Reach, Unusable, name_of
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.inventory import TIERS, Held
from windlass.checkpoint.memory.stripes import DATA, PARITY
from windlass.dist.errors import CheckpointError

POLL_S = 0.02
Report = dict[str, Any]  # node, host, port, holdings (fields of Held), memberships (documents by generation), problem


class Survey:
    """Asks the snapshot process of this node, through `client`, and those of nodes on which nobody trains now.

    Invariant: nothing stays open between two calls
    """

    def __init__(self, client: SnapshotClient, folder: NodeFolder, local_dir: Path | None, timeout_s: float) -> None:
        self.client, self.folder, self.timeout_s = client, folder, timeout_s
        self._level = None if local_dir is None else LocalLevel(folder, local_dir)
        self._absent: list[tuple[str, int]] = []  # where those are that answered

    def report(self) -> Report:
        """Say what this node holds. Copies that are whole but not hashed yet are waited for.

        Blocks: host, at most about `timeout_s`
        """
        return self._report(self.client, self.folder.node, time.monotonic() + self.timeout_s)

    def ask(self, nodes: Sequence[tuple[str, str, int]]) -> list[Report]:
        """Ask nodes (name, host, port) on which nobody trains now, all at once. One that does not answer holds nothing.

        Blocks: host, at most about `timeout_s`
        """

        def one(node: tuple[str, str, int]) -> Report:
            name, host, port = node
            with self._connect(host, port) as client:
                report = self._report(client, name, time.monotonic())
            if not report["problem"]:
                self._absent.append((host, port))
            return report

        if not nodes:
            return []
        with ThreadPoolExecutor(min(len(nodes), 32), "survey") as pool:
            return list(pool.map(one, nodes))

    def layout(self, digest: str) -> str:
        """Return the document of a layout from this node, or an absent one that answered; empty if nobody has it."""
        with contextlib.suppress(CheckpointError):
            found = self.folder.read_layout(digest)
            if found is not None:
                return found.dump().decode()
        with contextlib.suppress(CheckpointError):
            return self.client.layout(digest).dump().decode()
        for host, port in self._absent:
            with contextlib.suppress(CheckpointError), self._connect(host, port) as client:
                return client.layout(digest).dump().decode()
        return ""

    def reach(self) -> Reach:
        """Return what copies are read with."""
        return Reach(self.folder, self._level, lambda held: Wire(self._connect(held.host, held.port)))

    def _connect(self, host: str, port: int) -> SnapshotClient:
        token, generation = self.folder.read_token, self.client.generation
        return SnapshotClient(host, port, self.folder.job, token, self.timeout_s, generation=generation)

    def _report(self, client: SnapshotClient, node: str, deadline: float) -> Report:
        """Ask until nothing is being hashed, or until the deadline."""
        nothing = {"node": node, "holdings": [], "memberships": {}, "problem": ""}
        while True:
            late = time.monotonic() >= deadline
            try:
                found = client.inventory()
                if late or not any(row["state"] == State.COPIED for row in found.held):
                    held = [_row(node, client.wire.host, client.wire.port, row) for row in found.held]
                    return nothing | {"holdings": held, "memberships": _memberships(client, found.memberships)}
            except (KeyError, TypeError, ValueError) as error:
                return nothing | {"problem": f"its inventory is malformed: {type(error).__name__}: {error}"}
            except CheckpointError as error:  # one that ended is started again by whoever looks after it
                if late or client.wire.fenced:
                    return nothing | {"problem": str(error)}
            time.sleep(POLL_S)


def _memberships(client: SnapshotClient, generations: Sequence[int]) -> dict[str, str]:
    out = {}
    for generation in generations:
        with contextlib.suppress(CheckpointError):  # damaged, or removed since: another node may have it
            out[str(generation)] = client.membership(generation).dump()
    return out


class Wire:
    """The snapshot process of another node, as copies are read from it."""

    def __init__(self, client: SnapshotClient) -> None:
        self._client = client

    def header_of(self, held: Held) -> SlotHeader:
        header = self._client.header(**_slot(held))
        if header is None:
            raise Unusable(f"{name_of(held)} is not there any more")
        return header

    def read_from(self, held: Held, offset: int, into: memoryview) -> None:
        self._client.read(**_slot(held), offset=offset, into=into)

    def close(self) -> None:
        self._client.close()


def _slot(held: Held) -> dict[str, Any]:
    named = {"rank": held.rank, "role": held.role, "step": held.step}
    return named | {"slot_generation": held.generation, "tier": held.tier}


def _row(node: str, host: str, port: int, row: dict[str, Any]) -> list[Any]:
    """Return the fields of a `Held`."""
    if row["tier"] not in TIERS or row["role"] not in (DATA, PARITY):
        raise ValueError(f"tier {row['tier']!r}, role {row['role']!r}")
    slot = [row["tier"], int(row["rank"]), row["role"], int(row["step"]), int(row["generation"])]
    return [node, host, port, *slot, bool(row["ok"]), str(row.get("why", "")), int(row["state"])]
