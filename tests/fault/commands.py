"""Whole runs as users start them: `windlass train` and torchrun as processes of their own, watched through their files.

`Given` is a small job on prepared text; `Started` is one run of it. Every run keeps its snapshots in a folder of its
own in memory, and `Given.left` says what of them is still there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.waiting import until
from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.folder import NodeFolder, SnapshotProcess, list_jobs
from windlass.checkpoint.memory.heartbeat import Beat, is_alive, read_heartbeat
from windlass.data.prepare import prepare
from windlass.launch.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SHM = Path("/dev/shm")
TORCHRUN = ("-m", "torch.distributed.run")
JOB = """
model: {{vocab_size: 257, hidden_size: 32, num_layers: 2, num_heads: 2, max_seq_len: 64, tie_embeddings: true}}
data: {{path: {data}}}
train: {{steps: {steps}, seq_len: 32, micro_batch: 2, global_batch: 8, eval_batches: 1, device: cpu}}
optimizer: {{lr: 1e-2}}
zero: {{stage: 2}}
snapshot: {{every: 1, folder: {memory}}}
checkpoint: {{mode: lazy}}
launch: {{threads: 1}}
parallelism: {{timeout_s: 60}}
metrics: {{tensorboard: false}}
"""


def tokens_in(folder: Path) -> Path:
    """Prepare a little text and return its folder."""
    (folder / "text.txt").write_text("\n".join(f"line {i} says {i * i}" for i in range(2000)))
    prepare([folder / "text.txt"], folder / "tokens", workers=1, validation=0.05)
    return folder / "tokens"


@dataclass(frozen=True)
class Given:
    """A job in a file, and the folder in memory that its snapshots are kept in."""

    file: Path
    memory: Path

    def start(
        self,
        run: Path,
        *overrides: str,
        program: Sequence[str] = ("-m", "windlass"),
        variables: Mapping[str, str] | None = None,
    ) -> Started:
        """Start `PROGRAM train JOB OVERRIDES` in a session of its own."""
        run.mkdir(parents=True, exist_ok=True)
        out = (run / "output.txt").open("ab")
        command = [sys.executable, *program, "train", str(self.file), f"train.run_dir={run}", *overrides]
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **(variables or {})}
        with out:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Started(self, run, process)

    def nodes(self) -> list[NodeFolder]:
        return list_jobs(self.memory)

    def left(self) -> list[str]:
        """Return what has not been cleaned up in memory."""
        return sorted(str(path.relative_to(self.memory)) for path in self.memory.rglob("*") if path.is_file())


@dataclass
class Started:
    """A run under way."""

    given: Given
    run: Path
    process: subprocess.Popen[bytes]

    def output(self) -> str:
        return (self.run / "output.txt").read_text(errors="replace")

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the events of this name, or the steps."""
        path = self.run / "metrics.jsonl"
        return [event for event in (read_metrics(path) if path.exists() else []) if event.get("event") == name]

    def last_step(self) -> int:
        with suppress(FileNotFoundError):
            lines = (self.run / "metrics.jsonl").read_bytes().splitlines()
            for line in reversed(lines):
                with suppress(ValueError):
                    if "event" not in (entry := json.loads(line)):
                        return int(entry["step"])
        return 0

    def until_step(self, step: int, timeout_s: float = 60.0) -> None:
        until(lambda: self.last_step() >= step or self.process.poll() is not None, timeout_s)
        assert self.process.poll() is None, self.output()

    def beat(self, rank: int) -> Beat | None:
        """Return the last sign of life of a rank."""
        found = [folder.beat_path(rank) for folder in self.given.nodes() if folder.beat_path(rank).exists()]
        return read_heartbeat(found[0]) if found else None

    def kill(self, rank: int) -> Beat:
        """Kill a rank and return its last sign of life."""
        beat = self.beat(rank)
        assert beat is not None and is_alive(beat.pid, beat.started)
        os.kill(beat.pid, signal.SIGKILL)
        return beat

    def served(self) -> list[SnapshotProcess]:
        return [served for folder in self.given.nodes() if (served := folder.read_smp()) is not None]

    def wait(self, timeout_s: float = 60.0) -> int:
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """Kill whatever of this run is still there."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for folder in self.given.nodes():
            beats = [b for path in folder.beating().values() if (b := read_heartbeat(path)) is not None]
            pids.kill([(beat.pid, beat.started) for beat in beats], 5.0)
            if (served := folder.read_smp()) is not None:
                pids.kill([(served.pid, served.started)], 5.0)

    # -- what the run computed ---------------------------------------------------------------------------------------

    def figures(self) -> dict[int, tuple[Any, ...]]:
        """Return loss, gradient norm and samples by step; what is done again must come to the same."""
        found: dict[int, tuple[Any, ...]] = {}
        for event in self.events():
            figures = (event["loss"], event["grad_norm"], tuple(event["samples"]))
            assert found.setdefault(event["step"], figures) == figures, f"step {event['step']} came out differently"
        return found


@dataclass
class Runs:
    """Makes jobs and ends what was started of them."""

    tokens: Path
    folder: Path
    steps: int = 40
    started: list[Started] = field(default_factory=list)
    memories: list[Path] = field(default_factory=list)

    def given(self, *, steps: int = 0, memory: Path | None = None, name: str = "job") -> Given:
        """Write a job; `memory`: where its snapshots are kept (default: a folder of its own)."""
        if memory is None:
            memory = Path(tempfile.mkdtemp(prefix="windlass-test-", dir=SHM))
            self.memories.append(memory)
        file = self.folder / f"{name}.yaml"
        file.write_text(JOB.format(data=self.tokens, steps=steps or self.steps, memory=memory))
        return Given(file, memory)

    def start(self, given: Given, run: str, *overrides: str, **how: Any) -> Started:
        started = given.start(self.folder / run, *overrides, **how)
        self.started.append(started)
        return started


@contextmanager
def runs_in(folder: Path, tokens: Path, *, steps: int = 40) -> Iterator[Runs]:
    """Give jobs on these tokens, and end every process and folder of theirs afterwards."""
    runs = Runs(tokens, folder, steps)
    try:
        yield runs
    finally:
        for started in runs.started:
            started.end()
        for memory in runs.memories:
            shutil.rmtree(memory, ignore_errors=True)
