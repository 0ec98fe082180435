"""Turns a partial order of actions into one list per rank, by letting them run on an imagined machine.

Forwards and backwards keep the order that was given. What has slack goes where the machine would wait otherwise.
Must not know: which schedule this is.
Differs:     a list scheduler that may also reorder forwards and backwards, with a cap on memory, leaves 9 to 36 % of
             bubbles where the fixed order leaves 5 %
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace

from windlass.parallel.pipeline.action import Action
from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.graph import build_graph
from windlass.parallel.pipeline.schedule import Schedule

# What runs first when several actions could: lookups and scatters are short, other ranks wait for scores, and what
# other ranks wait for next comes from later stages.
_URGENCY = {kind: i for i, kind in enumerate(("EF", "EB", "S", "T", "F"))} | {"B": 4, "I": 4}
_FILLER = 5

# A filler starts unless something else is known to arrive within this share of its time. Measured on p = 2 to 8:
# waiting for the whole of it, or not at all, costs the zero-bubble schedules 1.2 to 2 times the idle time.
_PATIENCE = 0.5


def arrange(schedule: Schedule, costs: Costs, after: Mapping[Action, Sequence[Action]], fillers: str) -> Schedule:
    """Put the actions of every rank in the order in which they would run.

    `after` adds to the data dependencies. Kinds in `fillers` run when a rank would be idle, the first of them first.
    The result depends on nothing but the arguments. Its lists cannot deadlock, because they follow one common time.
    """
    graph = build_graph(schedule)
    index = {action: i for i, action in enumerate(graph.actions)}
    home = [rank for rank, row in enumerate(graph.ranks) for _ in row]
    seconds = [costs.seconds(action) for action in graph.actions]
    order = [_urgency(action, fillers) for action in graph.actions]
    waiting = [len(earlier) for earlier in graph.needs]
    feeds: list[list[int]] = [[] for _ in graph.needs]
    for i, earlier in enumerate(graph.needs):
        for number in earlier:
            feeds[number].append(i)
    for action, others in after.items():
        waiting[index[action]] += len(others)
        for other in others:
            feeds[index[other]].append(index[action])
    num_ranks, joints = schedule.layout.num_ranks, len(graph.actions)
    lag = costs.latency_s + costs.transfer_s(costs.num_bytes(Action(0, "SEND_F", 0)))
    known = [0.0] * len(graph.needs)  # when the needs that are met so far are met
    coming: list[list[tuple[float, int]]] = [[] for _ in range(num_ranks)]
    ready: list[list[tuple[tuple[int, int, int], int]]] = [[] for _ in range(num_ranks)]
    rows: list[list[Action]] = [[] for _ in range(num_ranks)]
    free = [0.0] * num_ranks
    awake = [(0.0, rank) for rank in range(num_ranks)]

    def release(number: int, at: float) -> None:
        if number >= joints:
            for fed in feeds[number]:
                meet(fed, at)
            return
        heapq.heappush(coming[home[number]], (at, number))
        heapq.heappush(awake, (at, home[number]))

    def meet(number: int, at: float) -> None:
        known[number] = max(known[number], at)
        waiting[number] -= 1
        if not waiting[number]:
            release(number, known[number])

    for number in [i for i in range(joints) if not waiting[i]]:
        release(number, 0.0)
    while awake:
        now, rank = heapq.heappop(awake)
        if free[rank] > now:
            continue
        while coming[rank] and coming[rank][0][0] <= now:
            number = heapq.heappop(coming[rank])[1]
            heapq.heappush(ready[rank], (order[number], number))
        if not ready[rank]:
            continue
        (urgency, _, _), number = ready[rank][0]
        if urgency == _FILLER and any(
            at < now + _PATIENCE * seconds[number] and order[i][0] != _FILLER for at, i in coming[rank]
        ):
            continue
        heapq.heappop(ready[rank])
        rows[rank].append(graph.actions[number])
        end = free[rank] = now + seconds[number]
        heapq.heappush(awake, (end, rank))
        for fed in feeds[number]:
            away = fed >= joints or home[fed] != rank
            meet(fed, end + lag if away else end)
    return replace(schedule, ranks=tuple(map(tuple, rows)))


def _urgency(action: Action, fillers: str) -> tuple[int, int, int]:
    if action.kind in fillers:
        return _FILLER, fillers.index(action.kind), action.number
    urgency = _URGENCY[action.kind]
    return urgency, -action.place if urgency == _URGENCY["F"] else 0, action.number
