"""What a run tells about itself: the event stream as lines for people, JSON lines for programs and TensorBoard scalars.

Must not know: how an event comes about.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from windlass.dist.errors import ConfigError, DataError
from windlass.launch.events import Ended, Evaluated, Event, Sink, Started, Stepped, Warned
from windlass.launch.report import line_of, step_line


@dataclass(frozen=True)
class MetricsConfig:
    """How a run reports. `RUN/metrics.jsonl` has every step whatever is chosen here."""

    log_every: int = field(default=1, metadata={"help": "print a line every n steps", "unit": "steps", "ge": 1})
    tensorboard: bool = field(default=True, metadata={"help": "write scalars for TensorBoard into RUN/tensorboard"})
    progress: bool = field(default=True, metadata={"help": "progress bar, shown on a terminal only"})


class AppendFile:
    """Lines appended to a file that may already have some; nothing is lost while the disk is full.

    A write that fails keeps its text for the next one. A last line without its end (the writer was killed) is closed
    first, so that it cannot swallow ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        self._pending = b"\n" if size and os.pread(self._fd, 1, size - 1) != b"\n" else b""

    def write(self, text: str) -> None:
        """Append one line.

        Raises: OSError if not all of it is in the file yet.
        """
        self._pending += text.encode() + b"\n"
        self._push()

    def _push(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._fd, self._pending) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        try:
            self._push()
        finally:
            os.close(self._fd)


class JsonLines:
    """One JSON object per event; steps have no key "event". Numbers that JSON cannot say (nan, inf) are null."""

    def __init__(self, path: Path) -> None:
        self.file = AppendFile(path)

    def write(self, event: Event) -> None:
        self.file.write(json.dumps(as_json(event), allow_nan=False))

    def close(self) -> None:
        self.file.close()


def as_json(event: Event) -> dict[str, Any]:
    """Return the event as one JSON object, the step first and the time last."""
    head: dict[str, Any] = {} if isinstance(event, Stepped) else {"event": event.kind}
    body = {f.name: _plain(getattr(event, f.name)) for f in fields(event)}
    return {**head, **body, "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl as one history, whatever interruptions it had.

    A start at step n makes all earlier objects with a later step void: they were redone from a checkpoint. A half line
    (the writer was killed) is left out.

    Raises: DataError if the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"metrics file '{path}': {error.strerror}") from error
    history: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") in ("resume", "start"):
            history = [past for past in history if past["step"] <= entry["step"]]
        history.append(entry)
    return history


class TensorBoard:
    """Scalars for TensorBoard; a start after a crash purges the steps that are redone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def write(self, event: Event) -> None:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    f"metrics.tensorboard = true: {error}. Install tensorboard, or set metrics.tensorboard=false."
                ) from error
            self._writer = SummaryWriter(
                str(self.folder), purge_step=event.step + 1 if event.step else 0, flush_secs=20
            )
        for name, value in scalars(event).items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, event.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def scalars(event: Event) -> dict[str, float]:
    """Return the numbers of an event under their TensorBoard names."""
    if isinstance(event, Evaluated):
        return {"validation/loss": event.loss} | _bits("validation", event.bits_per_byte)
    if not isinstance(event, Stepped):
        return {}
    return {
        "train/loss": event.loss,
        **_bits("train", event.bits_per_byte),
        "train/grad_norm": event.grad_norm,
        "train/lr": event.lr,
        "train/tokens": float(event.tokens),
        "speed/tokens_per_s": event.tokens_per_s,
        "speed/tflops": event.tflops,
        "speed/mfu": event.mfu,
        "speed/step_s": event.step_s,
        "speed/data_s": event.data_s,
        "speed/stall_s": event.stall_s,
        "traffic/comm_bytes": float(event.comm_bytes),
        **{f"seconds/{phase}": seconds for phase, seconds in event.seconds.items()},
        **{f"lanes/{lane}/{what}": float(n) for lane, counts in event.lanes.items() for what, n in counts.items()},
        **{f"snapshot/{what}": float(value) for what, value in event.snapshot.items()},
        **{f"memory/{tier}_bytes": float(num_bytes) for tier, num_bytes in event.bytes_by_tier.items()},
        "memory/process_peak_bytes": float(event.memory_peak_bytes),
    }


def _bits(split: str, bits_per_byte: float | None) -> dict[str, float]:
    return {} if bits_per_byte is None else {f"{split}/bits_per_byte": bits_per_byte}


class LogLines:
    """Lines on standard output and in log.txt; on a terminal also a progress bar.

    The first step, every `log_every`-th and the last one have a line; speeds are means since the line before.
    """

    def __init__(self, path: Path, *, log_every: int = 1, progress: bool = True) -> None:
        self.file = AppendFile(path)
        self.log_every = log_every
        self.progress = progress and sys.stdout.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._total = 0
        self._window: list[Stepped] = []
        self._first = True

    def write(self, event: Event) -> None:
        if isinstance(event, Started):
            self._total = event.total_steps
        if isinstance(event, Ended):
            self._stop_bar()
        text = self._text_of(event)
        if text is not None:
            self._print(text)
            now = datetime.now().isoformat(" ", "seconds")
            self.file.write("\n".join(f"{now} {line}" for line in text.split("\n")))
        if isinstance(event, Started):
            self._start_bar(event)
        if isinstance(event, Stepped) and self._bar is not None:
            self._bar.update(self._task, completed=event.step, loss=f"{event.loss:.4f}")

    def _text_of(self, event: Event) -> str | None:
        if not isinstance(event, Stepped):
            return line_of(event)
        self._window.append(event)
        if not (self._first or event.step % self.log_every == 0 or event.step == self._total):
            return None
        text = step_line(self._window)
        self._window, self._first = [], False
        return text

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _start_bar(self, event: Started) -> None:
        if not self.progress:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("training", total=event.total_steps, completed=event.step, loss="-")
        self._bar.start()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def close(self) -> None:
        self._stop_bar()
        self.file.close()


class Surprises:
    """What ranks other than 0 show: warnings only, on standard error, with their rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def write(self, event: Event) -> None:
        if isinstance(event, Warned):
            print(f"rank {self.rank}: {line_of(event)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is kept."""


def build_sinks(config: MetricsConfig, rank: int, *, metrics: Path, log: Path, tensorboard: Path) -> list[Sink]:
    """Return the views of rank 0, or those of any other rank."""
    if rank != 0:
        return [Surprises(rank)]
    sinks: list[Sink] = [LogLines(log, log_every=config.log_every, progress=config.progress), JsonLines(metrics)]
    return [*sinks, TensorBoard(tensorboard)] if config.tensorboard else sinks
