"""Events as text: the step line in the field's usual form, and the table at the end of a run.

Must not know: where the text goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from windlass.launch.events import Ended, Evaluated, Event, Profiled, Resumed, Saved, Started, Stepped, Warned


def step_line(window: Sequence[Stepped]) -> str:
    """Write the last step of a window, with speeds that are means over the window.

    Units:      tps: positions of all ranks per second; tflops: model operations of one rank; memory: the process's peak
    """
    last = window[-1]
    seconds = sum(s.step_s for s in window)

    def mean(values: Sequence[float]) -> float:
        return sum(v * s.step_s for v, s in zip(values, window, strict=True)) / seconds

    parts = [
        f"step: {last.step}",
        f"loss: {last.loss:.4f}",
        *([f"bpb: {last.bits_per_byte:.4f}"] if last.bits_per_byte is not None else []),
        f"grad_norm: {last.grad_norm:.4f}",
        f"lr: {last.lr:.1e}",
        f"memory: {last.memory_peak_bytes / 2**30:.2f}GiB({last.memory_share:.1%})",
        f"tps: {mean([s.tokens_per_s for s in window]):,.0f}",
        f"tflops: {mean([s.tflops for s in window]):.2f}",
        f"mfu: {mean([s.mfu for s in window]):.2%}",
        f"data_ms: {1000 * sum(s.data_s for s in window) / len(window):.0f}",
        f"stall_ms: {1000 * sum(s.stall_s for s in window) / len(window):.0f}",
        *_lane_parts(window),
        *_snapshot_parts(window),
        f"eta: {duration(last.eta_s)}",
    ]
    return " ".join(parts) + (" (skipped)" if last.skipped else "")


def _lane_parts(window: Sequence[Stepped]) -> list[str]:
    """Say how long a step waited for tiers, and what it moved from and to nvme."""
    if not any(s.lanes for s in window):
        return []
    waited = sum(lane["stalled_s"] for s in window for lane in s.lanes.values()) / len(window)
    parts = [f"tier_stall_ms: {1000 * waited:.0f}"]
    for direction in ("read", "write"):
        moved = sum(c["bytes"] for s in window for lane, c in s.lanes.items() if lane.startswith(f"file {direction}"))
        if moved:
            parts.append(f"nvme_{direction}: {size(moved / len(window))}")
    return parts


def _snapshot_parts(window: Sequence[Stepped]) -> list[str]:
    """Say which step each level of snapshots holds, how many were skipped and how long training waited for them."""
    last = window[-1].snapshot
    if not last:
        return []
    held = [f"{level} {last[level]:.0f}" for level in ("ram", "peers", "local", "storage") if level in last]
    waited = sum(s.snapshot.get("blocked_s", 0.0) for s in window) / len(window)
    skipped = [f"skipped: {last['skipped']:.0f}"] if last.get("skipped") else []
    return [f"kept: {', '.join(held) or 'nothing yet'}", f"kept_ms: {1000 * waited:.1f}", *skipped]


def line_of(event: Event) -> str | None:
    """Write any other event; None if people need not see it."""
    if isinstance(event, Evaluated):
        bits = "" if event.bits_per_byte is None else f" bpb: {event.bits_per_byte:.4f}"
        return f"step: {event.step} validation_loss: {event.loss:.4f}{bits} tokens: {event.tokens:,}"
    if isinstance(event, Saved):
        return f"step: {event.step} saved '{event.folder}' ({size(event.num_bytes)} in {event.seconds:.1f} s)"
    if isinstance(event, Warned):
        return f"WARNING (step {event.step}): {event.message}"
    if isinstance(event, Profiled):
        return f"step: {event.step} profiled: {', '.join(event.files)}"
    if isinstance(event, Resumed):
        notes = [f"  passed over {note}" for note in event.passed_over] + [f"  note: {note}" for note in event.changes]
        return "\n".join([f"resumed at step {event.step} from '{event.folder}' ({event.seconds:.1f} s)", *notes])
    if isinstance(event, Started):
        where = f"{event.world_size} x {event.devices}"
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in event.seconds.items())
        ready = f"ready after {sum(event.seconds.values()):.1f} s: {phases}"
        return (
            f"training {event.num_parameters:,} parameters on {where}: steps {event.step + 1} to {event.total_steps}, "
            f"{event.global_batch} x {event.seq_len} tokens each ({ready})"
        )
    if isinstance(event, Ended):
        return "\n".join(_summary(event))
    return None


def _summary(event: Ended) -> list[str]:
    headline = (
        "finished" if event.reason == "done" else f"stopped ({event.reason})" if event.ok else f"FAILED: {event.reason}"
    )
    spent = f"{duration(event.seconds)}, goodput {event.goodput:.1%} (share of the time spent in steps that count)"
    lines = [f"{headline} at step {event.step}: {event.tokens:,} tokens in {spent}"]
    peaks = [f"{tier} {size(num_bytes)}" for tier, num_bytes in event.peak_bytes.items() if num_bytes]
    if peaks:
        lines.append(f"peak per rank: {', '.join(peaks)}")
    both = (event.predicted_bytes, event.measured_bytes)
    classes = {state for side in both for state, num_bytes in side.items() if num_bytes}
    if classes:
        lines.append(f"{'bytes per rank':<20} {'predicted':>12} {'measured':>12}")
    for state in sorted(classes, key=lambda state: (state == "total", state)):
        cells = [size(side[state]) if state in side else "-" for side in both]
        lines.append(f"{state:<20} {cells[0]:>12} {cells[1]:>12}")
    lines += [f"WARNING (again): {message}" for message in event.warnings]
    lines += [f"written: {path}" for path in event.files]
    return lines


def size(num_bytes: float) -> str:
    """Write a number of bytes with a binary unit."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def duration(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
