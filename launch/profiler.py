"""A window of steps recorded as Chrome traces: torch's profiler and Windlass's own timeline, written into RUN/traces.

Must not know: the engine, the model, ranks other than its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windlass.dist.trace import Tracer


@dataclass(frozen=True)
class ProfilerConfig:
    """Which steps are recorded, by whom, and with how much detail."""

    start_step: int = field(default=0, metadata={"help": "first recorded step (0: nothing is recorded)", "ge": 0})
    num_steps: int = field(default=3, metadata={"help": "length of the recorded window", "unit": "steps", "ge": 1})
    all_ranks: bool = field(default=False, metadata={"help": "record every rank instead of rank 0 only"})
    operators: bool = field(
        default=True, metadata={"help": "record torch operators and kernels too, not only Windlass's own timeline"}
    )
    shapes: bool = field(default=False, metadata={"help": "record the shapes of operator inputs"})
    memory: bool = field(default=False, metadata={"help": "record allocations of operators"})


@dataclass
class Window:
    """What became of the recording with one step: the files it was written to, or why it could not be."""

    files: list[str] = field(default_factory=list)
    problem: str = ""


class StepProfiler:
    """Records the steps `[start_step, start_step + num_steps)`; a window that the run ends in is written by `close`."""

    def __init__(self, config: ProfilerConfig, folder: Path, rank: int, tracer: Tracer) -> None:
        self.config, self.folder, self.rank, self.tracer = config, folder, rank, tracer
        self.on = config.start_step > 0 and (config.all_ranks or rank == 0)
        self._torch: Any = None
        self._recording = False

    @contextmanager
    def step(self, step: int) -> Iterator[Window]:
        """Surround one step."""
        window = Window()
        first = self.config.start_step
        if self.on and not self._recording and first <= step < first + self.config.num_steps:
            self._start()
        with self.tracer.span(f"step {step}", "step"):
            yield window
        if self._recording and step >= first + self.config.num_steps - 1:
            self._stop(step, window)

    def _start(self) -> None:
        self._recording = True
        self.tracer.enabled = True
        if self.config.operators:
            from torch.profiler import profile

            self._torch = profile(record_shapes=self.config.shapes, profile_memory=self.config.memory)
            self._torch.start()

    def _stop(self, step: int, window: Window) -> None:
        self._recording = self.on = self.tracer.enabled = False
        recorded, self._torch = self._torch, None
        if recorded is not None:
            recorded.stop()
        name = f"rank{self.rank}_step{step}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tracer.write_chrome(self.folder / f"timeline_{name}", self.rank)
            window.files.append(str(self.folder / f"timeline_{name}"))
            if recorded is not None:
                recorded.export_chrome_trace(str(self.folder / f"operators_{name}"))
                window.files.append(str(self.folder / f"operators_{name}"))
        except OSError as error:
            window.problem = f"profiler: cannot write into '{self.folder}': {error.strerror}. Training goes on."

    def close(self, step: int) -> Window:
        """Write a recording that is still open."""
        window = Window()
        if self._recording:
            self._stop(step, window)
        return window
