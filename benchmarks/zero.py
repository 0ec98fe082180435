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
import sys
from dataclasses import dataclass
from pathlib import Path

from head_to_head import (
    LOSS_TOLERANCE,
    Case,
    Sample,
    Worker,
    add_options,
    build_deepspeed_operators,
    environment,
    finish,
    heading,
    introduce,
    quicken,
    run_rounds,
    warn_of_slow_bf16,
)
from ranks import RankFailed
from rich import box
from rich.console import Console
from rich.table import Table
from rounds import disagreements, fixed, median, mib, pick, ratio

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
SCRIPT = Path(__file__).with_name("zero_sides.py")


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


def main() -> int:
    given = parse()
    console = Console(stderr=True, soft_wrap=True)
    sides, dtypes = pick(given.sides, SIDES, "--sides"), pick(given.dtypes, ("fp32", "bf16"), "--dtypes")
    warn_of_slow_bf16(dtypes, console)
    worker = Worker(SCRIPT, env=environment(given.extensions_dir))
    failures: dict[str, str] = {}
    theirs = [side for side in sides if side.startswith("deepspeed")]
    if theirs:
        try:
            build_deepspeed_operators(worker, "deepspeed-2", given.model, given, console)
        except RankFailed as error:
            failures |= dict.fromkeys(theirs, f"DeepSpeed did not build: {error}")
    cases = [Case(given.model, given.world_size, dtype) for dtype in dtypes]
    samples = run_rounds(cases, sides, worker, given, console, failures)
    return report(given, samples, failures, cases)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(SIDES), help="comma-separated, out of: %(default)s")
    parser.add_argument("--world-size", type=int, default=2, help="ranks (%(default)s)")
    parser.add_argument("--model", default="gpt-50m", help="model preset or YAML file of model keys (%(default)s)")
    add_options(parser)
    given = parser.parse_args()
    quicken(given)
    return given


# -- the table -------------------------------------------------------------------------------------------------------


def report(given: argparse.Namespace, samples: list[Sample], failures: dict[str, str], cases: list[Case]) -> int:
    """Print one table per dtype and what went wrong; return the exit code."""
    console = Console(width=160, soft_wrap=True)
    introduce(console)
    problems = [f"{side} failed: {reason}" for side, reason in failures.items()]
    for case in cases:
        rows = [s for s in samples if s.case == case]
        if not rows:
            continue
        console.print(heading(rows, given), highlight=False)
        console.print(table_of(rows, given))
        problems += disagreements(rows, case.dtype, LOSS_TOLERANCE[case.dtype], alone=("alone",))
    return finish(console, problems, given, samples, failures)


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
