"""The workers of a run in a Ray cluster: one actor per worker, and a run without recovery from start to end.

Must not know what the worker computes.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from windlass.dist.errors import WorkerError
from windlass.launch.failure import Exit, Failure
from windlass.launch.lines import say
from windlass.launch.local import LaunchConfig, WorkerCommand, prefixed
from windlass.launch.ray.beats import get_unless_stopped
from windlass.launch.ray.cluster import cluster_for, reserved, wants_gpu
from windlass.launch.ray.placement import Placement, plan_placement, seat_workers
from windlass.launch.ray.worker_actor import ActorFacts, Line, WorkerActor, meeting_point, worker_variables
from windlass.launch.supervisor import Stopped, StopRequests, conclude, interruptible, supervise

__all__ = ["ActorFacts", "RayWorkers", "launch_ray", "start_workers", "worker_variables"]

POLL_S = 1.0
CLEAN_S = 2.0
START_S = 150.0  # the first worker of an actor waits until everything is imported, and the actor for Ray
CONCURRENCY = 4  # of an actor: two readers while one takes over from the other, signals, beats


class RayWorkers:
    """The workers of a run in a Ray cluster, by rank. An actor that is None is gone.

    `show` gets every line once, with its rank. `shown` says up to which number the lines of a rank are safe with
    whoever reads them; by default that is when `show` returns.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        generation: int = 0,
        *,
        show: Callable[[int, Line], None] | None = None,
        shown: Callable[[int], int] | None = None,
    ) -> None:
        self.num_workers = len(actors)
        self.heard = [time.monotonic()] * len(actors)  # when an actor last answered, by rank
        self._actors = list(actors)
        self._generation = generation
        self._show = show or print_line
        self._last = [0] * len(actors)
        self._shown = shown or self._last.__getitem__
        self._asked_to_die: set[int] = set()
        self._gone: dict[int, Failure | None] = {}
        self._polls: dict[Any, int] = {}
        for rank, actor in enumerate(self._actors):
            if actor is None:
                self._gone[rank] = self._died(rank, "nobody answers under its name")
            else:
                self._poll(rank)

    @property
    def silent(self) -> list[int]:
        """Ranks that have not ended although others have."""
        waiting = list(self._polls.values())
        return waiting if len(waiting) < self.num_workers else []

    def _poll(self, rank: int) -> None:
        poll = self._actors[rank].poll.remote(POLL_S, self._last[rank], self._shown(rank), self._generation)
        self._polls[poll] = rank

    def wait(self, timeout_s: float) -> list[Exit]:
        """Pass on output and return the workers that ended since the last call."""
        if self._gone:
            timeout_s = 0.0
        ready, _ = ray.wait(list(self._polls), num_returns=1, timeout=timeout_s) if self._polls else ([], [])
        exits = []
        for call in ready:
            rank = self._polls.pop(call)
            try:
                polled = ray.get(call)
            except RayActorError as exc:
                if rank in self._gone:
                    continue  # somebody knows better why
                exits.append(_killed(rank, self._died(rank, str(exc).partition("\n")[0])))
                continue
            except RayTaskError:  # a mistake in the actor itself, which would make it again
                raise
            except RayError:  # the answer was lost with the node that had it; the actor has the lines, if it lives
                self._poll(rank)
                continue
            self.heard[rank] = time.monotonic()
            for line in polled.lines:
                self._last[rank] = line.number
                self._show(rank, line)
            if polled.code is None:
                self._poll(rank)
            else:
                self._gone.pop(rank, None)
                exits.append(Exit(rank, polled.code, time.time(), polled.failure, stopped=False))
        return exits + self._given_up()

    def _died(self, rank: int, reason: str) -> Failure:
        return Failure(rank, time.time(), f"the Ray actor of the worker died: {reason}", "", 1, False)

    def _given_up(self) -> list[Exit]:
        """Return workers whose actor did not even answer that they are dead: their node is gone or hangs."""
        exits = [_killed(rank, failure) for rank, failure in self._gone.items()]
        self._polls = {call: rank for call, rank in self._polls.items() if rank not in self._gone}
        self._gone = {}
        return exits

    def give_up(self, rank: int, failure: Failure | None) -> None:
        """Count a worker that has not ended as lost."""
        if rank in self._polls.values():
            self._gone[rank] = failure

    def send(self, ranks: Collection[int], signum: int) -> None:
        """Send a signal to workers; the second SIGKILL takes the actor as well and counts its worker as ended."""
        for rank in ranks:
            if self._actors[rank] is not None:
                self._actors[rank].send.remote(signum, self._generation)
        if signum != signal.SIGKILL:
            return
        for rank in set(ranks) & self._asked_to_die & set(self._polls.values()):
            ray.kill(self._actors[rank])
            self._gone[rank] = None
        self._asked_to_die.update(ranks)

    def release(self) -> None:
        """End every actor, and with it its worker."""
        end_actors([actor for actor in self._actors if actor is not None])


def _killed(rank: int, failure: Failure | None) -> Exit:
    return Exit(rank, -signal.SIGKILL, time.time(), failure, stopped=False)


def print_line(rank: int, line: Line) -> None:
    """Show a line here, with its rank unless that is 0."""
    target = sys.stdout if line.stream == "stdout" else sys.stderr
    if rank == 0:
        say(line.text, target)
    else:
        prefixed(rank, target)(line.text)


def end_actors(actors: Sequence[Any]) -> None:
    """End actors and their workers."""
    cleaning = [actor.clean.remote() for actor in actors]
    if cleaning:
        ray.wait(cleaning, num_returns=len(cleaning), timeout=CLEAN_S)
    for actor in actors:
        ray.kill(actor)


def _answers(calls: Iterable[Any], missing: str) -> list[Any]:
    """Return what actors answer.

    Blocks:      host, at most START_S
    Raises:      WorkerError if one cannot start, or time is over; Stopped, if waits were made interruptible
    """
    until = time.monotonic() + START_S
    try:
        return [get_unless_stopped(call, until - time.monotonic()) for call in calls]
    except GetTimeoutError:
        busy = "`ray status` shows what the cluster is busy with"
        raise WorkerError(f"{missing} (after {START_S:g} s). {busy}") from None
    except RayActorError as exc:
        raise WorkerError(
            f"the Ray actors of the workers do not start: {exc} If the cluster runs without token authentication but "
            "this machine has a token of another one, set RAY_AUTH_MODE=disabled or give --ray HOST:PORT"
        ) from exc


def start_workers(command: WorkerCommand, config: LaunchConfig, placement: Placement, group: Any) -> RayWorkers:
    """Start one actor per worker in a placement group, and the workers in them.

    Raises:      WorkerError if one does not start; Stopped, if waits were made interruptible. No actor is left then
    """
    actor_class = ray.remote(WorkerActor)
    actors = [
        actor_class.options(
            num_cpus=placement.worker["CPU"],
            num_gpus=placement.worker.get("GPU", 0),
            max_concurrency=CONCURRENCY,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        ).remote()
        for bundle in placement.bundle_of_worker
    ]
    try:
        return RayWorkers(_start_in(actors, command, config))
    except BaseException:
        end_actors(actors)
        raise


def _start_in(actors: Sequence[Any], command: WorkerCommand, config: LaunchConfig) -> list[Any]:
    """Start a worker in every actor, and return the actors by rank."""
    facts: list[ActorFacts] = _answers([a.facts.remote() for a in actors], "the actors of the workers have not begun")
    seats = seat_workers([fact.node_id for fact in facts])
    by_rank = [actors[seat.worker] for seat in seats]
    ((store, port),) = _answers([by_rank[0].rendezvous.remote()], "the actor of rank 0 does not answer")
    meeting = meeting_point(seats, store, port, address=facts[seats[0].worker].address)
    started = []
    for seat, actor in zip(seats, by_rank, strict=True):
        peers = [facts[other.worker] for other in seats if other.node_rank == seat.node_rank]
        variables = worker_variables(seat, len(seats), meeting, peers, config)
        started.append(actor.start.remote(command, variables, str(Path.cwd()), streams_shown(seat.rank, config)))
    _answers(started, "a worker has not begun to run")
    return by_rank


def streams_shown(rank: int, config: LaunchConfig) -> tuple[str, ...]:
    """Return the streams of a rank that people see."""
    return ("stdout", "stderr") if rank == 0 or config.all_ranks else ("stderr",)


def launch_ray(
    command: WorkerCommand, config: LaunchConfig, *, address: str, num_nodes: int, spread: bool, device: str
) -> int:
    """Run `config.workers` workers in a Ray cluster and return the exit code of the run. A failure ends it.

    With the address `local` and more than one node this machine emulates them.
    """
    plan_placement(config.workers, num_nodes=num_nodes, spread=spread, gpu=False)  # mistakes show before Ray starts
    with cluster_for(address, config, num_nodes), StopRequests().listening() as stop:
        gpu = wants_gpu(device, config.workers)
        placement = plan_placement(config.workers, num_nodes=num_nodes, spread=spread, gpu=gpu)
        with reserved(placement) as group:
            try:
                with interruptible(stop):
                    workers = start_workers(command, config, placement, group)
            except Stopped:
                say("windlass: stopped on request before all workers had begun")
                return 128 + signal.SIGTERM
            try:
                return conclude(supervise(workers, config.grace_s, stop), stop)
            finally:
                workers.release()
