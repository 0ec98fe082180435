"""A port for a server that begins later, in another process: free now, and most likely free then.

Must not know: what listens there.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
BELOW = 10_000
TRIES = 100


def free_port() -> int:
    """Return a TCP port that nobody has here, if possible one that the system gives only to those who ask for it.

    Any other might be somebody's before our server binds it: the system gives them to every connection that begins,
    and to every server that does not care.
    """
    lowest = _lowest_given_out()
    candidates = range(max(lowest - BELOW, 1024), lowest)
    for port in random.SystemRandom().sample(candidates, min(TRIES, len(candidates))):
        with contextlib.suppress(OSError):
            return _bind(port)
    return _bind(0)


def _lowest_given_out() -> int:
    """Return the first port that the system chooses by itself; 0 where it does not say."""
    try:
        return int(GIVEN_OUT.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _bind(port: int) -> int:
    with socket.socket() as probe:
        probe.bind(("", port))
        return int(probe.getsockname()[1])
