"""Pipelines with and without vocabulary parallelism against torch.distributed.pipelining, on paper and measured.

    python benchmarks/pipeline.py --quick                    every part once with small models, about two minutes
    python benchmarks/pipeline.py --out pipeline.json        the full run: 3 interleaved rounds at 2 and 4 ranks
    python benchmarks/pipeline.py --parts heavy --ranks 2 --sides torch-1f1b-best,windlass-1f1b-2

Parts: `simulated` starts no processes. `heavy` trains a decoder whose head outweighs half of the model, `light` one
whose head does not. `overhead` runs schedules whose parts compute nothing, so that the runner's own work remains. At no
more ranks than cores, every step of Windlass is also predicted by simulation from its measured actions.

Each rank has one thread. Every side of a round is a fresh set of processes; the sides take turns within a round. Ratios
are medians of the ratios within one round. Memory is the highest proportional set size of the fullest rank in training.
With more ranks than cores the ranks share them: a step then takes at least the work of all ranks over the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from machine import describe_machine
from pipeline_simulated import idle_table, predicted_step_s, published_table
from ranks import RankFailed, run_ranks
from rich import box
from rich.console import Console
from rich.table import Table
from rounds import disagreements, fixed, median, mib, pick, ratio, write

WORKER = Path(__file__).with_name("pipeline_sides.py")
PARTS = ("simulated", "heavy", "light", "overhead")
LOSS_TOLERANCE = 1e-3  # relative, of the last loss: fp32 sums in another order
ACTION_US = 100.0  # goal for the runner's work per action
PREDICTION = 0.15  # goal for the relative error of a predicted step


@dataclass(frozen=True)
class Job:
    """What the sides of one part train: `model` keys, micro-batches of one sequence, and `steps` that are timed.

    Around a hollow model the parts compute nothing.
    """

    sides: tuple[str, ...]
    model: dict[str, Any]
    seq_len: int
    num_micro_batches: int
    steps: int
    hollow: bool = False

    def quick(self, seq_len: int, **model: int) -> Job:
        """Return the job with a smaller model, fewer and shorter micro-batches and fewer steps."""
        return replace(self, model=self.model | model, seq_len=seq_len, num_micro_batches=4, steps=3)


SAME_SCHEDULES = tuple(
    side for name in ("1f1b", "interleaved", "zbv") for side in (f"torch-{name}-best", f"windlass-{name}-off")
)
VOCABULARY = ("windlass-1f1b-1", "windlass-1f1b-2", "windlass-1f1b-2c", "windlass-vhalf-2")
JOBS = {
    # Two cores bound what balance can win: the head must outweigh not only a stage, but half of the model. And the
    # logits must outweigh the matrix, or two ranks, one with the head and one with the embedding, hold the same.
    "heavy": Job(
        ("torch-1f1b-best", "torch-1f1b-even", "windlass-1f1b-off", *VOCABULARY),
        {"hidden_size": 128, "num_layers": 8, "num_heads": 4, "vocab_size": 131072},
        seq_len=512,
        num_micro_batches=8,
        steps=3,
    ),
    "light": Job(
        SAME_SCHEDULES,
        {"hidden_size": 256, "num_layers": 8, "num_heads": 4, "vocab_size": 2048},
        seq_len=256,
        num_micro_batches=8,
        steps=8,
    ),
    "overhead": Job(
        SAME_SCHEDULES,
        {"hidden_size": 8, "num_layers": 4, "num_heads": 1, "vocab_size": 8},
        seq_len=1,
        num_micro_batches=64,
        steps=20,
        hollow=True,
    ),
}
QUICK_JOBS = {
    "heavy": JOBS["heavy"].quick(128, hidden_size=64, vocab_size=32768),
    "light": JOBS["light"].quick(64, hidden_size=64),
    "overhead": JOBS["overhead"],
}


@dataclass(frozen=True)
class Versus:
    """A column: ours against the best of its peers, which may have the same {schedule}, and what is wanted."""

    title: str
    peers: tuple[str, ...]
    quantity: str
    goal: float

    def value(self, rows: Sequence[Sample], side: str) -> float | None:
        """Return how many times as fast, or what share of the memory."""
        peers = [peer.format(schedule=side.split("-")[1]) for peer in self.peers]
        share = ratio(rows, side, peers, self.quantity)
        return 1 / share if share and self.faster else share

    @property
    def faster(self) -> bool:
        return self.quantity == "step_s"

    def met(self, value: float | None) -> bool:
        return value is None or (value >= self.goal if self.faster else value <= self.goal)


THEIR_SAME = Versus("x torch's same schedule", ("torch-{schedule}-best",), "step_s", 1.0)
TORCH_1F1B = ("torch-1f1b-best", "torch-1f1b-even")
COLUMNS = {
    "heavy": (
        Versus("x torch's 1F1B", TORCH_1F1B, "step_s", 1.25),
        Versus("x own without", ("windlass-1f1b-off",), "step_s", 1.25),
        Versus("memory / torch's", TORCH_1F1B, "fullest_bytes", 0.7),
        Versus("memory / own without", ("windlass-1f1b-off",), "fullest_bytes", 0.7),
    ),
    "light": (THEIR_SAME,),
}


@dataclass(frozen=True)
class Sample:
    """One side in one round. Times in seconds (mean over ranks of the median step), memory in bytes."""

    part: str
    num_ranks: int
    side: str
    round: int
    step_s: float
    rank_peak_bytes: list[int]  # PSS of each rank while training
    losses: list[float]
    num_parameters: int
    blocks: list[list[int]]  # [first, last) of every stage
    wall_s: float
    predicted_s: float | None = None
    # Of the rank with the most, the step divided by the rank's actions: with and without waiting for peers.
    action_us: float | None = None
    own_action_us: float | None = None

    @property
    def fullest_bytes(self) -> int:
        return max(self.rank_peak_bytes)

    @property
    def of_predicted(self) -> float:
        assert self.predicted_s is not None
        return self.step_s / self.predicted_s


def main() -> int:
    given = parse()
    console = Console(stderr=True, soft_wrap=True)
    parts = pick(given.parts, PARTS, "--parts")
    samples: list[Sample] = []
    failures: dict[str, str] = {}
    for number in range(1, given.rounds + 1):
        for part, num_ranks, side in runs(parts, given):
            key = f"{part} {num_ranks} ranks {side}"
            if key in failures:
                continue
            try:
                sample = measure(part, num_ranks, side, number, given)
            except RankFailed as error:
                failures[key] = str(error)
                console.print(f"round {number} {key} failed: {error}", highlight=False, markup=False)
                continue
            samples.append(sample)
            console.print(
                f"round {number}/{given.rounds} {part} {num_ranks} ranks {side:<24} {1000 * sample.step_s:7.1f} ms "
                f"{mib(sample.fullest_bytes):6.0f} MiB  loss {sample.losses[-1]:.5f}  ({sample.wall_s:.0f} s)",
                highlight=False,
            )
            if given.out:
                write(given.out, given, samples, failures)
    return report(parts, given, samples, failures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, out of: %(default)s")
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks of heavy and light (%(default)s)")
    sides = dict.fromkeys(side for job in JOBS.values() for side in job.sides)
    parser.add_argument("--sides", default=",".join(sides), help="comma-separated, out of: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the timed ones (%(default)s)")
    parser.add_argument("--memory-steps", type=int, default=1, help="steps after them, memory sampled (%(default)s)")
    parser.add_argument("--traced-steps", type=int, default=2, help="then, to predict steps from (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of few steps of small models at 2 ranks")
    parser.add_argument("--out", type=Path, help="JSON file for every sample, written after each run")
    parser.add_argument("--timeout-s", type=float, default=900, help="longest single run (%(default)s)")
    given = parser.parse_args()
    given.sides = pick(given.sides, list(sides), "--sides")
    given.jobs = QUICK_JOBS if given.quick else JOBS
    if given.quick:
        given.rounds, given.ranks = 1, "2"
    return given


def runs(parts: Sequence[str], given: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Yield part, number of ranks and side of every run of one round."""
    for part, job in given.jobs.items():
        for num_ranks in [2] if job.hollow else map(int, given.ranks.split(",")):
            yield from ((part, num_ranks, side) for side in job.sides if part in parts and side in given.sides)


def measure(part: str, num_ranks: int, side: str, number: int, given: argparse.Namespace) -> Sample:
    """Run one side once.

    Raises: RankFailed
    """
    job: Job = given.jobs[part]
    with tempfile.TemporaryDirectory(prefix="windlass-bench-") as folder:
        model = Path(folder) / "model.yaml"
        model.write_text(json.dumps(job.model | {"max_seq_len": job.seq_len}))
        arguments = [
            f"--side={side}",
            f"--model={model}",
            "--micro-batch=1",
            f"--seq-len={job.seq_len}",
            f"--num-micro-batches={job.num_micro_batches}",
            f"--warmup={given.warmup}",
            f"--steps={job.steps}",
            f"--memory-steps={given.memory_steps}",
            f"--traced-steps={given.traced_steps}",
            *(["--hollow"] if job.hollow else []),
        ]
        env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        run = run_ranks(WORKER, arguments, num_ranks=num_ranks, folder=Path(folder), env=env, timeout_s=given.timeout_s)
    results = run.results
    held = [run.rank_peak_bytes[phase] for phase in ("warmup", "memory") if phase in run.rank_peak_bytes]
    ours = side.startswith("windlass")
    return Sample(
        part,
        num_ranks,
        side,
        number,
        step_s=statistics.mean(r["step_s"] for r in results),
        rank_peak_bytes=[max(of_rank) for of_rank in zip(*held, strict=True)] or [0],
        losses=results[0]["losses"],
        num_parameters=results[0]["num_parameters"],
        blocks=results[0]["blocks"],
        wall_s=run.seconds,
        predicted_s=predicted_step_s(results) if ours and given.traced_steps and num_ranks <= num_cores() else None,
        action_us=max(1e6 * r["runner_s"] / r["num_actions"] for r in results) if ours else None,
        own_action_us=max(1e6 * r["busy_s"] / r["num_actions"] for r in results) if ours else None,
    )


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


# -- tables ------------------------------------------------------------------------------------------------------------


def report(parts: Sequence[str], given: argparse.Namespace, samples: list[Sample], failures: dict[str, str]) -> int:
    """Print the tables and what went wrong; return the exit code."""
    console = Console(width=180, soft_wrap=True)
    console.print(f"\n{', '.join(f'{key} {value}' for key, value in describe_machine().items())}", highlight=False)
    problems = [f"{key} failed: {reason}" for key, reason in failures.items()]
    if "simulated" in parts:
        for table, missed in (idle_table(), published_table(with_v_half=not given.quick)):
            console.print(table)
            problems += missed
    for part, num_ranks in dict.fromkeys((s.part, s.num_ranks) for s in samples):
        rows = [s for s in samples if (s.part, s.num_ranks) == (part, num_ranks)]
        job: Job = given.jobs[part]
        console.print(
            f"\n{part}: {num_ranks} ranks x 1 thread, {rows[0].num_parameters:,} parameters {job.model}, "
            f"{job.num_micro_batches} micro-batches x {job.seq_len} tokens, {given.rounds} round(s) of {job.steps} "
            "timed steps",
            highlight=False,
        )
        console.print(overhead_table(rows) if job.hollow else comparison(rows, part, job))
        if not job.hollow:
            problems += disagreements(rows, f"{part} at {num_ranks} ranks", LOSS_TOLERANCE)
            if any(s.predicted_s for s in rows):
                console.print(prediction_table(rows))
    for problem in problems:
        console.print(f"PROBLEM: {problem}", highlight=False, markup=False)
    if given.out:
        write(given.out, given, samples, failures)
        console.print(f"\nwritten: {given.out}", highlight=False)
    return 1 if problems else 0


def comparison(rows: list[Sample], part: str, job: Job) -> Table:
    """Return the table of a part that trains."""
    columns = COLUMNS[part]
    table = Table(box=box.MARKDOWN)
    table.add_column("side")
    for name in ("blocks", "ms/step", "tokens/s", "fullest rank MiB"):
        table.add_column(name, justify="right")
    for column in columns:
        table.add_column(f"{column.title} ({'>=' if column.faster else '<='} {column.goal})", justify="right")
    table.add_column("last loss")
    table.add_column("goals met")
    tokens = job.num_micro_batches * job.seq_len
    for side in dict.fromkeys(s.side for s in rows):
        mine = next(s for s in rows if s.side == side)
        step_s = median(rows, side, "step_s")
        cells = [
            side,
            " ".join(str(last - first) for first, last in mine.blocks),
            f"{1000 * step_s:.0f}",
            f"{tokens / step_s:.0f}",
            f"{mib(median(rows, side, 'fullest_bytes')):.0f}",
        ]
        values = [column.value(rows, side) for column in columns]
        ours = side.startswith("windlass")
        judged = ours and (part == "light" or side in VOCABULARY)
        cells += [fixed(value) if ours else "" for value in values]
        num_met = sum(c.met(value) for c, value in zip(columns, values, strict=True))
        table.add_row(*cells, f"{mine.losses[-1]:.5f}", f"{num_met} of {len(columns)}" if judged else "")
    return table


def prediction_table(rows: list[Sample]) -> Table:
    """Return measured against predicted steps."""
    table = Table("side", "measured ms", "predicted ms", "measured / predicted", "within 15%", box=box.MARKDOWN)
    predicted = [s for s in rows if s.predicted_s]
    for side in dict.fromkeys(s.side for s in predicted):
        times = [f"{1000 * median(predicted, side, name):.0f}" for name in ("step_s", "predicted_s")]
        share = median(predicted, side, "of_predicted")
        table.add_row(side, *times, f"{share:.2f}", "yes" if abs(share - 1) <= PREDICTION else "no")
    return table


def overhead_table(rows: list[Sample]) -> Table:
    """Return what an action costs when its parts compute nothing.

    Ranks that compute nothing mostly wait for each other, which is no work of the runner; so the goal is for the rest.
    """
    names = ("side", "ms/step", "us per action", "without waiting", "x torch", f"below {ACTION_US:.0f} us")
    table = Table(*names, box=box.MARKDOWN)
    for side in dict.fromkeys(s.side for s in rows):
        cells = [side, f"{1000 * median(rows, side, 'step_s'):.1f}"]
        if side.startswith("windlass"):
            with_waits, own = (median(rows, side, name) for name in ("action_us", "own_action_us"))
            faster = fixed(THEIR_SAME.value(rows, side))
            cells += [f"{with_waits:.0f}", f"{own:.0f}", faster, "yes" if own < ACTION_US else "no"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
