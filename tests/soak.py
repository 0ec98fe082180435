"""`make soak`: a job with spares is struck at random, again and again, and must come out as if nothing had happened.

    python -m tests.soak [--minutes 5] [--seed 0]

Each round is one run with a few strikes of random kinds at random steps; the oracle of the fault matrix compares it
with the undisturbed run. The exit code is 1 if any round differs from it, and the table then names the seed that
repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.fault.memory_runs import STEPS, Lab
from tests.fault.oracle import Told
from windlass.launch.control_log import ControlLog
from windlass.launch.drill import outcomes

MOMENTS = (
    "train.forward",
    "train.backward",
    "train.update",
    "gate.wait",
    "snapshot.begin",
    "snapshot.chunk",
    "snapshot.filled",
)
KINDS = ("rank", "stop", "smp", "node", "zombie", "reboot")
WORKERS = 2


@dataclass
class Kind:
    """What came of all strikes of one kind. Units: seconds."""

    strikes: int = 0
    lost: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def round_of(seed: int) -> dict[str, object]:
    """Return what goes wrong in the round of this seed."""
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(2, STEPS - 1), chance.randint(1, 3)))
    strikes, nodes_lost = [], 0
    for step in steps:
        kind = chance.choice(KINDS)
        if kind in ("node", "zombie") and nodes_lost == 2:
            kind = "rank"
        nodes_lost += kind in ("node", "zombie")
        target = chance.randrange(WORKERS)
        strikes.append(f"{kind}={target}@step={step}")
    out: dict[str, object] = {"strikes": strikes, "spares": 2}
    if chance.random() < 0.4:
        rank, step = chance.randrange(WORKERS), chance.randint(2, STEPS - 1)
        out["fault"] = f"kill:{chance.choice(MOMENTS)}:rank={rank}:step={step}:generation=1"
    return out


def judge(told: Told, undisturbed: Told) -> str:
    """Return how a run differs from the undisturbed one, empty if it does not."""
    try:
        # Strikes at neighbouring steps may hit a run that has not protected a newer step yet.
        told.check(undisturbed, lost=3, recoveries=len(told.recovered))
    except AssertionError as difference:
        return str(difference) or "it differs"
    return ""


def note(told: Told, kinds: dict[str, Kind]) -> None:
    """Add what the strikes of a round cost."""
    for outcome in outcomes(ControlLog(told.run).since_launch()):
        kind = kinds[outcome.what.split("=")[0]]
        kind.strikes += 1
        if outcome.seconds is not None:
            kind.seconds.append(sum(outcome.seconds.values()))
            kind.lost.append(int(outcome.lost) if outcome.lost.isdigit() else 0)


def table(kinds: dict[str, Kind]) -> str:
    """Write what each kind of strike cost."""
    lines = [f"{'struck':<12}{'times':>7}{'recoveries':>12}{'steps lost':>12}{'median s':>10}{'worst s':>9}"]
    for name, kind in sorted(kinds.items()):
        middle, worst = (f"{f(kind.seconds):.2f}" if kind.seconds else "-" for f in (median, max))
        recoveries, lost = len(kind.seconds), sum(kind.lost)
        lines.append(f"{name:<12}{kind.strikes:>7}{recoveries:>12}{lost:>12}{middle:>10}{worst:>9}")
    return "\n".join(lines)


def soak(minutes: float, seed: int) -> int:
    """Run rounds for some minutes and return the exit code."""
    kinds: dict[str, Kind] = defaultdict(Kind)
    wrong: list[str] = []
    useful = wall = 0.0
    rounds, end = 0, time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="windlass-soak-") as folder, Lab(Path(folder)) as lab:
        undisturbed = lab.undisturbed(WORKERS)
        usual = median(entry["step_s"] for entry in undisturbed.history)
        while time.monotonic() < end:
            given = round_of(seed + rounds)
            told = lab.run(workers=WORKERS, settings=["recovery.hang_s=10", "recovery.node_failures=9"], **given)  # type: ignore[arg-type]
            difference = judge(told, undisturbed)
            outcome = "DIFFERS" if difference else "equal"
            print(f"round {rounds} (seed {seed + rounds}): {given} {told.seconds:.1f} s {outcome}")
            if difference:
                wrong.append(f"seed {seed + rounds}: {given}\n{difference}")
            note(told, kinds)
            useful += len(told.history) * usual
            wall += told.seconds
            rounds += 1
    print(table(kinds))
    print(f"{rounds} rounds, goodput {useful / wall:.1%} (steps that count, at their usual pace, of the whole time)")
    print("\n".join(wrong) or "every run was equal to the undisturbed one, bit for bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES", "5")))
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    arguments = parser.parse_args()
    sys.exit(soak(arguments.minutes, arguments.seed))
