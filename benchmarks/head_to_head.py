"""Head-to-heads of sides that train one decoder: interleaved rounds, each side a fresh set of processes.

The speed of a shared machine drifts, so the sides take turns within a round (A B C, A B C, ...). What a side is, and
which goals it has, is said by the benchmark that uses this: zero.py, offload.py.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import describe_machine, has_bf16
from ranks import RankFailed, run_ranks
from rich.console import Console
from rounds import mib, write

# Relative difference of the last loss that rounding explains: fp32 sums in another order, bf16 in other places.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}


@dataclass(frozen=True)
class Case:
    """What all sides of one table train, and on how many ranks."""

    model: str
    num_ranks: int
    dtype: str

    @property
    def title(self) -> str:
        return f"{self.model} {self.num_ranks} rank{'s' * (self.num_ranks > 1)} {self.dtype}"


@dataclass(frozen=True)
class Sample:
    """One side in one round. Times in seconds (mean over ranks of the median step), memory in bytes over all ranks."""

    side: str
    case: Case
    round: int
    step_s: float
    peak_bytes: int  # summed PSS while training
    build_peak_bytes: int  # summed PSS before training
    max_rss_bytes: int  # sum of each rank's highest resident set, for information
    read_bytes: float  # from drives, in one step, over all ranks
    written_bytes: float
    losses: list[float]
    num_parameters: int
    wall_s: float
    facts: dict[str, Any] = field(default_factory=dict)  # what rank 0 says beside

    @property
    def dtype(self) -> str:
        return self.case.dtype


@dataclass(frozen=True)
class Worker:
    """The script that runs one rank of one side, and what it is told beside the phases and the job."""

    script: Path
    arguments: Callable[[str], Sequence[str]] = lambda side: [f"--side={side}"]
    env: dict[str, str] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every head-to-head is told."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--dtypes", default="fp32,bf16", help="fp32, bf16 or both (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each run (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (%(default)s)")
    parser.add_argument("--memory-steps", type=int, default=3, help="steps after them, memory sampled (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round, fp32, three timed steps")
    parser.add_argument("--out", type=Path, help="JSON file for every sample, written after each run")
    parser.add_argument("--timeout-s", type=float, default=600, help="longest single run (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences per rank and step (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence (%(default)s)")
    parser.add_argument(
        "--clip", type=float, default=1.0, help="gradient norm limit of all sides, 0: off (%(default)s)"
    )
    parser.add_argument(
        "--extensions-dir",
        type=Path,
        default=cache / "windlass" / "deepspeed-operators",
        help="where DeepSpeed's compiled operators are kept (%(default)s)",
    )


def quicken(given: argparse.Namespace) -> None:
    """Apply --quick."""
    if given.quick:
        given.rounds, given.steps, given.warmup, given.memory_steps, given.dtypes = 1, 3, 2, 2, "fp32"


def environment(extensions_dir: Path) -> dict[str, str]:
    """Return what every rank of every side finds in its environment."""
    return {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(extensions_dir),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed looks for ninja there
        "TOKENIZERS_PARALLELISM": "false",
    }


def warn_of_slow_bf16(dtypes: Sequence[str], console: Console) -> None:
    if "bf16" in dtypes and not has_bf16():
        console.print(
            "this CPU has no bf16 instructions: bf16 steps are slow on every side and their ratios say little"
        )


def run_rounds(
    cases: Sequence[Case],
    sides: Sequence[str],
    worker: Worker,
    given: argparse.Namespace,
    console: Console,
    failures: dict[str, str],
) -> list[Sample]:
    """Run all sides of all cases, round after round.

    What goes wrong is added to `failures` and not tried again; a side named there by itself is left out.
    """
    samples: list[Sample] = []
    for number in range(1, given.rounds + 1):
        for case in cases:
            for side in sides:
                key = f"{case.title} {side}"
                if side in failures or key in failures:
                    continue
                try:
                    sample = measure(worker, case, side, number, given)
                except RankFailed as error:
                    failures[key] = str(error)
                    console.print(f"round {number} {key} failed: {error}", highlight=False, markup=False)
                    continue
                samples.append(sample)
                console.print(
                    f"round {number}/{given.rounds} {case.title} {side:<16} {1000 * sample.step_s:7.0f} ms "
                    f"{mib(sample.peak_bytes):7.0f} MiB  loss {sample.losses[-1]:.5f}  ({sample.wall_s:.0f} s)",
                    highlight=False,
                )
                if given.out:
                    write(given.out, given, samples, failures)
    return samples


def measure(worker: Worker, case: Case, side: str, number: int, given: argparse.Namespace) -> Sample:
    """Run one side once.

    Raises: RankFailed
    """
    arguments = [
        *worker.arguments(side),
        f"--dtype={case.dtype}",
        f"--warmup={given.warmup}",
        f"--steps={given.steps}",
        f"--memory-steps={given.memory_steps}",
        f"--model={case.model}",
        f"--micro-batch={given.micro_batch}",
        f"--seq-len={given.seq_len}",
        f"--clip={given.clip}",
    ]
    with tempfile.TemporaryDirectory(prefix="windlass-bench-") as folder:
        run = run_ranks(
            worker.script,
            arguments,
            num_ranks=case.num_ranks,
            folder=Path(folder),
            env=worker.env,
            timeout_s=given.timeout_s,
        )
    return Sample(
        side,
        case,
        number,
        step_s=statistics.mean(r["step_s"] for r in run.results),
        peak_bytes=max(run.peak_bytes.get(phase, 0) for phase in ("warmup", "memory")),
        build_peak_bytes=max(run.peak_bytes.get(phase, 0) for phase in ("start", "build")),
        max_rss_bytes=sum(r["max_rss_bytes"] for r in run.results),
        read_bytes=sum(r["read_bytes"] for r in run.results) / given.steps,
        written_bytes=sum(r["written_bytes"] for r in run.results) / given.steps,
        losses=run.results[0]["losses"],
        num_parameters=run.results[0]["num_parameters"],
        wall_s=run.seconds,
        facts=run.results[0]["facts"],
    )


@contextmanager
def operators_locked(folder: Path) -> Iterator[None]:
    """Hold DeepSpeed's folder of compiled operators and remove what an earlier, killed build left there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "windlass.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A killed build leaves a lock file behind, on which every later one waits for ever. We hold ours: it is stale.
        for stale in folder.rglob("lock"):
            shutil.rmtree(stale.parent)
        yield


def build_deepspeed_operators(
    worker: Worker, side: str, model: str, given: argparse.Namespace, console: Console
) -> None:
    """Let DeepSpeed compile what a side needs, once per version, before anything is timed.

    Raises: RankFailed
    """
    folder = given.extensions_dir
    versions = f"deepspeed-{version('deepspeed')}-torch-{version('torch')}-python-{sys.version_info[1]}"
    done = folder / f"built-{side}-{versions}"
    if done.exists():
        return
    with operators_locked(folder):
        console.print(f"building DeepSpeed's operators in {folder} (once; this takes minutes) ...", highlight=False)
        began = time.perf_counter()
        arguments = [*worker.arguments(side), "--warmup=1", "--steps=1", "--memory-steps=1", "--seq-len=16"]
        arguments.append(f"--model={model}")
        with tempfile.TemporaryDirectory(prefix="windlass-bench-") as scratch:
            run_ranks(worker.script, arguments, num_ranks=2, folder=Path(scratch), env=worker.env, timeout_s=1800)
        done.touch()
        console.print(f"built in {time.perf_counter() - began:.0f} s", highlight=False)


def introduce(console: Console) -> None:
    """Print what the numbers were measured on."""
    console.print(f"\n{', '.join(f'{key} {value}' for key, value in describe_machine().items())}", highlight=False)


def heading(rows: Sequence[Sample], given: argparse.Namespace) -> str:
    """Return the line above the table of one case."""
    case = rows[0].case
    return (
        f"\n{case.title}: {rows[0].num_parameters:,} parameters, 1 thread per rank, "
        f"{given.micro_batch} x {given.seq_len} tokens per rank, clip {given.clip}, {given.rounds} round(s) of "
        f"{given.steps} timed steps"
    )


def finish(
    console: Console,
    problems: Sequence[str],
    given: argparse.Namespace,
    samples: Sequence[Any],
    failures: dict[str, str],
) -> int:
    """Print what went wrong, write the file, and return the exit code."""
    for problem in problems:
        console.print(f"PROBLEM: {problem}", highlight=False, markup=False)
    if given.out:
        write(given.out, given, samples, failures)
        console.print(f"\nwritten: {given.out}", highlight=False)
    return 1 if problems else 0
