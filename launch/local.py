"""Starts one training process per worker on this machine and watches them.

Must not know what a worker computes: it gets a command, an environment and a payload on its standard input.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from windlass.dist import env
from windlass.launch.failure import ERROR_FILE, Exit, read_failure
from windlass.launch.supervisor import StopRequests, conclude, supervise

PR_SET_PDEATHSIG = 1


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
            "help": "after a worker failed, the others get this long from SIGTERM to SIGKILL",
            "unit": "s",
            "ge": 0,
            "le": 7,
        },
    )
    all_ranks: bool = field(
        default=False, metadata={"help": "show the output of every worker, not only that of rank 0 and errors"}
    )


@dataclass(frozen=True)
class WorkerCommand:
    """What a worker process runs: arguments of the Python interpreter and bytes for its standard input."""

    arguments: tuple[str, ...]
    payload: bytes = b""


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
    import_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    process = subprocess.Popen(
        [sys.executable, *command.arguments],
        env={**env.copy(), "PYTHONPATH": import_path, **variables},
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        start_new_session=True,  # Ctrl-C reaches only the launcher, which asks the workers once
        preexec_fn=_die_with_parent(),
    )
    assert process.stdin is not None
    try:
        process.stdin.write(command.payload)
        process.stdin.close()
    except BrokenPipeError:
        process.stdin = None  # it ended before it read: its exit code tells
    return process


def _die_with_parent() -> Callable[[], None] | None:
    """Return what a child runs before exec so that the kernel kills it when its parent dies (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded before the fork: a forked child must not load libraries
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def send_to_group(process: subprocess.Popen[bytes], signum: int) -> None:
    """Signal a worker and, when it is killed, everything it started."""
    if process.poll() is not None:
        return
    if signum == signal.SIGKILL:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)


class LineReader:
    """Cuts the bytes of several pipes into lines as they come."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._rest: dict[int, bytes] = {}

    def add(self, pipe: int, put: Callable[[str], None]) -> None:
        """Call `put` with every line that arrives on a file descriptor."""
        os.set_blocking(pipe, False)
        self._selector.register(pipe, selectors.EVENT_READ, put)
        self._rest[pipe] = b""

    def pump(self, timeout_s: float) -> bool:
        """Pass on what has arrived, waiting at most `timeout_s` for it, and return whether there was something."""
        if not self._rest:
            time.sleep(timeout_s)
            return False
        ready = self._selector.select(timeout_s)
        for key, _ in ready:
            arrived = os.read(key.fd, 1 << 16)
            *lines, self._rest[key.fd] = (self._rest[key.fd] + arrived).split(b"\n")
            if not arrived:
                lines.append(self._rest.pop(key.fd))
                self._selector.unregister(key.fd)
            for line in lines:
                if line or arrived:
                    key.data(line.decode(errors="replace"))
        return bool(ready)

    def drain(self) -> None:
        """Pass on everything that has arrived."""
        while self.pump(0):
            continue


class LocalWorkers:
    """The workers of a run on this machine. Rank 0 writes to our output; errors of the others carry their rank."""

    def __init__(self, command: WorkerCommand, config: LaunchConfig, folder: Path) -> None:
        self.num_workers = config.workers
        self._folder = folder
        self._reader = LineReader()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(config.workers):
            self._processes[rank] = self._start(rank, command, config)

    def _start(self, rank: int, command: WorkerCommand, config: LaunchConfig) -> subprocess.Popen[bytes]:
        me = env.ProcessEnv(
            rank=rank,
            local_rank=rank,
            world_size=config.workers,
            local_world_size=config.workers,
            rendezvous=f"file://{self._folder}/store",
            launcher="local",
        )
        threads = threads_per_worker(config, config.workers, num_cores())
        variables = {"OMP_NUM_THREADS": str(threads), ERROR_FILE: str(self._report(rank))}
        hidden = subprocess.PIPE if config.all_ranks else subprocess.DEVNULL
        process = spawn(
            command,
            me.variables() | variables,
            stdout=None if rank == 0 else hidden,
            stderr=None if rank == 0 else subprocess.PIPE,
        )
        for pipe, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if pipe is not None:
                self._reader.add(pipe.fileno(), prefixed(rank, target))
        return process

    def _report(self, rank: int) -> Path:
        return self._folder / f"failure-{rank}.json"

    def wait(self, timeout_s: float) -> list[Exit]:
        """Pass on output and return the workers that ended since the last call."""
        self._reader.pump(timeout_s)
        exits = []
        for rank, process in list(self._processes.items()):
            code = process.poll()
            if code is not None:
                del self._processes[rank]
                self._reader.drain()
                exits.append(Exit(rank, code, time.time(), read_failure(self._report(rank)), stopped=False))
        return exits

    def send(self, ranks: Collection[int], signum: int) -> None:
        """Send a signal to workers that have not ended."""
        for rank in ranks:
            if rank in self._processes:
                send_to_group(self._processes[rank], signum)


def prefixed(rank: int, target: TextIO) -> Callable[[str], None]:
    """Return a writer of lines that carry the rank. A line and its end go out as one write: rank 0 writes there too."""

    def put(line: str) -> None:
        target.write(f"[rank {rank}] {line}\n")
        target.flush()

    return put


def launch_local(command: WorkerCommand, config: LaunchConfig) -> int:
    """Run `config.workers` workers on this machine and return the exit code of the run."""
    with tempfile.TemporaryDirectory(prefix="windlass-") as folder, StopRequests().listening() as stop:
        workers = LocalWorkers(command, config, Path(folder))
        try:
            return conclude(supervise(workers, config.grace_s, stop), stop)
        finally:
            workers.send(range(config.workers), signal.SIGKILL)
