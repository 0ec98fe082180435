"""Keeps the actors of a job alive: they end themselves when nobody has spoken to them for their lease.

A thread of its own does it, because their controller waits for minutes at times: for the first import on a cold file
system, for a node that hangs. It ends with its controller. Must not know: what the actors do.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, final

import ray
from ray.exceptions import GetTimeoutError, RayError

from windlass.launch.supervisor import check_stop

BEAT_S = 1.0
LOOK_S = 0.1  # between looks whether somebody wants to stop meanwhile


@final
class Beats:
    """Calls `beat` of everybody once in BEAT_S from `begin` to `end`. `everybody` is asked by another thread."""

    def __init__(self, everybody: Callable[[], Iterable[Any]]) -> None:
        self._everybody = everybody
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            for handle in self._everybody():
                with contextlib.suppress(RayError):  # dead: whoever looks after it finds out
                    handle.beat.remote()


def get_unless_stopped(call: Any, timeout_s: float) -> Any:
    """Return what `ray.get` does.

    Blocks:      host, at most `timeout_s`
    Raises:      GetTimeoutError; whatever the call raised; Stopped, if waits were made interruptible
    """
    until = time.monotonic() + timeout_s
    while not ray.wait([call], timeout=max(min(LOOK_S, until - time.monotonic()), 0.0))[0]:
        check_stop()
        if time.monotonic() >= until:
            raise GetTimeoutError(f"no answer in {timeout_s:g} s")
    return ray.get(call)
