"""What happens after a failure, as a pure function of what has happened: who sits where, or why the run ends.

Rules, in order: mistakes that would repeat end the run; the same step failing again without progress (data or code is
suspect); the budget of restarts; nodes that failed too often are left out; otherwise in place, on a spare node, on
fewer workers of an allowed number, and back on all of them when there is room again. What failed long before the
newest failure counts no more.
Must not know: processes, files, clocks, Ray. Replaying the log gives the same decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from windlass.launch.fleet import Node, Seating

KILLED = 128  # exit codes above say by which signal
MAX_BACKOFF_S = 30.0


@dataclass(frozen=True)
class Limits:
    """How far recovery may go. `sizes`: numbers of workers with which this job works, `workers` the one wanted.

    Units: seconds; `window_s`: failures longer before the newest do not count, 0: all do
    """

    workers: int
    sizes: tuple[int, ...] = ()
    max_restarts: int = 0
    crash_loops: int = 2
    node_failures: int = 2
    replace_s: float = 0.0
    window_s: float = 0.0


@dataclass(frozen=True)
class Failed:
    """One failure. `kind`: worker | hang | node | start, or planned, which is none: workers were asked to end; `step`:
    the last one that was finished; `restored`: the one before the first that was made, None if unknown; `repeats`: a
    mistake that no restart mends; `node` empty: unknown.
    """

    generation: int
    kind: str
    step: int
    message: str = ""
    node: str = ""
    rank: int = -1
    exit_code: int = 1
    repeats: bool = False
    time: float = 0.0
    restored: int | None = None

    @property
    def blames_node(self) -> bool:
        """An error that Python raised says nothing against the machine; a kill, a hang or a loss does."""
        return bool(self.node) and (
            self.kind in ("hang", "node") or (self.kind == "worker" and self.exit_code > KILLED)
        )


@dataclass(frozen=True)
class History:
    """What decisions depend on: the failures since the user started the run, and who sat where last."""

    failures: tuple[Failed, ...] = ()
    seating: Seating | None = None

    @staticmethod
    def of(records: Iterable[Mapping[str, Any]]) -> History:
        """Reduce the records of a control log."""
        failures: list[Failed] = []
        seating: Seating | None = None
        names = {f.name for f in fields(Failed)}
        for record in records:
            if record["kind"] == "launch":
                failures, seating = [], None
            elif record["kind"] == "decision" and record.get("nodes"):
                seating = Seating(tuple(record["nodes"]))
            elif record["kind"] == "failure":
                facts = {name: record[name] for name in names & set(record) if name != "kind"}
                failures.append(Failed(kind=record["what"], **facts))
            elif record["kind"] == "lost" and failures:
                # Whatever its workers said was due to that: elsewhere it does not happen again.
                failures[-1] = replace(failures[-1], kind="node", node=record["nodes"][0], repeats=False)
        return History(tuple(failures), seating)

    def within(self, window_s: float) -> History:
        """Return the history without failures that are longer ago than this, counted back from the newest."""
        if not window_s or not self.failures:
            return self
        newest = max(failed.time for failed in self.failures)
        return replace(self, failures=tuple(f for f in self.failures if newest - f.time <= window_s))

    @property
    def looping(self) -> tuple[Failed, ...]:
        """The failures in a row, up to the last, without progress. Lost nodes are no sign of bad data or code.

        Progress is a step that nobody had done. Where steps are done again it is also any step beyond the restored one,
        unless that is where it failed before.
        """
        row: list[Failed] = []
        best = -1
        for failed in self.failures:
            if failed.kind == "node":
                continue
            redone = failed.restored is not None and failed.step > failed.restored
            elsewhere = all(failed.step != before.step for before in row)
            if failed.step > best or (redone and elsewhere):
                row = []
            row.append(failed)
            best = max(best, failed.step)
        return tuple(row)

    def bad_nodes(self, limit: int) -> frozenset[str]:
        counts = Counter(failed.node for failed in self.failures if failed.blames_node)
        return frozenset(name for name, count in counts.items() if count >= limit)


@dataclass(frozen=True)
class Restart:
    """Start the workers like this, after `pause_s`."""

    seating: Seating
    why: str
    pause_s: float = 0.0


@dataclass(frozen=True)
class Wait:
    """Nodes are missing: look again, until the limit for it is over."""

    why: str
    seconds: float


@dataclass(frozen=True)
class Stop:
    """The run ends. `report`: what a person should look at."""

    why: str
    report: tuple[str, ...] = field(default=())


Decision = Restart | Wait | Stop


def decide(history: History, nodes: Sequence[Node], limits: Limits, *, waited_s: float = 0.0) -> Decision:
    """Decide how a run goes on (or begins, with an empty history).

    Invariant:   pure. A Restart never seats a worker on a lost or excluded node, nor more on a node than it holds; its
                 number of workers is allowed; there are never more Restarts after failures than `max_restarts` within
                 `window_s`
    """
    history = history.within(limits.window_s)
    if (end := _must_stop(history, limits)) is not None:
        return end
    bad = history.bad_nodes(limits.node_failures) if len(nodes) > 1 else frozenset()
    healthy = [node for node in nodes if node.alive and node.name not in bad and node.slots > 0]
    staying = [node for node in healthy if node.drain_deadline is None]
    # A node that will be taken is better than none.
    usable = staying if _room(staying) >= min(limits.workers, _room(healthy)) else healthy
    begun = history.seating is not None
    allowed = {limits.workers} | (set(limits.sizes) if begun else set())
    size = max((size for size in allowed if 0 < size <= min(limits.workers, _room(usable))), default=0)
    if size < limits.workers and waited_s < limits.replace_s:
        return Wait(_missing(nodes, bad, usable, limits), limits.replace_s - waited_s)
    if not size:
        smallest = min(allowed)
        return Stop(f"{_missing(nodes, bad, usable, limits)}, and the job cannot go on with fewer than {smallest}")
    seating = seat(history.seating, usable, size)
    return Restart(seating, _why(history, seating, bad), _pause(history))


def _must_stop(history: History, limits: Limits) -> Stop | None:
    if not history.failures:
        return None
    last = history.failures[-1]
    if last.repeats:
        return Stop("the same would happen again")
    looping = history.looping
    if len(looping) >= limits.crash_loops and last.kind != "node":
        steps = [str(step) for step in sorted({failed.step + 1 for failed in looping})]
        return Stop(
            f"step{'s' * (len(steps) > 1)} {', '.join(steps)} failed {len(looping)} times without progress "
            f"(recovery.crash_loops = {limits.crash_loops}): suspect the data or the code, not the machines",
            tuple(f"generation {f.generation}, after step {f.step}, {_where(f)}: {f.message}" for f in looping),
        )
    if len(history.failures) > limits.max_restarts:
        within = f" within recovery.window_s = {limits.window_s:g}" if limits.window_s else ""
        return Stop(f"recovery.max_restarts = {limits.max_restarts} restarts are used up{within}")
    return None


def _where(failed: Failed) -> str:
    return " of ".join([f"rank {failed.rank}"] * (failed.rank >= 0) + [failed.node] * bool(failed.node)) or "unknown"


def _room(nodes: Iterable[Node]) -> int:
    return sum(node.slots for node in nodes)


def _missing(nodes: Sequence[Node], bad: frozenset[str], usable: Sequence[Node], limits: Limits) -> str:
    lost = [node.name for node in nodes if not node.alive]
    parts = [f"room for {_room(usable)} of {limits.workers} workers"]
    parts += [f"lost: {', '.join(lost)}"] if lost else []
    parts += [f"excluded after {limits.node_failures} failures: {', '.join(sorted(bad))}"] if bad else []
    return "; ".join(parts)


def _pause(history: History) -> float:
    """Return how long to wait: not after a first failure, then twice as long for each one without progress."""
    length = len(history.looping)
    return min(2.0 ** (length - 2), MAX_BACKOFF_S) if length > 1 else 0.0


def _why(history: History, seating: Seating, bad: frozenset[str]) -> str:
    before = history.seating
    if before is None:
        return "first start"
    if before == seating:
        return "in place"
    joined = [name for name in seating.used if name not in before.used]
    left = [name for name in before.used if name not in seating.used]
    text = ""
    if seating.world_size != before.world_size:
        verb = "shrink" if seating.world_size < before.world_size else "grow"
        text = f"{verb} from {before.world_size} to {seating.world_size} workers"
    elif left:
        names = [f"{name} (excluded)" if name in bad else name for name in left]
        text = f"{', '.join(joined) or 'the other nodes'} for {', '.join(names)}"
    return text or "other places on the same nodes"


def seat(before: Seating | None, nodes: Sequence[Node], size: int) -> Seating:
    """Seat `size` workers on nodes with room for them: as they sat where that is possible, ranks of a node contiguous.

    Invariant:   while the number of workers stays, a rank moves only if its node is gone, or to keep ranks contiguous
    """
    room = {node.name: node.slots for node in nodes}
    if before is not None and before.world_size == size:
        places = list(before.nodes)
        lost = [name for name in before.used if len(before.ranks_of(name)) > room.get(name, 0)]
        for name in before.used:
            if name not in lost:
                room[name] -= len(before.ranks_of(name))
        for name in lost:
            _move(before.ranks_of(name), places, room, nodes)
        if _contiguous(places):
            return Seating(tuple(places))
        counts = Counter(places)
        return Seating(tuple(name for name in dict.fromkeys(places) for _ in range(counts[name])))
    known = before.used if before is not None else ()
    order = sorted(room, key=lambda name: known.index(name) if name in known else len(known))  # stable: spares last
    places = [name for name in order for _ in range(room[name])]
    return Seating(tuple(places[:size]))


def _move(ranks: Sequence[int], places: list[str], room: dict[str, int], nodes: Sequence[Node]) -> None:
    """Give ranks of a lost node new places: all on one node if it fits, best one that shares no domain with others."""
    domain = {node.name: node.domain for node in nodes}
    taken = {domain[name] for rank, name in enumerate(places) if name in domain and rank not in ranks}
    whole = [name for name in room if room[name] >= len(ranks)]
    order = sorted(room, key=lambda name: (name not in whole, name in places, domain[name] in taken, -room[name]))
    free = iter([name for name in order for _ in range(room[name])])
    for rank in ranks:
        places[rank] = next(free)
        room[places[rank]] -= 1


def _contiguous(places: Sequence[str]) -> bool:
    changes = 1 + sum(a != b for a, b in pairwise(places))
    return changes == len(set(places))
