"""Runs as users start them: `windlass train` and torchrun as processes of their own, watched through their files.

They train the job of a `Lab` (memory_runs.py), so that its undisturbed runs and its oracle serve them too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fault.memory_runs import PROTECTED, Lab
from tests.fault.oracle import Told
from tests.leftovers import end_all
from tests.waiting import until
from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.folder import NodeFolder, SnapshotProcess, list_jobs
from windlass.checkpoint.memory.heartbeat import Beat, is_alive, read_heartbeat
from windlass.launch.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WINDLASS = ("-m", "windlass")


@dataclass
class Command:
    """One run under way."""

    run: Path
    memory: Path  # where its snapshots are
    steps: int
    process: subprocess.Popen[bytes]

    def output(self) -> str:
        return (self.run / "output.txt").read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_metrics(self.run / "metrics.jsonl") if event.get("event") == name]

    def last_step(self) -> int:
        """Return the last step that is done, 0 for none."""
        with suppress(FileNotFoundError):
            for line in reversed((self.run / "metrics.jsonl").read_bytes().splitlines()):
                with suppress(ValueError):
                    if "event" not in (entry := json.loads(line)):
                        return int(entry["step"])
        return 0

    def until(self, step: int, timeout_s: float = 150.0) -> None:
        """Wait until a step is done."""
        until(lambda: self.last_step() >= step or self.process.poll() is not None, timeout_s)
        assert self.process.poll() is None, self.output()

    def nodes(self) -> list[NodeFolder]:
        return list_jobs(self.memory)

    def served(self) -> list[SnapshotProcess]:
        return [served for folder in self.nodes() if (served := folder.read_smp()) is not None]

    def beat(self, rank: int) -> Beat | None:
        """Return the last sign of life of a rank."""
        paths = [path for folder in self.nodes() if (path := folder.beat_path(rank)).exists()]
        return read_heartbeat(paths[0]) if paths else None

    def kill(self, rank: int) -> Beat:
        """Kill a rank and return its last sign of life."""
        beat = self.beat(rank)
        assert beat is not None and is_alive(beat.pid, beat.started)
        os.kill(beat.pid, signal.SIGKILL)
        return beat

    def end(self) -> None:
        """Kill whatever of this run is still there."""
        if self.process.poll() is None:  # else its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for folder in self.nodes():
            beats = [b for path in folder.beating().values() if (b := read_heartbeat(path)) is not None]
            pids.kill([(beat.pid, beat.started) for beat in beats], 5.0)
        end_all(self.memory)


@dataclass
class Commands:
    """Starts runs of a lab's job."""

    lab: Lab
    folder: Path
    started: list[Command] = field(default_factory=list)

    def start(
        self,
        *overrides: str,
        program: Sequence[str] = WINDLASS,
        name: str = "run",
        steps: int = 12,
        variables: Mapping[str, str] | None = None,
        memory: Path | None = None,
        before: Sequence[str] = (),
    ) -> Command:
        """Start `BEFORE python PROGRAM train JOB OVERRIDES` in a session of its own.

        Its snapshots go to `memory`, or to a folder of its own in memory.
        """
        run = self.folder / name
        run.mkdir(exist_ok=True)
        memory = memory or self.lab.new_memory()
        settings = [f"train.run_dir={run}", f"train.steps={steps}", f"snapshot.folder={memory}"]
        settings += [key for key in PROTECTED if not key.startswith("recovery.")]
        with (run / "output.txt").open("ab") as out:
            process = subprocess.Popen(
                [*before, sys.executable, *program, "train", str(self.lab.job), *settings, *overrides],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(Command(run, memory, steps, process))
        return self.started[-1]

    def told(self, command: Command, timeout_s: float = 150.0) -> Told:
        """Wait for the end of a run and return how it went."""
        code = command.process.wait(timeout_s)
        return Told(command.run, code, command.output(), command.steps, self.lab.left(command.memory))


@contextmanager
def commands_of(lab: Lab, folder: Path) -> Iterator[Commands]:
    """Give commands, and end every process and folder of theirs afterwards."""
    commands = Commands(lab, folder)
    try:
        yield commands
    finally:
        for command in commands.started:
            command.end()
