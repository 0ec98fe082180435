"""The wire between snapshot processes: requests are answered, slow and lost peers harm nobody, room is bounded."""

import contextlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.waiting import until
from tests.wire_case import HOST, JOB, LONG_S, MAX, REQUEST, STORE, TOKEN, Case, ended, frame, handle, serving
from windlass.checkpoint.memory import channel as channel_module
from windlass.checkpoint.memory import wire as wire_module
from windlass.checkpoint.memory.channel import HEAD, MAX_HEADER
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder, SnapshotProcess
from windlass.checkpoint.memory.heartbeat import process_started
from windlass.checkpoint.memory.wire import Server
from windlass.dist.errors import CheckpointError


@pytest.fixture
def make() -> Iterator[Callable[..., Case]]:
    with serving() as maker:
        yield maker


@pytest.fixture
def case(make: Callable[..., Case]) -> Case:
    return make()


# -- what may be said ------------------------------------------------------------------------------------------------


def test_a_request_brings_its_fields_and_payload_and_takes_back_an_answer(case: Case) -> None:
    payload = np.arange(1000, dtype=np.uint8)
    answer, body = case.client().request("vote", {"generation": 9, "name": "ü"}, payload=memoryview(payload))
    assert answer == {"verb": "vote", "fields": {"generation": 9, "name": "ü"}, "sum": int(payload.sum())}
    assert body.nbytes == 0


@pytest.mark.parametrize("count", [0, 1, 4097, MAX])
def test_an_answer_is_received_straight_into_the_buffer_given(case: Case, count: int) -> None:
    client, buffer = case.client(), np.zeros(MAX, np.uint8)
    fields, body = client.request("read", {"at": MAX - count, "count": count}, into=memoryview(buffer))
    assert (body.nbytes, fields) == (count, {"from": MAX - count})
    assert np.array_equal(buffer[:count], STORE[MAX - count :]) and not buffer[count:].any()
    assert client.request("read", {"at": 0, "count": count})[1] == memoryview(STORE)[:count]


def test_an_answer_larger_than_the_buffer_is_not_taken(case: Case) -> None:
    with pytest.raises(CheckpointError, match="payload too large: 11 bytes, at most 10"):
        case.client().request("read", {"at": 0, "count": 11}, into=memoryview(bytearray(10)))
    assert case.lives()


def test_threads_share_a_client_and_connections_are_kept(case: Case) -> None:
    client, wrong = case.client(), []

    def ask(number: int) -> None:
        for at in range(number, number + 40):
            _, body = client.request("read", {"at": at, "count": 5000})
            if body != memoryview(STORE)[at : at + 5000]:
                wrong.append(at)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and case.refused("answered") == 240
    assert case.server.num_connections <= 6


def test_what_a_verb_refuses_reaches_the_peer_with_its_name(case: Case) -> None:
    client = case.client(name="node-4")
    with pytest.raises(CheckpointError, match=rf"snapshot process of node-4 at {HOST}:\d+: step 7 is not here"):
        client.request("refuse")
    assert not client.fenced and client.request("ping")[0]["verb"] == "ping" and case.server.num_connections == 1


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("break", "'break' failed: ZeroDivisionError: of the handler"),
        ("boast", "answer to 'boast' cannot be sent"),
        ("flood", "at most"),
    ],
)
def test_a_failing_verb_ends_neither_the_server_nor_the_connection(case: Case, verb: str, message: str) -> None:
    client = case.client()
    with pytest.raises(CheckpointError, match=message):
        client.request(verb)
    assert client.request("ping")[0]["verb"] == "ping" and case.server.num_connections == 1


# -- generations -----------------------------------------------------------------------------------------------------


def test_an_old_generation_is_refused_before_its_request_is_looked_at(make: Callable[..., Case]) -> None:
    seen: list[str] = []

    def watch(verb: str, fields: dict[str, Any], payload: memoryview) -> tuple[dict[str, Any], None]:
        seen.append(verb)
        return {}, None

    case = make(handle=watch, open_verbs=frozenset({"status"}))
    old, new = case.client(generation=2), case.client(generation=4)
    with pytest.raises(CheckpointError, match="generation 3 has begun"):
        old.request("vote", payload=b"zombie")
    assert seen == [] and old.fenced and case.refused("fenced") == 1
    old.request("status")
    new.request("vote")
    assert seen == ["status", "vote"] and not new.fenced


# -- peers that are slow, silent or gone -----------------------------------------------------------------------------

SOON_S, LATE_S = 0.4, 60.0


def hasten(case: Case) -> None:
    """Have those who are connected cut off soon: only now, as proving who they are may take long on a busy machine."""
    until(lambda: case.server._num_admitted == case.server.num_connections)
    for channel in list(case.server._channels.values()):
        channel.timeout_s = SOON_S


def test_a_peer_that_connects_and_says_nothing_is_cut_off(make: Callable[..., Case]) -> None:
    case = make(timeout_s=SOON_S)
    with case.raw() as peer:
        assert ended(peer)
    until(lambda: case.refused("too slow or idle") == 1)
    case.server.timeout_s = LATE_S
    assert case.lives()


@pytest.mark.parametrize("start", [b"", frame(json.dumps(REQUEST).encode(), 1000)])
def test_a_peer_that_sends_a_byte_now_and_then_is_cut_off_like_a_silent_one(
    make: Callable[..., Case], start: bytes
) -> None:
    case = make(timeout_s=LATE_S if start else SOON_S)
    pause = threading.Event()
    peer = case.known().socket if start else case.raw()
    if start:
        hasten(case)
    peer.sendall(start)
    with pytest.raises(ConnectionError):
        for _ in range(1200):
            peer.sendall(b"W")
            pause.wait(0.05)  # so slowly that a server that looks late has not got all it wants either
    until(lambda: case.refused("too slow or idle") == 1)
    peer.close()
    case.server.timeout_s = LATE_S
    assert case.lives()


def test_a_peer_that_does_not_read_its_answer_is_cut_off(
    make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "SLOWEST", 1 << 40)
    case = make(handle=lambda verb, fields, payload: ({}, bytes(32 << 20)), max_payload=32 << 20)
    peer = case.known()
    hasten(case)
    peer.socket.sendall(frame(json.dumps(REQUEST).encode()))
    until(lambda: case.refused("too slow or idle") == 1)
    until(lambda: case.server.num_connections == 0)
    peer.close()
    assert case.server._room.free == 4 * (32 << 20), "the answer that nobody read holds no memory"


def test_a_peer_that_leaves_in_the_middle_of_a_message_leaves_nothing_behind(case: Case) -> None:
    peer = case.known()
    peer.socket.sendall(frame(json.dumps(REQUEST).encode(), 1000) + bytes(500))
    peer.close()
    until(lambda: case.refused("closed") == 1)
    until(lambda: case.server.num_connections == 0)
    assert case.server._room.free == 4 * MAX and case.lives()


def test_an_idle_connection_is_ended_and_replaced_without_a_word_to_the_caller(make: Callable[..., Case]) -> None:
    def answer(verb: str, fields: dict[str, Any], payload: memoryview) -> tuple[dict[str, Any], Any]:
        made.server.idle_s = 0.05  # from this answer on, and not while the request is on its way
        return handle(verb, fields, payload)

    made = make(handle=answer)
    client = made.client()
    client.request("ping")
    until(lambda: made.server.num_connections == 0)
    made.server.idle_s = LATE_S
    assert client.request("ping", payload=b"\1\2")[0]["sum"] == 3


def test_a_client_goes_on_with_a_server_that_was_restarted(case: Case) -> None:
    client, port = case.client(), case.server.port
    client.request("ping")
    case.server.close()
    case.server = Server(HOST, port, JOB, TOKEN, handle, log=case.log.append).start()
    assert client.request("read", {"at": 5, "count": 9})[1] == memoryview(STORE)[5:14]


def test_a_client_names_a_peer_that_is_not_there(case: Case) -> None:
    client = case.client(name="node-9")
    case.server.close()
    with pytest.raises(CheckpointError, match=rf"node-9 at {HOST}:{case.server.port}: 'ping' failed: .*refused"):
        client.request("ping")


def test_a_client_names_a_peer_that_does_not_answer(make: Callable[..., Case]) -> None:
    stop = threading.Event()

    def wait(verb: str, fields: dict[str, Any], payload: memoryview) -> tuple[dict[str, Any], None]:
        stop.wait(60)
        return {}, None

    case = make(handle=wait)
    with pytest.raises(CheckpointError, match=r"did not answer 'ping' within 0\.1 s"):
        case.client().request("ping", timeout_s=0.1)
    stop.set()


# -- bounds ----------------------------------------------------------------------------------------------------------


def test_connections_are_bounded_and_the_room_comes_back(make: Callable[..., Case]) -> None:
    case = make(max_connections=2)
    known = [case.known(), case.known()]
    with pytest.raises(CheckpointError, match="failed"):
        case.client().request("ping")
    until(lambda: case.refused("more than 2 connections") == 1)
    until(lambda: case.server.num_connections == 2)
    for connection in known:
        connection.close()
    until(lambda: case.server.num_connections == 0)
    assert case.lives()


def test_those_who_do_not_prove_who_they_are_take_no_place_of_others_and_are_few(
    make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_module, "MAX_STRANGERS", 2)
    monkeypatch.setattr(wire_module, "STRANGER_S", LATE_S)
    case = make(max_connections=2, timeout_s=LATE_S)
    client = case.client()
    client.request("ping")
    strangers = [case.raw() for _ in range(5)]
    until(lambda: case.server.num_connections == 3)  # the other three wait to be accepted
    assert client.request("ping")[0]["verb"] == "ping" and case.server.num_connections == 3
    monkeypatch.setattr(wire_module, "STRANGER_S", 2.0)  # for those who come in from now on
    for stranger in strangers[:2]:
        stranger.close()
    assert case.client().request("ping")[0]["verb"] == "ping"  # although they are before it
    assert case.refused("more than 2 connections") == 0
    for stranger in strangers[2:]:
        assert ended(stranger)
        stranger.close()
    until(lambda: case.refused("too slow or idle") == 3)
    until(lambda: case.server.num_connections == 2)


def known_in(folder: NodeFolder, case: Case) -> Case:
    """Let a server be that of a node's snapshot process."""
    started = process_started(os.getpid()) or 0
    folder.write_smp(SnapshotProcess(os.getpid(), started, case.server.host, case.server.port))
    return case


def test_a_client_of_a_folder_follows_its_process_to_another_address(make: Callable[..., Case], tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0").create(TOKEN)

    first = known_in(folder, make())
    client = SnapshotClient.of(folder, 3)
    assert client.hello()["verb"] == "hello"
    first.server.close()
    with pytest.raises(CheckpointError, match=f"node-0 at {HOST}:{first.server.port}"):
        client.hello()
    second = known_in(folder, make())
    assert second.server.port != first.server.port and client.hello()["verb"] == "hello"
    assert client.wire.port == second.server.port
    client.close()


def test_a_flush_is_asked_again_where_the_process_is_being_replaced_and_a_refusal_is_not(
    make: Callable[..., Case], tmp_path: Path
) -> None:
    folder, asked = NodeFolder(tmp_path, JOB, "node-0").create(TOKEN), []

    def die(verb: str, fields: dict[str, Any], payload: memoryview) -> Any:
        asked.append(fields["at_least"])
        threading.Timer(0.3, lambda: known_in(folder, make(handle=answer))).start()  # by then it was found to be gone
        first.server.close(timeout_s=0.0)
        raise ConnectionAbortedError

    def answer(verb: str, fields: dict[str, Any], payload: memoryview) -> Any:
        asked.append(fields["at_least"])
        if fields["at_least"] == 9:
            raise CheckpointError("step 9 is not protected")
        return {"step": 7, "place": "there", "num_bytes": 1, "seconds": 0.1}, None

    first = known_in(folder, make(handle=die))
    with SnapshotClient.of(folder, 3) as client:
        assert client.flush(LONG_S, at_least=7).step == 7 and asked == [7, 7]
        with pytest.raises(CheckpointError, match="step 9 is not protected"):
            client.flush(LONG_S, at_least=9)
    assert asked == [7, 7, 9]


class Room(wire_module._Room):
    """Has those who have room go on only when none is left: the time of the first does not pass before that."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.full = threading.Event()

    @contextlib.contextmanager
    def taken(self, num_bytes: int, timeout_s: float) -> Any:
        with super().taken(num_bytes, timeout_s) as payload:
            if self.free == 0:
                self.full.set()
            assert self.full.wait(60)
            yield payload


def test_payloads_of_all_connections_share_a_bounded_memory(make: Callable[..., Case]) -> None:
    case = make()
    case.server._room = room = Room(4 * MAX)
    head = frame(json.dumps(REQUEST).encode(), MAX)
    peers = [case.known() for _ in range(6)]
    hasten(case)
    case.server.timeout_s = SOON_S  # also for those who wait for room
    for peer in peers:
        peer.socket.sendall(head + bytes(10))  # promises a payload, and then sends no more of it
    assert room.full.wait(60)
    assert case.server.num_connections <= 6
    for peer in peers:
        assert ended(peer.socket)
        peer.close()
    until(lambda: room.free == 4 * MAX)
    case.server.timeout_s = LATE_S
    assert case.lives()


def test_closing_a_server_ends_its_threads_and_connections(case: Case) -> None:
    client = case.client()
    client.request("ping")
    silent = case.raw()
    until(lambda: case.server.num_connections == 2)
    threads = [case.server._acceptor, *case.server._channels]
    until(lambda: all(thread.is_alive() for thread in threads))
    case.server.close(timeout_s=60.0)
    assert ended(silent)
    silent.close()
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_a_server_listens_on_one_address_only(host: str) -> None:
    with pytest.raises(CheckpointError, match="name one address"):
        Server(host, 0, JOB, TOKEN, handle)


def test_a_port_that_is_taken_is_named(case: Case) -> None:
    with pytest.raises(CheckpointError, match=rf"{HOST}:{case.server.port}.*use port 0"):
        Server(HOST, case.server.port, JOB, TOKEN, handle)


def test_a_request_that_is_too_large_is_not_sent(case: Case) -> None:
    with pytest.raises(CheckpointError, match="use the payload"):
        case.client().request("ping", {"text": "x" * MAX_HEADER})
    assert case.lives()


def test_the_head_of_a_frame_is_sixteen_bytes() -> None:
    assert HEAD.size == 16 == struct.calcsize("<4sIQ")
