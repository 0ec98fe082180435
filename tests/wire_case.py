"""A server for tests of the wire, and peers of every kind that speak to it."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from windlass.checkpoint.memory.channel import HEAD, MAGIC, MAX_HEADER, Channel
from windlass.checkpoint.memory.wire import Client, Server
from windlass.dist.errors import CheckpointError

JOB, TOKEN = "0123456789abcdef", "6d" * 32
MAX = 1 << 20
HOST = "127.0.0.1"
LONG_S = 30.0  # nobody takes so long who answers at all
STORE = np.random.default_rng(0).integers(0, 256, MAX, dtype=np.uint8)


def handle(verb: str, fields: dict[str, Any], payload: memoryview) -> tuple[dict[str, Any], Any]:
    if verb == "read":
        return {"from": fields["at"]}, memoryview(STORE)[fields["at"] : fields["at"] + fields["count"]]
    if verb == "refuse":
        raise CheckpointError("step 7 is not here")
    if verb == "break":
        raise ZeroDivisionError("of the handler")
    if verb == "boast":
        return {"text": "x" * (MAX_HEADER + 1)}, None
    if verb == "flood":
        return {}, bytes(MAX + 1)
    return {"verb": verb, "fields": fields, "sum": int(np.frombuffer(payload, np.uint8).sum(dtype=np.int64))}, None


REQUEST = {"verb": "ping", "generation": 3, "fields": {}}


class Case:
    """A server and what it logged."""

    def __init__(self, **options: Any) -> None:
        self.log: list[str] = []
        settings: dict[str, Any] = {"max_payload": MAX, "timeout_s": LONG_S, "log": self.log.append, **options}
        settings.setdefault("fenced", lambda generation: None if generation >= 3 else "generation 3 has begun")
        self.server = Server(HOST, 0, JOB, TOKEN, settings.pop("handle", handle), **settings).start()
        self.clients: list[Client] = []

    def client(self, **options: Any) -> Client:
        settings: dict[str, Any] = {"job": JOB, "token": TOKEN, "timeout_s": LONG_S, "generation": 3, **options}
        self.clients.append(Client(HOST, self.server.port, **settings))
        return self.clients[-1]

    def raw(self) -> socket.socket:
        connection = socket.create_connection((HOST, self.server.port), timeout=LONG_S)
        return connection

    def known(self) -> Channel:
        """Return a connection past the handshake, to say over it whatever one likes."""
        peer = Channel(self.raw(), LONG_S)
        peer.introduce(TOKEN, JOB)
        return peer

    def refused(self, kind: str) -> int:
        return self.server.counters[kind]

    def lives(self) -> bool:
        answer, _ = self.client().request("ping", {"x": 1})
        return bool(answer["fields"] == {"x": 1})

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()


@contextlib.contextmanager
def serving() -> Iterator[Callable[..., Case]]:
    """Give a maker of servers, which end with the block."""
    cases: list[Case] = []

    def make(**options: Any) -> Case:
        cases.append(Case(**options))
        return cases[-1]

    try:
        yield make
    finally:
        for case in cases:
            case.close()


def frame(header: bytes, payload_bytes: int = 0, magic: bytes = MAGIC) -> bytes:
    return HEAD.pack(magic, len(header), payload_bytes) + header


def ended(connection: socket.socket) -> bool:
    """Wait until the server has cut a connection."""
    connection.settimeout(LONG_S)
    try:
        while connection.recv(1 << 16):
            continue
    except ConnectionError:
        return True
    return True
