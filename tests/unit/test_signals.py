"""Stop signals: the first is a wish, the second is obeyed at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.waiting import until
from windlass.launch.signals import SIGNALS, StopSignals


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_signal_is_remembered_and_raises_nothing(
    signum: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignals(debounce_s=600.0) as signals:  # however late the second one is heard
        assert signals.requested == 0
        os.kill(os.getpid(), signum)
        until(lambda: signals.requested != 0, 60.0)
        os.kill(os.getpid(), signum)  # at once: the same press, passed on by a launcher
        assert signals.requested == signum
    assert capfd.readouterr().err.startswith(f"{signum.name}: stopping after this step")


def test_previous_handlers_and_wakeup_pipe_are_back_afterwards() -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with StopSignals(announce=False):
        assert [signal.getsignal(s) for s in SIGNALS] != before
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert all(thread.name != "stop-signals" for thread in threading.enumerate())


def test_outside_the_main_thread_nothing_is_installed_and_a_request_still_counts() -> None:
    seen: list[int] = []

    def work() -> None:
        with StopSignals(announce=False) as signals:
            signals.request()
            seen.append(signals.requested)

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


STUCK = """
from windlass.launch.signals import StopSignals
with StopSignals(debounce_s=0.0) as signals:
    print("ready", flush=True)
    while not signals.requested:
        pass
    print("asked", flush=True)
    sum(1 for _ in iter(int, 1))  # never ends
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_stuck_process_with_the_usual_exit_code(signum: signal.Signals, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signum)
    assert process.wait(timeout=60) == code
    process.communicate()
