"""Tokens per second of the data loader of one rank, against what a training run consumes.

    python benchmarks/loader.py
    python benchmarks/loader.py --data tokens --seq-len 2048 --needed 400000

Without --data the sources of Python's standard library are prepared as bytes in a temporary folder. `--needed` is what
one rank's training consumes (default: the quick start's run, where there is one); the goal is 20 times that. Measured
without reading ahead, so that the number is the work itself and not a queue.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from machine import describe_machine
from ranks import ROOT, python_path

sys.path[:0] = [str(ROOT)]  # a checkout that is not installed

GOAL = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="token folder")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per row (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows per micro-batch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each of five measurements (%(default)s)")
    parser.add_argument("--needed", type=float, help="tokens per second that one rank's training consumes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="windlass-loader-") as scratch:
        folder = given.data or prepare(Path(scratch))
        speeds = measure(folder, given.seq_len, given.micro_batch, given.seconds)
    speed, needed = statistics.median(speeds), given.needed or consumed_by_the_quickstart()
    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    print(f"loader: {speed:,.0f} tokens/s (from {min(speeds):,.0f} to {max(speeds):,.0f})")
    if needed is None:
        print("no --needed and no quick start here, so there is nothing to compare with")
        return 0
    verdict = "met" if speed >= GOAL * needed else "MISSED"
    print(f"training consumes {needed:,.0f} tokens/s: {speed / needed:,.0f} times that; goal {GOAL}: {verdict}")
    return 0 if speed >= GOAL * needed else 1


def prepare(folder: Path) -> Path:
    """Write the sources of the standard library as byte tokens."""
    out = folder / "tokens"
    library = sysconfig.get_paths()["stdlib"]
    command = [sys.executable, "-m", "windlass", "data", "prepare", library, "--include=*.py", "--out", str(out)]
    command += [f"--exclude={name}" for name in ("site-packages", "dist-packages", "test", "tests", "lib2to3")]
    env = {**os.environ, "PYTHONPATH": python_path()}
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def measure(folder: Path, seq_len: int, micro_batch: int, seconds: float, repeats: int = 5) -> list[float]:
    """Return tokens per second of each repeat."""
    from windlass.data.config import DataConfig
    from windlass.data.loader import Loader
    from windlass.data.mixture import open_data

    dataset = open_data(DataConfig(path=str(folder)), "train", seq_len)
    assert dataset is not None
    speeds = []
    with Loader(
        dataset, micro_batch=micro_batch, num_micro_batches=1, rank=0, num_ranks=1, global_batch=micro_batch, prefetch=0
    ) as loader:
        loader.next_step()
        for _ in range(repeats):
            tokens, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < seconds:
                tokens += sum(batch.num_tokens for batch in loader.next_step())
            speeds.append(tokens / elapsed)
    return speeds


def consumed_by_the_quickstart() -> float | None:
    """Return the median tokens per second of the quick start's run in this checkout, per rank; None without one."""
    metrics = ROOT / ".quickstart" / "run" / "metrics.jsonl"
    if not metrics.exists():
        return None
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    ranks, speeds = 1, []
    for event in events:
        if event.get("event") == "start":
            ranks = event["world_size"]
        elif "event" not in event:
            speeds.append(event["tokens_per_s"] / ranks)
    return statistics.median(speeds) if speeds else None


if __name__ == "__main__":
    sys.exit(main())
