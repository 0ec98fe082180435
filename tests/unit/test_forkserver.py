"""Workers forked from a process that has imported everything behave as those started afresh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import until
from windlass.dist.errors import WorkerError
from windlass.launch.forkserver import Forked, ForkServer
from windlass.launch.local import WorkerCommand, send_to_group
from windlass.launch.supervisor import Stopped, StopRequests, interruptible


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(preload=["xxhash"])
    yield server
    server.close()


def ended(worker: Forked) -> int:
    until(lambda: worker.poll() is not None, timeout_s=60)
    assert worker.returncode is not None
    return worker.returncode


def run(server: ForkServer, code: str, payload: bytes = b"", **variables: str) -> tuple[int, str, str]:
    command = WorkerCommand(("-c", code), payload)
    worker = server.spawn(command, variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    result = ended(worker)
    assert worker.stdout is not None
    assert worker.stderr is not None
    return result, worker.stdout.read().decode(), worker.stderr.read().decode()


def test_a_worker_has_its_payload_environment_folder_streams_and_exit_code(server: ForkServer, tmp_path: Path) -> None:
    code = "import sys, os; print(sys.stdin.read(), os.environ['WHO'], 'xxhash' in sys.modules); sys.exit(7)"
    assert run(server, code, b"payload", WHO="me") == (7, "payload me True\n", "")
    command = WorkerCommand(("-c", "import os; print(os.getcwd())"))
    worker = server.spawn(command, {}, stdout=subprocess.PIPE, stderr=None, cwd=str(tmp_path))
    assert ended(worker) == 0
    assert worker.stdout is not None
    assert worker.stdout.read().decode().strip() == str(tmp_path)


def test_an_exception_is_shown_and_a_module_runs_as_main(server: ForkServer) -> None:
    code, out, err = run(server, "1/0")
    assert (code, out) == (1, "")
    assert "ZeroDivisionError" in err
    worker = server.spawn(WorkerCommand(("-m", "windlass", "--version")), {}, stdout=subprocess.PIPE, stderr=None)
    assert ended(worker) == 0
    assert worker.stdout is not None
    assert worker.stdout.read().startswith(b"windlass ")


def test_a_killed_worker_is_reported_as_killed_and_is_alone_in_its_session(server: ForkServer) -> None:
    worker = server.spawn(WorkerCommand(("-c", "import time; time.sleep(600)")), {}, stdout=None, stderr=None)
    until(lambda: os.getsid(worker.pid) == worker.pid, timeout_s=60)
    worker.send_signal(signal.SIGKILL)
    assert ended(worker) == -signal.SIGKILL


def test_workers_die_with_their_server_and_the_next_one_is_served_again() -> None:
    server = ForkServer(preload=[])
    worker = server.spawn(WorkerCommand(("-c", "import time; time.sleep(600)")), {}, stdout=None, stderr=None)
    assert server._process is not None
    server._process.kill()
    assert ended(worker) == -signal.SIGKILL
    until(lambda: not _runs(worker.pid), timeout_s=60)
    try:
        assert run(server, "print('again')") == (0, "again\n", "")
    finally:
        server.close()


def test_who_asks_to_stop_does_not_wait_until_all_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_slow_module.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(str(tmp_path))
    server, stop = ForkServer(preload=["a_slow_module"]), StopRequests()
    threading.Timer(0.5, lambda: setattr(stop, "count", 1)).start()
    began = time.monotonic()
    try:
        with interruptible(stop), pytest.raises(Stopped):
            server.spawn(WorkerCommand(("-c", "pass")), {}, stdout=None, stderr=None)
        assert time.monotonic() - began < 60
        assert server._process is None, "it goes on importing"
    finally:
        server.close()


ORPHAN = """
import os, sys, time
from windlass.launch.local import die_with_parent
if os.fork() == 0:
    die = die_with_parent()
    parent = os.getpid()
    if os.fork() == 0:
        while os.getppid() == parent:
            time.sleep(0.01)
        die()
        open(sys.argv[1], "w").close()
    os._exit(0)
os.wait()
"""


def test_a_child_whose_parent_has_died_before_the_kernel_ties_them_does_not_live_on(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path / "alive")], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and done.stdout == b""  # read to its end: the orphan has ended too
    assert not (tmp_path / "alive").exists()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_that_cannot_import_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    server = ForkServer(preload=["no_such_module"])
    with pytest.raises(WorkerError, match="has ended"):
        server.spawn(WorkerCommand(("-c", "pass")), {}, stdout=None, stderr=None)
    assert "no_such_module" in capfd.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_ended_unheard_can_be_signalled(server: ForkServer, monkeypatch, signum) -> None:
    worker = server.spawn(WorkerCommand(("-c", "pass")), {}, stdout=None, stderr=None)
    until(lambda: not Path(f"/proc/{worker.pid}").exists(), timeout_s=60)
    monkeypatch.setattr(server, "exit_code", lambda pid: None)  # the word of its end is on its way
    send_to_group(worker, signum)
    monkeypatch.undo()
    assert ended(worker) == 0


def test_an_environment_that_is_too_large_is_refused_and_leaves_nothing_open(server: ForkServer) -> None:
    run(server, "pass")
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WorkerError, match="the environment of a worker has"):
        run(server, "pass", LARGE="x" * (1 << 20))
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_full_disk_behind_the_output_does_not_change_how_a_worker_ended(server: ForkServer) -> None:
    code = "import sys; sys.stdout = open('/dev/full', 'w'); sys.stdout.write('lost'); sys.exit(7)"
    assert run(server, code)[0] == 7
