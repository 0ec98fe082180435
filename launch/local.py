"""Starts one training process per worker on this machine and watches them.

Must not know what a worker computes: it gets a command, an environment and a payload on its standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, TextIO

import psutil

from windlass.dist import env
from windlass.launch import lines
from windlass.launch.failure import ERROR_FILE, Exit, Failure, read_failure
from windlass.launch.supervisor import StopRequests, conclude, supervise

PR_SET_PDEATHSIG = 1
REAP_S = 0.05
KILL_S = 5.0  # the kernel ends a killed process within milliseconds, unless it waits for a device or a file


@dataclass(frozen=True)
class LaunchConfig:
    """How many workers a run has and how they are started and stopped. (torchrun and Slurm bring their own number)"""

    workers: int = field(
        default=1,
        metadata={"help": "worker processes (ranks) that `windlass train` or `windlass launch` starts", "ge": 1},
    )
    threads: int = field(
        default=0,
        metadata={"help": "CPU threads per worker (0: cores / workers of the machine)", "unit": "threads", "ge": 0},
    )
    grace_s: float = field(
        default=4.0,
        metadata={
            "help": "without a controller: after a worker failed, the others get this long from SIGTERM to SIGKILL",
            "unit": "s",
            "ge": 0,
            "le": 7,
        },
    )
    nodes: int = field(
        default=0,
        metadata={
            "help": "nodes with equally many workers each; without Ray and with `--ray local` this machine emulates "
            "them (0: this machine is one node; Ray chooses)",
            "ge": 0,
        },
    )
    spares: int = field(
        default=0,
        metadata={"help": "further emulated nodes that take the place of lost ones", "ge": 0},
    )
    all_ranks: bool = field(
        default=False, metadata={"help": "show the output of every worker, not only that of rank 0 and errors"}
    )


@dataclass(frozen=True)
class WorkerCommand:
    """What a worker process runs: arguments of the Python interpreter and bytes for its standard input."""

    arguments: tuple[str, ...]
    payload: bytes = b""


class WorkerProcess(Protocol):
    """The part of `subprocess.Popen` that a launcher uses."""

    pid: int

    @property
    def stdout(self) -> IO[bytes] | None: ...

    @property
    def stderr(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...

    def send_signal(self, signum: int) -> None: ...


class StartProcess(Protocol):
    """What starts a worker process: `spawn`, or something that has one ready."""

    def __call__(
        self, command: WorkerCommand, variables: Mapping[str, str], *, stdout: int | None, stderr: int | None
    ) -> WorkerProcess: ...


def num_cores() -> int:
    """Return the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_worker(config: LaunchConfig, local_workers: int, cores: int) -> int:
    """Return the CPU threads of each of `local_workers` workers that share a machine of so many cores."""
    return config.threads or max(1, cores // local_workers)


def spawn(
    command: WorkerCommand,
    variables: Mapping[str, str],
    *,
    stdout: int | None,
    stderr: int | None,
    cwd: str | None = None,
) -> subprocess.Popen[bytes]:
    """Start a worker that dies with this process and has this process's import path.

    Invariant:   call from a thread that lives as long as the worker shall: the kernel ties them to each other
    """
    process = subprocess.Popen(
        [sys.executable, *command.arguments],
        env={**env.copy(), "PYTHONPATH": import_path(), **variables},
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        start_new_session=True,  # Ctrl-C reaches only the launcher, which asks the workers once
        preexec_fn=die_with_parent(),
    )
    assert process.stdin is not None
    try:
        process.stdin.write(command.payload)
        process.stdin.close()
    except BrokenPipeError:
        process.stdin = None  # it ended before it read: its exit code tells
    return process


def import_path() -> str:
    """Return this process's import path, for a child's PYTHONPATH."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def die_with_parent() -> Callable[[], None] | None:
    """Return what a child of this process runs first so that the kernel kills it when its parent dies (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    parent = os.getpid()
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded before the fork: a forked child must not load libraries

    def die() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel knew
            os._exit(1)

    return die


def send_to_group(process: WorkerProcess, signum: int) -> None:
    """Signal a worker and, when it is killed, everything it started."""
    if process.poll() is not None:
        return
    if signum == signal.SIGKILL:
        with contextlib.suppress(ProcessLookupError):  # somebody else has reaped it, and will say so
            os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)


def does_not_end(pid: int) -> str:
    """Say of a process that it was killed in vain, and what it waits for as far as the kernel tells."""
    state = "gone"
    with contextlib.suppress(psutil.Error):
        state = psutil.Process(pid).status()
    return f"process {pid} has been killed and does not end (state: {state})"


class LineReader:
    """Cuts the bytes of several pipes into lines as they come."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._rest: dict[int, bytes] = {}
        self.ended = 0  # watched processes that have ended

    def add(self, pipe: int, put: Callable[[str], None]) -> None:
        """Call `put` with every line that arrives on a file descriptor."""
        os.set_blocking(pipe, False)
        self._selector.register(pipe, selectors.EVENT_READ, put)
        self._rest[pipe] = b""

    def watch(self, process: WorkerProcess) -> None:
        """Let `pump` return as soon as a process ends, not only when it next looks."""
        with contextlib.suppress(OSError, AttributeError):  # gone already, or no Linux: `pump` is only slower then
            handle = os.pidfd_open(process.pid)
            self._selector.register(handle, selectors.EVENT_READ, None)

    def pump(self, timeout_s: float) -> bool:
        """Pass on what has arrived, waiting at most `timeout_s` for it, and return whether there was something."""
        if not self._selector.get_map():
            time.sleep(timeout_s)
            return False
        ready = [key for key, _ in self._selector.select(timeout_s)]
        lines_arrived = False
        for key in ready:
            if key.data is None:
                self._selector.unregister(key.fd)
                os.close(key.fd)
                self.ended += 1
                continue
            lines_arrived = True
            arrived = os.read(key.fd, 1 << 16)
            *lines, self._rest[key.fd] = (self._rest[key.fd] + arrived).split(b"\n")
            if not arrived:
                lines.append(self._rest.pop(key.fd))
                self._selector.unregister(key.fd)
            for line in lines:
                if line or arrived:
                    key.data(line.decode(errors="replace"))
        return lines_arrived

    def drain(self) -> None:
        """Pass on everything that has arrived."""
        while self.pump(0):
            continue

    def close(self) -> None:
        """Forget everything that is still watched."""
        for key in list(self._selector.get_map().values()):
            if key.data is None:
                os.close(key.fd)
        self._selector.close()


def local_identities(config: LaunchConfig, folder: Path) -> list[env.ProcessEnv]:
    """Return who the workers of a run on this machine are, when nothing is said about nodes and generations."""
    return [
        env.ProcessEnv(
            rank=rank,
            local_rank=rank,
            world_size=config.workers,
            local_world_size=config.workers,
            rendezvous=f"file://{folder}/store",
            launcher="local",
        )
        for rank in range(config.workers)
    ]


class LocalWorkers:
    """The workers of a run on this machine. Rank 0 writes to our output; errors of the others carry their rank.

    `start_process` takes the place of `spawn`; `explain` says why a rank was killed that could not say so itself.
    """

    def __init__(
        self,
        command: WorkerCommand,
        config: LaunchConfig,
        folder: Path,
        identities: Sequence[env.ProcessEnv] = (),
        variables: Mapping[str, str] | None = None,
        start_process: StartProcess | None = None,
        explain: Callable[[int], Failure | None] = lambda rank: None,
    ) -> None:
        who = identities or local_identities(config, folder)
        self.num_workers = len(who)
        self._folder = folder
        self._reader = LineReader()
        self._processes: dict[int, WorkerProcess] = {}
        self._nodes = {me.rank: me.node or "this machine" for me in who}
        self._killed: dict[int, float] = {}  # by rank: when it was first
        self._left: list[Exit] = []
        self._reaped = 0
        self._explain = explain
        threads = {"OMP_NUM_THREADS": str(threads_per_worker(config, config.workers, num_cores()))}
        for me in who:
            report = {ERROR_FILE: str(self._report(me.rank))}
            given = me.variables() | threads | report | dict(variables or {})
            self._processes[me.rank] = self._start(me.rank, command, given, config.all_ranks, start_process or spawn)

    def _start(
        self, rank: int, command: WorkerCommand, variables: Mapping[str, str], all_ranks: bool, start: StartProcess
    ) -> WorkerProcess:
        stdout, stderr = streams_of(rank, all_ranks)
        process = start(command, variables, stdout=stdout, stderr=stderr)
        for pipe, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if pipe is not None:
                self._reader.add(pipe.fileno(), prefixed(rank, target))
        self._reader.watch(process)
        return process

    def _report(self, rank: int) -> Path:
        return self._folder / f"failure-{rank}.json"

    def wait(self, timeout_s: float) -> list[Exit]:
        """Pass on output and return the workers that ended since the last call."""
        self._reader.pump(0 if self._left else timeout_s)
        exits, self._left = self._left + self._ended(), []
        until = time.monotonic() + REAP_S
        while self._reader.ended > self._reaped and not exits and time.monotonic() < until:
            time.sleep(0.001)  # whoever started it learns its exit code a moment after its end is seen
            exits = self._ended()
        return exits

    def _ended(self) -> list[Exit]:
        exits = []
        for rank, process in list(self._processes.items()):
            code = process.poll()
            if code is not None:
                del self._processes[rank]
                self._reaped += 1
                self._reader.drain()
                failure = read_failure(self._report(rank)) or (self._explain(rank) if code else None)
                exits.append(Exit(rank, code, time.time(), failure, stopped=False))
        return exits

    def send(self, ranks: Collection[int], signum: int) -> None:
        """Send a signal to workers that have not ended. One that SIGKILL does not end counts as ended after KILL_S."""
        for rank in ranks:
            if rank in self._processes:
                send_to_group(self._processes[rank], signum)
                if signum == signal.SIGKILL:
                    self._leave(rank)

    def _leave(self, rank: int) -> None:
        """Take a worker for lost that was killed long ago: whatever the kernel waits for may never come."""
        process, now = self._processes[rank], time.monotonic()
        if now - self._killed.setdefault(rank, now) < KILL_S or process.poll() is not None:
            return
        message = f"{does_not_end(process.pid)} on {self._nodes[rank]}: it is left behind"
        lines.say(f"windlass: rank {rank}: {message}")
        # Secondary: what everybody was killed for came before.
        self.abandon([rank], Failure(rank, time.time(), message, "", 128 + signal.SIGKILL, secondary=True))

    def process(self, rank: int) -> WorkerProcess | None:
        """Return the process of a rank while it runs and nobody has killed it."""
        process = None if rank in self._killed else self._processes.get(rank)
        return None if process is None or process.poll() is not None else process

    def abandon(self, ranks: Collection[int], why: Failure | None = None) -> list[WorkerProcess]:
        """Take workers for lost although they live on, as those of a machine that nobody can reach; return them."""
        left = [(rank, self._processes.pop(rank)) for rank in ranks if rank in self._processes]
        self._left += [Exit(rank, -signal.SIGKILL, time.time(), why, stopped=False) for rank, _ in left]
        return [process for _, process in left]

    def close(self) -> None:
        """Close the pipes of workers that have ended."""
        self._reader.close()


def streams_of(rank: int, all_ranks: bool) -> tuple[int | None, int | None]:
    """Return where output and errors of a rank go: those of rank 0 to ours, of the others through us or nowhere."""
    if rank == 0:
        return None, None
    return (subprocess.PIPE if all_ranks else subprocess.DEVNULL), subprocess.PIPE


def prefixed(rank: int, target: TextIO) -> Callable[[str], None]:
    """Return a writer of lines that carry the rank. A line and its end go out as one write: rank 0 writes there too."""

    return lambda line: lines.say(f"[rank {rank}] {line}", target)


def launch_local(command: WorkerCommand, config: LaunchConfig) -> int:
    """Run `config.workers` workers on this machine and return the exit code of the run."""
    with tempfile.TemporaryDirectory(prefix="windlass-") as folder, StopRequests().listening() as stop:
        workers = LocalWorkers(command, config, Path(folder))
        try:
            return conclude(supervise(workers, config.grace_s, stop), stop)
        finally:
            workers.send(range(config.workers), signal.SIGKILL)
