"""What a run with faults comes to, and the oracle that compares it with the same run undisturbed.

`Told.check`: every loss, gradient norm and sample range is bitwise that of the undisturbed run, also of steps that
were done twice; the final tensors are; no more steps are lost than allowed; nothing is left, neither a process nor a
folder in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.reader import CheckpointReader
from windlass.checkpoint.store import find_checkpoint
from windlass.launch.control_log import ControlLog
from windlass.launch.metrics import read_metrics

BATCH = 8
EXACT = ("loss", "grad_norm", "lr", "samples", "skipped")


@dataclass
class Told:
    """How a run went."""

    run: Path
    code: int
    said: str
    steps: int
    leftovers: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: Path = Path()  # where its snapshots are

    @property
    def records(self) -> list[dict[str, Any]]:
        return ControlLog(self.run).records

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of a kind in the control log."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def recovered(self) -> list[dict[str, Any]]:
        return self.of("recovered")

    @property
    def restored(self) -> list[tuple[int, str]]:
        """The step and the tier of every recovery, in order."""
        return [(record["restored"], tier_of(record["tier"])) for record in self.recovered]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The steps that count, in order."""
        return [entry for entry in read_metrics(self.run / "metrics.jsonl") if "event" not in entry]

    @property
    def every_step(self) -> list[dict[str, Any]]:
        """Every step that was ever finished, also those that were done again."""
        metrics = self.run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []  # no worker came so far
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return [entry for entry in entries if "event" not in entry]

    @property
    def checkpoint(self) -> Path:
        return Path(str(find_checkpoint(self.run / "checkpoints")))

    def check(
        self,
        undisturbed: Told,
        *,
        lost: int = 1,
        restarts: int | None = None,
        recoveries: int | None = None,
        repeats: int = 0,
        exact: bool = True,
    ) -> None:
        """Assert that nothing but time was lost: the oracle. `lost`: steps that each recovery may repeat; `recoveries`:
        how many of the restarts came to a first step (default: all); `repeats`: steps done again after restarts that
        no controller has recorded.

        `exact`: bit for bit, which holds as long as the number of workers stays the same.
        """
        assert self.code == 0, self.said
        assert [entry["step"] for entry in self.history] == list(range(1, self.steps + 1))
        edges = [tuple(entry["samples"]) for entry in self.history]
        assert edges == [(step * BATCH, (step + 1) * BATCH) for step in range(self.steps)]
        if exact:
            right = {entry["step"]: [entry[key] for key in EXACT] for entry in undisturbed.history}
            for entry in self.every_step:
                assert [entry[key] for key in EXACT] == right[entry["step"]], f"step {entry['step']}: {self.said}"
            self._check_same_checkpoint(undisturbed)
        failures = self.of("failure") + self.of("planned")
        assert len(self.recovered) == (len(failures) if recoveries is None else recoveries), self.said
        assert len(self.every_step) <= self.steps + lost * len(self.recovered) + repeats, (
            "more was done again than was lost"
        )
        assert all(0 <= record["lost"] <= lost for record in self.recovered), self.said
        if restarts is not None:
            assert len(failures) == restarts, self.said
        assert self.leftovers == []

    def _check_same_checkpoint(self, other: Told) -> None:
        with CheckpointReader(self.checkpoint) as mine, CheckpointReader(other.checkpoint) as theirs:
            assert mine.manifest.step == theirs.manifest.step == self.steps
            assert sorted(mine.manifest.tensors) == sorted(theirs.manifest.tensors)
            for key in mine.manifest.tensors:
                assert torch.equal(mine.read(key), theirs.read(key)), key
            for fact in ("step", "consumed", "tokens", "optimizer_steps"):
                assert mine.manifest.extra[fact] == theirs.manifest.extra[fact], fact


def tier_of(text: str) -> str:
    """Return "ram", "local" or "storage" from how a start names what it went on from."""
    return next((tier for tier in ("ram", "local") if text.split(" ")[0] == tier), "storage")
