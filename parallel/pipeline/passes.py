"""From compute-only schedules to complete ones: passes that write recomputation, ZeRO and communication into the lists.

Every pass is a function from schedule to schedule that only inserts; `lower` applies them in the one order that works.
Communication actions begin a transfer and never block their list, so their place says how early a transfer may start,
not who waits for whom. Deadlock can therefore only come from the order of compute actions.
Must not know: durations, who executes the actions, tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.graph import makes_gradients, unit_of, uses_parameters
from windlass.parallel.pipeline.schedule import Schedule
from windlass.parallel.pipeline.verify import check_complete

GATHERS = ("none", "run", "step")
REDUCES = ("last", "each")

Row = tuple[Action, ...]
Insertions = defaultdict[int, list[Action]]  # place in a row -> what is put there


def lower(schedule: Schedule, *, recompute: bool = False, gather: str = "none", reduce: str = "last") -> Schedule:
    """Complete a compute-only schedule.

    `recompute` rebuilds activations before every backward. `gather` says when ZeRO's sharded parameters of a stage are
    there: for every run of consecutive uses ("run"), from the first to the last use of the step ("step"), or as the
    walk sees fit ("none"). `reduce` sums gradients after the stage's last backward ("last") or after each.

    Raises:  PlanError if the schedule has communication already, lacks an action, or for an unknown choice
    """
    if schedule.lowered:
        raise PlanError(
            f"schedule '{schedule.name}' has its communication already and is run as it is. Give a compute-only "
            "schedule to lower() (only F, B, I, W, R, S, T, EF, EB), or do not lower it"
        )
    if gather not in GATHERS or reduce not in REDUCES:
        raise PlanError(f"gather = '{gather}', reduce = '{reduce}': choose from {GATHERS} and {REDUCES}")
    check_complete(schedule)
    if recompute:
        schedule = insert_recompute(schedule)
    schedule = insert_zero(schedule, gather, reduce)
    schedule = insert_point_to_point(schedule)
    return insert_vocabulary(schedule) if schedule.layout.vocab else schedule


def insert_recompute(schedule: Schedule) -> Schedule:
    """Put R before every B or I; the receive that B waits for is posted before R, so that R fills the wait."""
    rebuilt = {action for row in schedule.ranks for action in row if action.kind == "R"}

    def rebuild(_: int, row: Row) -> Row:
        before: Insertions = defaultdict(list)
        for i, (stage, kind, number) in enumerate(row):
            action = Action(stage, "R", number)
            if kind in ("B", "I") and action not in rebuilt:
                before[i].append(action)
        return _insert(row, before=before)

    return _map(schedule, rebuild)


def insert_zero(schedule: Schedule, gather: str, reduce: str) -> Schedule:
    """Put gathers and releases around uses of a unit, and reductions after its gradients.

    A gather is issued one compute action ahead of its first use, so that it overlaps; that never makes more than two
    units gathered. A unit that would be gathered again where it is released stays gathered.
    """

    def place(_: int, row: Row) -> Row:
        before: Insertions = defaultdict(list)
        after: Insertions = defaultdict(list)
        for unit, spans in _gathered(row, gather).items():
            for ordinal, (first, last) in enumerate(spans):
                before[first].append(_zero(unit, "GATHER", ordinal))
                after[last].append(_zero(unit, "RELEASE", ordinal))
        made: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
        for i, action in enumerate(row):
            if makes_gradients(action):
                made[unit_of(action)].append(i)
        for unit, places in made.items():
            # The shard's gradients are small and come from two sides of the pipeline: once is enough.
            for ordinal, i in enumerate(places if reduce == "each" and unit[1] != "V" else places[-1:]):
                after[i].append(_zero(unit, "REDUCE", ordinal))
        return _insert(row, before, after)

    return _map(schedule, place)


def insert_point_to_point(schedule: Schedule) -> Schedule:
    """Put sends behind their producers, and post receives one compute action ahead of their consumers.

    Receives from one rank are posted in the order in which that rank sends, one direction apart from the other.
    """
    stage_rank = schedule.layout.stage_rank
    after: defaultdict[int, Insertions] = defaultdict(lambda: defaultdict(list))
    edges: defaultdict[tuple[str, int, int], list[tuple[Action, Action]]] = defaultdict(list)
    backward = {(a.place, a.number): a for row in schedule.ranks for a in row if a.kind in ("B", "I")}
    for rank, row in enumerate(schedule.ranks):
        for i, (stage, kind, number) in enumerate(row):
            way, peer = ("F", stage + 1) if kind == "F" else ("B", stage - 1) if kind in ("B", "I") else ("", -1)
            if not 0 <= peer < len(stage_rank) or stage_rank[peer] == rank:
                continue
            after[rank][i].append(Action(stage, f"SEND_{way}", number))
            consumer = Action(peer, "F", number) if way == "F" else backward[peer, number]
            edges[way, rank, stage_rank[peer]].append((consumer, Action(peer, f"RECV_{way}", number)))

    def place(rank: int, row: Row) -> Row:
        before: Insertions = defaultdict(list)
        for (_, _, receiver), receives in edges.items():
            if receiver == rank:
                _post(row, receives, before)
        return _insert(row, before, after[rank])

    return _map(schedule, place)


def insert_vocabulary(schedule: Schedule) -> Schedule:
    """Put in the collectives of vocabulary parallelism: every rank takes part in each, in one order per kind."""
    layout = schedule.layout
    last = layout.num_stages - 1
    backward = not schedule.forward_only
    head_order = [a.number for a in schedule.ranks[layout.head_rank] if (a.place, a.kind) == (last, "F")]
    embed_order = [
        a.number for a in schedule.ranks[layout.embed_rank] if a.place == 0 and a.kind in ("B", "I") and backward
    ]
    follows: dict[str, list[str]] = {"EF": ["ROWS"], "S": ["STATS"], "T": []}
    if backward:
        follows["S" if layout.vocab == 2 else "T"].append("DX")

    def place(rank: int, row: Row) -> Row:
        before: Insertions = defaultdict(list)
        after: Insertions = defaultdict(list)
        for i, (stage, kind, number) in enumerate(row):
            after[i] += [Action(rank, name, number) for name in follows.get(kind, ())]
            if rank == layout.head_rank and kind == "F" and stage == last:
                after[i].append(Action(rank, "X", number))
            if rank == layout.embed_rank and kind in ("B", "I") and stage == 0:
                after[i].append(Action(rank, "DROWS", number))
        if rank != layout.head_rank:
            _post(row, [(Action(rank, "S", m), Action(rank, "X", m)) for m in head_order], before)
        if rank != layout.embed_rank:
            _post(row, [(Action(rank, "EB", m), Action(rank, "DROWS", m)) for m in embed_order], before)
        return _insert(row, before, after)

    return _map(schedule, place)


# -- placing -----------------------------------------------------------------------------------------------------------


def _map(schedule: Schedule, change: Callable[[int, Row], Row]) -> Schedule:
    return replace(schedule, ranks=tuple(change(rank, row) for rank, row in enumerate(schedule.ranks)))


def _insert(row: Row, before: Insertions | None = None, after: Insertions | None = None) -> Row:
    """Put actions directly before and directly behind actions of a row."""
    out: list[Action] = []
    for i, action in enumerate(row):
        out += before[i] if before and i in before else ()
        out.append(action)
        out += after[i] if after and i in after else ()
    return tuple(out)


def _post(row: Row, receives: Sequence[tuple[Action, Action]], before: Insertions) -> None:
    """Place (consumer, receive) pairs one compute action ahead of the consumer, receives in the given order."""
    index = {action: i for i, action in enumerate(row)}
    ahead, previous = [], 0
    for i, action in enumerate(row):
        ahead.append(previous)
        if KINDS[action.kind].lane == "compute":
            previous = i
    latest = len(row)
    placed: list[tuple[int, Action]] = []
    for consumer, receive in reversed(receives):
        latest = min(latest, ahead[index[consumer]])
        placed.append((latest, receive))
    for i, receive in reversed(placed):
        before[i].append(receive)


def _zero(unit: tuple[int, str], kind: str, ordinal: int) -> Action:
    return Action(unit[0], unit[1] + kind, ordinal)


def _gathered(row: Row, gather: str) -> dict[tuple[int, str], list[tuple[int, int]]]:
    """Return for every unit the stretches of the row (first and last action) during which it is gathered."""
    spans: dict[tuple[int, str], list[tuple[int, int]]] = {}
    if gather == "none":
        return spans
    current: tuple[int, str] | None = None
    for i, action in enumerate(row):
        if not uses_parameters(action):
            continue
        unit, ahead = unit_of(action), max(i - 1, 0)
        known = spans.setdefault(unit, [])
        if known and (gather == "step" or unit == current or ahead <= known[-1][1] + 1):
            known[-1] = (known[-1][0], i)
        else:
            known.append((ahead, i))
        current = unit
    return spans
