"""What every action of a schedule waits for: the edges of the data, not the order of the lists.

Compute-only schedules have edges from compute to compute. In lowered ones they pass through the actions that carry the
data, where an edge from a communication action means that its data has arrived. Handing over between stages of one rank
needs no communication.
Must not know: time, memory, whether the order of the lists works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.schedule import Schedule

# Which kinds need a unit's gathered parameters, and which add to its gradients. W multiplies kept tensors, EB scatters.
STAGE_USES = frozenset(("F", "R", "B", "I"))
VOCAB_USES = frozenset(("S", "T", "EF"))
STAGE_GRADIENTS = frozenset(("B", "W"))
VOCAB_GRADIENTS = frozenset(("T", "EB"))
VOCAB_KINDS = frozenset(("S", "T", "EF", "EB", "X", "STATS", "DX", "ROWS", "DROWS"))


def unit_of(action: Action) -> tuple[int, str]:
    """Return the unit that a compute or ZeRO action works on: (rank, "V") for a shard, (stage, "") otherwise."""
    return action.place, "V" if action.kind in VOCAB_KINDS or action.kind[0] == "V" else ""


def uses_parameters(action: Action) -> bool:
    """Return whether a compute action needs its unit's parameters gathered."""
    return action.kind in STAGE_USES or action.kind in VOCAB_USES


def makes_gradients(action: Action) -> bool:
    """Return whether a compute action adds to its unit's gradients."""
    return action.kind in STAGE_GRADIENTS or action.kind in VOCAB_GRADIENTS


@dataclass(frozen=True)
class Graph:
    """A schedule with its actions numbered rank after rank, in list order.

    `needs[i]` are the numbers of what i waits for. Numbers from len(actions) on are joints: nobody's action, reached
    when all of `needs` are, one per rank, so that p consumers of p contributions take 2 p edges instead of p^2.
    """

    schedule: Schedule
    actions: list[Action]
    index: dict[Action, int]
    ranks: list[range]
    needs: list[list[int]]

    def leaves(self, number: int) -> list[int]:
        """Return the actions that an action or a joint needs, joints dissolved."""
        joints = len(self.actions)
        return [leaf for n in self.needs[number] for leaf in (self.needs[n] if n >= joints else [n])]

    def all_needs(self, number: int) -> set[int]:
        """Return everything that has to be done before an action, along the data."""
        found: set[int] = set()
        stack = [number]
        while stack:
            new = [n for n in self.needs[stack.pop()] if n not in found]
            found.update(new)
            stack += new
        return found


def dependencies(schedule: Schedule) -> dict[Action, tuple[Action, ...]]:
    """Return for every action of the schedule those whose result it needs.

    Raises:  PlanError if an action is missing or there twice
    """
    graph = build_graph(schedule)
    return {a: tuple(graph.actions[n] for n in graph.leaves(i)) for i, a in enumerate(graph.actions)}


def build_graph(schedule: Schedule) -> Graph:
    """Number the actions of a schedule and find what each needs.

    Raises:  PlanError if an action is missing or there twice
    """
    actions = [action for row in schedule.ranks for action in row]
    index = {action: i for i, action in enumerate(actions)}
    if len(index) < len(actions):
        twice = next(action for i, action in enumerate(actions) if index[action] != i)
        raise PlanError(f"schedule '{schedule.name}' has {twice} twice; keep one of them")
    edges = _Edges(schedule, index)
    needs: list[list[int]] = []
    for action in actions:
        rule = edges.rules.get(action.kind)
        try:
            needs.append(rule(action.place, action.number) if rule else [])
        except KeyError as error:
            raise PlanError(
                f"schedule '{schedule.name}' has {action}, but not {error.args[0]} which it needs"
            ) from None
    first, ranks = 0, []
    for row in schedule.ranks:
        ranks.append(range(first, first + len(row)))
        first += len(row)
        _add_zero_edges(actions, ranks[-1], needs)
    return Graph(schedule, actions, index, ranks, needs + edges.joints)


def _add_zero_edges(actions: list[Action], row: range, needs: list[list[int]]) -> None:
    """Uses wait for the gather before them, a release for the uses and a reduction for the gradients before it."""
    if not any(KINDS[actions[i].kind].ordinal for i in row):
        return
    gathered: dict[tuple[int, str], int] = {}
    used: dict[tuple[int, str], int] = {}
    made: dict[tuple[int, str], int] = {}
    for i in row:
        action = actions[i]
        unit, kind = unit_of(action), action.kind.removeprefix("V")
        if kind == "GATHER":
            gathered[unit] = i
        elif kind == "RELEASE":
            needs[i] += [before[unit] for before in (gathered, used) if unit in before]
            gathered.pop(unit, None)
        elif kind == "REDUCE":
            needs[i] += [made[unit]] if unit in made else []
        else:
            if uses_parameters(action):
                used[unit] = i
                needs[i] += [gathered[unit]] if unit in gathered else []
            if makes_gradients(action):
                made[unit] = i


class _Edges:
    """One rule per kind: place and number -> numbers of the needed actions. A KeyError names one that is missing."""

    def __init__(self, schedule: Schedule, index: dict[Action, int]) -> None:
        self.index = index
        self.layout = layout = schedule.layout
        self.lowered = schedule.lowered
        self.last = layout.num_stages - 1
        self.split = {(a.place, a.number) for a in index if a.kind == "I"}
        self.rebuilt = {(a.place, a.number) for a in index if a.kind == "R"}
        self.joints: list[list[int]] = []
        self._joint_of: dict[tuple[str, int], int] = {}
        # What sends a shard's part of the hidden states' gradient: algorithm 2 has it after S, algorithm 1 after T.
        self.partials = "S" if layout.vocab == 2 else "T"
        self.rules: dict[str, Callable[[int, int], list[int]]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._backward,
            "R": lambda s, m: [self._one(s, "F", m)],
            "W": lambda s, m: [self._one(s, "I", m)],
            "S": self._scores,
            "T": lambda r, m: [self._one(r, "S", m), self._all("STATS" if self.lowered else "S", m)],
            "EB": lambda r, m: [self._one(r, "DROWS", m) if self.lowered else self._gradient(0, m)],
            "SEND_F": lambda s, m: [self._one(s, "F", m)],
            "SEND_B": lambda s, m: [self._gradient(s, m)],
            "RECV_F": lambda s, m: [self._one(s - 1, "SEND_F", m)],
            "RECV_B": lambda s, m: [self._one(s + 1, "SEND_B", m)],
            "X": self._hidden_states,
            "STATS": lambda r, m: [self._one(r, "S", m)],
            "DX": lambda r, m: [self._one(r, self.partials, m)],
            "ROWS": lambda r, m: [self._one(r, "EF", m)],
            "DROWS": self._row_gradients,
        }

    def _one(self, place: int, kind: str, number: int) -> int:
        return self.index[Action(place, kind, number)]

    def _all(self, kind: str, number: int) -> int:
        """Return the joint of every rank's action of a kind."""
        if (kind, number) not in self._joint_of:
            self._joint_of[kind, number] = len(self.index) + len(self.joints)
            self.joints.append([self._one(rank, kind, number) for rank in range(self.layout.num_ranks)])
        return self._joint_of[kind, number]

    def _gradient(self, stage: int, number: int) -> int:
        """Return what makes the gradient of a stage's input."""
        return self._one(stage, "I" if (stage, number) in self.split else "B", number)

    def _carried(self, stage: int, neighbour: int) -> bool:
        """Return whether two stages talk through sends and receives."""
        return self.lowered and self.layout.stage_rank[stage] != self.layout.stage_rank[neighbour]

    def _forward(self, stage: int, number: int) -> list[int]:
        if stage:
            carried = self._carried(stage, stage - 1)
            return [self._one(stage, "RECV_F", number) if carried else self._one(stage - 1, "F", number)]
        return [self._all("ROWS" if self.lowered else "EF", number)] if self.layout.vocab else []

    def _backward(self, stage: int, number: int) -> list[int]:
        needs = [self._one(stage, "R" if (stage, number) in self.rebuilt else "F", number)]
        if stage < self.last:
            carried = self._carried(stage, stage + 1)
            needs.append(self._one(stage, "RECV_B", number) if carried else self._gradient(stage + 1, number))
        elif self.layout.vocab:
            needs += [self._all(kind, number) for kind in (("STATS", "DX") if self.lowered else (self.partials,))]
        return needs

    def _scores(self, rank: int, number: int) -> list[int]:
        at_home = rank == self.layout.head_rank or not self.lowered
        return [self._one(self.last, "F", number) if at_home else self._one(rank, "X", number)]

    def _hidden_states(self, rank: int, number: int) -> list[int]:
        root = self.layout.head_rank
        return [self._one(self.last, "F", number) if rank == root else self._one(root, "X", number)]

    def _row_gradients(self, rank: int, number: int) -> list[int]:
        root = self.layout.embed_rank
        return [self._gradient(0, number) if rank == root else self._one(root, "DROWS", number)]
