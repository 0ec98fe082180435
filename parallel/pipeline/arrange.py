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
from windlass.parallel.pipeline.graph import Graph, build_graph
from windlass.parallel.pipeline.schedule import Schedule

# What runs first when several actions could: lookups and scatters are short, other ranks wait for scores, and what
# other ranks wait for next comes from later stages.
_URGENCY = {"EF": 0, "EB": 1, "S": 2, "T": 3, "F": 4, "B": 4, "I": 4}
_FILLER = 5

# A filler starts unless something else is known to arrive within this share of its time. Waiting for the whole of it,
# or not at all, gives ZB1P with vocabulary passes 1.3 to 1.5 times the idle time, and the others no less.
_PATIENCE = 0.5


def arrange(schedule: Schedule, costs: Costs, after: Mapping[Action, Sequence[Action]], fillers: str) -> Schedule:
    """Put the actions of every rank in the order in which they would run.

    `after` adds to the data dependencies. Kinds in `fillers` run when a rank would be idle, the first of them first.
    The result depends on nothing but the arguments. Its lists cannot deadlock, because they follow one common time.
    """
    machine = _Machine(build_graph(schedule), costs, fillers)
    machine.wait(after)
    return replace(schedule, ranks=tuple(map(tuple, machine.run())))


class _Machine:
    """Ranks that run one action after the other, and a clock. An action starts when all that it needs has arrived."""

    def __init__(self, graph: Graph, costs: Costs, fillers: str) -> None:
        self._actions = graph.actions
        self._home = [rank for rank, row in enumerate(graph.ranks) for _ in row]
        self._seconds = [costs.seconds(action) for action in graph.actions]
        self._order = [_urgency(action, fillers) for action in graph.actions]
        self._lag = costs.latency_s + costs.transfer_s(costs.num_bytes(Action(0, "SEND_F", 0)))
        self._waiting = [len(needs) for needs in graph.needs]
        self._feeds: list[list[int]] = [[] for _ in graph.needs]
        for number, needs in enumerate(graph.needs):
            for need in needs:
                self._feeds[need].append(number)
        self._arrived = [0.0] * len(graph.needs)  # when the latest of the needs that are met arrives
        self._coming: list[list[tuple[float, int]]] = [[] for _ in graph.ranks]
        self._ready: list[list[tuple[tuple[int, int, int], int]]] = [[] for _ in graph.ranks]
        self._awake = [(0.0, rank) for rank in range(len(graph.ranks))]

    def wait(self, after: Mapping[Action, Sequence[Action]]) -> None:
        """Make actions wait for others."""
        index = {action: number for number, action in enumerate(self._actions)}
        for action, others in after.items():
            self._waiting[index[action]] += len(others)
            for other in others:
                self._feeds[index[other]].append(index[action])

    def run(self) -> list[list[Action]]:
        """Return what each rank has run, in order."""
        for first in [n for n in range(len(self._actions)) if not self._waiting[n]]:
            self._release(first)
        rows: list[list[Action]] = [[] for _ in self._ready]
        free = [0.0] * len(rows)
        while self._awake:
            now, rank = heapq.heappop(self._awake)
            if free[rank] > now or (number := self._choose(rank, now)) is None:
                continue
            rows[rank].append(self._actions[number])
            end = free[rank] = now + self._seconds[number]
            heapq.heappush(self._awake, (end, rank))
            # What this makes possible is known from now on, so that fillers can keep out of its way.
            for fed in self._feeds[number]:
                here = fed < len(self._home) and self._home[fed] == rank
                self._meet(fed, end if here else end + self._lag)
        return rows

    def _meet(self, number: int, at: float) -> None:
        """One of an action's needs arrives at this time."""
        self._arrived[number] = max(self._arrived[number], at)
        self._waiting[number] -= 1
        if not self._waiting[number]:
            self._release(number)

    def _release(self, number: int) -> None:
        at = self._arrived[number]
        if number < len(self._home):
            heapq.heappush(self._coming[self._home[number]], (at, number))
            heapq.heappush(self._awake, (at, self._home[number]))
        else:  # a joint of the graph: reached without taking time
            for fed in self._feeds[number]:
                self._meet(fed, at)

    def _choose(self, rank: int, now: float) -> int | None:
        """Take the next action of an idle rank; None if it had better wait for what comes."""
        coming, ready = self._coming[rank], self._ready[rank]
        while coming and coming[0][0] <= now:
            number = heapq.heappop(coming)[1]
            heapq.heappush(ready, (self._order[number], number))
        if not ready:
            return None
        (urgency, _, _), number = ready[0]
        soon = now + _PATIENCE * self._seconds[number]
        if urgency == _FILLER and any(at < soon and self._order[other][0] != _FILLER for at, other in coming):
            return None
        return heapq.heappop(ready)[1]


def _urgency(action: Action, fillers: str) -> tuple[int, int, int]:
    if action.kind in fillers:
        return _FILLER, fillers.index(action.kind), action.number
    urgency = _URGENCY[action.kind]
    return urgency, -action.place if urgency == _URGENCY["F"] else 0, action.number
