"""Unix-domain sockets between the processes of one host: small framed messages, and file descriptors beside them.

Addresses are abstract names with a random part, told to the peers through the rendezvous; who connects is checked by
user id. Sending never blocks: what the kernel does not take at once is queued and goes out with the next `pump`.
A peer that ends shows as the end of its stream, at once.
Must not know: operations, shared memory.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from windlass.dist.errors import CommError

READY, STEP, BYE, LETTER, FREE, REFUSED = 1, 2, 3, 4, 5, 6
_FRAME = struct.Struct("<BBIIIII")  # type, carries a descriptor, group, op, level, signature bytes, payload bytes
_HELLO = struct.Struct("<I")
_READ_BYTES = 1 << 18
_UNREAD_BYTES = 2 << 20  # the kernel holds this much for a peer that does not read, or what the system allows
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Message(NamedTuple):
    """READY says what a group's operation `seq` is, STEP the `level` it has reached.

    A LETTER carries a point-to-point message, or says in which slot of shared memory it is (`level`); FREE gives the
    slot back; REFUSED tells a sender that it is not what the receiver wants.
    """

    kind: int
    group: int
    seq: int
    level: int = 0
    signature: bytes = b""
    payload: bytes = b""
    fd: int | None = None


class Link:
    """One stream to one peer, with what is not yet sent and what is not yet a whole message."""

    def __init__(self, peer: int, sock: socket.socket) -> None:
        self.peer, self.sock = peer, sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
        self.unsent: deque[tuple[memoryview, int | None]] = deque()
        self.received = bytearray()
        self.fds: deque[int] = deque()
        self.polite = False
        self.open = True

    def flush(self) -> None:
        """Give the kernel as much as it takes now."""
        try:
            while self.unsent:
                data, fd = self.unsent[0]
                ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
                sent = self.sock.sendmsg([data], ancillary)
                if fd is not None:
                    os.close(fd)
                if sent == len(data):
                    self.unsent.popleft()
                else:
                    self.unsent[0] = (data[sent:], None)
        except BlockingIOError:
            return
        except OSError:
            self.unsent.clear()  # the peer is gone; its last messages and the end of its stream are still to be read

    def read(self) -> list[Message]:
        """Take everything that has arrived; mark the link closed at the end of the stream."""
        try:
            while True:
                data, ancillary, _, _ = self.sock.recvmsg(
                    _READ_BYTES, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
                for _, _, packed in ancillary:
                    self.fds.extend(struct.unpack(f"{len(packed) // 4}i", packed))
                if not data:
                    self.open = False
                    break
                self.received += data
                if len(data) < _READ_BYTES // 2 and not ancillary:
                    break
        except BlockingIOError:
            return self._parse()
        except OSError:
            self.open = False
        return self._parse()

    def _parse(self) -> list[Message]:
        out, at, view = [], 0, memoryview(self.received)
        while len(view) - at >= _FRAME.size:
            kind, has_fd, group, seq, level, num_signature, num_payload = _FRAME.unpack_from(view, at)
            end = at + _FRAME.size + num_signature + num_payload
            if end > len(view):
                break
            body = at + _FRAME.size
            signature, payload = bytes(view[body : body + num_signature]), bytes(view[body + num_signature : end])
            out.append(Message(kind, group, seq, level, signature, payload, self.fds.popleft() if has_fd else None))
            at = end
        view.release()
        del self.received[:at]
        return out

    def close(self) -> None:
        self.open = False
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


class Listener:
    """An address under which peers of this host can connect, before it is known who they are."""

    def __init__(self, backlog: int) -> None:
        self.address = f"windlass-{secrets.token_hex(16)}"
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.bind("\0" + self.address)
        self.sock.listen(backlog)


class Links:
    """The streams of this process to all peers on its host."""

    def __init__(self, rank: int, links: dict[int, Link]) -> None:
        self.rank, self.links = rank, links
        self.deliver: Callable[[int, Message], None] = lambda peer, message: None
        self._poll = select.poll()
        self._by_fd = {link.sock.fileno(): link for link in links.values()}
        self._mask = dict.fromkeys(self._by_fd, select.POLLIN)
        for fd in self._by_fd:
            self._poll.register(fd, select.POLLIN)

    @staticmethod
    def connect(rank: int, addresses: dict[int, str], listener: Listener, timeout_s: float) -> Links:
        """Connect to every peer: towards lower ranks, from higher ones.

        Collective: every rank of the host
        Blocks: host
        Raises: CommError naming the peers that did not come, or the stranger who did.
        """
        start = time.monotonic()
        links: dict[int, Link] = {}
        try:
            for peer in sorted(p for p in addresses if p < rank):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.settimeout(timeout_s)
                sock.connect("\0" + addresses[peer])
                _check_user(sock, f"rank {peer}")
                sock.sendall(_HELLO.pack(rank))
                links[peer] = Link(peer, sock)
            while len(links) < len(addresses):
                listener.sock.settimeout(max(timeout_s - (time.monotonic() - start), 0.001))
                sock, _ = listener.sock.accept()
                _check_user(sock, "a process that connected")
                sock.settimeout(timeout_s)
                (peer,) = _HELLO.unpack(sock.recv(_HELLO.size, socket.MSG_WAITALL))
                links[peer] = Link(peer, sock)
        except (OSError, struct.error) as error:
            missing = sorted(set(addresses) - set(links))
            raise CommError(
                f"rank {rank}: ranks {missing} of this host did not connect within {time.monotonic() - start:.0f} s: "
                f"{error}. parallelism.transport=group does without these connections"
            ) from error
        finally:
            listener.sock.close()
        for link in links.values():
            link.sock.setblocking(False)
        return Links(rank, links)

    def send(self, peer: int, message: Message) -> None:
        """Send, or queue what the kernel does not take now. A descriptor is duplicated.

        Blocks: no
        """
        link = self.links[peer]
        if not link.open:
            return
        head = _FRAME.pack(
            message.kind,
            message.fd is not None,
            message.group,
            message.seq,
            message.level,
            len(message.signature),
            len(message.payload),
        )
        fd = None if message.fd is None else os.dup(message.fd)
        link.unsent.append((memoryview(head + message.signature + message.payload), fd))
        link.flush()
        self._watch(link)

    def pump(self, timeout_s: float) -> bool:
        """Move bytes both ways, waiting at most `timeout_s` for something to happen; return whether it did.

        Blocks: host
        """
        events = self._poll.poll(max(timeout_s, 0.0) * 1000)
        for fd, event in events:
            link = self._by_fd[fd]
            if event & select.POLLOUT:
                link.flush()
            if event & ~select.POLLOUT:
                for message in link.read():
                    if message.kind == BYE:
                        link.polite = True
                    else:
                        self.deliver(link.peer, message)
            self._watch(link)
        return bool(events)

    def _watch(self, link: Link) -> None:
        fd = link.sock.fileno()
        wanted = select.POLLIN | (select.POLLOUT if link.unsent else 0) if link.open else 0
        if fd in self._mask and wanted != self._mask[fd]:
            if wanted:
                self._poll.modify(fd, wanted)
                self._mask[fd] = wanted
            else:
                self._poll.unregister(fd)
                del self._mask[fd]

    def lost(self) -> list[int]:
        """Return the peers that ended without saying good-bye."""
        return [peer for peer, link in self.links.items() if not link.open and not link.polite]

    def left(self) -> list[int]:
        """Return the peers whose stream has ended, either way."""
        return [peer for peer, link in self.links.items() if not link.open]

    def close(self, timeout_s: float = 5.0) -> None:
        """Say good-bye, send what is queued, and close."""
        end = time.monotonic() + timeout_s
        for peer in self.links:
            self.send(peer, Message(BYE, 0, 0))
        while any(link.open and link.unsent for link in self.links.values()) and time.monotonic() < end:
            self.pump(end - time.monotonic())
        self.abandon()

    def abandon(self) -> None:
        """Close without a word: what a forked child must do, or it would hide the end of its parent."""
        for link in self.links.values():
            link.close()
        self._mask.clear()


def _check_user(sock: socket.socket, who: str) -> None:
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.getuid():
        raise CommError(f"{who} belongs to user {uid}, this process to user {os.getuid()}: shared memory is refused")
