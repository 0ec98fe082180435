"""The snapshot processes of the other nodes as one of them sees them: where they are, and who does not answer.

Must not know: what is asked of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.wire import Client
from windlass.dist.errors import CheckpointError

Fields = dict[str, Any]
Own = Callable[[str, Fields, memoryview], tuple[Fields, Any]]


class Peers:
    """All nodes of one generation, this one included: it is asked without a socket. Any thread."""

    def __init__(self, membership: Membership, node: str, token: Callable[[], str], own: Own, timeout_s: float) -> None:
        self.node, self.timeout_s, self._own = node, timeout_s, own
        self.nodes = membership.nodes
        self._new = lambda name, host, port: Client(
            host, port, membership.job, token, timeout_s, generation=membership.generation, name=name
        )
        self._clients = {name: self._new(name, *membership.address_of(name)) for name in self.nodes if name != node}
        self._silent: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()

    def ask(
        self,
        node: str,
        verb: str,
        fields: Mapping[str, Any] | None = None,
        *,
        into: memoryview | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Fields, memoryview]:
        """Send a request to a node and return its answer.

        Blocks: host, at most `timeout_s` and the time the bytes take
        Raises: CheckpointError that names the node
        """
        if node == self.node:
            answer, payload = self._own(verb, dict(fields or {}), memoryview(b""))
            return answer, memoryview(payload if payload is not None else b"")
        try:
            found = self._clients[node].request(verb, dict(fields or {}), into=into, timeout_s=timeout_s)
        except CheckpointError as error:
            with self._lock:
                since = self._silent.get(node, (time.monotonic(), ""))[0]
                self._silent[node] = (since, str(error))
            raise
        if self._silent:
            with self._lock:
                self._silent.pop(node, None)
        return found

    def moved(self, node: str, host: str, port: int) -> None:
        """Take note of where a node's process, started anew, listens."""
        with self._lock:
            old = self._clients.get(node)
            if old is not None and (old.host, old.port) != (host, port):
                self._clients[node] = self._new(node, host, port)
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
