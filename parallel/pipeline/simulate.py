"""Run a schedule on paper: when every action starts and ends, how long ranks idle, how much they hold.

The rules are those of the runner. A rank goes through its list. A compute action waits until what it needs is there and
holds up everything behind it; a communication action is begun when the list reaches it and holds up nothing. A message
occupies its channel (one per rank and kind, as every kind has its own communicator) for bytes / bandwidth and arrives a
latency later; a receive is complete when it is posted and its data has arrived. A gather holds up the first use of what
it gathers, a reduction only the end of the step.
Must not know: tensors, transports.
Differs: channels do not share bandwidth; a rooted collective takes as long as one message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.draw import text_grid
from windlass.parallel.pipeline.graph import Graph, build_graph
from windlass.parallel.pipeline.schedule import Layout, Schedule
from windlass.parallel.pipeline.timeline import Span, Timeline

_UNKNOWN = -1.0


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Return when every action of a step runs, and what each rank holds at most.

    Raises:  PlanError if an action is missing or twice, or if ranks wait for each other in a circle: says who waits in
             which action for whom and shows the actions up to there
    """
    run = Run(build_graph(schedule), costs)
    if run.stuck():
        raise PlanError(deadlock(run))
    return run.timeline(peak_bytes=_peak_bytes(run.graph, costs))


class Run:
    """The state of a simulation: clock and place of every rank, start and end of every action."""

    def __init__(self, graph: Graph, costs: Costs) -> None:
        self.graph, self.costs = graph, costs
        count = len(graph.needs)
        self.starts = [_UNKNOWN] * count
        self.ends = [_UNKNOWN] * count
        self.place = [row.start for row in graph.ranks]  # the action that each rank has come to
        self._clock = [0.0] * len(graph.ranks)
        self._missing = [len(needs) for needs in graph.needs]
        self._ready = [0.0] * count  # when the latest of what it needs is there
        self._posted = [_UNKNOWN] * count
        self._dependents: list[list[int]] = [[] for _ in range(count)]
        for number, needs in enumerate(graph.needs):
            for need in needs:
                self._dependents[need].append(number)
        layout = graph.schedule.layout
        self._lanes = [KINDS[action.kind].lane for action in graph.actions]
        self.rank_of = [rank for rank, row in enumerate(graph.ranks) for _ in row]
        self._moves = [is_message(action, layout) for action in graph.actions]
        self._channels: defaultdict[tuple[int, str], float] = defaultdict(float)
        self._awake = list(range(len(graph.ranks)))
        while self._awake:
            self._advance(self._awake.pop())

    def _advance(self, rank: int) -> None:
        """Go through a rank's list until it ends or a compute action lacks something."""
        end = self.graph.ranks[rank].stop
        while (number := self.place[rank]) < end:
            if self._lanes[number] == "compute":
                if self._missing[number]:
                    return
                start = max(self._clock[rank], self._ready[number])
                self._clock[rank] = start + self.costs.seconds(self.graph.actions[number])
                self._finish(number, start, self._clock[rank])
                self.place[rank] += 1
            else:
                self.place[rank] += 1
                self._posted[number] = self._clock[rank]
                if not self._missing[number]:
                    self._communicate(number)

    def _communicate(self, number: int) -> None:
        """Carry a message, or take in the one that has been carried."""
        action, posted = self.graph.actions[number], self._posted[number]
        start = arrival = max(posted, self._ready[number])
        if not self._moves[number]:
            start = max(posted, self.starts[self.graph.needs[number][0]])
        elif size := self.costs.num_bytes(action):
            channel = self.rank_of[number], action.kind
            start = max(arrival, self._channels[channel])
            self._channels[channel] = start + self.costs.transfer_s(size)
            arrival = self._channels[channel] + self.costs.latency_s
        self._finish(number, start, arrival)

    def _finish(self, number: int, start: float, end: float) -> None:
        self.starts[number], self.ends[number] = start, end
        for dependent in self._dependents[number]:
            self._missing[dependent] -= 1
            if end > self._ready[dependent]:
                self._ready[dependent] = end
            if self._missing[dependent]:
                continue
            if dependent >= len(self.graph.actions):
                self._finish(dependent, self._ready[dependent], self._ready[dependent])
            elif self._lanes[dependent] != "compute":
                if self._posted[dependent] != _UNKNOWN:
                    self._communicate(dependent)
            elif self.place[self.rank_of[dependent]] == dependent:
                self._awake.append(self.rank_of[dependent])

    def stuck(self) -> list[int]:
        """Return the ranks that have not come to the end of their list."""
        return [rank for rank, row in enumerate(self.graph.ranks) if self.place[rank] < row.stop]

    def lacking(self, number: int) -> int:
        """Return the first action that has not run and keeps this one waiting: past messages that are under way."""
        graph = self.graph
        need = next(n for n in graph.leaves(number) if self.ends[n] == _UNKNOWN)
        if self._lanes[need] == "compute":
            return need
        producers = [n for n in graph.needs[need] if self.ends[n] == _UNKNOWN and self.rank_of[n] == self.rank_of[need]]
        return self.lacking(need) if self._posted[need] != _UNKNOWN or producers else need

    def timeline(self, peak_bytes: tuple[float, ...] = ()) -> Timeline:
        """Return what has run."""
        actions, starts, ends = self.graph.actions, self.starts, self.ends
        rows = [[Span(actions[i], starts[i], ends[i]) for i in row if ends[i] != _UNKNOWN] for row in self.graph.ranks]
        return Timeline.of(self.graph.schedule.name, rows, peak_bytes)


def is_message(action: Action, layout: Layout) -> bool:
    """Return whether a communication action puts data on a link; the others wait for data of a peer, or have their own.

    Roots keep their own contribution; alone in a pipeline, every rank is a root.
    """
    match action.kind:
        case "X":
            return action.place == layout.head_rank and layout.num_ranks > 1
        case "DROWS":
            return action.place == layout.embed_rank and layout.num_ranks > 1
        case "DX":
            return action.place != layout.head_rank
        case "ROWS":
            return action.place != layout.embed_rank
        case "STATS":
            return layout.num_ranks > 1
        case kind:
            return not kind.startswith("RECV_")


# -- memory ------------------------------------------------------------------------------------------------------------


def _peak_bytes(graph: Graph, costs: Costs) -> tuple[float, ...]:
    """Return the most bytes that each rank holds. Lists run in order, so this does not depend on durations."""
    peaks = []
    for rank, row in enumerate(graph.ranks):
        held: defaultdict[int, float] = defaultdict(float)  # the action that frees -> bytes
        now = peak = costs.resident_bytes[rank]
        for number in row:
            for until, size in _holds(graph, costs, number):
                held[until] += size
                now += size
            peak = max(peak, now)
            now -= held.pop(number, 0.0)
        peaks.append(peak)
    return tuple(peaks)


def _holds(graph: Graph, costs: Costs, number: int) -> Iterator[tuple[int, float]]:
    """Yield what an action allocates: the number of the action after which it is free again, and bytes."""
    layout, actions, index = graph.schedule.layout, graph.actions, graph.index
    place, kind, m = actions[number]
    last = layout.num_stages - 1

    def until(*wanted: Action) -> int:
        return next((index[action] for action in wanted if action in index), number)

    def gradient(stage: int) -> int:
        return until(Action(stage, "B", m), Action(stage, "I", m))

    def received(rank: int | None = None) -> float:
        sizes = costs.message_bytes.get(kind, (0.0,) * layout.num_ranks)
        return sum(sizes) if rank is None else sizes[rank]

    match kind:
        case "F" | "R":
            size = (costs.activation_bytes if kind == "F" else costs.recomputed_bytes)[place]
            early = costs.freed_by_input_gradient if Action(place, "W", m) in index else 0.0
            yield gradient(place), size * early
            yield until(Action(place, "W", m), Action(place, "B", m)), size * (1 - early)
        case "S":
            yield until(Action(place, "T", m)), costs.scores_bytes[place]
        case "RECV_F":
            yield until(Action(place, "F", m)), costs.num_bytes(Action(place - 1, "SEND_F", m))
        case "RECV_B":
            yield gradient(place), costs.num_bytes(Action(place + 1, "SEND_B", m))
        case "X":
            yield until(Action(place, "T", m), Action(place, "S", m)), received(place)
        case "STATS":
            yield until(Action(place, "T", m)), received()
        case "DX" if place == layout.head_rank:
            yield gradient(last), received()
        case "ROWS" if place == layout.embed_rank:
            yield until(Action(0, "F", m)), received()
        case "DROWS":
            yield until(Action(place, "EB", m)), received(place)
        case "GATHER" | "VGATHER":
            sizes = costs.gathered_bytes if kind == "GATHER" else costs.gathered_vocab_bytes
            yield index.get(Action(place, kind.replace("GATHER", "RELEASE"), m), len(actions)), sizes[place]


# -- deadlocks ---------------------------------------------------------------------------------------------------------


def deadlock(run: Run) -> str:
    """Say who waits for whom in a circle and which action would have to come earlier, and show what ran until there."""
    graph, names = run.graph, run.graph.actions
    links: list[tuple[int, int, int, int]] = []  # a rank, the action it stands at, the one it wants, whose that is
    rank = run.stuck()[0]
    while rank not in (ranks := [link[0] for link in links]):
        stands = run.place[rank]
        wanted = run.lacking(stands)
        links.append((rank, stands, wanted, run.rank_of[wanted]))
        rank = run.rank_of[wanted]
    circle = links[ranks.index(rank) :]
    story = ", which waits in ".join(
        f"{names[at]} for {names[wanted]} of rank {owner}" for _, at, wanted, owner in circle
    )
    # Data flows in no circle, so at least one of the wanted actions does not itself need what its rank stands at.
    earlier = next(wanted for *_, wanted, owner in circle if run.place[owner] not in {wanted, *graph.all_needs(wanted)})
    owner = run.rank_of[earlier]
    return (
        f"schedule '{graph.schedule.name}' never ends: rank {circle[0][0]} waits in {story}. "
        f"{names[earlier]}, with what it needs, must come before {names[run.place[owner]]} on rank {owner}. "
        f"What ran until there:\n{text_grid(run.timeline())}"
    )
