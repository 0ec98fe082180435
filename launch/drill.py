"""Failures on purpose: what to break when, and what came of it.

Must not know: how anything is broken (the fleet does), when the run is started again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from windlass.dist.errors import ConfigError

BY_RANK = ("rank", "stop")
BY_NODE = ("smp", "agent", "node", "zombie", "reboot")
ONLY_RAY = ("agent", "controller")  # without it the launcher is both, and the run ends with it
LOSING = ("node", "zombie")
STOPPING = ("rank", "stop", "node", "zombie", "reboot")  # training cannot go on without what they hit
KINDS = (*BY_RANK, *BY_NODE, "controller")
_FORM = re.compile(r"(\w+)=([\w.-]+)@step=(\d+)")


@dataclass(frozen=True)
class Strike:
    """Break `target` once `step` steps are done. See Fleet.strike for the kinds."""

    kind: str
    target: str
    step: int

    @staticmethod
    def parse(text: str) -> Strike:
        """Read `rank=1@step=20`, `stop=0@step=5`, `node=0@step=30`, `smp=node-0@step=9`, ...

        Raises:      ConfigError with a value that works
        """
        found = _FORM.fullmatch(text)
        if found is None or found[1] not in KINDS or (found[1] in BY_RANK and not found[2].isdigit()):
            raise ConfigError(
                f"--kill {text}: must be KIND=TARGET@step=N with KIND one of {', '.join(KINDS)}; the target is a rank "
                "for rank and stop, else a node. For example rank=1@step=20 or node=0@step=30"
            )
        target = f"node-{found[2]}" if found[1] in BY_NODE and found[2].isdigit() else found[2]
        return Strike(found[1], target, int(found[3]))

    def __str__(self) -> str:
        return f"{self.kind}={self.target}@step={self.step}"


@dataclass(frozen=True)
class Targets:
    """What a job has that can be struck.

    `processes`: it has snapshot processes. `nodes`: all that it will ever have; empty where only the cluster knows.
    """

    workers: int
    steps: int
    processes: bool
    ray: bool
    nodes: tuple[str, ...]


def check_strikes(strikes: Sequence[Strike], targets: Targets) -> None:
    """Check strikes against the job before anything starts.

    Raises:      ConfigError naming the strike and a value that works
    """
    lost: dict[str, Strike] = {}
    for strike in sorted(strikes, key=lambda strike: strike.step):
        if problem := _problem(strike, targets):
            raise ConfigError(f"--kill {strike}: {problem}")
        if targets.nodes and strike.kind in BY_NODE and strike.target in lost:
            raise ConfigError(f"--kill {strike}: {lost[strike.target]} has taken that node away. Use another one")
        if strike.kind in LOSING:
            lost[strike.target] = strike


def _problem(strike: Strike, has: Targets) -> str:
    """Return why a strike cannot happen, and what can."""
    kind, steps = strike.kind, has.steps
    cases = (
        (kind in ONLY_RAY and not has.ray, f"the launcher is the {kind}, and the run ends with it. Add --ray local"),
        (
            kind in BY_RANK and int(strike.target) >= has.workers,
            f"there are only {has.workers} workers. Use {kind}={has.workers - 1}",
        ),
        (
            kind in BY_NODE and bool(has.nodes) and strike.target not in has.nodes,
            f"there is no such node. Use one of {', '.join(has.nodes)}, or more launch.nodes or launch.spares",
        ),
        (not 0 < strike.step < steps, f"the run has train.steps = {steps}. Use a step from 1 to {steps - 1}"),
        (kind == "smp" and not has.processes, "this job has no snapshot processes. Add snapshot.every=1"),
        (
            kind == "stop" and not has.processes,
            "nobody would notice: snapshot processes look for hangs, and this job has none. Add snapshot.every=1",
        ),
    )
    return next((problem for wrong, problem in cases if wrong), "")


def all_done(strikes: Sequence[Strike], records: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the records of a launch show that every strike was made."""
    return not pending(strikes, records) and all(record["done"] for record in records if record["kind"] == "blow")


def pending(strikes: Sequence[Strike], records: Sequence[Mapping[str, Any]]) -> list[Strike]:
    """Return the strikes that the records of this launch do not show as done, in the order of their steps."""
    left = sorted(strikes, key=lambda strike: strike.step)
    for record in records:
        if record["kind"] == "struck":
            done = Strike(record["what"], record["target"], record["at"])
            if done in left:
                left.remove(done)
    return left


@dataclass(frozen=True)
class Outcome:
    """What came of one strike. `decision` tells why there is none, or that training did not stop."""

    what: str
    decision: str
    restored: str = "-"
    lost: str = "-"
    seconds: Mapping[str, float] | None = None


def outcomes(records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Return what came of every strike, from the records of one launch."""
    found = []
    for place, record in enumerate(records):
        if record["kind"] != "struck":
            continue
        later = records[place + 1 :]
        same = [r for r in later if r["generation"] == record["generation"]]
        blow = later[0] if later and later[0]["kind"] == "blow" else {"message": "", "done": True}
        what = f"{record['what']}={record['target']}@step={record['at']}"
        if not blow["done"]:
            found.append(Outcome(what, f"not done: {blow['message']}"))
            continue
        failed = next((place for place, r in enumerate(later) if r["kind"] == "failure" and r in same), None)
        if failed is None or not _caused(record, later[:failed]):
            news = [r["message"] for r in same if r["kind"] == "notice"]
            found.append(Outcome(what, f"training did not stop{': ' + news[0] if news else ''}"))
            continue
        later = later[failed:]
        end = next((r for r in later if r["kind"] == "recovered"), None)
        decision = next((r["why"] for r in later if r["kind"] == "decision"), "none")
        if end is None:
            found.append(Outcome(what, f"{decision}; did not recover"))
            continue
        known = end["restored"] is not None
        restored = f"{end['restored']} {end['tier']}".strip() if known else "?"
        found.append(Outcome(what, decision, restored, str(end["lost"]) if known else "?", end["seconds"]))
    return found


def _caused(struck: Mapping[str, Any], between: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a failure is due to a strike, from the records between: others at the same step count as one."""
    others = [record for record in between if record["kind"] == "struck"]
    return not others or (struck["what"] in STOPPING and all(other["at"] == struck["at"] for other in others))


def drill_table(found: Sequence[Outcome]) -> str:
    """Write the outcomes as a table: one row each, seconds by phase below."""
    rows = [("STRUCK", "LOST", "SECONDS", "RESTORED", "DECISION")]
    for outcome in found:
        total = "-" if outcome.seconds is None else f"{sum(outcome.seconds.values()):.2f}"
        rows.append((outcome.what, outcome.lost, total, outcome.restored, outcome.decision))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row, told in zip(rows, [None, *found], strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if told is not None and told.seconds:
            lines.append("    " + "  ".join(f"{name} {seconds:.2f}" for name, seconds in told.seconds.items()))
    return "\n".join(lines)
