"""What happened to a run: how far it is, what each recovery took, and the page RUN/history.md that tells it.

Everything is read from files that others write: metrics.jsonl, the control log and the workers' phase reports.
Must not know: how failures are detected or decided about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, final

from windlass.dist.errors import DataError
from windlass.launch.control_log import Record, read_phases
from windlass.launch.decide import Failed
from windlass.launch.metrics import read_metrics
from windlass.launch.run_folder import RunFolder, write_atomically

# From the report of one phase to that of the next.
WORKER_PHASES = (
    ("respawn", "imported"),
    ("rendezvous", "met"),
    ("find", "found"),
    ("load", "loaded"),
    ("first step", "first_step"),
)


@final
class StepWatch:
    """How far training is, from the lines that rank 0 adds to metrics.jsonl."""

    def __init__(self, run: Path) -> None:
        self._path = RunFolder(run).metrics
        self._at = 0
        self.begin()

    def begin(self, at: int | None = None) -> int:
        """Look only at what is written from now on, or behind these bytes; return behind how many."""
        self._at = began = self._size() if at is None else at
        self._step = 0
        return began

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0
        except OSError:  # what is known to be there
            return self._at

    def last(self) -> int:
        """Return the last step that was finished since `begin`, as far as the file could be read; 0 for none."""
        try:
            if self._path.stat().st_size <= self._at:
                return self._step
            with open(self._path, "rb") as file:
                file.seek(self._at)
                text = file.read()
        except OSError:
            return self._step
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # a line that an earlier process left unfinished
                continue
            if isinstance(entry, dict) and "event" not in entry:
                self._step = entry.get("step", self._step)
        return self._step


@dataclass
class Recovery:
    """A recovery under way. `reached`: the last step that was finished before, if this failure came before a new one.

    Units: Unix seconds; `fenced`: nothing old was left; `resumed`: workers were started
    """

    generation: int
    failed: Failed
    why: str
    fenced: float
    resumed: float = 0.0
    reached: int = 0


@dataclass(frozen=True)
class Measured:
    """What a recovery took. `restored`: the step it went on from, None while nobody has said; `done`: it has ended."""

    generation: int
    failed: Failed
    why: str
    restored: int | None
    tier: str
    seconds: dict[str, float] = field(default_factory=dict)
    done: bool = False
    reached: int = 0

    @property
    def lost(self) -> int | None:
        """Steps that had been finished and must be done again."""
        return None if self.restored is None else max(self.failed.step - self.restored, self.reached - self.restored, 0)

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def as_record(self) -> dict[str, Any]:
        return {
            "why": self.why,
            "restored": self.restored,
            "tier": self.tier,
            "lost": self.lost,
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
        }


def measure(run: Path, recovery: Recovery, struck: Sequence[float] = ()) -> Measured:
    """Return what is known of a recovery so far; `struck`: when a drill broke something.

    Seconds of workers are those of the slowest rank, so that they add up to the whole.
    """
    failed = recovery.failed
    blow = max((when for when in struck if when <= failed.time), default=failed.time)
    seconds = {"detect": failed.time - blow, "fence": recovery.fenced - failed.time}
    if recovery.resumed - recovery.fenced > 0.05:
        seconds["wait"] = recovery.resumed - recovery.fenced
    reports = read_phases(run, recovery.generation)
    loaded = _loaded(reports)
    before = max(recovery.fenced, recovery.resumed)
    for name, phase in WORKER_PHASES:
        times = [report["time"] for report in reports if report["phase"] == phase]
        if times:
            seconds[name] = max(max(times) - before, 0.0)
            before = max(before, *times)
    return Measured(
        generation=recovery.generation,
        failed=failed,
        why=recovery.why,
        restored=loaded.get("step"),
        tier=loaded.get("tier") or loaded.get("source") or "",
        seconds=seconds,
        done=any(report["phase"] == "first_step" for report in reports),
        reached=recovery.reached,
    )


def restored_step(run: Path, generation: int) -> int | None:
    """Return the step that the workers of a generation went on from; None: nobody has said."""
    return _loaded(read_phases(run, generation)).get("step")


def _loaded(reports: Iterable[Record]) -> Record:
    """Return the first report of what was restored, an empty one if there is none."""
    return next((r for r in reports if r["phase"] == "loaded" and r.get("step") is not None), {})


def last_reached(records: Sequence[Record]) -> int:
    """Return the last step that is known to have been finished since the run last recovered."""
    ends = [place for place, record in enumerate(records) if record["kind"] == "recovered"]
    since = records[ends[-1] :] if ends else records
    return max((record["step"] for record in since if record["kind"] in ("failure", "planned")), default=0)


def describe(measured: Measured) -> str:
    """Write one recovery as a block of lines for the terminal."""
    failed = measured.failed
    lost = f"{measured.lost} step{'s' * (measured.lost != 1)} lost" if measured.lost is not None else "not known"
    tier = f" from {measured.tier}" if measured.tier else ""
    restored = f"step {measured.restored}{tier}, {lost}" if measured.restored is not None else lost
    seconds = "  ".join(f"{name} {value:.2f}" for name, value in measured.seconds.items())
    return "\n".join(
        [
            f"windlass: recovered, generation {measured.generation}",
            f"  failed    {who_failed(failed)} after step {failed.step}: {failed.message}",
            f"  decision  {measured.why}",
            f"  restored  {restored}",
            f"  seconds   {seconds}  = {measured.total_s:.2f}",
        ]
    )


def who_failed(failed: Failed) -> str:
    """Name what failed."""
    if failed.kind == "node":
        return f"node {failed.node}"
    rank = f"rank {failed.rank}" if failed.rank >= 0 else "a worker"
    return f"{rank} on {failed.node}" if failed.node else rank


def goodput(run: Path) -> float | None:
    """Return the share of the time since the first start that went into steps which still count; None: not known."""
    try:
        entries = read_metrics(RunFolder(run).metrics)
    except DataError:
        return None
    useful = sum(entry.get("step_s", 0.0) for entry in entries if "event" not in entry and not entry.get("skipped"))
    times = [datetime.fromisoformat(entry["time"]).timestamp() for entry in entries if "time" in entry]
    wall = max(times) - min(times) if times else 0.0
    return min(useful / wall, 1.0) if wall > 0 else None


def write_history(run: Path, records: Iterable[Record]) -> None:
    """Write RUN/history.md for people and RUN/history.jsonl for programs.

    Raises:      OSError; the pages of before are still there then
    """
    told = [record for record in records if record["kind"] not in ("generation", "start")]
    write_atomically(run / "history.jsonl", "".join(json.dumps(record) + "\n" for record in told))
    write_atomically(run / "history.md", history_page(told, goodput(run)))


def history_page(records: Sequence[Mapping[str, Any]], share: float | None) -> str:
    """Return the page about the failures and recoveries of a run."""
    failures = [r for r in records if r["kind"] == "failure"]
    recovered = {r["generation"]: r for r in records if r["kind"] == "recovered"}
    lost = sum(r["lost"] or 0 for r in recovered.values())
    down = sum(sum(r["seconds"].values()) for r in recovered.values())
    lines = [
        "# History of this run",
        "",
        f"- failures: {len(failures)}, recovered from: {len(recovered)}",
        f"- steps done again: {lost}",
        f"- seconds from failures to the next new step: {down:.1f}",
        f"- goodput: {share:.1%} of the time went into steps that count"
        if share is not None
        else "- goodput: not known",
        "",
        "| when (UTC) | what | details |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {_when(r['time'])} | {r['kind']} | {_cell(_details(r))} |" for r in records]
    return "\n".join([*lines, ""])


def _when(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _details(record: Mapping[str, Any]) -> str:
    """Say in one line what a record is about."""
    match record["kind"]:
        case "launch":
            return f"{record['workers']} workers"
        case "failure":
            place = f" of {record['node']}" if record["node"] else ""
            return f"{record['what']}: rank {record['rank']}{place} after step {record['step']}: {record['message']}"
        case "lost":
            return "nodes " + ", ".join(record["nodes"])
        case "decision":
            return f"{record['action']}: {record['why']}"
        case "recovered":
            seconds = ", ".join(f"{name} {value:.2f}" for name, value in record["seconds"].items())
            tier = f" from {record['tier']}" if record["tier"] else ""
            return f"step {record['restored']}{tier}, {record['lost']} steps lost; seconds: {seconds}"
        case "end":
            return f"exit code {record['code']}"
        case _:
            known = ("kind", "time", "generation")
            return ", ".join(f"{name} {value}" for name, value in record.items() if name not in known)
