"""When a step is committed, and when one never can be: the leader's side of the protocol between snapshot processes.

Every node reports what its ranks hold; the leader answers with a decree that only moves forward. Both are whole states
with a time of sending, never differences: lost, doubled and reordered messages do no harm, and a leader that starts
anew knows as much as before once it has heard every node. Truth on recovery is what exists and verifies; a commit only
licenses freeing of what is older. Must not know: sockets, files, threads, clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from windlass.checkpoint.memory.header import State
from windlass.dist.errors import CheckpointError

NOTHING = -1  # the step before all steps


@dataclass(frozen=True)
class Report:
    """What the ranks of one node hold of the present generation, read after `passed`.

    `held`: rank -> step -> state. `passed`: rank -> the newest step about whose snapshot the rank has surely decided.
    `sent` grows with every report of a node, also over a new start of its process.
    """

    node: str
    generation: int
    sent: int
    held: Mapping[int, Mapping[int, int]]
    passed: Mapping[int, int] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """Write the report as JSON, whose keys are texts."""
        return {
            "node": self.node,
            "generation": self.generation,
            "sent": self.sent,
            "held": {str(r): {str(s): int(state) for s, state in steps.items()} for r, steps in self.held.items()},
            "passed": {str(rank): step for rank, step in self.passed.items()},
        }

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Report:
        """Read a report that came from a socket.

        Raises: CheckpointError when it is not one
        """
        try:
            return Report(
                str(fields["node"]),
                int(fields["generation"]),
                int(fields["sent"]),
                {int(r): {int(s): int(state) for s, state in steps.items()} for r, steps in fields["held"].items()},
                {int(rank): int(step) for rank, step in fields["passed"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"a vote is malformed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Decree:
    """What the leader has decided: everything up to `watermark` is committed or superseded, the later steps in
    `dropped` never will be, and slots of the steps in `pins` stay whatever else holds. For status: the newest step of
    each level that outlives memory, persists left out, and the last problem."""

    generation: int
    sent: int = 0
    watermark: int = NOTHING
    dropped: tuple[int, ...] = ()
    pins: tuple[int, ...] = ()
    saved: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0
    problem: str = ""

    def dump(self) -> dict[str, Any]:
        """Write the decree as JSON."""
        return {**vars(self), "dropped": list(self.dropped), "pins": list(self.pins), "saved": dict(self.saved)}

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Decree:
        """Read a decree that came from a socket.

        Raises: CheckpointError when it is not one
        """
        try:
            return Decree(
                int(fields["generation"]),
                int(fields["sent"]),
                int(fields["watermark"]),
                tuple(int(step) for step in fields["dropped"]),
                tuple(int(step) for step in fields["pins"]),
                {str(level): int(step) for level, step in fields["saved"].items()},
                int(fields["skipped"]),
                str(fields["problem"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"a decree is malformed: {type(error).__name__}: {error}") from error

    def after(self, other: Decree) -> Decree:
        """Merge two decrees of one generation in whatever order they came: decisions stay, pins are the latest's.

        A leader that has just started anew may know less than its forerunner said.
        """
        newer = self if self.sent >= other.sent else other
        watermark = max(self.watermark, other.watermark)
        dropped = sorted(step for step in {*self.dropped, *other.dropped} if step > watermark)
        return replace(newer, watermark=watermark, dropped=tuple(dropped))

    def frees(self, generation: int, step: int, state: int) -> bool:
        """Whether a node that has heard this decree may free a slot.

        Invariant:   never the newest committed step, and nothing of an older generation before the first commit
        """
        if generation > self.generation or (generation == self.generation and step in self.pins):
            return False
        if generation < self.generation:
            return self.watermark > NOTHING
        return step < self.watermark or (step in self.dropped and state < State.COMMITTED)


class Ballot:
    """The leader's view of one generation: hears reports, decides."""

    def __init__(self, generation: int, nodes: Mapping[str, Iterable[int]]) -> None:
        self.generation = generation
        self.ranks = {node: tuple(ranks) for node, ranks in nodes.items()}
        self.reports: dict[str, Report] = {}
        self.watermark = NOTHING
        self.dropped: set[int] = set()
        self.num_dropped = 0

    def hear(self, report: Report) -> bool:
        """Take a node's report in and return whether something was decided.

        Raises: CheckpointError when it is of another generation or of a node that is no member
        """
        if report.generation != self.generation or set(report.held) != set(self.ranks.get(report.node, ())):
            raise CheckpointError(
                f"vote of node {report.node!r}, generation {report.generation}, ranks {sorted(report.held)}: "
                f"generation {self.generation} expects ranks {list(self.ranks.get(report.node, ()))} there"
            )
        last = self.reports.get(report.node)
        if last is not None and last.sent >= report.sent:
            return False
        self.reports[report.node] = report
        return self._decide()

    def missing(self, step: int) -> list[int]:
        """Return the ranks that have not encoded a step."""
        held = self._held()
        return [
            rank
            for ranks in self.ranks.values()
            for rank in ranks
            if held.get(rank, {}).get(step, State.FREE) < State.ENCODED
        ]

    def newest(self, state: State) -> int:
        """Return the newest step that every rank holds in this state or a later one, and that was not given up."""
        if len(self.reports) < len(self.ranks):
            return NOTHING
        every = [{step for step, found in steps.items() if found >= state} for steps in self._held().values()]
        # A report is older than what its node has freed since: a step that was given up may look whole once more.
        return max(set.intersection(*every) - self.dropped, default=NOTHING) if every else NOTHING

    def _held(self) -> dict[int, Mapping[int, int]]:
        return {rank: steps for report in self.reports.values() for rank, steps in report.held.items()}

    def _decide(self) -> bool:
        held = self._held()
        # A slot that is already committed proves a commit that an earlier leader process made.
        proven = [step for steps in held.values() for step, state in steps.items() if state >= State.COMMITTED]
        watermark = max([self.watermark, self.newest(State.ENCODED), *proven])
        # Only once all nodes have been heard: one that has not may know of a commit, after which others have freed what
        # is older.
        heard = len(self.reports) == len(self.ranks)
        undecided = {step for steps in held.values() for step in steps if step > watermark}
        dead = {step for step in undecided if heard and self._is_dead(step, held)}
        dropped = {step for step in self.dropped if step > watermark} | dead
        if (watermark, dropped) == (self.watermark, self.dropped):
            return False
        self.num_dropped += len(dead - self.dropped)
        self.watermark, self.dropped = watermark, dropped
        return True

    def _is_dead(self, step: int, held: Mapping[int, Mapping[int, int]]) -> bool:
        """Whether some rank does not hold a step and never will: it has passed it or holds a newer one."""
        passed = {rank: at for report in self.reports.values() for rank, at in report.passed.items()}
        return any(
            step not in steps and max(*steps, passed.get(rank, NOTHING), NOTHING) >= step
            for rank, steps in held.items()
        )
