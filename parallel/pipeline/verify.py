"""Whether a schedule can run: complete, in an order in which nobody waits forever, within the memory it declares.

Every check raises a PlanError that names the first action that is wrong and what would be right. Compute-only and
lowered schedules are both accepted; once a schedule has any communication, all of it must be there.
Must not know: who executes the schedule, how long anything takes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.graph import Graph, build_graph, makes_gradients, unit_of, uses_parameters
from windlass.parallel.pipeline.schedule import Schedule
from windlass.parallel.pipeline.simulate import Run, deadlock
from windlass.parallel.pipeline.timeline import peak_in_flight

VOCAB_COMPUTE = ("EF", "S", "T", "EB")
VOCAB_COLLECTIVES = ("ROWS", "X", "STATS", "DX", "DROWS")
BACKWARD_KINDS = frozenset(("B", "I", "W", "R", "T", "EB", "DX", "DROWS", "SEND_B", "RECV_B", "REDUCE", "VREDUCE"))


def verify(schedule: Schedule) -> None:
    """Check everything about a schedule that can be known before it runs.

    Raises:  PlanError for an action that is missing, there twice, on the wrong rank or before what it needs; for sends,
             receives or collectives whose orders differ between ranks; for gathers and releases that do not alternate;
             for more activations than declared; for ranks that wait for each other
    """
    check_complete(schedule)
    graph = build_graph(schedule)
    _check_order_on_ranks(graph)
    if schedule.lowered:
        _check_message_order(schedule)
        _check_collective_order(schedule)
        _check_zero(schedule)
    _check_limits(schedule)
    ones = (1.0,) * schedule.layout.num_ranks  # so that every action is seen in the picture of a deadlock
    steps = replace(Costs.uniform(schedule.layout), scores_s=ones, transposed_s=ones, lookup_s=ones, scatter_s=ones)
    run = Run(graph, steps)
    if run.stuck():
        raise PlanError(deadlock(run))


def check_complete(schedule: Schedule) -> None:
    """Check that every action is there once, on its rank, and none that does not belong.

    Raises:  PlanError naming the first that is wrong
    """
    expected = set(_expected(schedule))
    seen: set[Action] = set()
    for rank, row in enumerate(schedule.ranks):
        for action in row:
            if action not in expected and (why := _why_not(schedule, action)):
                _fail(schedule, f"rank {rank} has {action}, but {why}")
            if (home := schedule.layout.rank_of(action)) != rank:
                _fail(schedule, f"rank {rank} has {action}, which belongs to rank {home}")
            if action in seen:
                _fail(schedule, f"rank {rank} has {action} twice; keep one of them")
            seen.add(action)
    if missing := expected - seen:
        first = min(missing, key=lambda action: (action.number, action.place, list(KINDS).index(action.kind)))
        _fail(
            schedule,
            f"rank {schedule.layout.rank_of(first)} lacks {first} ({KINDS[first.kind].meaning}); "
            f"missing in all: {len(missing)}",
        )


def _expected(schedule: Schedule) -> Iterator[Action]:
    """Yield the actions that the schedule cannot do without."""
    layout, backward, lowered = schedule.layout, not schedule.forward_only, schedule.lowered
    split = _split(schedule)
    per_rank: tuple[str, ...] = ()
    if layout.vocab:
        per_rank = VOCAB_COMPUTE + (VOCAB_COLLECTIVES if lowered else ())
        per_rank = tuple(kind for kind in per_rank if backward or kind not in BACKWARD_KINDS)
    carried = [s for s in range(1, layout.num_stages) if layout.stage_rank[s - 1] != layout.stage_rank[s]]
    for m in range(schedule.num_micro_batches):
        for stage in range(layout.num_stages):
            yield Action(stage, "F", m)
            if backward:
                yield from (Action(stage, kind, m) for kind in ("IW" if (stage, m) in split else "B"))
        for stage in carried if lowered else ():
            yield from (Action(stage - 1, "SEND_F", m), Action(stage, "RECV_F", m))
            if backward:
                yield from (Action(stage, "SEND_B", m), Action(stage - 1, "RECV_B", m))
        for rank in range(layout.num_ranks):
            yield from (Action(rank, kind, m) for kind in per_rank)


def _split(schedule: Schedule) -> set[tuple[int, int]]:
    """Return the stages and micro-batches whose backward is in two halves."""
    return {(a.place, a.number) for row in schedule.ranks for a in row if a.kind in ("I", "W")}


def _why_not(schedule: Schedule, action: Action) -> str:
    """Say why an action that is not expected does not belong here; nothing if it is merely optional."""
    layout, kind = schedule.layout, KINDS[action.kind]
    places = layout.num_stages if kind.place == "stage" else layout.num_ranks
    if not 0 <= action.place < places:
        return f"there are {kind.place}s 0 to {places - 1}"
    if not kind.ordinal and not 0 <= action.number < schedule.num_micro_batches:
        return f"there are micro-batches 0 to {schedule.num_micro_batches - 1}"
    if kind.place == "rank" and not layout.vocab:
        return "the vocabulary is not cut: set vocab to 1 or 2, or leave it out"
    if schedule.forward_only and action.kind in BACKWARD_KINDS:
        return "the schedule is forward-only"
    if kind.lane == "p2p":
        return "stage and neighbour are on one rank, or there is no neighbour: nothing is sent"
    if action.kind == "B":
        return f"stage {action.place} has I or W for micro-batch {action.number} too: either B, or I and W"
    return ""


def _check_order_on_ranks(graph: Graph) -> None:
    """Whatever an action needs of its own rank comes before it."""
    for rank, row in enumerate(graph.ranks):
        for number in row:
            for need in graph.needs[number]:
                if need >= len(graph.actions):
                    need = graph.needs[need][rank]
                if number < need < row.stop:
                    action, needed = graph.actions[number], graph.actions[need]
                    post = KINDS[needed.kind].lane in ("p2p", "collective") and KINDS[action.kind].lane == "compute"
                    _fail(
                        graph.schedule,
                        f"rank {rank} has {action} before {needed}, "
                        f"{'which must be posted first' if post else 'whose result it needs'}. Put {needed} first",
                    )


def _check_message_order(schedule: Schedule) -> None:
    """Messages from one rank to another arrive in the order of the sends; receives have to be posted in that order."""
    stage_rank = schedule.layout.stage_rank
    sends: defaultdict[tuple[str, int, int], list[Action]] = defaultdict(list)
    receives: defaultdict[tuple[str, int, int], list[Action]] = defaultdict(list)
    for row in schedule.ranks:
        for action in row:
            if KINDS[action.kind].lane != "p2p":
                continue
            name, way = action.kind.split("_")
            peer = action.place + (1 if action.kind in ("SEND_F", "RECV_B") else -1)
            here, there = stage_rank[action.place], stage_rank[peer]
            if name == "SEND":
                sends[way, here, there].append(Action(peer, f"RECV_{way}", action.number))
            else:
                receives[way, there, here].append(action)
    for (way, source, target), sent in sends.items():
        for wanted, posted in zip(sent, receives[way, source, target], strict=True):
            if wanted != posted:
                _fail(
                    schedule,
                    f"rank {target} posts {posted} where rank {source} sends for {wanted}: receives from one rank must "
                    f"be in the order of its sends. Put {wanted} before {posted}",
                )


def _check_collective_order(schedule: Schedule) -> None:
    """All ranks take part in the collectives of one kind in one order."""
    orders: defaultdict[str, list[list[Action]]] = defaultdict(lambda: [[] for _ in schedule.ranks])
    for rank, row in enumerate(schedule.ranks):
        for action in row:
            if action.kind in VOCAB_COLLECTIVES:
                orders[action.kind][rank].append(action)
    for order in orders.values():
        for rank, taken in enumerate(order):
            for here, first in zip(taken, order[0], strict=True):
                if here.number != first.number:
                    _fail(
                        schedule,
                        f"rank {rank} has {here} where rank 0 has {first}: collectives of one kind need one order on "
                        f"all ranks. Put {Action(rank, here.kind, first.number)} before {here}",
                    )


def _check_zero(schedule: Schedule) -> None:
    """Gathers and releases alternate, uses lie between them, and no gradient is left unreduced."""
    for rank, row in enumerate(schedule.ranks):
        gathers = {unit_of(action) for action in row if action.kind in ("GATHER", "VGATHER")}
        gathered: set[tuple[int, str]] = set()
        counts: Counter[tuple[int, str]] = Counter()
        unreduced: dict[tuple[int, str], Action] = {}
        for action in row:
            unit, kind = unit_of(action), action.kind.removeprefix("V")
            if KINDS[action.kind].ordinal:
                if action.number != counts[action.place, action.kind]:
                    right = action._replace(number=counts[action.place, action.kind])
                    _fail(schedule, f"rank {rank} has {action}: these are counted from 0 in order, write {right}")
                counts[action.place, action.kind] += 1
            if kind == "GATHER" and unit in gathered:
                _fail(schedule, f"rank {rank} has {action} while it is gathered: put a release before it")
            if kind == "RELEASE" and unit not in gathered:
                _fail(schedule, f"rank {rank} has {action} without a gather before it")
            if uses_parameters(action) and unit in gathers - gathered:
                _fail(
                    schedule, f"rank {rank} has {action} while its parameters are not gathered: put a gather before it"
                )
            if kind == "GATHER":
                gathered.add(unit)
            elif kind == "RELEASE":
                gathered.discard(unit)
            elif kind == "REDUCE":
                unreduced.pop(unit, None)
            elif makes_gradients(action):
                unreduced[unit] = action
        for unit, action in unreduced.items():
            reduction = Action(unit[0], unit[1] + "REDUCE", counts[unit[0], unit[1] + "REDUCE"])
            _fail(schedule, f"rank {rank} never reduces the gradients of {action}: put {reduction} behind it")


def _check_limits(schedule: Schedule) -> None:
    """Every rank stays within the activations that the schedule declares."""
    for rank, (actions, limit) in enumerate(zip(schedule.ranks, schedule.limits or (), strict=False)):
        if (peak := peak_in_flight(actions)) > limit:
            first = next(a for i, a in enumerate(actions) if peak_in_flight(actions[: i + 1]) > limit)
            _fail(
                schedule,
                f"rank {rank} holds {limit + 1} stage activations with {first} and declares {limit}: put a backward "
                f"before it, or declare {peak}",
            )


def _fail(schedule: Schedule, problem: str) -> NoReturn:
    raise PlanError(f"schedule '{schedule.name}': {problem}")
