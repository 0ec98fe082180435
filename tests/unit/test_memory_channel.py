"""Who may speak to a snapshot process, and what: everything else is cut off, and the process lives on."""

import contextlib
import json
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from tests.wire_case import HOST, JOB, MAX, REQUEST, TOKEN, Case, ended, frame, handle, serving
from windlass.checkpoint.memory.channel import HEAD, MAGIC, MAX_HEADER
from windlass.checkpoint.memory.wire import Client, Server
from windlass.dist.errors import CheckpointError


@pytest.fixture
def make() -> Iterator[Callable[..., Case]]:
    with serving() as maker:
        yield maker


@pytest.fixture
def case(make: Callable[..., Case]) -> Case:
    return make()


# -- who may speak ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"token": "00" * 32}, {"job": "fedcba9876543210"}, {"token": ""}])
def test_a_peer_with_another_token_or_job_is_cut_off_and_logged_once(case: Case, other: dict[str, str]) -> None:
    for _ in range(3):
        with pytest.raises(CheckpointError, match="another token, or is not of job"):
            case.client(**other).request("ping")
    until(lambda: case.refused("wrong token or job") == 3 and bool(case.log))
    assert len(case.log) == 1 and TOKEN not in case.log[0]
    assert case.lives()


def test_the_token_is_read_anew_at_every_handshake() -> None:
    tokens = [TOKEN]
    server = Server(HOST, 0, JOB, lambda: tokens[-1], handle, log=lambda line: None).start()
    tokens.append("77" * 32)
    assert Client(HOST, server.port, JOB, "77" * 32).request("ping")[0]["verb"] == "ping"
    with pytest.raises(CheckpointError, match="another token"):
        Client(HOST, server.port, JOB, TOKEN).request("ping")
    server.close()


def serve_once(answer: Callable[[socket.socket], None]) -> tuple[int, threading.Thread]:
    """Answer one connection by hand."""
    listener = socket.create_server((HOST, 0))

    def run() -> None:
        with listener, listener.accept()[0] as connection:
            connection.settimeout(60)
            answer(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return listener.getsockname()[1], thread


def test_a_client_tells_nothing_to_a_server_that_does_not_know_the_token() -> None:
    heard = bytearray()

    def impostor(connection: socket.socket) -> None:
        connection.sendall(MAGIC + bytes(32))
        heard.extend(connection.recv(1000))
        connection.sendall(heard[-32:])  # its own proof, sent back
        while part := connection.recv(1000):
            heard.extend(part)

    port, thread = serve_once(impostor)
    with pytest.raises(CheckpointError, match="does not know the token"):
        Client(HOST, port, JOB, TOKEN).request("secret", {"of": "the job"})
    thread.join(60)
    assert len(heard) == 4 + 32 + 32 and TOKEN.encode() not in heard and bytes.fromhex(TOKEN) not in heard


def test_a_recorded_handshake_is_of_no_use(case: Case) -> None:
    record = bytearray()

    def record_one(connection: socket.socket) -> None:
        with case.raw() as server:
            connection.sendall(server.recv(36))
            record.extend(connection.recv(1000))
            server.sendall(record)
            connection.sendall(server.recv(32))

    port, thread = serve_once(record_one)
    with pytest.raises(CheckpointError):
        Client(HOST, port, JOB, TOKEN).request("ping")  # ends with the recorder, after the handshake
    thread.join(60)
    assert case.refused("wrong token or job") == 0
    with case.raw() as again:
        again.recv(36)
        again.sendall(record)
        assert ended(again)
    until(lambda: case.refused("wrong token or job") == 1)
    assert case.lives()


def test_a_client_says_when_what_it_reaches_is_something_else() -> None:
    port, _ = serve_once(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6 and so on and so forth"))
    with pytest.raises(CheckpointError, match="no snapshot process"):
        Client(HOST, port, JOB, TOKEN).request("ping")


# -- what may not be said --------------------------------------------------------------------------------------------

BREACHES = {
    "header too large": HEAD.pack(MAGIC, MAX_HEADER + 1, 0),
    "payload too large": frame(json.dumps(REQUEST).encode(), MAX + 1),
    "a payload of all memory": frame(json.dumps(REQUEST).encode(), 2**64 - 1),
    "another magic": frame(b"{}", magic=b"HTTP"),
    "no JSON": frame(b"\xff\xfe\x00garbage"),
    "no object": frame(b"[1, 2]"),
    "very deep": frame(b'{"a":' + b"[" * 200_000),
    "a huge number": frame(b'{"generation": 1' + b"0" * 100_000 + b"}"),
    "no verb": frame(b'{"generation": 3, "fields": {}}'),
    "no generation": frame(b'{"verb": "ping", "fields": {}}'),
    "a generation that is none": frame(b'{"verb": "ping", "generation": true, "fields": {}}'),
    "fields that are none": frame(b'{"verb": "ping", "generation": 3, "fields": [1]}'),
}


@pytest.mark.parametrize("what", BREACHES)
def test_a_peer_that_breaks_the_rules_is_cut_off_and_the_server_lives(case: Case, what: str) -> None:
    peer = case.known()
    peer.socket.sendall(BREACHES[what])
    assert ended(peer.socket)
    until(lambda: len(case.log) == 1)
    assert ("too large" if "too large" in what or "all memory" in what else "garbage") in case.log[0]
    assert case.lives()
    until(lambda: case.server._room.free == 4 * MAX)


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(1000), MAGIC + bytes(64), MAGIC * 17])
def test_noise_before_the_handshake_is_cut_off(case: Case, noise: bytes) -> None:
    with case.raw() as peer:
        peer.sendall(noise)
        assert ended(peer)
    until(lambda: case.refused("wrong token or job") == 1)
    assert case.lives()


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_nothing_is_ever_unpickled(case: Case, tmp_path: Path) -> None:
    bomb, mark = pickle.dumps(Bomb(tmp_path / "mark")), tmp_path / "mark"
    for message in [bomb, frame(bomb), frame(json.dumps(REQUEST).encode(), len(bomb)) + bomb]:
        peer = case.known()
        peer.socket.sendall(message)
        with contextlib.suppress(OSError):  # it may have been cut off already
            peer.socket.shutdown(socket.SHUT_WR)
        assert ended(peer.socket)
    with case.raw() as stranger:
        stranger.sendall(bomb * 10)
        assert ended(stranger)
    assert case.client().request("ping", payload=bomb)[0]["sum"] == sum(bomb)
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # so the bomb is one
