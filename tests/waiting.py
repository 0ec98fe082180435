"""Waits in tests for something that other threads bring about."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return once a condition holds. The timeout is for what never comes, however busy the machine.

    Raises: AssertionError if it never does
    """
    end, pause = time.perf_counter() + timeout_s, threading.Event()
    while not holds():
        assert time.perf_counter() < end, "what was waited for did not happen"
        pause.wait(0.001)
