"""One GPU: tokens per second, model FLOP utilisation and peak memory against plain PyTorch and FSDP2.

    python benchmarks/gpu_check.py --list
    python benchmarks/gpu_check.py --models gpt3-125m,gpt3-1.3b --rounds 3 --out gpu.json
    python benchmarks/gpu_check.py --models llama2-7b --recompute --micro-batch 1

Each side trains the same decoder in bf16 with fp32 master weights and fused AdamW, in a process of its own; the sides
of a model take turns. `torch` is the plain loop under autocast, `fsdp2` shards over a mesh of one, `windlass` is the
engine at ZeRO stage 0 and 3. A side that does not fit into memory says so and the others go on. MFU is model FLOPs (6
per parameter and token, plus attention, recomputation not counted) over the data sheet's dense bf16 peak.

Without a CUDA device it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe_machine
from ranks import ROOT
from rich import box
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(ROOT)]  # a checkout that is not installed

MODELS = ("gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-1.3b", "gpt3-2.7b", "gpt3-6.7b", "llama2-7b")
SIDES = ("torch", "fsdp2", "windlass-0", "windlass-3")
MARK = "RESULT "


def main() -> int:
    given = parse()
    if given.list:
        print("\n".join(MODELS))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return 0
    if given.side:
        print(MARK + json.dumps(run_side(given)))
        return 0
    return compare(given)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt3-125m,gpt3-1.3b", help="model presets, comma-separated (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the presets from 125M to 7B that this is meant for")
    parser.add_argument("--sides", default=",".join(SIDES), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each run (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per step (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per sequence (%(default)s)")
    parser.add_argument("--clip", type=float, default=1.0, help="gradient norm limit of all sides (%(default)s)")
    parser.add_argument("--recompute", action="store_true", help="all sides recompute every block in backward")
    parser.add_argument("--timeout-s", type=float, default=900, help="longest single run (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for every sample")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a child: run one side of one model
    return parser.parse_args()


# -- the parent ------------------------------------------------------------------------------------------------------


def compare(given: argparse.Namespace) -> int:
    console, models, sides = Console(stderr=True, soft_wrap=True), given.models.split(","), given.sides.split(",")
    samples: list[dict[str, Any]] = []
    for model in models:
        unfit: set[str] = set()
        for number in range(1, given.rounds + 1):
            for side in sides:
                if side in unfit:
                    continue
                sample = {"model": model, "side": side, "round": number, **start_child(model, side, given)}
                samples.append(sample)
                if "error" in sample:
                    unfit.add(side)
                said = sample.get("error") or f"{sample['tokens_per_s']:,.0f} tokens/s, loss {sample['loss']:.4f}"
                console.print(f"round {number}/{given.rounds} {model} {side}: {said}", highlight=False)
    report(samples, given)
    if given.out:
        given.out.write_text(json.dumps({"machine": describe_machine(), "samples": samples}, indent=1))
    return 1 if any(s.get("error", "").startswith("failed") for s in samples) else 0


def start_child(model: str, side: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a process of its own and return what it measured, or its error."""
    command = [sys.executable, __file__, f"--side={side}", f"--models={model}"]
    for name in ("steps", "warmup", "micro_batch", "seq_len", "clip"):
        command.append(f"--{name.replace('_', '-')}={getattr(given, name)}")
    command += ["--recompute"] if given.recompute else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"failed: not done after {given.timeout_s:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            result: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return result
    return {"error": "failed: " + "\n".join(done.stderr.strip().splitlines()[-8:])}


def report(samples: list[dict[str, Any]], given: argparse.Namespace) -> None:
    console = Console(width=140, soft_wrap=True)
    machine = describe_machine() | {"gpu": next((s["gpu"] for s in samples if "gpu" in s), "?")}
    console.print(f"\n{', '.join(f'{key} {value}' for key, value in machine.items())}", highlight=False)
    console.print(f"{given.micro_batch} x {given.seq_len} tokens per step, bf16, recompute {given.recompute}\n")
    table = Table(box=box.MARKDOWN)
    for name in ("model", "side", "tokens/s", "MFU", "peak GiB", "x torch", "x fsdp2", "loss"):
        table.add_column(name, justify="left" if name in ("model", "side") else "right")
    for model, side in dict.fromkeys((s["model"], s["side"]) for s in samples):
        mine = [s for s in samples if (s["model"], s["side"]) == (model, side)]
        good = [s for s in mine if "error" not in s]
        if not good:
            table.add_row(model, side, mine[-1]["error"].splitlines()[0])
            continue
        speed, mfu, peak = (statistics.median(s[name] for s in good) for name in ("tokens_per_s", "mfu", "peak_bytes"))
        ratios = [ratio(samples, model, side, peer) for peer in ("torch", "fsdp2")]
        cells = [f"{speed:,.0f}", f"{mfu:.1%}", f"{peak / 2**30:.1f}", *ratios, f"{good[-1]['loss']:.4f}"]
        table.add_row(model, side, *cells)
    console.print(table)


def ratio(samples: list[dict[str, Any]], model: str, side: str, peer: str) -> str:
    """Return the median over rounds of our speed over the peer's in the same round."""
    speeds = {(s["side"], s["round"]): s["tokens_per_s"] for s in samples if s["model"] == model and "error" not in s}
    ratios = [speed / speeds[peer, r] for (name, r), speed in speeds.items() if name == side and (peer, r) in speeds]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


# -- the child -------------------------------------------------------------------------------------------------------


def run_side(given: argparse.Namespace) -> dict[str, Any]:
    """Train one side and measure it; running out of memory is a result."""
    import torch
    from workload import Workload

    from windlass.dist.device import pick_device
    from windlass.model.flops import flops_per_token

    device = pick_device("cuda")
    torch.set_float32_matmul_precision("high")
    workload = Workload(
        model=given.models,
        bf16=True,
        micro_batch=given.micro_batch,
        seq_len=given.seq_len,
        clip=given.clip,
        seed=0,
        rank=0,
        world_size=1,
        device=str(device.torch_device),
    )
    builders: dict[str, Callable[[Any, bool], Callable[[int], Any]]] = {
        "torch": build_torch,
        "fsdp2": build_fsdp2,
        "windlass-0": lambda w, recompute: build_windlass(w, recompute, stage=0),
        "windlass-3": lambda w, recompute: build_windlass(w, recompute, stage=3),
    }
    try:
        step = builders[given.side](workload, given.recompute)
        for i in range(given.warmup):
            loss = step(i)
        device.synchronize()
        device.reset_peak()
        began = time.perf_counter()
        for i in range(given.steps):
            loss = step(given.warmup + i)
        device.synchronize()
        seconds = (time.perf_counter() - began) / given.steps
    except torch.OutOfMemoryError:
        return {"error": f"does not fit into {device.total_bytes() / 2**30:.0f} GiB", "gpu": device.name}
    tokens_per_s = given.micro_batch * given.seq_len / seconds
    peak_flops = device.peak_flops(torch.bfloat16)
    flops = flops_per_token(workload.config, given.seq_len) * tokens_per_s
    return {
        "gpu": device.name,
        "step_s": seconds,
        "tokens_per_s": tokens_per_s,
        "mfu": flops / peak_flops if peak_flops else float("nan"),
        "peak_bytes": device.peak_bytes(),
        "loss": float(loss),
        "num_parameters": workload.num_parameters,
    }


def with_recompute(net: Any) -> None:
    """Make every block forget its activations in forward and compute them again in backward."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for index, block in enumerate(net.blocks):
        net.blocks[index] = checkpoint_wrapper(block)


def build_torch(workload: Any, recompute: bool) -> Callable[[int], Any]:
    import torch
    from zero_sides import OneModule, adamw, decay_groups, plain_step

    net = OneModule(workload, autocast=True)
    if recompute:
        with_recompute(net)
    optimizer = torch.optim.AdamW(decay_groups(net, workload.decay), **adamw(workload))
    return plain_step(workload, net, net.parameters(), optimizer, autocast=True)


def build_fsdp2(workload: Any, recompute: bool) -> Callable[[int], Any]:
    import tempfile

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from zero_sides import OneModule, adamw, decay_groups, plain_step

    with tempfile.NamedTemporaryFile(prefix="windlass-gpu-") as meet:
        dist.init_process_group("nccl", store=dist.FileStore(meet.name, 1), rank=0, world_size=1)
    mesh = init_device_mesh("cuda", (1,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    net = OneModule(workload)
    if recompute:
        with_recompute(net)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(decay_groups(net, workload.decay), **adamw(workload))
    return plain_step(workload, net, net.parameters(), optimizer, autocast=False)


def build_windlass(workload: Any, recompute: bool, *, stage: int) -> Callable[[int], Any]:
    from zero_sides import windlass_engine

    engine, _ = windlass_engine(workload, stage=stage, device="cuda", recompute=recompute)
    return lambda index: engine.train_step([workload.batch(index)], workload.lr).loss


if __name__ == "__main__":
    sys.exit(main())
