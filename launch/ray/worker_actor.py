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
    does_not_end,
    num_cores,
    send_to_group,
    spawn,
    threads_per_worker,
)
from windlass.launch.node_memory import NodeMemory
from windlass.launch.ports import free_port
from windlass.launch.ray import records
from windlass.launch.ray.placement import Seat

MAX_LINES = 10_000  # kept for a reader that does not come; then the oldest go
END_S = 5.0
LOOK_S = 1.0  # between looks at a worker that says nothing, should its end go unseen
REAP_S = 0.002  # the same once its end was seen: who started it learns how a moment later
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
    """Runs one worker process at a time. A thread takes in what it says; those that ask in `poll` wait for that.

    With `lease_s` it ends itself and its worker when nobody has spoken to it for so long. With `fork_server` workers
    are forked from a process that has imported everything.
    """

    def __init__(self, lease_s: float = 0.0, fork_server: bool = False) -> None:
        self._files = Path(tempfile.mkdtemp(prefix="windlass-"))
        self._lines: deque[Line] = deque(maxlen=MAX_LINES)
        self._number = 0
        self._process: WorkerProcess | None = None
        self._code: int | None = None  # of the process, once it has ended and all its lines are here
        self._server = ForkServer() if fork_server else None
        if self._server is not None:
            self._server.warm_up()
        self._node: NodeFolder | None = None
        self._failure: Failure | None = None
        self._job = Job()
        self._changed = threading.Condition()  # the process, its lines, its end: several readers, signals, starts
        self._starting = threading.Lock()
        self._heard = time.monotonic()
        if lease_s:
            threading.Thread(target=self._watch, args=(lease_s,), daemon=True, name="lease").start()

    def _watch(self, lease_s: float) -> None:
        while time.monotonic() - self._heard < lease_s:
            time.sleep(min(1.0, lease_s / 4))
        try:
            with self._starting:
                self._end()
            if self._node is not None:
                records.abandon(self._node)
        finally:
            shutil.rmtree(self._files, ignore_errors=True)
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
        return f"file://{self._folder()}/store-{generation}", free_port()

    def _folder(self) -> Path:
        """Return the folder of this actor's files, made again if somebody has tidied up /tmp."""
        self._files.mkdir(0o700, exist_ok=True)
        return self._files

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
        report = self._folder() / "failure.json"
        with self._starting:
            self._end()
            with self._changed:
                report.unlink(missing_ok=True)
                self._job, self._node, self._process, self._code, self._failure = job or Job(), node, None, None, None
                process = (self._server.spawn if self._server is not None else spawn)(
                    command,
                    {**variables, ERROR_FILE: str(report)},
                    stdout=subprocess.PIPE if "stdout" in show else subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    cwd=cwd if Path(cwd).is_dir() else None,
                )
                self._process = process
            threading.Thread(target=self._attend, args=(process, report), daemon=True, name="worker").start()
            if node is not None:
                records.record(node, f"actor-{self._job.rank}", os.getpid())
                records.record_worker(node, self._job.rank, self._job.generation, process.pid)

    def _attend(self, process: WorkerProcess, report: Path) -> None:
        """Take in what a worker says until it has ended, and then how."""
        reader, code = LineReader(), None
        for stream, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            if pipe is not None:
                reader.add(pipe.fileno(), partial(self._keep, stream))
        reader.watch(process)
        while code is None:
            reader.pump(REAP_S if reader.ended else LOOK_S)
            with self._changed:
                code = process.poll()
        reader.drain()
        reader.close()
        failure = None
        try:
            failure = read_failure(report) or self._verdict(code)
        finally:  # whoever waits for the end must hear of it
            with self._changed:
                self._code, self._failure = code, failure
                self._changed.notify_all()

    def _end(self) -> None:
        """Kill the worker and wait until it is gone."""
        self.send(signal.SIGKILL)
        with self._changed:
            if not self._changed.wait_for(lambda: self._process is None or self._code is not None, END_S):
                assert self._process is not None
                raise WorkerError(f"rank {self._job.rank}: {does_not_end(self._process.pid)}")

    def _keep(self, stream: str, text: str) -> None:
        with self._changed:
            self._number += 1
            self._lines.append(Line(self._number, stream, text))
            self._changed.notify_all()

    def poll(self, wait_s: float, after: int = 0, forget: int = 0, generation: int = 0) -> Polled:
        """Return lines after number `after`, and once the worker has ended how; wait at most `wait_s` for either.

        Lines up to `forget` are dropped: whoever shows them has them. A worker of another generation counts as killed.
        """
        self.beat()

        def another() -> bool:
            return self._process is None or self._job.generation != generation

        with self._changed:
            while self._lines and self._lines[0].number <= forget:
                self._lines.popleft()
            self._changed.wait_for(lambda: another() or self._number > after or self._code is not None, wait_s)
            if another():
                return Polled((), -signal.SIGKILL)
            return Polled(tuple(line for line in self._lines if line.number > after), self._code, self._failure)

    def _verdict(self, code: int) -> Failure | None:
        """Return why the watchdog of the node killed the worker, if it did."""
        if self._node is None or code != -signal.SIGKILL:
            return None
        try:
            memory = NodeMemory(self._node, self._node.read_token())
        except CheckpointError:  # the node has lost its memory: nobody watches there
            return None
        return memory.verdict(self._job.rank, self._job.generation)

    def send(self, signum: int, generation: int | None = None) -> bool:
        """Send a signal to the worker, if it is of this generation; return whether there was one to send it to."""
        with self._changed:
            process = self._process if self._code is None else None
            if process is None or generation not in (None, self._job.generation):
                return False
            send_to_group(process, signum)
            return True

    def clean(self) -> None:
        """End the worker and remove this actor's files, once no worker of the run needs them."""
        self.send(signal.SIGKILL)
        shutil.rmtree(self._files, ignore_errors=True)


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
