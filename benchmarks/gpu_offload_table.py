"""The last table of gpu_offload.py: what was measured beside what was wanted."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str, str, str]
GB = 1e9
SLOWDOWN, GAIN, PREDICTION, HOST_BYTES, HIDDEN = 1.15, 0.8, 0.2, 120e9, 0.9


def rows_of(known: dict[str, dict[str, Any]]) -> list[Row]:
    """Return the rows of all parts that were run."""
    rows: list[Row] = []
    for part, result in known.items():
        if "error" in result:
            rows.append((part, "", result["error"].splitlines()[-1][:100] if result["error"] else "?", "", "FAILED"))
    good = {part: result for part, result in known.items() if "error" not in result}
    if "calibrate" in good:
        rows += calibrate_rows(good["calibrate"])
    if "equality" in good:
        rows += equality_rows(good["equality"])
    rows += finetune_rows({part: result for part, result in good.items() if part.startswith("finetune")})
    for part in ("host", "disk"):
        if part in good:
            rows += largest_rows(part, good[part])
    return rows


def verdict(met: bool) -> str:
    return "pass" if met else "MISS"


def calibrate_rows(result: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name, (rate, unit) in result["figures"].items():
        scale, prefix = (GB, "G") if rate >= GB else (1e6, "M")
        rows.append(("calibrate", name, f"{rate / scale:.2f} {prefix} {unit}", "", ""))
    rows.append(("calibrate", "bf16 matrix product", f"{result['matmul_flops'] / 1e12:.1f} TFLOP/s", "", ""))
    differing = f"{result['adam_differing']:.3g} of the elements differ, by at most {result['adam_largest']:.2g}"
    rows.append(("calibrate", "AdamW on CPU and device", differing, "0", verdict(not result["adam_differing"])))
    return rows


def size_of(num_parameters: int) -> str:
    return f"{num_parameters / GB:.2f}B" if num_parameters >= 1e8 else f"{num_parameters / 1e6:.2f}M"


def equality_rows(result: dict[str, Any]) -> list[Row]:
    said = "equal" if result["repeatable"] else "different: the rows below say nothing"
    rows: list[Row] = [("equality", "the same run twice", said, "equal", verdict(result["repeatable"]))]
    for group, where in (("device", "on the device"), ("cpu", "on the CPU"), ("drive", "on the CPU, over the drive")):
        same = result["equal"][group]
        case = f"{size_of(result['sizes'][group])}, updated {where}"
        rows.append(("equality", case, "all policies equal" if same else "different", "bitwise", verdict(same)))
    rows.append(("equality", "CPU and device", "equal" if result["across"] else "different", "as the kernels", ""))
    return rows


def finetune_rows(parts: dict[str, dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for part, result in parts.items():
        memory = f"{result['device_peak_bytes'] / GB:.1f} GB device, {result['host_bytes'] / GB:.1f} GB host"
        case = f"{size_of(result['num_parameters'])}, {result['tokens']} tokens, share {result['share']:.2f}"
        rows.append((part, case, f"{result['step_s']:.3f} s, {result['tflops']:.1f} TFLOP/s; {memory}", "", ""))
        if "predicted_s" in result:
            rows.append(predicted_row(part, result))
    planned, gpu, cpu = (parts.get(f"finetune-{name}") for name in ("planned", "gpu", "cpu"))
    if planned and gpu:
        slower = planned["step_s"] / gpu["step_s"]
        rows.append(("finetune", "planned / GPU only", f"{slower:.2f}", f"<= {SLOWDOWN}", verdict(slower <= SLOWDOWN)))
    if planned and cpu:
        share = planned["step_s"] / cpu["step_s"]
        rows.append(("finetune", "planned / CPU alone", f"{share:.2f}", f"<= {GAIN}", verdict(share <= GAIN)))
    stride = parts.get("finetune-stride2")
    if planned and stride:
        rows.append(("finetune", "planned / stride 2", f"{planned['step_s'] / stride['step_s']:.2f}", "", ""))
    return rows


def predicted_row(part: str, result: dict[str, Any]) -> Row:
    error = result["step_s"] / result["predicted_s"] - 1
    said = f"{result['step_s']:.2f} s, {result['predicted_s']:.2f} s predicted"
    return (part, "measured against predicted", said, f"+- {PREDICTION:.0%}", verdict(abs(error) <= PREDICTION))


def largest_rows(part: str, result: dict[str, Any]) -> list[Row]:
    held = " + ".join(f"{result['fit'][f'on_{tier}']} {tier}" for tier in ("device", "host", "nvme"))
    host = result["host_bytes"]
    size = size_of(result["num_parameters"])
    memory = f"{result['device_peak_bytes'] / GB:.1f} GB device, {result['nvme_bytes'] / GB:.1f} GB drive"
    lanes = {lane: c["busy_s"] for lane, c in result["lanes"].items()}
    bound = max(lanes, key=lambda lane: lanes[lane]) if lanes else "-"
    speed = f"{result['step_s']:.2f} s, {result['tflops']:.1f} TFLOP/s; {memory}"
    return [
        (part, f"{size}, blocks: {held}", speed, "runs", "pass"),
        (part, "host memory", f"{host / GB:.1f} GB", f"<= {HOST_BYTES / GB:.0f} GB", verdict(host <= HOST_BYTES)),
        (part, "busiest lane", f"{bound}, {lanes.get(bound, 0.0):.2f} s of a step", "", ""),
        predicted_row(part, result),
    ]
