"""ZeRO stages 0-3 against PyTorch DDP, FSDP2 and DeepSpeed: step time, tokens per second and peak memory, one command.

    python benchmarks/zero.py --quick                      a first look, about ten minutes
    python benchmarks/zero.py --out zero.json              the full run: 3 interleaved rounds, fp32 and bf16
    python benchmarks/zero.py --sides ddp,windlass-0 --dtypes fp32 --rounds 5

Two ranks with one thread each train the same decoder of about 50M parameters. Every (side, dtype) of a round is a
fresh pair of processes; the sides take turns within a round (A B C, A B C, ...), because the speed of a shared machine
drifts. Ratios are medians of the ratios within one round. Peak memory is the peak over time of the sum of both ranks'
proportional set sizes while they train (a page shared by two ranks counts once).

DeepSpeed compiles an operator on first use. It is built once, before anything is timed, in a folder of its own.
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
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from machine import describe_machine, has_bf16
from ranks import RankFailed, run_ranks
from rich import box
from rich.console import Console
from rich.table import Table
from rounds import disagreements, fixed, median, mib, pick, ratio, write

SIDES = (
    "alone",
    "ddp",
    "zero-redundancy",
    "deepspeed-1",
    "deepspeed-2",
    "deepspeed-3",
    "fsdp2-keep",
    "fsdp2",
    "windlass-0",
    "windlass-1",
    "windlass-2",
    "windlass-3",
)
WORKER = Path(__file__).with_name("zero_sides.py")
# Relative difference of the last loss that rounding explains: fp32 sums in another order, bf16 in other places.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}


@dataclass(frozen=True)
class Goal:
    """What one stage is compared with: the fastest peer's time / ours, our memory / the leanest peer's."""

    speed_peers: tuple[str, ...]
    speed: float
    memory_peers: tuple[str, ...]
    memory: float = 1.0
    alone: float = 1.25  # our time / time of a rank that does not communicate


GOALS = {
    "windlass-0": Goal(("ddp",), 1.05, ("ddp",)),
    "windlass-1": Goal(("deepspeed-1",), 1.3, ("deepspeed-1",)),
    "windlass-2": Goal(("deepspeed-2",), 1.3, ("deepspeed-2", "fsdp2-keep")),
    "windlass-3": Goal(("deepspeed-3", "fsdp2"), 1.4, ("deepspeed-3", "fsdp2")),
}


@dataclass(frozen=True)
class Sample:
    """One side in one round. Times in seconds (mean over ranks of the median step), memory in bytes over all ranks."""

    side: str
    dtype: str
    round: int
    step_s: float
    peak_bytes: int  # summed PSS while training
    build_peak_bytes: int  # summed PSS before training
    max_rss_bytes: int  # sum of each rank's highest resident set, for information
    losses: list[float]
    num_parameters: int
    wall_s: float


def main() -> int:
    given = parse()
    console = Console(stderr=True, soft_wrap=True)
    sides, dtypes = pick(given.sides, SIDES, "--sides"), pick(given.dtypes, ("fp32", "bf16"), "--dtypes")
    if "bf16" in dtypes and not has_bf16():
        console.print(
            "this CPU has no bf16 instructions: bf16 steps are slow on every side and their ratios say little"
        )
    env = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(given.extensions_dir),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed looks for ninja there
        "TOKENIZERS_PARALLELISM": "false",
    }
    failures: dict[str, str] = {}
    if any(side.startswith("deepspeed") for side in sides):
        try:
            build_deepspeed_operators(given, env, console)
        except RankFailed as error:
            failures |= {side: f"DeepSpeed did not build: {error}" for side in sides if side.startswith("deepspeed")}
    samples: list[Sample] = []
    for number in range(1, given.rounds + 1):
        for dtype in dtypes:
            for side in sides:
                if side in failures:
                    continue
                try:
                    sample = measure(side, dtype, number, given, env)
                except RankFailed as error:
                    failures[side] = f"{dtype}: {error}"
                    console.print(f"[red]round {number} {dtype} {side} failed:[/] {error}", highlight=False)
                    continue
                samples.append(sample)
                console.print(
                    f"round {number}/{given.rounds} {dtype} {side:<16} {1000 * sample.step_s:7.0f} ms "
                    f"{mib(sample.peak_bytes):7.0f} MiB  loss {sample.losses[-1]:.5f}  ({sample.wall_s:.0f} s)",
                    highlight=False,
                )
                if given.out:
                    write(given.out, given, samples, failures)
    return report(given, samples, failures, dtypes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(SIDES), help="comma-separated, out of: %(default)s")
    parser.add_argument("--dtypes", default="fp32,bf16", help="fp32, bf16 or both (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each run (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (%(default)s)")
    parser.add_argument("--memory-steps", type=int, default=3, help="steps after them, memory sampled (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round, fp32, three timed steps")
    parser.add_argument("--out", type=Path, help="JSON file for every sample, written after each run")
    parser.add_argument("--world-size", type=int, default=2, help="ranks (%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=600, help="longest single run (%(default)s)")
    parser.add_argument("--model", default="gpt-50m", help="model preset or YAML file of model keys (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences per rank and step (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence (%(default)s)")
    parser.add_argument(
        "--clip", type=float, default=1.0, help="gradient norm limit of all sides, 0: off (%(default)s)"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument(
        "--extensions-dir",
        type=Path,
        default=cache / "windlass" / "deepspeed-operators",
        help="where DeepSpeed's compiled operators are kept (%(default)s)",
    )
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.steps, given.warmup, given.memory_steps, given.dtypes = 1, 3, 2, 2, "fp32"
    return given


def measure(side: str, dtype: str, number: int, given: argparse.Namespace, env: dict[str, str]) -> Sample:
    """Run one side once."""
    arguments = [
        f"--side={side}",
        f"--dtype={dtype}",
        f"--warmup={given.warmup}",
        f"--steps={given.steps}",
        f"--memory-steps={given.memory_steps}",
        f"--model={given.model}",
        f"--micro-batch={given.micro_batch}",
        f"--seq-len={given.seq_len}",
        f"--clip={given.clip}",
    ]
    with tempfile.TemporaryDirectory(prefix="windlass-bench-") as folder:
        run = run_ranks(
            WORKER, arguments, num_ranks=given.world_size, folder=Path(folder), env=env, timeout_s=given.timeout_s
        )
    return Sample(
        side,
        dtype,
        number,
        step_s=statistics.mean(r["step_s"] for r in run.results),
        peak_bytes=max(run.peak_bytes.get(phase, 0) for phase in ("warmup", "memory")),
        build_peak_bytes=max(run.peak_bytes.get(phase, 0) for phase in ("start", "build")),
        max_rss_bytes=sum(r["max_rss_bytes"] for r in run.results),
        losses=run.results[0]["losses"],
        num_parameters=run.results[0]["num_parameters"],
        wall_s=run.seconds,
    )


def build_deepspeed_operators(given: argparse.Namespace, env: dict[str, str], console: Console) -> None:
    """Let DeepSpeed compile what it needs, once per version, before anything is timed.

    Raises: RankFailed
    """
    folder = given.extensions_dir
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / f"built-deepspeed-{version('deepspeed')}-torch-{version('torch')}-python-{sys.version_info[1]}"
    with (folder / "windlass.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return
        # A killed build leaves a lock file behind, on which every later one waits for ever. We hold ours: it is stale.
        for stale in folder.rglob("lock"):
            shutil.rmtree(stale.parent)
        console.print(f"building DeepSpeed's operators in {folder} (once; this takes minutes) ...", highlight=False)
        began = time.perf_counter()
        arguments = ["--side=deepspeed-2", "--warmup=1", "--steps=1", "--memory-steps=1", "--seq-len=16"]
        arguments.append(f"--model={given.model}")
        with tempfile.TemporaryDirectory(prefix="windlass-bench-") as scratch:
            run_ranks(WORKER, arguments, num_ranks=2, folder=Path(scratch), env=env, timeout_s=1800)
        done.touch()
        console.print(f"built in {time.perf_counter() - began:.0f} s", highlight=False)


# -- the table -------------------------------------------------------------------------------------------------------


def report(given: argparse.Namespace, samples: list[Sample], failures: dict[str, str], dtypes: Sequence[str]) -> int:
    """Print one table per dtype and what went wrong; return the exit code."""
    console = Console(width=160, soft_wrap=True)
    machine = describe_machine()
    console.print(f"\n{', '.join(f'{key} {value}' for key, value in machine.items())}", highlight=False)
    problems = [f"{side} failed: {reason}" for side, reason in failures.items()]
    for dtype in dtypes:
        rows = [s for s in samples if s.dtype == dtype]
        if not rows:
            continue
        console.print(
            f"\n{dtype}: {rows[0].num_parameters:,} parameters, {given.world_size} ranks x 1 thread, "
            f"{given.micro_batch} x {given.seq_len} tokens per rank, clip {given.clip}, {given.rounds} round(s) of "
            f"{given.steps} timed steps",
            highlight=False,
        )
        console.print(table_of(rows, given))
        problems += disagreements(rows, dtype, LOSS_TOLERANCE[dtype], alone=("alone",))
    for problem in problems:
        console.print(f"PROBLEM: {problem}", highlight=False)
    if given.out:
        write(given.out, given, samples, failures)
        console.print(f"\nwritten: {given.out}", highlight=False)
    return 1 if problems else 0


def table_of(rows: list[Sample], given: argparse.Namespace) -> Table:
    """Return the markdown table of one dtype."""
    table = Table(box=box.MARKDOWN)
    table.add_column("side")
    for name in ("ms/step", "tokens/s", "peak MiB", "x alone", "speed-up (goal)", "memory (goal)", "last loss"):
        table.add_column(name, justify="right")
    table.add_column("goals met")
    tokens = given.world_size * given.micro_batch * given.seq_len
    for side in dict.fromkeys(s.side for s in rows):
        mine = [s for s in rows if s.side == side]
        step_s, peak = (median(rows, side, name) for name in ("step_s", "peak_bytes"))
        alone = ratio(rows, side, ("alone",), "step_s")
        cells = [side, f"{1000 * step_s:.0f}", f"{tokens / step_s:.0f}", f"{mib(peak):.0f}", fixed(alone)]
        goal = GOALS.get(side)
        if goal is None:
            cells += ["", "", f"{mine[-1].losses[-1]:.5f}", ""]
        else:
            slower = ratio(rows, side, goal.speed_peers, "step_s")
            speed = None if slower is None else 1 / slower
            memory = ratio(rows, side, goal.memory_peers, "peak_bytes")
            verdicts = {
                "speed": speed is None or speed >= goal.speed,
                "memory": memory is None or memory <= goal.memory,
                "alone": alone is None or alone <= goal.alone,
            }
            missed = [name for name, met in verdicts.items() if not met]
            cells += [
                f"{fixed(speed)} (>= {goal.speed})",
                f"{fixed(memory)} (<= {goal.memory})",
                f"{mine[-1].losses[-1]:.5f}",
                f"not {', '.join(missed)}" if missed else "yes" if speed and alone else "(no peers)",
            ]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
