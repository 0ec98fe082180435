"""The Ray actor of one worker: it starts the worker as its own process, keeps its lines and tells how it ended.

The worker is a plain process with the environment torchrun would give it, so signals, crashes and output behave as
everywhere else, and it dies with its actor. The actor and its place stay when the worker is started again. Lines are
kept until the reader says it has them, so nothing is lost when the reader is started anew. Must not know what the
worker computes, nor when to start it again.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray

from windlass.checkpoint.memory.folder import NodeFolder
from windlass.dist import env
from windlass.dist.errors import CheckpointError, WorkerError
from windlass.launch.failure import ERROR_FILE, Failure, read_failure
from windlass.launch.forkserver import ForkServer
from windlass.launch.local import (
    LaunchConfig,
    LineReader,
    WorkerCommand,
    WorkerProcess,
    num_cores,
    send_to_group,
    spawn,
    threads_per_worker,
)
from windlass.launch.ray import records
from windlass.launch.ray.placement import Seat

MAX_LINES = 10_000  # kept for a reader that does not come; then the oldest go
END_S = 5.0
FORWARDED = ("WINDLASS_", "NCCL_", "TORCH_")  # what users set in the driver's shell for their workers


@dataclass(frozen=True)
class ActorFacts:
    """Where an actor runs."""

    node_id: str
    address: str
    interface: str
    cores: int
    gpus: tuple[str, ...]
    actor_id: str = ""


@dataclass(frozen=True)
class Line:
    """One line of output, numbered by the actor across all workers it has run."""

    number: int
    stream: str
    text: str


@dataclass(frozen=True)
class Polled:
    """What a worker has said and how it ended (`code` None: it runs)."""

    lines: tuple[Line, ...]
    code: int | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Job:
    """Which worker an actor runs; generation 0 where nobody counts."""

    rank: int = -1
    generation: int = 0


class WorkerActor:
    """Runs one worker process at a time. One thread waits in `poll`, others serve the rest.

    With `lease_s` it ends itself and its worker when nobody has spoken to it for so long. With `fork_server` workers
    are forked from a process that has imported everything.
    """

    def __init__(self, lease_s: float = 0.0, fork_server: bool = False) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="windlass-"))
        self._reader = LineReader()
        self._lines: deque[Line] = deque(maxlen=MAX_LINES)
        self._number = 0
        self._process: WorkerProcess | None = None
        self._server = ForkServer() if fork_server else None
        if self._server is not None:
            self._server.warm_up()
        self._node: NodeFolder | None = None
        self._failure: Failure | None = None
        self._job = Job()
        self._using = threading.Lock()  # the process and its lines: several readers, signals, starts
        self._heard = time.monotonic()
        if lease_s:
            threading.Thread(target=self._watch, args=(lease_s,), daemon=True, name="lease").start()

    def _watch(self, lease_s: float) -> None:
        while time.monotonic() - self._heard < lease_s:
            time.sleep(min(1.0, lease_s / 4))
        try:
            with self._using:
                self._end()
            if self._node is not None:
                records.abandon(self._node)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(0)  # Ray does not start this actor again

    def beat(self) -> Job:
        """Say that somebody still needs this actor; return what it runs."""
        self._heard = time.monotonic()
        return self._job

    def facts(self) -> ActorFacts:
        """Return the node, its address, the network interface of that address and the GPUs given to this actor."""
        address = ray.util.get_node_ip_address()
        interfaces = [name for name, has in psutil.net_if_addrs().items() if any(a.address == address for a in has)]
        context = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        interface = interfaces[0] if interfaces else ""
        return ActorFacts(context.get_node_id(), address, interface, num_cores(), gpus, context.get_actor_id() or "")

    def rendezvous(self, generation: int = 0) -> tuple[str, int]:
        """Return a file for workers of this node and a port that is free on it for workers of several."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"file://{self._folder}/store-{generation}", int(probe.getsockname()[1])

    def start(
        self,
        command: WorkerCommand,
        variables: Mapping[str, str],
        cwd: str,
        show: Collection[str],
        job: Job | None = None,
        node: NodeFolder | None = None,
    ) -> None:
        """Start a worker, after the end of the one before, and pass on the streams named in `show`."""
        self.beat()
        report = self._folder / "failure.json"
        with self._using:
            self._end()
            report.unlink(missing_ok=True)
            self._job, self._node, self._failure = job or Job(), node, None
            self._reader.close()
            self._reader = LineReader()
            process = (self._server.spawn if self._server is not None else spawn)(
                command,
                {**variables, ERROR_FILE: str(report)},
                stdout=subprocess.PIPE if "stdout" in show else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=cwd if Path(cwd).is_dir() else None,
            )
            if node is not None:
                records.record(node, f"actor-{self._job.rank}", os.getpid())
                records.record_worker(node, self._job.rank, self._job.generation, process.pid)
            for stream, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
                if pipe is not None:
                    self._reader.add(pipe.fileno(), partial(self._keep, stream))
            self._reader.watch(process)
            self._process = process

    def _end(self) -> None:
        """Kill the worker and wait until it is gone."""
        process = self._process
        if process is None:
            return
        send_to_group(process, signal.SIGKILL)
        until = time.monotonic() + END_S
        while process.poll() is None:
            if time.monotonic() > until:
                raise WorkerError(f"process {process.pid} of {self._job} has been killed and does not end")
            time.sleep(0.005)
        self._reader.drain()

    def _keep(self, stream: str, text: str) -> None:
        self._number += 1
        self._lines.append(Line(self._number, stream, text))

    def poll(self, wait_s: float, after: int = 0, forget: int = 0, generation: int = 0) -> Polled:
        """Return lines after number `after`, and once the worker has ended how; wait at most `wait_s` for either.

        Lines up to `forget` are dropped: whoever shows them has them. A worker of another generation counts as killed.
        """
        until = time.monotonic() + wait_s
        while True:
            self.beat()
            with self._using:
                while self._lines and self._lines[0].number <= forget:
                    self._lines.popleft()
                process = self._process
                if process is None or self._job.generation != generation:
                    return Polled((), -signal.SIGKILL)
                code = process.poll()
                if code is not None:
                    self._reader.drain()
                    self._failure = self._failure or read_failure(self._folder / "failure.json") or self._verdict(code)
                if self._number > after or code is not None or time.monotonic() >= until:
                    return Polled(tuple(line for line in self._lines if line.number > after), code, self._failure)
                self._reader.pump(0.05)

    def _verdict(self, code: int) -> Failure | None:
        """Return why the watchdog of the node killed the worker, if it did."""
        if self._node is None or code != -signal.SIGKILL:
            return None
        from windlass.launch.node_memory import NodeMemory

        try:
            memory = NodeMemory(self._node, self._node.read_token())
        except CheckpointError:  # the node has lost its memory: nobody watches there
            return None
        return memory.verdict(self._job.rank, self._job.generation)

    def send(self, signum: int) -> None:
        """Send a signal to the worker."""
        with self._using:
            if self._process is not None:
                send_to_group(self._process, signum)

    def clean(self) -> None:
        """End the worker and remove this actor's files, once no worker of the run needs them."""
        self.send(signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)


def forwarded() -> dict[str, str]:
    """Return the variables of this process that every worker shall have too."""
    return {name: value for name, value in env.copy().items() if name.startswith(FORWARDED)}


def meeting_point(seats: Sequence[Seat], store: str, port: int, *, address: str) -> dict[str, Any]:
    """Return where ranks meet: a file if all are on one node, else the node of rank 0."""
    if seats[-1].node_rank == 0:
        return {"rendezvous": store}
    return {"master_addr": address, "master_port": port}


def worker_variables(
    seat: Seat,
    num_workers: int,
    meeting: Mapping[str, Any],
    peers: Sequence[ActorFacts],
    config: LaunchConfig,
    common: Mapping[str, str] | None = None,
    **place: Any,
) -> dict[str, str]:
    """Return the environment of one worker.

    `peers` are the facts of all workers of its node by local rank; `common` is what all workers get, by default
    what this process passes on; `place`: generation, node and domain where there are names for them.
    """
    fact = peers[seat.local_rank]
    me = env.ProcessEnv(
        rank=seat.rank,
        local_rank=seat.local_rank,
        world_size=num_workers,
        local_world_size=seat.local_world_size,
        node_rank=seat.node_rank,
        launcher="ray",
        **meeting,
        **place,
    )
    variables = dict(forwarded() if common is None else common)
    variables["OMP_NUM_THREADS"] = str(threads_per_worker(config, seat.local_world_size, fact.cores))
    if fact.interface and not fact.address.startswith("127."):
        variables["GLOO_SOCKET_IFNAME"] = fact.interface
    if fact.gpus:
        # Ray shows an actor only its own GPU; peers of a node must see each other's, in the order of local ranks.
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for other in peers for gpu in other.gpus)
    return variables | me.variables()
