"""One Ray actor per worker: it starts the worker as its own process, passes on its lines and tells how it ended.

The worker is a plain process with the environment torchrun would give it, so signals, crashes and output behave as
everywhere else, and it dies with its actor. Must not know what the worker computes.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from windlass.dist import env
from windlass.dist.errors import WorkerError
from windlass.launch.failure import ERROR_FILE, Exit, Failure, read_failure
from windlass.launch.local import (
    LaunchConfig,
    LineReader,
    WorkerCommand,
    num_cores,
    prefixed,
    send_to_group,
    spawn,
    threads_per_worker,
)
from windlass.launch.ray.cluster import connected, reserved, wants_gpu
from windlass.launch.ray.placement import Placement, Seat, plan_placement, seat_workers
from windlass.launch.supervisor import StopRequests, conclude, supervise

POLL_S = 1.0
CLEAN_S = 2.0
FORWARDED = ("WINDLASS_", "NCCL_", "TORCH_")  # what users set in the driver's shell for their workers
LineOf = tuple[str, str]  # stream name, line


@dataclass(frozen=True)
class ActorFacts:
    """Where an actor runs."""

    node_id: str
    address: str
    interface: str
    cores: int
    gpus: tuple[str, ...]


class WorkerActor:
    """Runs one worker process on some node. One thread waits in `poll`, the other serves `send`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="windlass-"))
        self._reader = LineReader()
        self._lines: list[LineOf] = []
        self._process: subprocess.Popen[bytes] | None = None

    def facts(self) -> ActorFacts:
        """Return the node, its address, the network interface of that address and the GPUs given to this actor."""
        address = ray.util.get_node_ip_address()
        interfaces = [name for name, has in psutil.net_if_addrs().items() if any(a.address == address for a in has)]
        context = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        return ActorFacts(context.get_node_id(), address, interfaces[0] if interfaces else "", num_cores(), gpus)

    def rendezvous(self) -> tuple[str, int]:
        """Return a file for workers of this node and a port that is free on it for workers of several."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"file://{self._folder}/store", int(probe.getsockname()[1])

    def start(self, command: WorkerCommand, variables: Mapping[str, str], cwd: str, show: Collection[str]) -> None:
        """Start the worker and pass on the streams named in `show`."""
        self._process = spawn(
            command,
            {**variables, ERROR_FILE: str(self._folder / "failure.json")},
            stdout=subprocess.PIPE if "stdout" in show else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=cwd if Path(cwd).is_dir() else None,
        )
        for stream, pipe in (("stdout", self._process.stdout), ("stderr", self._process.stderr)):
            if pipe is not None:
                self._reader.add(pipe.fileno(), partial(self._keep, stream))

    def _keep(self, stream: str, line: str) -> None:
        self._lines.append((stream, line))

    def poll(self, wait_s: float) -> tuple[list[LineOf], int | None, Failure | None]:
        """Return new lines, and once the worker has ended its exit code and report; wait at most `wait_s`."""
        assert self._process is not None
        until = time.monotonic() + wait_s
        code = None
        while code is None and not self._lines and time.monotonic() < until:
            self._reader.pump(0.05)
            code = self._process.poll()
        failure = None
        if code is not None:
            self._reader.drain()
            failure = read_failure(self._folder / "failure.json")
        lines, self._lines = self._lines, []
        return lines, code, failure

    def send(self, signum: int) -> None:
        """Send a signal to the worker."""
        if self._process is not None:
            send_to_group(self._process, signum)

    def clean(self) -> None:
        """Remove this actor's files, once no worker of the run needs them."""
        shutil.rmtree(self._folder)


class RayWorkers:
    """The workers of a run in a Ray cluster, by rank."""

    def __init__(self, command: WorkerCommand, config: LaunchConfig, placement: Placement, group: Any) -> None:
        self.num_workers = config.workers
        actor_class = ray.remote(WorkerActor)
        actors = [
            actor_class.options(
                num_cpus=placement.worker["CPU"],
                num_gpus=placement.worker.get("GPU", 0),
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            ).remote()
            for bundle in placement.bundle_of_worker
        ]
        facts = start_facts(actors)
        seats = seat_workers([fact.node_id for fact in facts])
        self._actors = [actors[seat.worker] for seat in seats]
        self._asked_to_die: set[int] = set()
        self._killed: set[int] = set()
        self._polls: dict[Any, int] = {}
        store, port = ray.get(self._actors[0].rendezvous.remote())
        meeting = (
            {"rendezvous": store}
            if seats[-1].node_rank == 0
            else {
                "master_addr": facts[seats[0].worker].address,
                "master_port": port,
            }
        )
        started = []
        for seat, actor in zip(seats, self._actors, strict=True):
            peers = [facts[other.worker] for other in seats if other.node_rank == seat.node_rank]
            variables = worker_variables(seat, len(seats), meeting, peers, config)
            show = ("stdout", "stderr") if seat.rank == 0 or config.all_ranks else ("stderr",)
            started.append(actor.start.remote(command, variables, str(Path.cwd()), show))
        ray.get(started)
        for rank in range(self.num_workers):
            self._poll(rank)

    def _poll(self, rank: int) -> None:
        self._polls[self._actors[rank].poll.remote(POLL_S)] = rank

    def wait(self, timeout_s: float) -> list[Exit]:
        """Pass on output and return the workers that ended since the last call."""
        ready, _ = ray.wait(list(self._polls), num_returns=1, timeout=timeout_s)
        exits = []
        for call in ready:
            rank = self._polls.pop(call)
            try:
                lines, code, failure = ray.get(call)
            except RayActorError as exc:
                reason = str(exc).partition("\n")[0]
                died = Failure(rank, time.time(), f"the Ray actor of the worker died: {reason}", "", 1, False)
                exits.append(Exit(rank, -signal.SIGKILL, time.time(), died, stopped=False))
                continue
            for stream, line in lines:
                self._show(rank, stream, line)
            if code is None:
                self._poll(rank)
            else:
                exits.append(Exit(rank, code, time.time(), failure, stopped=False))
        return exits + self._given_up()

    def _show(self, rank: int, stream: str, line: str) -> None:
        target = sys.stdout if stream == "stdout" else sys.stderr
        if rank == 0:
            print(line, file=target, flush=True)
        else:
            prefixed(rank, target)(line)

    def _given_up(self) -> list[Exit]:
        """Return workers whose actor did not even answer that they are dead: their node is gone or hangs."""
        gone = [(call, rank) for call, rank in self._polls.items() if rank in self._killed]
        for call, _ in gone:
            del self._polls[call]
        return [Exit(rank, -signal.SIGKILL, time.time(), None, stopped=False) for _, rank in gone]

    def send(self, ranks: Collection[int], signum: int) -> None:
        """Send a signal to workers; the second SIGKILL takes the actor as well and counts its worker as ended."""
        for rank in ranks:
            self._actors[rank].send.remote(signum)
        if signum != signal.SIGKILL:
            return
        for rank in set(ranks) & self._asked_to_die:
            ray.kill(self._actors[rank])
            self._killed.add(rank)
        self._asked_to_die.update(ranks)

    def release(self) -> None:
        """End every actor, and with it its worker."""
        cleaning = [actor.clean.remote() for actor in self._actors]
        ray.wait(cleaning, num_returns=len(cleaning), timeout=CLEAN_S)
        for actor in self._actors:
            ray.kill(actor)


def start_facts(actors: Sequence[Any]) -> list[ActorFacts]:
    """Wait until all actors run and return where.

    Raises:      WorkerError if one cannot start
    """
    try:
        return list(ray.get([actor.facts.remote() for actor in actors]))
    except RayActorError as exc:
        raise WorkerError(
            f"the Ray actors of the workers do not start: {exc} If the cluster runs without token authentication but "
            "this machine has a token of another one, set RAY_AUTH_MODE=disabled or give --ray HOST:PORT"
        ) from exc


def worker_variables(
    seat: Seat, num_workers: int, meeting: Mapping[str, Any], node: Sequence[ActorFacts], config: LaunchConfig
) -> dict[str, str]:
    """Return the environment of one worker; `node` are the facts of all workers of its node by local rank."""
    fact = node[seat.local_rank]
    me = env.ProcessEnv(
        rank=seat.rank,
        local_rank=seat.local_rank,
        world_size=num_workers,
        local_world_size=seat.local_world_size,
        node_rank=seat.node_rank,
        launcher="ray",
        **meeting,
    )
    variables = {name: value for name, value in env.copy().items() if name.startswith(FORWARDED)}
    variables["OMP_NUM_THREADS"] = str(threads_per_worker(config, seat.local_world_size, fact.cores))
    if fact.interface and not fact.address.startswith("127."):
        variables["GLOO_SOCKET_IFNAME"] = fact.interface
    if fact.gpus:
        # Ray shows an actor only its own GPU; peers of a node must see each other's, in the order of local ranks.
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for other in node for gpu in other.gpus)
    return variables | me.variables()


def launch_ray(
    command: WorkerCommand, config: LaunchConfig, *, address: str, num_nodes: int, spread: bool, device: str
) -> int:
    """Run `config.workers` workers in a Ray cluster and return the exit code of the run."""
    plan_placement(config.workers, num_nodes=num_nodes, spread=spread, gpu=False)  # mistakes show before Ray starts
    with connected(address, config.workers), StopRequests().listening() as stop:
        gpu = wants_gpu(device, config.workers)
        placement = plan_placement(config.workers, num_nodes=num_nodes, spread=spread, gpu=gpu)
        with reserved(placement) as group:
            workers = RayWorkers(command, config, placement, group)
            try:
                return conclude(supervise(workers, config.grace_s, stop), stop)
            finally:
                workers.release()
