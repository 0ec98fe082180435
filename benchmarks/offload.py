"""Offloading to host memory and NVMe: against DeepSpeed and FSDP2, against what the links allow, against itself.

    python benchmarks/offload.py --quick                        every part once with one small model, about 15 minutes
    python benchmarks/offload.py --out offload.json             the full run: 3 interleaved rounds (hours)
    python benchmarks/offload.py --parts peers --ranks 2 --sides deepspeed-nvme,windlass-fuyou --models gpt-50m

Parts: `peers` trains the same decoder with every system's state in host memory or on the drive under --folder, side by
side. `links` compares steps of Windlass over slowed-down links, and over the drive as it is, with the longest of
computing and moving. `order` compares updating inside backward, after it, and in DeepSpeed's way (after it, gradients
on the drive too, one buffer, nothing fetched ahead) in the same engine. `share` compares shares of updates made on the
device.

Every (side, case) of a round is a fresh set of processes with one thread per rank; the sides take turns within a round
and ratios are medians of the ratios within one round. Peak memory is that of all ranks together while they train, pages
shared by two counted once. Bytes from and to the drive are what the kernel counts for the processes.

What the peers need beside this repository: DeepSpeed's asynchronous file access is compiled against libaio (Debian,
Ubuntu: apt-get install -y libaio-dev) with g++ and ninja. That takes minutes, once, in --extensions-dir, before
anything is timed. With fio (apt-get install -y fio) its rates stand beside ours. A side that does not run is named with
its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from offload_lanes import CACHED, run_part
from offload_lanes import PARTS as LANE_PARTS
from ranks import RankFailed
from rich import box
from rich.console import Console
from rich.table import Table
from rounds import disagreements, fixed, median, mib, pick, ratio

SCRIPT = Path(__file__).with_name("offload_sides.py")
PARTS = ("peers", *LANE_PARTS)
PEERS = (
    "alone",
    "fsdp2-host",
    "deepspeed-host-opt",
    "deepspeed-host",
    "deepspeed-nvme-opt",
    "deepspeed-nvme-opt-1m",
    "deepspeed-nvme-opt-defaults",
    "deepspeed-nvme",
    "deepspeed-nvme-1m",
    "deepspeed-nvme-defaults",
)
OURS: dict[str, dict[str, Any]] = {
    f"windlass-{policy}": {"policy": policy}
    for policy in ("zero-offload", "superpipeline", "mlp-offload", "zero-infinity", "fuyou")
}
OURS["windlass-mlp-offload"]["cache"] = CACHED
SIDES = (*PEERS, *OURS)
CLIPPED = "No step after a clipped one updates inside backward; --clip sets the limit"


@dataclass(frozen=True)
class Goal:
    """What a policy is compared with: systems that keep the same classes of state on the same tier.

    `deepspeed`: our tokens/s over the fastest of them, our memory over the leanest of them; `others` are only shown.
    """

    deepspeed: tuple[str, ...]
    speed: float
    memory: float = 0.7
    others: tuple[str, ...] = ()


NVME_OPTIMIZER = ("deepspeed-nvme-opt", "deepspeed-nvme-opt-1m", "deepspeed-nvme-opt-defaults")
NVME_BOTH = ("deepspeed-nvme", "deepspeed-nvme-1m", "deepspeed-nvme-defaults")
GOALS = {
    "windlass-zero-offload": Goal(("deepspeed-host-opt",), 1.5, others=("fsdp2-host",)),
    "windlass-superpipeline": Goal(("deepspeed-host",), 1.5, others=("fsdp2-host",)),
    "windlass-mlp-offload": Goal(NVME_OPTIMIZER, 2.0),
    "windlass-zero-infinity": Goal(NVME_BOTH, 2.0),
    "windlass-fuyou": Goal(NVME_BOTH, 2.0),
}


def main() -> int:
    given = parse()
    console = Console(stderr=True, soft_wrap=True)
    parts, dtypes = pick(given.parts, PARTS, "--parts"), pick(given.dtypes, ("fp32", "bf16"), "--dtypes")
    given.sides = pick(given.sides, SIDES, "--sides")
    warn_of_slow_bf16(dtypes, console)
    failures: dict[str, str] = {}
    samples: list[Sample] = []
    reports: list[Callable[[Console], list[str]]] = []
    with tempfile.TemporaryDirectory(prefix="windlass-offload-", dir=given.folder) as scratch:
        folder = Path(scratch)
        make = partial(worker_of, given, folder)
        if "peers" in parts:
            samples += (rows := compare_with_peers(given, dtypes, folder, console, failures))
            reports.append(lambda out: report_peers(out, rows, given))
        for part in LANE_PARTS:
            if part in parts:
                found, report = run_part(part, given, make, folder, console, failures)
                samples += found
                reports.append(report)
    console = Console(width=190, soft_wrap=True)
    introduce(console)
    problems = [f"{side} failed: {reason}" for side, reason in failures.items()]
    for report in reports:
        problems += report(console)
    return finish(console, problems, given, samples, failures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, out of: %(default)s")
    parser.add_argument("--sides", default=",".join(SIDES), help="of peers, comma-separated, out of: %(default)s")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks of peers (%(default)s)")
    parser.add_argument(
        "--models", help="presets or YAML files of model keys, of peers (gpt-50m,gpt3-125m; with --quick gpt-50m)"
    )
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the drive that is used (%(default)s)")
    parser.add_argument("--chunk", type=int, default=1 << 20, help="offload.chunk of Windlass (%(default)s)")
    parser.add_argument("--slabs", type=int, default=4, help="offload.slabs of Windlass (%(default)s)")
    parser.add_argument("--torch-adam", action="store_true", help="DeepSpeed updates with torch's AdamW, not its own")
    lanes = parser.add_argument_group("parts links, order and share: one rank, fp32")
    lanes.add_argument("--lane-model", default="gpt-50m", help="model (%(default)s)")
    lanes.add_argument("--lane-micro-batch", type=int, default=4, help="sequences per step (%(default)s)")
    lanes.add_argument("--lane-seq-len", type=int, default=256, help="tokens per sequence (%(default)s)")
    lanes.add_argument("--rates", help="MB/s of slowed-down drives in links (200,500; with --quick 400)")
    lanes.add_argument(
        "--io-shares", help="of order: drive seconds per computing second, each way (0.5,1.0; with --quick 1.0)"
    )
    add_options(parser)
    given = parser.parse_args()
    quicken(given)
    given.models = given.models or ("gpt-50m" if given.quick else "gpt-50m,gpt3-125m")
    given.rates = given.rates or ("400" if given.quick else "200,500")
    given.io_shares = given.io_shares or ("1.0" if given.quick else "0.5,1.0")
    if not given.folder.is_dir():
        parser.error(f"--folder {given.folder}: there is no such folder. Give one on the drive that is to be used")
    return given


def worker_of(given: argparse.Namespace, folder: Path, sides: Mapping[str, Mapping[str, Any]] = OURS) -> Worker:
    """Return how a rank of a side is started. Each side finds a fresh folder on the drive.

    `sides` are those of Windlass, by name, with keys of the group offload.
    """
    common = {"chunk": given.chunk, "slabs": given.slabs}

    def arguments(side: str) -> Sequence[str]:
        fresh = folder / "run"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        own = ["--torch-adam"] if given.torch_adam else []
        if side in sides:
            own.append(f"--offload={json.dumps(common | dict(sides[side]))}")
        return [f"--side={side}", f"--folder={fresh}", *own]

    return Worker(SCRIPT, arguments, environment(given.extensions_dir))


# -- against peers -----------------------------------------------------------------------------------------------------


def compare_with_peers(
    given: argparse.Namespace, dtypes: Sequence[str], folder: Path, console: Console, failures: dict[str, str]
) -> list[Sample]:
    """Run the sides of the part `peers`."""
    worker = worker_of(given, folder)
    for kind in ("nvme", "host"):  # what the first builds is all that the second needs
        theirs = [side for side in given.sides if side.startswith(f"deepspeed-{kind}")]
        if theirs:
            try:
                build_deepspeed_operators(worker, f"deepspeed-{kind}", given.models.split(",")[0], given, console)
            except RankFailed as error:
                hint = "It needs libaio-dev, g++ and ninja. " if kind == "nvme" else "It needs g++ and ninja. "
                failures |= dict.fromkeys(theirs, f"DeepSpeed's operators did not build or run. {hint}{error}")
    cases = [
        Case(model, num_ranks, dtype)
        for model in given.models.split(",")
        for num_ranks in map(int, given.ranks.split(","))
        for dtype in dtypes
    ]
    return run_rounds(cases, given.sides, worker, given, console, failures)


def report_peers(console: Console, samples: Sequence[Sample], given: argparse.Namespace) -> list[str]:
    """Print one table per case; return what went wrong."""
    problems = []
    for case in dict.fromkeys(s.case for s in samples):
        rows = [s for s in samples if s.case == case]
        console.print(heading(rows, given), highlight=False)
        console.print(table_of(rows, given))
        for side in dict.fromkeys(s.side for s in rows if s.facts.get("clipped")):
            clipped = sum(s.facts["clipped"] for s in rows if s.side == side)
            steps = given.steps * sum(s.side == side for s in rows)
            console.print(f"{side}: {clipped} of {steps} timed steps were clipped. {CLIPPED}", highlight=False)
        # A rank that does not communicate trains the same model if it is the only one.
        alone = ("alone",) if case.num_ranks > 1 else ()
        problems += disagreements(rows, case.title, LOSS_TOLERANCE[case.dtype], alone=alone)
    return problems


def table_of(rows: Sequence[Sample], given: argparse.Namespace) -> Table:
    """Return the table of one case."""
    table = Table(box=box.MARKDOWN)
    table.add_column("side")
    for name in (
        "ms/step",
        "tokens/s",
        "peak MiB",
        "drive read MiB",
        "written",
        "x alone",
        "x DeepSpeed (goal)",
        "memory / DeepSpeed's (goal)",
        "x FSDP2",
        "last loss",
    ):
        table.add_column(name, justify="right")
    table.add_column("goals")
    tokens = rows[0].case.num_ranks * given.micro_batch * given.seq_len
    for side in dict.fromkeys(s.side for s in rows):
        mine = [s for s in rows if s.side == side]
        step_s = median(rows, side, "step_s")
        cells = [
            side,
            f"{1000 * step_s:.0f}",
            f"{tokens / step_s:.0f}",
            *(f"{mib(median(rows, side, name)):.0f}" for name in ("peak_bytes", "read_bytes", "written_bytes")),
            fixed(ratio(rows, side, ("alone",), "step_s")),
        ]
        goal = GOALS.get(side)
        if goal is None:
            table.add_row(*cells, "", "", "", f"{mine[-1].losses[-1]:.5f}", "")
            continue
        speed = faster(rows, side, goal.deepspeed)
        memory = ratio(rows, side, goal.deepspeed, "peak_bytes")
        cells += [f"{fixed(speed)} (>= {goal.speed})", f"{fixed(memory)} (<= {goal.memory})"]
        cells += [fixed(faster(rows, side, goal.others)) if goal.others else ""]
        verdicts = {
            "speed": None if speed is None else speed >= goal.speed,
            "memory": None if memory is None else memory <= goal.memory,
        }
        table.add_row(*cells, f"{mine[-1].losses[-1]:.5f}", verdict(verdicts))
    return table


def faster(rows: Sequence[Sample], side: str, peers: Sequence[str]) -> float | None:
    """Return how many times as fast a side is as the fastest of its peers."""
    slower = ratio(rows, side, peers, "step_s")
    return 1 / slower if slower else None


def verdict(verdicts: Mapping[str, bool | None]) -> str:
    """Return which goals were met."""
    if all(met is None for met in verdicts.values()):
        return "(no peers)"
    missed = [name for name, met in verdicts.items() if met is False]
    return f"MISS {', '.join(missed)}" if missed else "pass"


if __name__ == "__main__":
    sys.exit(main())
