"""SIGTERM and SIGINT as a wish: the first asks the run to stop after this step, a second one stops the process at once.

A thread reads the interpreter's wake-up pipe, so a second signal works even while the main thread is inside a C call
that waits for a dead peer. Must not know: steps, ranks, checkpoints.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import final

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar may have hidden it


def _leave_it_to_the_thread(signum: int, frame: FrameType | None) -> None:
    """Keep the default action from happening; the wake-up pipe already has the signal."""


def hold_signals() -> None:
    """Keep SIGTERM and SIGINT waiting until `StopSignals` handles them, so that none ends a process that is loading."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@final
class StopSignals:
    """Handle SIGTERM and SIGINT while the `with` block runs; outside the main thread, handle nothing.

    The same press of Ctrl-C often arrives twice (from the terminal and from a launcher that passes it on), so signals
    within `debounce_s` of the first count as the first. `at_once` hears of the first when it comes, in another thread.

    Invariant: after the block the previous handlers are back.
    """

    def __init__(
        self, *, announce: bool = True, debounce_s: float = 0.5, at_once: Callable[[int], object] | None = None
    ) -> None:
        self.announce = announce
        self.at_once = at_once
        self.debounce_s = debounce_s
        self._requested = 0
        self._since = 0.0
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> int:
        """The number of the first signal that came, 0 if none did."""
        return self._requested

    def request(self, signum: int = signal.SIGTERM) -> None:
        """Ask to stop as if the signal had come; a second call stops the process."""
        if not self._requested:
            self._since = time.monotonic()
            self._requested = signum
            if self.announce:
                name = signal.Signals(signum).name
                text = f"{name}: stopping after this step, with a checkpoint if they are on. Again: stop at once.\n"
                os.write(2, text.encode())
            if self.at_once is not None:
                self.at_once(signum)
        elif time.monotonic() - self._since >= self.debounce_s:
            if sys.stderr.isatty():
                os.write(2, SHOW_CURSOR)
            os._exit(128 + signum)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {s: signal.signal(s, _leave_it_to_the_thread) for s in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see `hold_signals`
        return self

    def _listen(self) -> None:
        while (byte := os.read(self._read, 1)) != b"":
            if byte[0] in SIGNALS:
                self.request(byte[0])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._previous:
            return
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # the reader sees the end of the pipe
        self._thread.join()
        os.close(self._read)
        self._previous = {}
