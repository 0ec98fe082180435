"""Snapshots and checkpoints: what they cost training, memory and disks, and what they save after a failure.

    python benchmarks/checkpoint.py --peers FOLDER                       everything, about a quarter of an hour
    python benchmarks/checkpoint.py --quick                              everything once and small, some minutes
    python benchmarks/checkpoint.py --parts blocked --sides windlass-lazy,torch_checkpointing,none --rounds 5

Parts: `blocked`: seconds that training stands still per save, two ranks, raw and with a link between device and host
memory so slow that a synchronous copy of the state costs 20 % of a step. `memory`: what snapshots with XOR parity take
of a node. `speeds`: XOR, Reed-Solomon and checksums per core. `persist`: how fast the snapshot process writes, against
a plain writer. `recovery`: seconds from a failure to the first new step.

Sides take turns, round after round, each in fresh processes with one thread per rank; a ratio is the median of the
ratios within one round. Peers that this environment lacks may lie in a folder given as --peers, which comes last on
the path of the children; what is absent is said and left out:

    pip install --no-deps --target FOLDER torchft==0.2.0 torch_checkpointing==0.1.1 pandas python-dateutil \\
        opentelemetry-{api,sdk,proto,semantic-conventions} googleapis-common-protos \\
        opentelemetry-exporter-{otlp-proto-http,otlp-proto-common,otlp-common,http-transport}
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import checkpoint_recovery as recovery
from checkpoint_ours import end_nodes
from machine import describe_machine
from ranks import RankFailed, python_path, run_ranks
from rich import box
from rich.console import Console
from rich.table import Table
from rounds import fixed, median, mib, pick, ratio, write

HERE = Path(__file__).parent
PARTS = ("blocked", "memory", "speeds", "persist", "recovery")
SIDES = (
    "none",
    "windlass-lazy",
    "windlass-lazy-durable",
    "windlass-async",
    "windlass-sync",
    "torch_checkpointing",
    "torchtitan-staging",
    "dcp.async_save",
    "dcp.async_save-process",
    "dcp.save",
    "torch.save",
    "deepspeed",
)
NEEDED = {  # by side, when it is not installed with Windlass
    "torch_checkpointing": ("torch_checkpointing",),
    "deepspeed": ("deepspeed",),
    "torchft": ("torchft", "opentelemetry"),
    "torchft-tuned": ("torchft", "opentelemetry"),
    "ray-train": ("ray", "pandas", "dateutil"),
    "ray-train-tuned": ("ray", "pandas", "dateutil"),
}
LINK_SHARE = 0.2
BLOCKED_SHARE, OF_ASYNC, OF_TORCH_CHECKPOINTING = 0.01, 0.1, 1.0
XOR_GBS, HASH_GBS, PERSIST = 8.0, 20.0, 0.9
EXTRA_BYTES = 64 << 20


@dataclass(frozen=True)
class Sample:
    """One side in one round. Seconds: of the slowest rank, median over saves; of a step with all that it waits for."""

    side: str
    round: int
    link: str  # raw or link
    blocked_s: float
    save_s: float
    gate_s: float
    step_s: float
    losses: list[float] = field(default_factory=list)


def main() -> int:
    given = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything that was started is ended
    console, out = Console(stderr=True, soft_wrap=True), Console(width=180, soft_wrap=True)
    parts = pick(given.parts, PARTS, "--parts")
    sides = pick(given.sides, SIDES, "--sides")
    failing = pick(given.recovery_sides, recovery.SIDES, "--recovery-sides")
    env = environment(given)
    failures: dict[str, str] = {}
    samples: list[Any] = []
    absent = {side: missing for side in (*sides, *failing) if (missing := missing_of(side, given.peers))}
    for side, missing in absent.items():
        console.print(f"absent: {side}, because there is no {', '.join(missing)}; see --help", highlight=False)
    sides, failing = ([side for side in chosen if side not in absent] for chosen in (sides, failing))
    out.print(f"\n{', '.join(f'{key} {value}' for key, value in describe_machine().items())}", highlight=False)
    out.print(f"peers absent: {', '.join(absent) or 'none'}", highlight=False)
    problems: list[str] = []
    for part in parts:
        try:
            if part == "blocked":
                rows, link = run_blocked(sides, given, env, console, failures)
                samples += rows
                report_blocked(out, rows, link, given)
            elif part == "recovery":
                samples += (recovered := recovery.run_recovery(failing, given.rounds, env, console, failures))
                problems += recovery.report_recovery(out, recovered)
            else:
                run = {"memory": run_memory, "speeds": run_speeds, "persist": run_persist}[part]
                problems += run(out, given, env)
        except (RankFailed, subprocess.SubprocessError) as error:
            failures[part] = str(error)
        if given.out:
            write(given.out, given, samples, failures)
    problems += [f"{side} failed: {reason}" for side, reason in failures.items()]
    for problem in problems:
        out.print(f"PROBLEM: {problem}", highlight=False, markup=False)
    return 1 if problems else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, out of: %(default)s")
    parser.add_argument("--sides", default=",".join(SIDES), help="of blocked, out of: %(default)s")
    parser.add_argument("--recovery-sides", default=",".join(recovery.DEFAULT), help="of: " + ",".join(recovery.SIDES))
    parser.add_argument("--peers", type=Path, help="folder with the packages of peers")
    parser.add_argument("--rounds", type=int, default=2, help="interleaved rounds (%(default)s)")
    parser.add_argument("--mib", type=int, default=100, help="state of a rank (%(default)s)")
    parser.add_argument("--persist-mib", type=int, default=512, help="state in persist (%(default)s)")
    parser.add_argument("--step-s", type=float, default=0.5, help="computing per step (%(default)s)")
    parser.add_argument("--every", type=int, default=2, help="steps from save to save (%(default)s)")
    parser.add_argument("--saves", type=int, default=3, help="timed saves of a run, after one (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the drive of saves (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round, 16 MiB of state, short steps")
    parser.add_argument("--timeout-s", type=float, default=300, help="longest single run (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for every sample")
    if parser.parse_args().quick:
        parser.set_defaults(rounds=1, mib=16, persist_mib=64, step_s=0.1, saves=2)
    given = parser.parse_args()
    if given.peers is not None and not given.peers.is_dir():
        parser.error(f"--peers {given.peers}: there is no such folder. Fill one as --help says")
    return given


def environment(given: argparse.Namespace) -> dict[str, str]:
    """Return what every child finds in its environment; the peers come last on its path."""
    path = python_path() if given.peers is None else f"{python_path()}{os.pathsep}{given.peers.resolve()}"
    return {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path, "RAY_TRAIN_V2_ENABLED": "1"}


def missing_of(side: str, peers: Path | None) -> list[str]:
    """Return which modules a side lacks."""
    path = [*sys.path, *([str(peers)] if peers else [])]
    return [name for name in NEEDED.get(side, ()) if PathFinder.find_spec(name, path) is None]


@contextmanager
def places(given: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """Give a folder on the drive and one in memory; end afterwards every snapshot process that serves there."""
    memory = Path(tempfile.mkdtemp(prefix="windlass-bench-", dir="/dev/shm"))
    try:
        with tempfile.TemporaryDirectory(prefix="windlass-bench-", dir=given.folder) as folder:
            yield Path(folder), memory
    finally:
        for base in memory.iterdir():
            end_nodes(base)
        shutil.rmtree(memory, ignore_errors=True)


def run_script(
    name: str, arguments: Sequence[str], num_ranks: int, given: argparse.Namespace, env: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Run one of our scripts and return the results by rank.

    Raises: RankFailed
    """
    with places(given) as (folder, memory):
        more = [f"--folder={folder}", f"--memory={memory}"]
        return run_ranks(
            HERE / name, [*arguments, *more], num_ranks=num_ranks, folder=folder, env=env, timeout_s=given.timeout_s
        ).results


# -- blocked -----------------------------------------------------------------------------------------------------------


def run_blocked(
    sides: Sequence[str],
    given: argparse.Namespace,
    env: Mapping[str, str],
    console: Console,
    failures: dict[str, str],
) -> tuple[list[Sample], float]:
    """Return the samples and the speed of the link in the last round.

    Raises: RankFailed if there is nothing to begin with
    """
    common = [f"--bytes={given.mib << 20}", f"--every={given.every}", f"--step-s={given.step_s}"]
    first = run_script(
        "checkpoint_sides.py", [*common, "--side=none", "--link=0", "--warmup=1", "--saves=2"], 2, given, env
    )
    link = link_for(statistics.median(first[0]["runs"][0]["steps"]), given)
    common += [f"--products={first[0]['products']}", "--warmup=1", f"--saves={given.saves}"]
    samples = []
    for number in range(1, given.rounds + 1):
        for side in sides:
            if side in failures:
                continue
            try:
                found = run_script(
                    "checkpoint_sides.py", [*common, f"--side={side}", "--link=0", f"--link={link:.0f}"], 2, given, env
                )
            except RankFailed as error:
                failures[side] = str(error)
                console.print(f"round {number} {side} failed: {error}", highlight=False, markup=False)
                continue
            for index, name in enumerate(("raw", "link")):
                samples.append(sample_of(side, number, name, [result["runs"][index] for result in found]))
            console.print(
                f"round {number}/{given.rounds} {side:<24} blocked {1000 * samples[-2].blocked_s:8.2f} ms raw, "
                f"{1000 * samples[-1].blocked_s:8.2f} ms with the link",
                highlight=False,
            )
            if side == "none":  # the first of its round: the others get the link that suits the machine as it is now
                link = link_for(samples[-2].step_s, given)
    return samples, link


def link_for(step_s: float, given: argparse.Namespace) -> float:
    """Return the bytes per second at which a copy of the state takes its share of a step."""
    return float((given.mib << 20) / (LINK_SHARE * step_s))


def sample_of(side: str, number: int, link: str, runs: Sequence[Mapping[str, Any]]) -> Sample:
    """Return the sample of one run from what its ranks measured."""
    saves = list(zip(*(run["blocked"] for run in runs), strict=True))  # by save, then by rank
    return Sample(
        side,
        number,
        link,
        blocked_s=statistics.median(max(save + gate for save, gate in of_ranks) for of_ranks in saves),
        save_s=statistics.median(max(save for save, _ in of_ranks) for of_ranks in saves),
        gate_s=statistics.median(max(gate for _, gate in of_ranks) for of_ranks in saves),
        step_s=statistics.mean(max(of_ranks) for of_ranks in zip(*(run["steps"] for run in runs), strict=True)),
    )


def report_blocked(console: Console, samples: Sequence[Sample], link: float, given: argparse.Namespace) -> None:
    """Print one table for the machine as it is and one with the link."""
    for name in ("raw", "link"):
        rows = [s for s in samples if s.link == name]
        if not rows:
            continue
        without = [s.step_s for s in rows if s.side == "none"]
        step_s = statistics.median(without) if without else given.step_s
        share = 100 * (given.mib << 20) / link / step_s
        slow = f", copies through a link of {link / 1e9:.2f} GB/s per rank (the state takes {share:.0f} % of a step)"
        console.print(
            f"\nblocked, {name}{slow if name == 'link' else ''}: 2 ranks, {given.mib} MiB each, a save every "
            f"{given.every} steps, {given.rounds} round(s) of {given.saves} saves; of the slowest rank",
            highlight=False,
        )
        table = Table(box=box.MARKDOWN)
        table.add_column("side")
        for title in ("blocked ms", "save ms", "gate ms", "% of a step", "step / none", "/ async_save", "/ t_ckpt"):
            table.add_column(title, justify="right")
        table.add_column("goals")
        for side in dict.fromkeys(s.side for s in rows):
            blocked = median(rows, side, "blocked_s")
            times = [f"{1000 * median(rows, side, key):.2f}" for key in ("blocked_s", "save_s", "gate_s")]
            of_async = ratio(rows, side, ("dcp.async_save", "dcp.async_save-process"), "blocked_s")
            of_best = ratio(rows, side, ("torch_checkpointing",), "blocked_s")
            cells = [side, *times, f"{100 * blocked / step_s:.2f}", fixed(ratio(rows, side, ("none",), "step_s"))]
            if side == "none":
                table.add_row(*cells, "", "", "")
                continue
            goals = verdict(blocked / step_s, of_async, of_best) if side.startswith("windlass-lazy") else ""
            table.add_row(*cells, fixed(of_async), fixed(of_best), goals)
        console.print(table)
    console.print(
        "Throttled by the link: ours in the capturer (snapshot.link_bytes_per_s, also parity between nodes); the "
        "staging copies of dcp.async_save, torchtitan-staging and torch_checkpointing in the thread that copies; "
        "dcp.save as a whole (the longer of link and writing); torch.save, DeepSpeed and windlass-sync before they "
        "write. Nobody's wait for an earlier save is counted. `step / none` has all that steps lose, also to work "
        "beside them. windlass-lazy keeps snapshots with XOR parity in memory, -durable writes each to disk as well, "
        "-async copies before training goes on; the others write to disk.",
        highlight=False,
    )


def verdict(share: float, of_async: float | None, of_best: float | None) -> str:
    """Return which goals a lazy snapshot met."""
    met = {f"< {100 * BLOCKED_SHARE:.0f} %": share < BLOCKED_SHARE}
    if of_async is not None:
        met[f"<= {OF_ASYNC} async_save"] = of_async <= OF_ASYNC
    if of_best is not None:
        met["<= torch_checkpointing"] = of_best <= OF_TORCH_CHECKPOINTING
    missed = [name for name, ok in met.items() if not ok]
    return f"MISS {', '.join(missed)}" if missed else f"pass ({', '.join(met)})"


# -- memory, speeds, persist -------------------------------------------------------------------------------------------


def run_memory(console: Console, given: argparse.Namespace, env: Mapping[str, str]) -> list[str]:
    """Print what the fullest node held; a limit that was passed is a problem."""
    rows = run_script(
        "checkpoint_memory.py", ["--part=memory", f"--bytes={given.mib << 20}", "--rounds=5"], 1, given, env
    )[0]["rows"]
    console.print(
        f"\nmemory: the fullest node at its peak, one rank of {given.mib} MiB per node, XOR parity", highlight=False
    )
    table = Table(box=box.MARKDOWN)
    for title in ("nodes", "slots", "files MiB", "snapshot process MiB", "peak MiB", "limit MiB", "goal"):
        table.add_column(title, justify="right")
    problems = []
    for row in rows:
        n, total = row["nodes"], row["total"]
        limit = row["slots"] * row["shard"] * n / (n - 1) + EXTRA_BYTES
        cells = [f"{mib(value):.1f}" for value in (row["files"], row["own"], total, limit)]
        table.add_row(str(n), str(row["slots"]), *cells, "pass" if total <= limit else "MISS")
        if total > limit:
            problems.append(f"memory: {n} nodes: {mib(total):.1f} MiB on one of them, the limit is {mib(limit):.1f}")
    console.print(table)
    return problems


def run_speeds(console: Console, given: argparse.Namespace, env: Mapping[str, str]) -> list[str]:
    """Print GB/s per core."""
    rounds, total = (3, 64 << 20) if given.quick else (15, 256 << 20)
    command = [sys.executable, str(HERE / "checkpoint_speeds.py"), str(rounds), str(total)]
    done = subprocess.run(
        command, env={**os.environ, **env}, check=True, timeout=given.timeout_s, stdout=subprocess.PIPE
    )
    found = json.loads(done.stdout)
    console.print(f"\nspeeds: GB/s of data on one core, {total >> 20} MiB at a time, no torch", highlight=False)
    table = Table(box=box.MARKDOWN)
    table.add_column("work")
    for title in ("median", "best", "goal"):
        table.add_column(title, justify="right")
    for name, rate in found["rates"].items():
        goal = HASH_GBS if name == "xxh3" else XOR_GBS if name.startswith("XOR") else 0.0
        said = f"{'pass' if rate >= goal else 'MISS'} (>= {goal:.0f})" if goal else ""
        table.add_row(name, f"{rate:.2f}", f"{found['best'][name]:.2f}", said)
    console.print(table)
    return [f"speeds: {name}: {reason}" for name, reason in found["missing"].items()]


def run_persist(console: Console, given: argparse.Namespace, env: Mapping[str, str]) -> list[str]:
    """Print how fast a snapshot gets to disk."""
    rounds = 3 if given.quick else 11
    rows = run_script(
        "checkpoint_memory.py",
        ["--part=persist", f"--bytes={given.persist_mib << 20}", f"--rounds={rounds}"],
        1,
        given,
        env,
    )[0]["rows"]
    low, share, high = statistics.quantiles([row["windlass"] / row["plain"] for row in rows], n=4)
    rates = {name: statistics.median(row[name] for row in rows) / 1e6 for name in ("windlass", "plain")}
    console.print(
        f"\npersist: {given.persist_mib} MiB from memory to {given.folder}, {len(rows)} rounds in turns: flush of the "
        f"snapshot process {rates['windlass']:.0f} MB/s, plain writer with fsync {rates['plain']:.0f} MB/s, "
        f"ratio {share:.2f} (quartiles {low:.2f} and {high:.2f}): "
        f"{'pass' if share >= PERSIST else 'MISS'} (>= {PERSIST})",
        highlight=False,
    )
    return []


if __name__ == "__main__":
    sys.exit(main())
