"""Seconds from a failure to the end of the first step that nobody had done: part `recovery` of checkpoint.py.

Ours are `windlass drill` on a small decoder, two workers on two emulated nodes (and a spare one), a snapshot after
every step; seconds by phase are those of the run's control log. The peers are the programs of checkpoint_peers.py with
a decoder of the same sizes in plain PyTorch; this module kills the process of rank 1 and reads from what all ranks note
when the first step after it is done: of every rank of Ray Train, which starts all of them again, and of the replica of
TorchFT that was killed and that this module starts again at once; the step of its survivor is told beside.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from checkpoint_ours import end_mentioning, end_nodes, until
from rich import box
from rich.console import Console
from rich.table import Table
from rounds import fixed, median, ratio

from windlass.launch.control_log import ControlLog

PEERS_SCRIPT = Path(__file__).with_name("checkpoint_peers.py")
WINDLASS = [sys.executable, "-m", "windlass"]
KILL_AT, STEPS = 8, 14
RUN_S = 180.0
BOTH = "--ray=local"
OURS: dict[str, tuple[str, list[str]]] = {
    "windlass-rank": ("rank=1", []),
    "windlass-rank-new-interpreter": ("rank=1", ["recovery.fork_server=false"]),
    "windlass-ray-rank": ("rank=1", [BOTH]),
    "windlass-ray-node": ("node=1", [BOTH]),
}
PEERS = ("ray-train", "ray-train-tuned", "torchft", "torchft-tuned")
SIDES = (*OURS, *PEERS)
DEFAULT = tuple(side for side in SIDES if side != "ray-train")
HEARTBEAT_MS = {"torchft": 5000, "torchft-tuned": 1000}  # its default, and ten of its heartbeats
TUNED = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}  # it looks for dead workers every 2 s by default
RANK_S, NODE_S, FASTER = 3.0, 10.0, 3.0
JOB = """\
model: {{preset: tiny}}
data: {{path: {tokens}}}
train: {{steps: {steps}, seq_len: 128, micro_batch: 2, global_batch: 4, eval_batches: 1, device: cpu, run_dir: {run}}}
zero: {{stage: 2}}
snapshot: {{every: 1, slots: 3, redundancy: xor, folder: {memory}}}
checkpoint: {{mode: lazy, at_end: false}}
launch: {{workers: 2, nodes: 2, spares: 1, threads: 1}}
metrics: {{tensorboard: false}}
"""


class NotRecovered(Exception):
    """A run that did not do what it should; the message holds the end of its output."""


@dataclass(frozen=True)
class Sample:
    """One recovery. Units: seconds from the kill to the end of the first step not done before it; steps done again."""

    side: str
    round: int
    seconds: float
    beyond_s: float  # without the start of new interpreters
    lost: int | None
    phases: Mapping[str, float] = field(default_factory=dict)
    survivor_s: float | None = None
    losses: list[float] = field(default_factory=list)


def run_recovery(
    sides: Sequence[str], rounds: int, env: Mapping[str, str], console: Console, failures: dict[str, str]
) -> list[Sample]:
    """Let every side recover once a round; sides that fail are left out from then on."""
    samples: list[Sample] = []
    with scratch() as folder:
        tokens = prepare(folder, env) if set(sides) & set(OURS) else folder
        for number in range(1, rounds + 1):
            for side in sides:
                if side in failures:
                    continue
                try:
                    with scratch() as own:
                        marked = {**os.environ, **env, "BENCHMARK_FOLDER": str(own)}
                        marked.pop("RAY_ADDRESS", None)
                        if side in OURS:
                            samples.append(recover(side, number, own, tokens, marked))
                        else:
                            samples.append(recover_peer(side, number, own, marked))
                except (NotRecovered, TimeoutError, subprocess.SubprocessError) as error:
                    failures[side] = str(error)
                    console.print(f"round {number} {side} failed: {error}", highlight=False, markup=False)
                    continue
                console.print(
                    f"round {number}/{rounds} recovery {side:<30} {samples[-1].seconds:6.2f} s", highlight=False
                )
    return samples


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder with a short path, for Ray's sockets; end afterwards whatever names it, and remove it."""
    folder = Path(tempfile.mkdtemp(prefix="wb-", dir="/tmp"))
    try:
        yield folder
    finally:
        until(lambda: not end_mentioning(folder), 20, 0.05)
        shutil.rmtree(folder, ignore_errors=True)


def prepare(folder: Path, env: Mapping[str, str]) -> Path:
    """Write a small token folder."""
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * k) % 97}" for k in range(400))
        (text / f"{number}.txt").write_text(f"document {number}\n{words}\n")
    command = [*WINDLASS, "data", "prepare", str(text), "--out", str(folder / "tokens"), "--validation", "0.2"]
    subprocess.run(command, env={**os.environ, **env}, check=True, capture_output=True, timeout=RUN_S)
    return folder / "tokens"


# -- ours --------------------------------------------------------------------------------------------------------------


def recover(side: str, number: int, folder: Path, tokens: Path, env: Mapping[str, str]) -> Sample:
    """Run a drill and return what its recovery took."""
    target, more = OURS[side]
    memory = Path(tempfile.mkdtemp(prefix="windlass-bench-", dir="/dev/shm"))
    job, run = folder / "job.yaml", folder / "run"
    job.write_text(JOB.format(tokens=tokens, run=run, memory=memory, steps=STEPS))
    command = [*WINDLASS, "drill", str(job), "--kill", f"{target}@step={KILL_AT}", *more]
    try:
        with (folder / "output.txt").open("wb") as out:
            code = subprocess.run(
                command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=RUN_S
            ).returncode
        records = ControlLog(run).records if run.exists() else []
    finally:
        end_mentioning(folder)
        end_nodes(memory)
        shutil.rmtree(memory, ignore_errors=True)
    found = [r for r in records if r["kind"] == "recovered"]
    if code or len(found) != 1:
        raise NotRecovered(f"exit code {code}, {len(found)} recoveries: {tail(folder / 'output.txt')}")
    phases = {name: float(value) for name, value in found[0]["seconds"].items()}
    total = first_new_step(run) - next(r["time"] for r in records if r["kind"] == "struck")
    return Sample(side, number, total, total - phases.get("respawn", 0.0), found[0]["lost"], phases)


def first_new_step(run: Path) -> float:
    """Return when the first step ended that had not been done before the failure, in Unix seconds."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    starts = [place for place, entry in enumerate(entries) if entry.get("event") in ("start", "resume")]
    before = [entry["step"] for entry in entries[: starts[-1]] if "event" not in entry]
    new = next(e for e in entries[starts[-1] :] if "event" not in e and e["step"] > max(before))
    return datetime.fromisoformat(new["time"]).timestamp()


# -- peers -------------------------------------------------------------------------------------------------------------


def recover_peer(side: str, number: int, folder: Path, env: Mapping[str, str]) -> Sample:
    """Start a peer, kill its rank 1, and return how long its first step after that takes."""
    started: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, *arguments: str) -> None:
        with (folder / f"{name}.txt").open("ab") as out:
            command = [sys.executable, str(PEERS_SCRIPT), f"--folder={folder}", *arguments]
            started[name] = subprocess.Popen(
                command, env={**env, **(TUNED if side == "ray-train-tuned" else {})},
                cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip

    def steps(rank: int) -> list[dict[str, Any]]:
        path = folder / f"steps-{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def running() -> None:
        if ended := [name for name, process in started.items() if process.poll() is not None]:
            raise NotRecovered(
                f"{ended[0]} ended with {started[ended[0]].returncode}: {tail(folder / f'{ended[0]}.txt')}"
            )

    def reached(there: Any) -> bool:
        running()
        return bool(there())

    try:
        if side in HEARTBEAT_MS:
            start("lighthouse", "--what=lighthouse", f"--heartbeat-ms={HEARTBEAT_MS[side]}")
            until(lambda: reached((folder / "lighthouse").exists), 60)
            for replica in (0, 1):
                start(f"replica{replica}", "--what=torchft", f"--replica={replica}")
        else:
            start("driver", "--what=ray-train", f"--temp={folder}", f"--steps={STEPS}")
        until(lambda: reached(lambda: (last := steps(1)) and last[-1]["step"] >= KILL_AT), RUN_S)
        victim, old = steps(1)[-1]["pid"], {line["pid"] for rank in (0, 1) for line in steps(rank)}
        killed = time.time()
        os.kill(victim, 9)
        if side in HEARTBEAT_MS:
            started["replica1"].wait()
            start("replica1", "--what=torchft", "--replica=1")
            old = {victim}

        def after(rank: int) -> list[dict[str, Any]]:
            """Return the steps of a rank that nobody had done when it was killed."""
            return [line for line in steps(rank) if line["pid"] not in old and line["step"] > done()]

        def done() -> int:
            return int(max(line["step"] for line in steps(1) if line["pid"] == victim))

        until(lambda: reached(lambda: after(0) and after(1)), RUN_S)
        first = next(line for line in steps(1) if line["pid"] not in old)
        lost = max(done() + 1 - first["step"], 0)
        if side in HEARTBEAT_MS:
            seconds = after(1)[0]["time"] - killed
            return Sample(side, number, seconds, seconds, lost, survivor_s=after(0)[0]["time"] - killed)
        seconds = max(after(rank)[0]["time"] for rank in (0, 1)) - killed
        return Sample(side, number, seconds, seconds, lost)
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def tail(path: Path, num_lines: int = 12) -> str:
    """Return the end of some output."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    return "\n    ".join(line[:300] for line in lines[-num_lines:])


# -- report ------------------------------------------------------------------------------------------------------------


def interpreter_s() -> float:
    """Return how long a new interpreter takes until torch is imported."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True, timeout=RUN_S)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def report_recovery(console: Console, samples: Sequence[Sample]) -> list[str]:
    """Print the table and what must be known to read it."""
    rows = list(samples)
    sides = list(dict.fromkeys(s.side for s in rows))
    console.print(
        f"\nrecovery: seconds from the kill to the end of the first step that had not been done before it; two "
        f"workers, decoders of 2.6 million "
        f"parameters (preset tiny; peers: plain PyTorch of the same sizes); a new interpreter with torch takes "
        f"{interpreter_s():.2f} s here",
        highlight=False,
    )
    table = Table(box=box.MARKDOWN)
    table.add_column("side")
    faster_than = {
        "Ray Train": ("ray-train-tuned", "ray-train"),
        "TorchFT": ("torchft",),
        "tuned TorchFT": ("torchft-tuned",),
    }
    shares = [f"{name} / ours" for name in faster_than]
    for name in ("seconds", "beyond interpreter", "steps lost", "survivor", *shares):
        table.add_column(name, justify="right")
    table.add_column("goals")
    for side in sides:
        mine = [s for s in rows if s.side == side]
        lost = max((s.lost for s in mine if s.lost is not None), default=None)
        survivors = [s.survivor_s for s in mine if s.survivor_s is not None]
        cells = [side, fixed(median(rows, side, "seconds")), fixed(median(rows, side, "beyond_s")), str(lost)]
        cells += [fixed(statistics.median(survivors)) if survivors else ""]
        if side not in OURS:
            table.add_row(*cells, *[""] * (len(shares) + 1))
            continue
        faster = {}
        for name, peers in faster_than.items():
            share = ratio(rows, side, peers, "seconds")
            faster[name] = 1 / share if share else None
        table.add_row(*cells, *map(fixed, faster.values()), verdict(rows, side, faster))
    console.print(table)
    for side in sides:
        told = [s.phases for s in rows if s.side == side and s.phases]
        if told:
            names = list(dict.fromkeys(name for phases in told for name in phases))
            parts = (f"{name} {statistics.median(p.get(name, 0.0) for p in told):.2f}" for name in names)
            console.print(f"{side}: {', '.join(parts)}, then steps done again", highlight=False)
    console.print(
        "Differences: Windlass forks new workers from a process with everything imported (recovery.fork_server; "
        "-new-interpreter is without), its state is sharded (ZeRO-2) and it goes on from memory; Ray Train starts all "
        "workers anew and loads the DCP checkpoint of the last step from a local disk (-tuned: looks for dead workers "
        "every 0.2 s instead of 2 s); TorchFT's replica is started again at once by this benchmark and gets its state "
        "from the survivor, which itself goes on at `survivor`, after TorchFT's heartbeat timeout (5 s; -tuned: 1 s). "
        "TorchFT averages by Manager.allreduce, because its DDP ends survivors by an assertion with gloo.",
        highlight=False,
    )
    return []


def verdict(rows: Sequence[Sample], side: str, faster: Mapping[str, float | None]) -> str:
    """Return which goals were met."""
    if side == "windlass-ray-node":
        met = {f"< {NODE_S:.0f} s": median(rows, side, "seconds") < NODE_S}
    else:
        met = {f"< {RANK_S:.0f} s": median(rows, side, "beyond_s") < RANK_S}
        met |= {f">= {FASTER:.0f}x {name}": value >= FASTER for name, value in faster.items() if value is not None}
    missed = [name for name, ok in met.items() if not ok]
    return f"MISS {', '.join(missed)}" if missed else f"pass ({', '.join(met)})"
