"""Starts workers by forking a process that has imported everything already: tenths of a second instead of seconds.

One server per launcher (or per Ray actor). It imports torch and Windlass, touches no device and starts no thread, and
forks a child for every request; memory of what was imported is shared between the children. The server dies with its
launcher and the children with the server, so nothing outlives a run.
Must not know: what a worker computes, when one is started again.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any, NoReturn, final

from windlass.dist import env
from windlass.dist.errors import WorkerError
from windlass.launch.local import WorkerCommand, die_with_parent, import_path
from windlass.launch.supervisor import Stopped, check_stop

PRELOADED = (
    "torch",
    "windlass.launch.worker",
    "windlass.launch.run",
    # Imported when first used otherwise: by torch's first forward, most of a second,
    "torch.fx.experimental.symbolic_shapes",
    # by the first snapshot and its state of generators, and by the first address.
    "numpy.random",
    "torch.utils.serialization",
    "encodings.idna",
)
REQUEST_BYTES = 1 << 20
ANSWER_S = 120.0  # the first answer comes when everything is imported
LOOK_S = 0.1  # between looks whether somebody wants to stop meanwhile


@final
class Forked:
    """A forked worker, with the part of `subprocess.Popen` that a launcher uses."""

    def __init__(self, server: ForkServer, pid: int, stdout: IO[bytes] | None, stderr: IO[bytes] | None) -> None:
        self._server, self.pid = server, pid
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code as `subprocess` does, None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.exit_code(self.pid)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # the server has reaped it, and its word is on its way
                os.kill(self.pid, signum)


@final
class ForkServer:
    """The launcher's end. For one thread, that of the launcher: the kernel ties the server's life to it.

    Raises:      WorkerError if the server cannot start or does not answer; Stopped if somebody asks to stop meanwhile
    """

    def __init__(self, preload: Sequence[str] = PRELOADED) -> None:
        self._preload = tuple(preload)
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._exits: dict[int, int] = {}

    def warm_up(self) -> None:
        """Start the server now, so that it imports while others work. Returns at once."""
        if self._process is None:
            self._start()

    def spawn(
        self,
        command: WorkerCommand,
        variables: Mapping[str, str],
        *,
        stdout: int | None,
        stderr: int | None,
        cwd: str | None = None,
    ) -> Forked:
        """Start a worker; arguments and result as of `launch.local.spawn`."""
        self.warm_up()
        assert self._socket is not None
        request = {
            "arguments": list(command.arguments),
            "environ": {**env.copy(), "PYTHONPATH": import_path(), **variables},
            "cwd": cwd or os.getcwd(),
        }
        data = json.dumps(request).encode()
        if len(data) > REQUEST_BYTES:
            raise WorkerError(
                f"the environment of a worker has {len(data)} bytes, at most {REQUEST_BYTES} can be passed"
            )
        ours: list[IO[bytes] | None] = []
        theirs = [_memory_file(command.payload)]
        for wish, inherited in ((stdout, 1), (stderr, 2)):
            mine, other = _stream(wish, inherited)
            ours.append(mine)
            theirs.append(other)
        try:
            socket.send_fds(self._socket, [data], theirs)
            pid = self._answer()
        except OSError as error:
            self.close()
            raise WorkerError(f"the process that starts workers has ended ({error}); see its output above") from error
        except Stopped:
            self.close()  # it would still fork what nobody waits for
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        return Forked(self, pid, ours[0], ours[1])

    def _start(self) -> None:
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.settimeout(LOOK_S)
        for end in (mine, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * REQUEST_BYTES)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "windlass.launch.forkserver", str(other.fileno()), *self._preload],
                env={**env.copy(), "PYTHONPATH": import_path()},
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        self._socket = mine

    def _answer(self) -> int:
        until = time.monotonic() + ANSWER_S
        while True:
            check_stop()
            try:
                message = self._receive()
            except TimeoutError:
                if time.monotonic() > until:
                    raise
                continue
            if "pid" in message:
                return int(message["pid"])
            self._note(message)

    def _receive(self) -> dict[str, Any]:
        assert self._socket is not None
        data = self._socket.recv(REQUEST_BYTES)
        if not data:
            raise ConnectionError("it closed the connection")
        return dict(json.loads(data))

    def _note(self, message: Mapping[str, int]) -> None:
        self._exits[message["ended"]] = message["code"]

    def exit_code(self, pid: int) -> int | None:
        """Return how a worker ended, None while it runs. Without a server it was killed with it."""
        while pid not in self._exits and self._socket is not None:
            self._socket.settimeout(0)
            try:
                self._note(self._receive())
            except BlockingIOError:
                break
            except OSError:
                self.close()
            finally:
                if self._socket is not None:
                    self._socket.settimeout(LOOK_S)
        if self._socket is None and pid not in self._exits:
            return -signal.SIGKILL
        return self._exits.pop(pid, None)

    def close(self) -> None:
        """End the server, and with it every worker that still runs."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _stream(wish: int | None, inherited: int) -> tuple[IO[bytes] | None, int]:
    """Return our end of a stream, if there is one, and the child's."""
    if wish == subprocess.PIPE:
        read, write = os.pipe2(os.O_CLOEXEC)
        return os.fdopen(read, "rb", buffering=0), write
    if wish == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    return None, os.dup(inherited)


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("windlass payload", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


# -- the server --------------------------------------------------------------------------------------------------------


def serve(control: socket.socket, preload: Sequence[str]) -> None:
    """Fork a child for every request until the launcher closes the connection."""
    for name in preload:
        importlib.import_module(name)
    gc.freeze()  # no child looks through all of it for garbage, and so copies every page of it
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is control:
                    data, fds, _, _ = socket.recv_fds(control, REQUEST_BYTES, 3)
                    if not data:
                        return
                    pid = _fork(control, json.loads(data), fds, [wake_read, wake_write])
                    for fd in fds:
                        os.close(fd)
                    control.send(json.dumps({"pid": pid}).encode())
                else:
                    os.read(wake_read, 4096)
                    _reap(control)


def _reap(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        control.send(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def _fork(control: socket.socket, request: Mapping[str, Any], fds: list[int], ours: list[int]) -> int:
    """Fork a worker and return its number; `ours`: what it must not keep.

    Invariant:   once this returns, the worker dies with this process, and signals to its group reach it
    """
    die = die_with_parent()
    done, doing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        if die is not None:
            die()
        os.setsid()
        for fd in (*ours, done, doing):
            os.close(fd)
        _become_worker(control, request, fds)
    os.close(doing)
    os.read(done, 1)  # until the child has closed its end, or is gone
    os.close(done)
    return pid


def _become_worker(control: socket.socket, request: Mapping[str, Any], fds: list[int]) -> NoReturn:
    """Run in the forked child what `python ARGUMENTS` would run, and end."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
            os.close(fd)
        env.replace_all(request["environ"])
        os.chdir(request["cwd"])
        for entry in reversed(request["environ"]["PYTHONPATH"].split(os.pathsep)):
            if entry not in sys.path:
                sys.path.insert(0, entry)
        code = _run(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk must not let this child go on as the server
                stream.flush()
        os._exit(code)


def _run(arguments: list[str]) -> int:
    """Run `-m MODULE ARGS...` or `-c CODE ARGS...`, as the interpreter would, and return the exit code."""
    kind, what, *rest = arguments
    try:
        sys.argv = [what if kind == "-m" else "-c", *rest]
        if kind == "-m":
            sys.modules.pop(what, None)  # imported ahead; run as the program it is a module of its own
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
