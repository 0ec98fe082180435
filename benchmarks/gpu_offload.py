"""One GPU: calibrate its links, then train what fits, what fits with host memory, and what fits with a drive as well.

    python benchmarks/gpu_offload.py --quick                       smaller models, a few minutes
    python benchmarks/gpu_offload.py --folder /data --out gpu.json all checks, within --budget-s
    python benchmarks/gpu_offload.py --checks calibrate,finetune   some of them
    python benchmarks/gpu_offload.py --cpu-rehearsal               the same code with tiny sizes, without a GPU

Checks: `calibrate` measures links, memories, drive, cores and the update kernels. `equality` trains a decoder of about
1B parameters under every policy with deterministic algorithms and compares all weights and moments bit by bit.
`finetune` trains a 7B decoder with its optimizer state on the GPU, and in host memory: updated by the CPU alone, every
second chunk on the GPU, and the planned share on the GPU. `host` trains the largest decoder that GPU and host memory
hold together, `disk` one that needs the drive as well; their sizes follow from what is free.

Every check is a process of its own, so that one that runs out of memory does not end the others. What does not fit into
the budget of time is left out and named. The table comes last. Without a CUDA device it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine
from ranks import ROOT
from rich import box
from rich.console import Console
from rich.table import Table
from rounds import pick

sys.path[:0] = [str(ROOT)]  # a checkout that is not installed

CHECKS = ("calibrate", "equality", "finetune", "host", "disk")
# A check of several parts runs each in a process of its own.
PARTS = {"finetune": ("finetune-gpu", "finetune-cpu", "finetune-stride2", "finetune-planned")}
MARK = "RESULT "


def main() -> int:
    given = parse()
    import torch

    if not given.cpu_rehearsal and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (--cpu-rehearsal runs the same code with tiny sizes)")
        return 0
    if given.part:
        from gpu_offload_checks import run_check

        print(MARK + json.dumps(run_check(given)))
        return 0
    return check_all(given)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", default=",".join(CHECKS), help="comma-separated, out of: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the drive that is used (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="smaller models and shorter steps")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="tiny sizes on the CPU, to see that it all runs")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run (%(default)s)")
    parser.add_argument("--budget-s", type=float, default=1500, help="no part is begun after that (%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=420, help="longest part (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # a child: run one part
    parser.add_argument("--known", type=Path, help=argparse.SUPPRESS)  # what earlier parts found
    given = parser.parse_args()
    given.checks = pick(given.checks, CHECKS, "--checks")
    if not given.folder.is_dir():
        parser.error(f"--folder {given.folder}: there is no such folder. Give one on the drive that is to be used")
    return given


def check_all(given: argparse.Namespace) -> int:
    """Run the parts of all checks one after another, then print the table."""
    console, began = Console(stderr=True, soft_wrap=True), time.perf_counter()
    known: dict[str, dict[str, Any]] = {}
    skipped = []
    with tempfile.TemporaryDirectory(prefix="windlass-gpu-", dir=given.folder) as scratch:
        for part in (p for check in given.checks for p in PARTS.get(check, (check,))):
            if time.perf_counter() - began > given.budget_s:
                skipped.append(part)
                continue
            since = time.perf_counter()
            known[part] = start_child(part, given, Path(scratch), known)
            said = known[part].get("error") or known[part].get("summary", "")
            console.print(f"{part}: {said}  ({time.perf_counter() - since:.0f} s)", highlight=False, markup=False)
            if given.out:
                given.out.write_text(json.dumps({"machine": describe_machine(), "parts": known}, indent=1))
    from gpu_offload_table import rows_of

    out = Console(width=150, soft_wrap=True)
    facts = describe_machine() | {"gpu": known.get("calibrate", {}).get("device", "?")}
    out.print(f"\n{', '.join(f'{key} {value}' for key, value in facts.items())}\n", highlight=False)
    table = Table("check", "case", "measured", "goal", "", box=box.MARKDOWN)
    rows = rows_of(known)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for part in skipped:
        out.print(f"left out, because {given.budget_s:.0f} s were over: {part}", highlight=False)
    return 1 if any("error" in result for result in known.values()) else 0


def start_child(part: str, given: argparse.Namespace, scratch: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Run one part in a process of its own and return what it found, or its error."""
    told = scratch / "known.json"
    told.write_text(json.dumps(known))
    folder = scratch / part
    folder.mkdir()
    command = [sys.executable, __file__, f"--part={part}", f"--known={told}", f"--folder={folder}"]
    command += [f"--steps={given.steps}"]
    command += ["--quick"] if given.quick else []
    command += ["--cpu-rehearsal"] if given.cpu_rehearsal else []
    # cuBLAS sums in one order only with this, and must find it before it is loaded.
    env = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.timeout_s, env=env)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {given.timeout_s:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            result: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return result
    return {"error": "\n".join(done.stderr.strip().splitlines()[-8:])}


if __name__ == "__main__":
    sys.exit(main())
