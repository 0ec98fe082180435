"""The checks of gpu_offload.py, each to be run in a process of its own. Every one returns plain data."""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_offload_models import FULL, QUICK, REHEARSAL, BigWorkload, Scale, fit, free_bytes
from offload_simulated import predicted_step_s
from offload_windlass import WindlassSteps
from workload import Workload

from windlass.dist.device import Device, pick_device
from windlass.launch.calibrate import calibrate
from windlass.model.flops import flops_per_token
from windlass.offload.policy import OffloadConfig
from windlass.offload.rates import Rates
from windlass.parallel.optim import OptimizerConfig, UpdateKernel


def run_check(given: argparse.Namespace) -> dict[str, Any]:
    """Run one part; running out of memory is a result."""
    scale = REHEARSAL if given.cpu_rehearsal else QUICK if given.quick else FULL
    device = pick_device("cpu" if given.cpu_rehearsal else "cuda")
    known = json.loads(given.known.read_text())
    torch.set_float32_matmul_precision("high")
    try:
        if given.part == "calibrate":
            return calibration(scale, device, given.folder)
        if given.part == "equality":
            return equality(scale, device, given.folder)
        if given.part.startswith("finetune"):
            return finetune(scale, device, given, known)
        return largest(scale, device, given, known)
    except torch.OutOfMemoryError as error:
        return {"error": f"does not fit: {error}"}


# -- calibrate -------------------------------------------------------------------------------------------------------


def calibration(scale: Scale, device: Device, folder: Path) -> dict[str, Any]:
    """Measure links, memories, drive, cores, both update kernels and a matrix product."""
    found = calibrate(device, [folder], seconds=scale.calibrate_s)
    flops = matmul_flops(device, 512 if device.kind == "cpu" else 8192)
    differing, largest = adam_difference(device, scale.adam_elements)
    return {
        "device": device.name,
        "cluster": found.cluster,
        "figures": {f.name.replace(str(folder), "drive"): [f.rate, f.unit] for f in found.figures},
        "notes": found.notes,
        "matmul_flops": flops,
        "adam_differing": differing,
        "adam_largest": largest,
        "summary": f"{flops / 1e12:.1f} TFLOP/s in bf16, {differing:.2g} of the elements differ after AdamW",
    }


def matmul_flops(device: Device, n: int) -> float:
    """Return the FLOP/s of a large bf16 matrix product."""
    a = torch.randn(n, n, device=device.torch_device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(4):
            torch.mm(a, a)
        device.synchronize()
        seconds.append((time.perf_counter() - began) / 4)
    return 2 * n**3 / statistics.median(seconds)


def adam_difference(device: Device, numel: int) -> tuple[float, float]:
    """Update the same numbers on the CPU and on the device; return the share of weights and moments that differ in any
    bit, and the largest relative difference of a weight."""
    generator = torch.Generator().manual_seed(1)
    weights, gradient = (torch.randn(numel, generator=generator) for _ in range(2))
    moments = [torch.randn(numel, generator=generator) * 0.1, torch.rand(numel, generator=generator) * 0.01]
    kernel, results = UpdateKernel(OptimizerConfig()), []
    for place in (torch.device("cpu"), device.torch_device):
        state = [t.to(place, copy=True) for t in (weights, gradient, *moments)]
        kernel.update(state[0], state[1], state[2:], cut=numel, steps=3, lr=1e-3)
        results.append([state[0].cpu(), *(t.cpu() for t in state[2:])])
    differing = sum(int((a.view(torch.int32) != b.view(torch.int32)).sum()) for a, b in zip(*results, strict=True))
    relative = ((results[0][0] - results[1][0]).abs() / weights.abs().clamp_min(1e-6)).max().item()
    return differing / (3 * numel), relative


# -- equality --------------------------------------------------------------------------------------------------------

# Groups whose members must end with the same bits: updates on the device, on the CPU, and on the CPU over the drive.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "device": {
        "none": {"policy": "none"},
        "none, again": {"policy": "none"},
        "deep-optimizer-states": {"policy": "deep-optimizer-states", "device_share": 1.0},
    },
    "cpu": {
        "zero-offload": {"policy": "zero-offload"},
        "superpipeline": {"policy": "superpipeline"},
    },
    "drive": {
        "zero-offload, smaller": {"policy": "zero-offload"},
        "zero-infinity": {"policy": "zero-infinity"},
        "fuyou": {"policy": "fuyou"},
        "mlp-offload": {"policy": "mlp-offload", "cache": 4},
    },
}


def equality(scale: Scale, device: Device, folder: Path) -> dict[str, Any]:
    """Train a few steps under every policy and compare all weights and moments."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    found: dict[str, dict[str, Any]] = {}
    digests: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for group, members in GROUPS.items():
        model = scale.on_drive if group == "drive" else scale.equality
        for name, keys in members.items():
            workload = BigWorkload(model, scale.tokens, scale.seq_len, device)
            with engine(workload, {"chunk": scale.chunk, **keys}, folder, device, stage=3) as steps:
                losses = [steps.step(i) for i in range(3)]
                found[name] = {"losses": losses, "digest": digest(steps.engine)}
            digests.setdefault(group, []).append(found[name]["digest"])
            sizes[group] = workload.num_parameters
    repeatable = found["none"]["digest"] == found["none, again"]["digest"]
    equal = {group: len(set(values)) == 1 for group, values in digests.items()}
    return {
        "runs": found,
        "sizes": sizes,
        "repeatable": repeatable,
        "equal": equal,
        "across": digests["device"][0] == digests["cpu"][0],
        "summary": f"the same run twice is equal: {repeatable}; policies are equal: {equal}",
    }


def digest(trained: Any) -> str:
    """Return a checksum of every bit of weights and moments, the same however they are cut into pieces."""
    total = 0
    for piece in trained.owned():
        values = piece.tensor.reshape(piece.box.sizes)
        bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16).long()
        place = torch.zeros((), dtype=torch.int64, device=bits.device)
        for dim, (offset, size) in enumerate(zip(piece.box.offsets, piece.box.sizes, strict=True)):
            stride = 1
            for length in piece.global_shape[dim + 1 :]:
                stride *= length
            along = torch.arange(offset, offset + size, device=bits.device) * stride
            place = place.unsqueeze(-1) + along
        weight = (place * 0x9E3779B97F4A7C1 + zlib.crc32(piece.key.encode())) | 1
        total += int((bits * weight).sum().item())  # wraps around, in any order
    return f"{total % 2**64:016x}"


@contextmanager
def engine(
    workload: BigWorkload, keys: dict[str, Any], folder: Path, device: Device, *, stage: int, reduce: str = "auto"
) -> Iterator[WindlassSteps]:
    """Build the engine in a fresh folder, and give all memory back afterwards."""
    own = folder / "state"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    steps = WindlassSteps(
        workload,
        OffloadConfig(**keys),
        own,
        stage=stage,
        device=device.kind,
        recompute=True,
        reduce=reduce,
    )
    try:
        yield steps
    finally:
        steps.close()
        del steps
        gc.collect()


# -- a full fine-tune ------------------------------------------------------------------------------------------------


def timed(steps: WindlassSteps, count: int, device: Device) -> dict[str, Any]:
    """Train one step to warm up and `count` that are timed; return medians."""
    losses, seconds = [steps.step(0)], []
    device.reset_peak()
    for i in range(count):
        device.synchronize()
        began = time.perf_counter()
        losses.append(steps.step(i + 1))
        device.synchronize()
        seconds.append(time.perf_counter() - began)
    step_s = statistics.median(seconds)
    workload = steps.workload
    flops = flops_per_token(workload.config, workload.seq_len) * workload.micro_batch * workload.seq_len
    facts = steps.facts(1, 1 + count)
    return {
        "device": device.name,
        "num_parameters": workload.num_parameters,
        "tokens": workload.micro_batch * workload.seq_len,
        "step_s": step_s,
        "tflops": flops / step_s / 1e12,  # of the model: recomputation is not counted
        "device_peak_bytes": device.peak_bytes(),
        "host_bytes": sum(facts["tiers"]["host"].values()),
        "nvme_bytes": sum(facts["tiers"]["nvme"].values()),
        "losses": losses,
        **facts,
    }


def rates_of(known: dict[str, Any]) -> Rates:
    """Return what `calibrate` found; nothing is known without it."""
    facts = known.get("calibrate", {}).get("cluster", {})
    return Rates(
        h2d=facts.get("h2d_bytes_per_s", 0.0),
        d2h=facts.get("d2h_bytes_per_s", 0.0),
        duplex=facts.get("duplex_bytes_per_s", 0.0),
        file_read=facts.get("nvme_read_bytes_per_s", 0.0),
        file_write=facts.get("nvme_write_bytes_per_s", 0.0),
        file_mixed=facts.get("nvme_mixed_bytes_per_s", 0.0),
        cpu_update=facts.get("cpu_update_per_s", 0.0),
        device_update=facts.get("device_update_per_s", 0.0),
        cpu_cast=facts.get("cpu_cast_per_s", 0.0),
        host_memory=facts.get("host_memory_bytes_per_s", 0.0),
    )


def planned_share(workload: Workload, keys: dict[str, Any], rates: Rates, computing_s: float) -> float:
    """Return the share of updates on the device with the shortest step on paper."""
    steps = {n / 20: predicted_step_s(workload, keys | {"device_share": n / 20}, rates, computing_s) for n in range(21)}
    return min(steps, key=lambda share: steps[share])


def computing_guess_s(workload: Workload, known: dict[str, Any]) -> float:
    """Return about how long forward and backward take: four passes over the parameters, at 60 % of a matrix product."""
    tokens = workload.micro_batch * workload.seq_len
    rate = 0.6 * known.get("calibrate", {}).get("matmul_flops", 5e14)
    return flops_per_token(workload.config, workload.seq_len) * 4 / 3 * tokens / rate


def finetune(scale: Scale, device: Device, given: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """Train with optimizer state on the device, or in host memory with some share of updates on the device."""
    workload = BigWorkload(scale.finetune, scale.finetune_tokens, scale.seq_len, device)
    keys: dict[str, Any] = {"policy": "deep-optimizer-states", "chunk": scale.chunk, "slabs": 8}
    rates = rates_of(known)
    share = 0.0
    if given.part == "finetune-gpu":
        keys = {"policy": "none"}
    elif given.part == "finetune-stride2":
        keys |= {"device_share": 0.0, "stride": 2}
    else:
        if given.part == "finetune-planned":
            share = planned_share(workload, keys, rates, computing_guess_s(workload, known))
        keys |= {"device_share": share}
    with engine(workload, keys, given.folder, device, stage=2) as steps:
        found = timed(steps, given.steps, device)
    if keys["policy"] != "none":
        found["predicted_s"] = predicted_step_s(workload, keys, rates, found["phases"]["forward_backward"])
    said = f"{found['step_s']:.2f} s/step, {found['tflops']:.1f} TFLOP/s, share {share:.2f}"
    return found | {"share": share, "summary": said}


# -- the largest model -----------------------------------------------------------------------------------------------


def largest(scale: Scale, device: Device, given: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """Train the largest model that the tiers hold."""
    sizes = []
    for layers in (1, 2):
        model, _ = BigWorkload(scale.block | {"num_layers": layers}, scale.tokens, scale.seq_len, device).empty_model()
        sizes.append(sum(p.numel() for part in (model.embed, model.blocks, model.head) for p in part.parameters()))
    block, ends = sizes[1] - sizes[0], 2 * sizes[0] - sizes[1]
    free = free_bytes(scale, device, given.folder)
    found = fit(ends, block, free, with_disk=given.part == "disk")
    if not found.blocks:
        return {"error": f"not one block fits into {free}"}
    workload = BigWorkload(scale.block | {"num_layers": found.blocks}, scale.tokens, scale.seq_len, device)
    rates = rates_of(known)
    keys: dict[str, Any] = {
        "policy": "deep-optimizer-states",
        "chunk": scale.chunk,
        "slabs": 8,
        "table": found.table(),
    }
    keys["device_share"] = planned_share(workload, keys, rates, computing_guess_s(workload, known))
    began = time.perf_counter()
    with engine(workload, keys, given.folder, device, stage=2, reduce="bf16") as steps:
        built = time.perf_counter() - began
        result = timed(steps, given.steps, device)
    computing_s = result["phases"]["forward_backward"]
    predicted_s = predicted_step_s(workload, keys, rates, computing_s, reduce="bf16")
    return result | {
        "fit": vars(found),
        "free": free,
        "build_s": built,
        "predicted_s": predicted_s,
        "share": keys["device_share"],
        "summary": f"{workload.num_parameters:,} parameters, {result['step_s']:.2f} s/step, {predicted_s:.2f} "
        f"predicted, built in {built:.0f} s",
    }
