"""Seconds from the command to the first step, by way of launching, and where they go.

    python benchmarks/startup.py
    python benchmarks/startup.py --ways process,local --rounds 5 --out startup.json

Every way trains the same small decoder (configs/model/nano.yaml) on generated text for two steps. The ways take turns;
the table holds medians. `command -> worker` is what passes before a worker's own clock begins: interpreter, imports,
launcher, Ray. The phases are the worker's own (as in the line `ready after ...`); `validation` is the evaluation before
the first step; `rest` is what the run's clock does not name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from machine import describe_machine
from ranks import python_path
from rich import box
from rich.console import Console
from rich.table import Table

WINDLASS = [sys.executable, "-m", "windlass"]
WAYS = {
    "process": [*WINDLASS, "train", "JOB"],
    "local": [*WINDLASS, "train", "JOB", "launch.workers=2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "windlass", "train", "JOB"],
    "ray": [*WINDLASS, "launch", "JOB", "--ray", "local", "launch.workers=2"],
}
JOB = """\
model: {{preset: nano}}
data: {{path: {tokens}}}
train: {{steps: 2, seq_len: 128, micro_batch: 2, global_batch: 4, eval_batches: 2, run_dir: {run}}}
checkpoint: {{at_end: false}}
metrics: {{tensorboard: false}}
"""


def main() -> int:
    given = parse()
    console, env = Console(stderr=True, soft_wrap=True), {**os.environ, "PYTHONPATH": python_path()}
    ways = [way.strip() for way in given.ways.split(",")]
    if unknown := [way for way in ways if way not in WAYS]:
        sys.exit(f"--ways: '{unknown[0]}' is unknown. Use some of: {', '.join(WAYS)}")
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="windlass-startup-") as scratch:
        folder = Path(scratch)
        tokens = prepare(folder, env)
        for number in range(given.rounds):
            for way in ways:
                if way in failures:
                    continue
                try:
                    samples[way].append(measure(WAYS[way], folder, tokens, env, given.timeout_s))
                except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                    output = error.output.decode(errors="replace") if error.output else ""
                    failures[way] = f"{error}\n{output[-2000:]}"
                    continue
                total = samples[way][-1]["total"]
                console.print(f"round {number + 1}/{given.rounds} {way:<9} {total:6.2f} s", highlight=False)
    return report(samples, failures, given)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated, out of: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=180, help="longest single start (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for every sample")
    return parser.parse_args()


def prepare(folder: Path, env: dict[str, str]) -> Path:
    """Write a small token folder."""
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * k) % 97}" for k in range(400))
        (text / f"{number}.txt").write_text(f"document {number}\n{words}\n")
    tokens = folder / "tokens"
    command = [*WINDLASS, "data", "prepare", str(text), "--out", str(tokens), "--validation", "0.2"]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return tokens


def measure(way: list[str], folder: Path, tokens: Path, env: dict[str, str], timeout_s: float) -> dict[str, float]:
    """Start a run and return the seconds of each part up to the end of its first step."""
    run, job = folder / "run", folder / "job.yaml"
    shutil.rmtree(run, ignore_errors=True)
    job.write_text(JOB.format(tokens=tokens, run=run))
    command = [str(job) if word == "JOB" else word for word in way]
    began = time.time()
    subprocess.run(
        command, env=env, check=True, timeout=timeout_s, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder
    )
    ended = time.time()
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    started = next(e for e in events if e.get("event") == "start")
    first = next(e for e in events if "event" not in e)
    evaluated = next((e for e in events if e.get("event") == "eval"), None)
    phases: dict[str, float] = dict(started["seconds"])
    ready = moment(started) - began
    total = moment(first) - began
    out = {
        "total": total,
        "command -> worker": ready - sum(phases.values()),
        **phases,
        "validation": evaluated["seconds"] if evaluated else 0.0,
        "first step": first["step_s"],
    }
    out["rest"] = total - sum(value for name, value in out.items() if name != "total")
    out["(whole command)"] = ended - began
    return out


def moment(event: dict[str, Any]) -> float:
    """Return the wall clock of an event."""
    return datetime.fromisoformat(event["time"]).timestamp()


def report(samples: dict[str, list[dict[str, float]]], failures: dict[str, str], given: argparse.Namespace) -> int:
    console, machine = Console(width=140, soft_wrap=True), describe_machine()
    console.print(f"\n{', '.join(f'{key} {value}' for key, value in machine.items())}\n", highlight=False)
    ways = [way for way, rows in samples.items() if rows]
    names = list(dict.fromkeys(name for way in ways for name in samples[way][0] if name != "total"))
    table = Table(box=box.MARKDOWN)
    table.add_column("seconds")
    for way in ways:
        table.add_column(way, justify="right")
    for name in ["total", *names]:
        medians = [[row[name] for row in samples[way] if name in row] for way in ways]
        table.add_row(name, *[f"{statistics.median(values):.2f}" if values else "-" for values in medians])
    console.print(table)
    for way, reason in failures.items():
        console.print(f"PROBLEM: {way}: {reason}", highlight=False)
    if given.out:
        given.out.write_text(json.dumps({"machine": machine, "samples": samples, "failures": failures}, indent=1))
        console.print(f"\nwritten: {given.out}", highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
