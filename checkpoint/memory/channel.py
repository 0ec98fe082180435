"""One authenticated connection between two snapshot processes, or a snapshot process and a trainer: frames over TCP.

    frame      magic (4 bytes), length of the header (u32), length of the payload (u64), header (JSON), payload
    handshake  server: magic, nonce; client: magic, nonce, proof; server: proof

A proof is an HMAC over both nonces and the job, so the token never travels, a recorded handshake is of no use, and
neither side parses anything of a peer that does not know the token. Lengths are checked before memory is taken;
headers are JSON objects, nothing is unpickled. Every wait has a deadline: a peer that sends a byte a second is cut off
like one that sends none. Must not know: verbs, generations, segments.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from windlass.dist.errors import CheckpointError

MAGIC = b"WLM1"
HEAD = struct.Struct("<4sIQ")
NONCE_BYTES = PROOF_BYTES = 32
MAX_HEADER = 1 << 20
SLOWEST = 1 << 20  # bytes/s: what a frame is given beside the timeout

Buffer = bytes | bytearray | memoryview
Token = str | Callable[[], str]


class Channel:
    """A connected socket that speaks frames. One thread at a time."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self.socket, self.timeout_s = connection, timeout_s
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose machine is gone without a word is noticed although nobody sends.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def close(self) -> None:
        """End the connection; a thread that is blocked in it wakes."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.socket.close()  # the peer was faster
        else:
            self.socket.close()

    def send(self, header: dict[str, Any], payload: Buffer | None = None) -> None:
        """Send one frame, the payload straight from its buffer.

        Raises: CheckpointError if the header is too large, OSError if the peer is gone or too slow
        """
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > MAX_HEADER:
            raise CheckpointError(f"a message of {len(text)} bytes of JSON: at most {MAX_HEADER}; use the payload")
        body = memoryview(payload if payload is not None else b"").cast("B")
        head = HEAD.pack(MAGIC, len(text), body.nbytes) + text
        deadline = time.monotonic() + self.timeout_s + body.nbytes / SLOWEST
        self._wait_at_most(deadline)
        sent = self.socket.sendmsg([head, body])
        if sent < len(head):
            self.socket.sendall(head[sent:])
            sent = len(head)
        while sent - len(head) < body.nbytes:
            self._wait_at_most(deadline)
            sent += self.socket.send(body[sent - len(head) :])

    def receive(self, timeout_s: float, max_payload: int) -> tuple[dict[str, Any], int]:
        """Wait for a frame and read its header; return it and the length of the payload, to be read with `fill`.

        Raises: CheckpointError if it is no frame or too large (nothing of it may be read then), OSError
        """
        head = bytearray(HEAD.size)
        self._wait_at_most(time.monotonic() + timeout_s)
        first = self.socket.recv_into(head)
        if first == 0:
            raise ConnectionError("the peer closed the connection")
        deadline = time.monotonic() + self.timeout_s
        self._fill(memoryview(head)[first:], deadline)
        magic, header_bytes, payload_bytes = HEAD.unpack(head)
        if magic != MAGIC:
            raise CheckpointError("garbage instead of a frame")
        if header_bytes > MAX_HEADER:
            raise CheckpointError(f"header too large: {header_bytes} bytes, at most {MAX_HEADER}")
        if payload_bytes > max_payload:
            raise CheckpointError(f"payload too large: {payload_bytes} bytes, at most {max_payload}")
        text = bytearray(header_bytes)
        self._fill(memoryview(text), deadline)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise CheckpointError("garbage instead of a JSON header") from exc
        if not isinstance(header, dict):
            raise CheckpointError("garbage instead of a JSON object")
        return header, payload_bytes

    def fill(self, buffer: memoryview) -> None:
        """Read exactly as many bytes as the buffer holds, into it."""
        self._fill(buffer, time.monotonic() + self.timeout_s + buffer.nbytes / SLOWEST)

    def _fill(self, buffer: memoryview, deadline: float) -> None:
        got = 0
        while got < buffer.nbytes:
            self._wait_at_most(deadline)
            count = self.socket.recv_into(buffer[got:])
            if count == 0:
                raise ConnectionError("the peer closed the connection in the middle of a message")
            got += count

    def _wait_at_most(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the peer is too slow")
        self.socket.settimeout(left)

    def admit(self, token: Token, job: str) -> None:
        """Take the server's part in the handshake.

        Raises: CheckpointError if the peer does not prove that it knows the token and the job, OSError
        """
        own = secrets.token_bytes(NONCE_BYTES)
        deadline = time.monotonic() + self.timeout_s
        self._wait_at_most(deadline)
        self.socket.sendall(MAGIC + own)
        answer = bytearray(len(MAGIC) + NONCE_BYTES + PROOF_BYTES)
        self._fill(memoryview(answer), deadline)
        magic, nonce, proof = answer[:4], bytes(answer[4 : 4 + NONCE_BYTES]), answer[4 + NONCE_BYTES :]
        key = _key(token)
        if magic != MAGIC or not hmac.compare_digest(proof, _proof(key, b"client", own, nonce, job)):
            raise CheckpointError("wrong token or job")
        self.socket.sendall(_proof(key, b"server", own, nonce, job))

    def introduce(self, token: Token, job: str) -> None:
        """Take the client's part in the handshake.

        Raises: CheckpointError if one side does not know the token and the job, OSError
        """
        deadline = time.monotonic() + self.timeout_s
        hello = bytearray(len(MAGIC) + NONCE_BYTES)
        self._fill(memoryview(hello), deadline)
        if hello[:4] != MAGIC:
            raise CheckpointError("it is no snapshot process")
        key, own, nonce = _key(token), secrets.token_bytes(NONCE_BYTES), bytes(hello[4:])
        self.socket.sendall(MAGIC + own + _proof(key, b"client", nonce, own, job))
        proof = bytearray(PROOF_BYTES)
        try:
            self._fill(memoryview(proof), deadline)
        except ConnectionError as exc:
            raise CheckpointError(f"it has another token, or is not of job {job}") from exc
        if not hmac.compare_digest(proof, _proof(key, b"server", nonce, own, job)):
            raise CheckpointError(f"it does not know the token of job {job}")


def _key(token: Token) -> bytes:
    return (token if isinstance(token, str) else token()).encode()


def _proof(key: bytes, side: bytes, server_nonce: bytes, client_nonce: bytes, job: str) -> bytes:
    """Prove a side of the handshake; the side is part of it, so that a proof cannot be sent back as one's own."""
    return hmac.digest(key, b"windlass" + side + server_nonce + client_nonce + job.encode(), hashlib.sha256)
