"""Requests between snapshot processes, trainers and launchers: a server with a bounded number of threads, and clients.

It is apart from the training processes' collectives, so that a dead or hung trainer stops nothing here. Memory for
payloads is bounded over all connections. A request carries the generation of its sender; the server's owner says which
generations are over. Must not know: what the verbs mean.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from windlass.checkpoint.memory.channel import Buffer, Channel, Token
from windlass.dist.errors import CheckpointError

MAX_PAYLOAD = 64 << 20
MAX_STRANGERS = 32  # connections at once that have not proved yet that they know the token
STRANGER_S = 2.0  # for that proof
LOOK_S = 0.1
Fields: TypeAlias = dict[str, Any]
Handle: TypeAlias = Callable[[str, Fields, memoryview], tuple[Fields, Buffer | None]]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Server:
    """Answers requests on one address, each connection in a thread of its own.

    `handle(verb, fields, payload)` returns fields and a buffer (sent without a copy) or None; it runs in many threads
    at once, and the payload is valid only during the call. A CheckpointError it raises is sent to the peer.
    `fenced(generation)` returns a reason to refuse a request, or None; `open_verbs` are answered all the same.
    A peer that breaks the rules is cut off and counted in `counters`, and each kind of breach is logged once. Those who
    have yet to prove who they are take no place of those who have: MAX_STRANGERS at once, for STRANGER_S each; further
    ones wait to be accepted.
    """

    def __init__(
        self,
        host: str,
        port: int,
        job: str,
        token: Token,
        handle: Handle,
        *,
        fenced: Callable[[int], str | None] = lambda generation: None,
        open_verbs: frozenset[str] = frozenset(),
        max_payload: int = MAX_PAYLOAD,
        max_connections: int = 128,
        timeout_s: float = 10.0,
        idle_s: float = 600.0,
        log: Callable[[str], None] = _to_stderr,
    ) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise CheckpointError(f"snapshot process: cannot listen on '{host}': name one address of the job's network")
        self.job, self._token, self._handle = job, token, handle
        self._fenced, self._open_verbs, self._log = fenced, open_verbs, log
        self.max_payload, self.max_connections, self.timeout_s, self.idle_s = (
            max_payload,
            max_connections,
            timeout_s,
            idle_s,
        )
        self.counters: Counter[str] = Counter()
        self._room = _Room(4 * max_payload)
        self._lock = threading.Lock()
        self._channels: dict[threading.Thread, Channel] = {}
        self._num_admitted = 0
        self._strangers = threading.Semaphore(MAX_STRANGERS)
        self._closing = threading.Event()
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=64)
        except OSError as exc:
            raise CheckpointError(f"snapshot process: cannot listen on {host}:{port}: {exc}; use port 0") from exc
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, name="snapshot-accept", daemon=True)

    def start(self) -> Server:
        """Begin to answer."""
        self._acceptor.start()
        return self

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop answering: cut all connections and wait for their threads, at most `timeout_s`."""
        self._closing.set()
        with contextlib.suppress(OSError):  # not connected: only wakes the acceptor
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        deadline = time.monotonic() + timeout_s
        if self._acceptor.ident is not None:
            self._acceptor.join(timeout_s)
        with self._lock:
            threads = dict(self._channels)
        for channel in threads.values():
            channel.close()
        for thread in threads:
            if thread is not threading.current_thread():  # a verb may end its own server
                thread.join(max(deadline - time.monotonic(), 0.0))

    @property
    def num_connections(self) -> int:
        """Return how many connections are open now."""
        return len(self._channels)

    def _accept(self) -> None:
        while not self._closing.is_set():
            if not self._strangers.acquire(timeout=LOOK_S):
                continue
            peer = "a peer"
            try:
                connection, address = self._listener.accept()
                peer = str(address[0])
                self._begin(connection, peer)
            except (OSError, RuntimeError) as exc:
                self._strangers.release()
                if not self._closing.is_set():
                    self._refuse(f"cannot accept connections: {exc}", peer)
                    self._closing.wait(0.05)  # out of descriptors or threads: they come back as connections end

    def _begin(self, connection: socket.socket, peer: str) -> None:
        try:
            channel = Channel(connection, min(self.timeout_s, STRANGER_S))
            thread = threading.Thread(target=self._serve, args=(channel, peer), name="snapshot-serve", daemon=True)
            with self._lock:
                self._channels[thread] = channel
            try:
                thread.start()
            except RuntimeError:
                with self._lock:
                    del self._channels[thread]
                raise
        except (OSError, RuntimeError):
            connection.close()
            raise

    def _refuse(self, reason: str, peer: str) -> None:
        kind = reason.split(":")[0]
        with self._lock:
            self.counters[kind] += 1
            first = self.counters[kind] == 1
        if first:
            self._log(f"snapshot process: cut off {peer}: {reason} (logged once)")

    def _serve(self, channel: Channel, peer: str) -> None:
        admitted = False
        try:
            try:
                channel.admit(self._token, self.job)
            finally:
                self._strangers.release()
            channel.timeout_s = self.timeout_s
            with self._lock:
                self._num_admitted += 1
                admitted = True
                full = self._num_admitted > self.max_connections
            if full:
                raise CheckpointError(f"more than {self.max_connections} connections")
            while not self._closing.is_set():
                header, num_bytes = channel.receive(self.idle_s, self.max_payload)
                self._answer(channel, header, num_bytes)
        except CheckpointError as exc:
            self._refuse(str(exc), peer)
        except TimeoutError:
            self._refuse("too slow or idle", peer)
        except (OSError, MemoryError):
            with self._lock:
                self.counters["closed"] += 1  # the ordinary end: the peer went away
        finally:
            channel.close()
            with self._lock:
                self._channels.pop(threading.current_thread(), None)
                self._num_admitted -= admitted

    def _answer(self, channel: Channel, header: Fields, num_bytes: int) -> None:
        verb, generation, fields = header.get("verb"), header.get("generation"), header.get("fields")
        if not isinstance(verb, str) or type(generation) is not int or not isinstance(fields, dict):
            raise CheckpointError("garbage instead of a request")
        with self._room.taken(num_bytes, self.timeout_s) as payload:
            channel.fill(payload)
            reason = None if verb in self._open_verbs else self._fenced(generation)
            if reason is not None:
                with self._lock:
                    self.counters["fenced"] += 1
                channel.send({"error": reason, "fenced": True})
                return
            try:
                answer, buffer = self._handle(verb, fields, payload)
                if buffer is not None and memoryview(buffer).nbytes > self.max_payload:
                    raise CheckpointError(
                        f"'{verb}' asks for {memoryview(buffer).nbytes} bytes: at most {self.max_payload} at a time"
                    )
            except CheckpointError as exc:
                channel.send({"error": str(exc)})
                return
            except Exception as exc:  # of the handler, not of the connection: the peer learns of it, the server lives
                self._log(f"snapshot process: '{verb}' failed:\n{traceback.format_exc()}")
                channel.send({"error": f"'{verb}' failed: {type(exc).__name__}: {exc}"[:4096]})
                return
        with self._lock:
            self.counters["answered"] += 1
        try:
            channel.send({"fields": answer}, buffer)
        except (CheckpointError, TypeError, ValueError) as exc:  # found before anything was sent
            channel.send({"error": f"the answer to '{verb}' cannot be sent: {exc}"})


class _Room:
    """Memory for the payloads of all connections together."""

    def __init__(self, num_bytes: int) -> None:
        self.free = num_bytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, num_bytes: int, timeout_s: float) -> Any:
        """Give a buffer for as long as the block runs; wait for others to be done with theirs."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.free >= num_bytes, timeout_s):
                raise TimeoutError("no memory for a payload")
            self.free -= num_bytes
        try:
            yield np.empty(num_bytes, np.uint8).data  # untouched memory: costs nothing until bytes arrive
        finally:
            with self._changed:
                self.free += num_bytes
                self._changed.notify_all()


class Client:
    """Sends requests to one server. Any number of threads: each request has a connection of its own, kept for later.

    `generation` may be set anew; `fenced` is True once the server refused it as being over.
    """

    def __init__(
        self,
        host: str,
        port: int,
        job: str,
        token: Token,
        timeout_s: float = 10.0,
        *,
        generation: int = 0,
        name: str = "",
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        self.job, self._token, self._name = job, token, name
        self.timeout_s, self.generation, self.max_payload = timeout_s, generation, max_payload
        self.fenced = False
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self.move(host, port)

    def move(self, host: str, port: int) -> None:
        """Speak to another address from the next request on."""
        self.host, self.port = host, port
        self.peer = f"snapshot process{f' of {self._name}' if self._name else ''} at {host}:{port}"
        self._drop_idle()

    def request(
        self,
        verb: str,
        fields: Fields | None = None,
        payload: Buffer | None = None,
        into: memoryview | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Fields, memoryview]:
        """Send a request and return the fields and the payload of its answer.

        The payload is received straight into `into` where that is given, and the part of it that was filled returned.
        A connection that died while it was idle is replaced once, so a verb may reach the server twice.

        Blocks: host, at most `timeout_s` until the answer begins, and the time that its bytes take
        Raises: CheckpointError that names the peer: not there, too slow, or what the server refused
        """
        header = {"verb": verb, "generation": self.generation, "fields": fields or {}}
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        with self._lock:
            channel = self._idle.pop() if self._idle else None
        if channel is not None:
            try:
                return self._exchange(channel, header, payload, into, timeout_s)
            except ConnectionError:
                self._drop_idle()  # the server was restarted, or cut off what was idle
            except OSError as exc:
                raise self._problem(verb, exc, timeout_s) from exc
        try:
            return self._exchange(self._connect(), header, payload, into, timeout_s)
        except OSError as exc:
            raise self._problem(verb, exc, timeout_s) from exc

    def close(self) -> None:
        """End the connections that are not in use."""
        self._drop_idle()

    def _problem(self, verb: str, exc: OSError, timeout_s: float) -> CheckpointError:
        if isinstance(exc, TimeoutError):
            return CheckpointError(f"{self.peer} did not answer '{verb}' within {timeout_s:g} s")
        return CheckpointError(f"{self.peer}: '{verb}' failed: {exc.strerror or exc}")

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()

    def _connect(self) -> Channel:
        connection = socket.create_connection((self.host, self.port), timeout=self.timeout_s)
        channel = Channel(connection, self.timeout_s)
        try:
            channel.introduce(self._token, self.job)
        except CheckpointError as exc:
            channel.close()
            raise CheckpointError(f"{self.peer} cannot be used: {exc}") from exc
        except BaseException:
            channel.close()
            raise
        return channel

    def _exchange(
        self, channel: Channel, header: Fields, payload: Buffer | None, into: memoryview | None, timeout_s: float
    ) -> tuple[Fields, memoryview]:
        done = False
        try:
            channel.send(header, payload)
            answer, num_bytes = channel.receive(timeout_s, self.max_payload if into is None else into.nbytes)
            body = np.empty(num_bytes, np.uint8).data if into is None else into[:num_bytes]
            channel.fill(body)
            done = True
        except CheckpointError as exc:
            raise CheckpointError(f"{self.peer}: '{header['verb']}': {exc}") from exc
        finally:
            if done:
                with self._lock:
                    self._idle.append(channel)
            else:
                channel.close()
        if "error" in answer:
            self.fenced = self.fenced or answer.get("fenced") is True
            raise CheckpointError(f"{self.peer}: {answer['error']}")
        return answer.get("fields", {}), body
