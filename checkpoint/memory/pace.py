"""Holds a stream of bytes to a rate: a bandwidth limit, or a slow link in tests and benchmarks.

Must not know: what the bytes are or where they go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

CATCH_UP_S = 0.02  # a sleep that lasted too long is made up for; time in which nothing was sent is not saved up


class Pace:
    """Bytes may pass at `bytes_per_s` (0: no limit). Threads that share a pace share the rate.

    It behaves as a link does: `spend(n)` returns when n more bytes have had the time to pass.
    """

    def __init__(
        self,
        bytes_per_s: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self._lifted = threading.Event()
        self._clock, self._sleep = clock, sleep or self._lifted.wait
        self._lock = threading.Lock()
        self._free_at = clock()

    def reserve(self, num_bytes: int) -> float:
        """Book the passage of bytes and return the seconds until they are through.

        Blocks: no
        """
        bytes_per_s = self.bytes_per_s  # once: it may be lifted meanwhile
        if bytes_per_s <= 0:
            return 0.0
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now - CATCH_UP_S) + num_bytes / bytes_per_s
            return max(self._free_at - now, 0.0)

    def lift(self) -> None:
        """Let everything pass at once from now on, also what waits."""
        self.bytes_per_s = 0.0
        self._lifted.set()

    def spend(self, num_bytes: int) -> float:
        """Wait until this many more bytes have had the time to pass; return the seconds waited.

        Blocks: host
        """
        seconds = self.reserve(num_bytes)
        if seconds > 0:
            self._sleep(seconds)
        return seconds
