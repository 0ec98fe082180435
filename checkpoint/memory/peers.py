"""The snapshot processes of the other nodes as one of them sees them: where they are, and who does not answer.

A process that could not have the port of the one before it listens elsewhere, and says so to each of the others once.
Whoever hears it keeps it in its node's folder for its own successors, and answers with all that it knows of such moves:
two that moved at once, each where the other does not look, find each other by any third.
Must not know: what is asked of them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from windlass.checkpoint.memory.folder import NodeFolder, SnapshotProcess
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.wire import Client
from windlass.dist.errors import CheckpointError

Fields = dict[str, Any]
Own = Callable[[str, Fields, memoryview], tuple[Fields, Any]]
Moves = dict[str, tuple[str, int, int]]  # node -> host and port of its process, and when that was started


class Peers:
    """All nodes of one generation, this one included: it is asked without a socket. Any thread."""

    def __init__(self, membership: Membership, folder: NodeFolder, own: Own, timeout_s: float) -> None:
        self.node, self.timeout_s, self._own = folder.node, timeout_s, own
        self.nodes, self._membership, self._folder = membership.nodes, membership, folder
        self._path = folder.path / moves_name(membership.generation)
        self._moves = kept_moves(folder, membership)
        self._clients = {name: self._new(name) for name in self.nodes if name != self.node}
        self._silent: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()

    def _new(self, node: str) -> Client:
        host, port = self.address_of(node)
        job, generation = self._membership.job, self._membership.generation
        return Client(host, port, job, self._folder.read_token, self.timeout_s, generation=generation, name=node)

    def address_of(self, node: str) -> tuple[str, int]:
        """Return where the process of a node listens, as far as is known here."""
        moved = self._moves.get(node)
        return self._membership.address_of(node) if moved is None else moved[:2]

    def ask(
        self,
        node: str,
        verb: str,
        fields: Mapping[str, Any] | None = None,
        *,
        payload: bytes | None = None,
        into: memoryview | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Fields, memoryview]:
        """Send a request to a node and return its answer.

        Blocks: host, at most `timeout_s` and the time the bytes take
        Raises: CheckpointError that names the node
        """
        if node == self.node:
            answer, body = self._own(verb, dict(fields or {}), memoryview(payload or b""))
            return answer, memoryview(body if body is not None else b"")
        try:
            found = self._clients[node].request(verb, dict(fields or {}), payload, into, timeout_s=timeout_s)
        except CheckpointError as error:
            with self._lock:
                since = self._silent.get(node, (time.monotonic(), ""))[0]
                self._silent[node] = (since, str(error))
            raise
        if self._silent:
            with self._lock:
                self._silent.pop(node, None)
        return found

    def moved(self, served: SnapshotProcess) -> bool:
        """Take note of where this node's own process listens; return whether the others are to be told."""
        if (served.host, served.port) == self.address_of(self.node) and self.node not in self._moves:
            return False
        self._merge({self.node: (served.host, served.port, served.started)})
        return True

    def exchange_moves(self, told: bytes | memoryview) -> bytes:
        """Take in what another process knows of moves, durably, and return what is known here.

        Raises: CheckpointError if it is malformed
        """
        self._merge(_parsed(told, self._membership))
        return json.dumps(self._moves).encode()

    def tell_moves(self, node: str) -> None:
        """Exchange what is known of moves with the process of another node.

        Blocks: host, at most the timeout of peers
        Raises: CheckpointError
        """
        fields = {"generation": self._membership.generation}
        self.exchange_moves(self.ask(node, "moved", fields, payload=json.dumps(self._moves).encode())[1])

    def _merge(self, told: Moves) -> None:
        with self._lock:
            # Of two processes of a node the one that was started later is the one that is there.
            news = {n: at for n, at in told.items() if n not in self._moves or self._moves[n][2] < at[2]}
            if not news:
                return
            moves = {**self._moves, **news}
            self._folder.replace(self._path, json.dumps(moves).encode())
            self._moves = moves
            for node in news.keys() & self._clients.keys():
                old, self._clients[node] = self._clients[node], self._new(node)
                old.close()

    def silent(self, at_least_s: float = 0.0) -> dict[str, str]:
        """Return the nodes whose last answer was an error or none, for this long, and what the problem is."""
        now = time.monotonic()
        with self._lock:
            return {node: why for node, (since, why) in sorted(self._silent.items()) if now - since >= at_least_s}

    def close(self) -> None:
        """End all connections."""
        for client in self._clients.values():
            client.close()


def kept_moves(folder: NodeFolder, membership: Membership) -> Moves:
    """Return what a node's folder knows of processes of a generation that listen elsewhere than its membership says."""
    with suppress(FileNotFoundError, CheckpointError):  # damaged: they are told once more when they move again
        return _parsed((folder.path / moves_name(membership.generation)).read_bytes(), membership)
    return {}


def _parsed(text: bytes | memoryview, membership: Membership) -> Moves:
    try:
        told = {str(node): (str(at[0]), int(at[1]), int(at[2])) for node, at in json.loads(bytes(text)).items()}
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"where nodes have moved is malformed: {type(error).__name__}: {error}") from error
    return {node: at for node, at in told.items() if node in membership.nodes}


def moves_name(generation: int) -> str:
    """Return under which name a node's folder keeps the moves of a generation."""
    return f"moved-{generation}.json"
