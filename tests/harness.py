"""Runs a function on a fresh world of ranks for a test: a server process that has already imported torch forks them.

    def total(comm, start):
        ...
    assert run_world(2, total, 5) == [11, 11]

Ranks meet through a FileStore in a temporary folder, with one thread each. A world has a deadline, at which the
stacks of all ranks are printed and the world is thrown away. `outcomes` returns what became of each rank; `run_world`
raises the first cause. The function must be at the top of a test file, and arguments and results must pickle.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import inspect
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORLD_S = 150.0  # pytest's own patience is longer
COMM_S = 60.0
GRACE_S = 60.0  # after one rank failed, the others get this long to notice
STACKS_S = 30.0  # only a rank that is stopped takes so long
LOOK_S = 0.02  # between looks for the file that ends a world


class WorldError(AssertionError):
    """A rank died without an exception, or the world ran past its deadline."""


@dataclass
class Outcome:
    """What became of one rank."""

    rank: int
    value: Any = None
    error: BaseException | None = None
    text: str = ""  # the traceback, or how it died, or its stacks at the deadline
    at: float = float("inf")  # when it failed, seconds since the epoch


@dataclass
class Request:
    num_ranks: int
    file: str
    module: str
    function: str
    args: bytes
    timeout_s: float
    transport: str
    with_env: bool
    comm_timeout_s: float
    env: dict[str, str] = field(default_factory=dict)
    ends: str = ""


def run_world(
    num_ranks: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = WORLD_S,
    transport: str = "auto",
    env: dict[str, str] | None = None,
    with_env: bool = False,
    comm_timeout_s: float = COMM_S,
) -> list[Any]:
    """Call `fn(comm, *args)` on every rank of a fresh world and return the results by rank.

    `with_env=True` calls `fn(process_env, *args)` instead and starts no comm. `env` is added to a rank's environment.
    Raises: the first cause among the ranks, from a WorldError that shows all of them.
    """
    found = outcomes(
        num_ranks,
        fn,
        *args,
        timeout_s=timeout_s,
        transport=transport,
        env=env,
        with_env=with_env,
        comm_timeout_s=comm_timeout_s,
    )
    # A lost peer is a consequence: whatever else went wrong comes first.
    failed = sorted(
        (o for o in found if o.error is not None), key=lambda o: (type(o.error).__name__ == "CommError", o.at)
    )
    if failed:
        first = failed[0].error
        assert first is not None
        raise first from WorldError("\n".join(f"--- rank {o.rank} ---\n{o.text}" for o in failed))
    return [o.value for o in found]


def outcomes(
    num_ranks: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = WORLD_S,
    transport: str = "auto",
    env: dict[str, str] | None = None,
    with_env: bool = False,
    comm_timeout_s: float = COMM_S,
    ends: Path | None = None,
) -> list[Outcome]:
    """Like `run_world`, but return what became of every rank, errors included.

    `ends`: a file at whose appearance the deadline has come, whatever the clock says.
    """
    file = inspect.getsourcefile(fn)
    assert file is not None and "." not in fn.__qualname__, f"{fn.__qualname__} must be at the top of a test file"
    request = Request(
        num_ranks,
        file,
        fn.__module__,
        fn.__qualname__,
        pickle.dumps(args),
        timeout_s,
        transport,
        with_env,
        comm_timeout_s,
        dict(env or {}),
        str(ends or ""),
    )
    return _server().ask(request)


class _Server:
    """The client's end of the fork-server of this test session."""

    def __init__(self) -> None:
        environ = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.path.append('tests'); from tests.harness import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            cwd=ROOT,
        )
        atexit.register(self.stop)

    def ask(self, request: Request) -> list[Outcome]:
        assert self.process.stdin is not None and self.process.stdout is not None
        _write_frame(self.process.stdin, pickle.dumps(vars(request)))
        reply = _read_frame(self.process.stdout)
        if reply is None:
            raise WorldError("the fork-server of the test harness ended")
        out = []
        for rank, body in enumerate(pickle.loads(reply)):
            at, value, error, text = pickle.loads(body)
            out.append(Outcome(rank, value, error, text, at))
        return out

    def stop(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


_servers: list[_Server] = []


def _server() -> _Server:
    if _servers and _servers[0].process.poll() is not None:
        _servers.clear()
    if not _servers:
        _servers.append(_Server())
    return _servers[0]


def _write_frame(pipe: Any, body: bytes) -> None:
    pipe.write(struct.pack("<Q", len(body)) + body)
    pipe.flush()


def _read_frame(pipe: Any) -> bytes | None:
    head = pipe.read(8)
    return pipe.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None


def serve() -> None:
    """Fork one world per request, until the test session closes the pipe. Runs in the server process."""
    import pytest  # noqa: F401
    import torch

    # Imported once, here, so that every forked rank already has them.
    import torch.fx.experimental.symbolic_shapes  # the first autograd.grad of a process imports it

    import windlass.checkpoint.save
    import windlass.dist.comm
    import windlass.parallel.engine  # noqa: F401

    torch.set_num_threads(1)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever ranks print must not end up among the replies
    while (body := _read_frame(requests)) is not None:
        request = Request(**pickle.loads(body))
        with tempfile.TemporaryDirectory(prefix="windlass-test-") as folder:
            _write_frame(replies, pickle.dumps(_run(request, Path(folder))))


def _run(request: Request, folder: Path) -> list[bytes]:
    pids = {}
    for rank in range(request.num_ranks):
        pid = os.fork()
        if pid == 0:
            _rank_main(request, rank, folder)
        pids[rank] = pid
    died = _wait(request, pids, folder)
    out = []
    for rank in range(request.num_ranks):
        result = folder / f"result-{rank}"
        if result.exists():
            out.append(result.read_bytes())
        else:
            how, at = died[rank]
            stacks = (folder / f"stacks-{rank}").read_text()
            out.append(pickle.dumps((at, None, WorldError(f"rank {rank} {how}"), f"rank {rank} {how}\n{stacks}")))
    return out


def _wait(request: Request, pids: dict[int, int], folder: Path) -> dict[int, tuple[str, float]]:
    """Wait for all ranks; at the deadline take their stacks and kill them. Return how and when each ended."""
    died: dict[int, tuple[str, float]] = {}
    deadline = time.monotonic() + request.timeout_s
    with selectors.DefaultSelector() as selector:
        for rank, pid in pids.items():
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, rank)
        while selector.get_map():
            if request.ends and os.path.exists(request.ends):
                deadline = min(deadline, time.monotonic())
            left = max(deadline - time.monotonic(), 0.0)
            ready = selector.select(min(left, LOOK_S) if request.ends else left)
            for key, _ in ready:
                rank = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                died[rank] = how, time.time()
                selector.unregister(key.fileobj)
                os.close(key.fd)
                if code != 0:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            if not ready and time.monotonic() >= deadline:
                late = list(selector.get_map().values())
                _take_stacks([pids[key.data] for key in late], [key.fd for key in late])
                for key in late:
                    os.kill(pids[key.data], signal.SIGKILL)
                    os.waitpid(pids[key.data], 0)
                    died[key.data] = f"was still running at the deadline of {request.timeout_s:.0f} s", time.time()
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
    return died


def _take_stacks(pids: list[int], pidfds: list[int]) -> None:
    """Have every rank write its stacks, which ends it: only an ended rank has surely written all of them."""
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    end = time.monotonic() + STACKS_S
    with selectors.DefaultSelector() as selector:
        for pidfd in pidfds:
            selector.register(pidfd, selectors.EVENT_READ)
        while selector.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                selector.unregister(key.fileobj)


def _rank_main(request: Request, rank: int, folder: Path) -> None:
    code = 1
    try:
        stacks = open(folder / f"stacks-{rank}", "w")  # noqa: SIM115  (open as long as the process lives)
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True, chain=True)  # and then the signal ends it
        os.environ.update(request.env)
        at, value, error, text = float("inf"), None, None, ""
        try:
            value = _call(request, rank, folder)
        except BaseException as caught:
            at, error, text = time.time(), caught, traceback.format_exc()
        (folder / f"partial-{rank}").write_bytes(_pickled(at, value, error, text, rank))
        (folder / f"partial-{rank}").rename(folder / f"result-{rank}")
        code = 0 if error is None else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def _call(request: Request, rank: int, folder: Path) -> Any:
    from windlass.dist.comm import Comm
    from windlass.dist.device import Device
    from windlass.dist.env import ProcessEnv

    n = request.num_ranks
    env = ProcessEnv(rank, rank, n, n, 0, rendezvous=f"file://{folder}/store", launcher="local")
    os.environ.update(env.variables())
    function = getattr(_load(request), request.function)
    args = pickle.loads(request.args)
    if request.with_env:
        return function(env, *args)
    with Comm.start(env, Device("cpu"), transport=request.transport, timeout_s=request.comm_timeout_s) as comm:
        return function(comm, *args)


def _load(request: Request) -> ModuleType:
    """Load the test file by path, under the name it has in the test session."""
    name = request.module if request.module != "__main__" else "world_main"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, request.file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _pickled(at: float, value: Any, error: BaseException | None, text: str, rank: int) -> bytes:
    """Pickle a rank's result, or say why that is not possible."""
    try:
        body = pickle.dumps((at, value, error, text))
        pickle.loads(body)
        return body
    except (pickle.PickleError, TypeError, AttributeError, ImportError, ValueError, RuntimeError) as problem:
        what = f"rank {rank} returned or raised something that does not pickle ({problem}): {value!r} {error!r}"
    return pickle.dumps((min(at, time.time()), None, WorldError(what), f"{what}\n{text}"))
