"""The recorded run that `pipeline.measured` names: its timelines, and whether it is a measure of the job being planned.

Must not know: how costs are formed, schedules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from windlass.dist.errors import ConfigError, PlanError
from windlass.dist.trace import read_chrome
from windlass.launch.config import load_job
from windlass.launch.job import JobConfig, show_value, value_at
from windlass.launch.run_folder import RunFolder
from windlass.model.config import ModelConfig
from windlass.parallel.pipeline.measured_costs import HOW, Recorded, Recording

WITHOUT_COST = ("preset", "init_std")  # keys of the model that cost no time
SAME = (
    *(f"model.{key.name}" for key in fields(ModelConfig) if key.name not in WITHOUT_COST),
    "train.micro_batch",
    "train.seq_len",
    "precision.param",
)


@dataclass(frozen=True)
class RecordedRun:
    """A run with the job that it was and what its ranks recorded."""

    job: JobConfig
    recorded: Recorded

    @classmethod
    def read(cls, root: str) -> RecordedRun:
        """Read a run folder.

        Raises: PlanError if it is none, if nothing was recorded, or not in a way that says what work takes
        """
        folder, at = RunFolder(Path(root)), f"pipeline.measured = '{root}'"
        try:
            plan = json.loads(folder.plan.read_text(encoding="utf-8"))
            job = load_job(folder.config).config
            mesh, device, pipeline = plan["mesh"], plan["device"], plan["pipeline"]
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise PlanError(f"{at}: no plan.json and config.yaml that can be read. Give the folder of a run") from error
        if device != "cpu":
            raise PlanError(
                f"{at}: recorded on {device}, where timelines say when work was begun, not how long it took. "
                "Use pipeline.measured=null"
            )
        beside = mesh["dp_replicate"] * mesh["dp_shard"]
        shards = pipeline["vocabulary"] if pipeline else []
        speeds = job.pipeline.speeds or [1.0] * mesh["pp"]
        ranks = [
            Recording(
                read_chrome(path),
                (shards[rank // beside][1] - shards[rank // beside][0]) / job.model.vocab_size if shards else 0.0,
                speeds[rank // beside],
            )
            for rank, path in _timelines(folder, mesh["pp"] * beside)
        ]
        if not ranks:
            raise PlanError(f"{at}: no timeline in '{folder.traces}'. Record one: {HOW}")
        recomputes = job.activation.policy == "recompute"
        recorded = Recorded(
            root,
            ranks,
            vocab=pipeline["schedule"]["vocab"] if pipeline else 0,
            streamed=bool(pipeline and pipeline["vocab_chunk"]),
            recompute_every=job.activation.every if recomputes else 0,
        )
        return cls(job, recorded)

    def check(self, config: JobConfig) -> None:
        """See that it is a measure of a job.

        Raises: PlanError naming the first key that differs
        """
        for key in SAME:
            here, there = value_at(config, key), value_at(self.job, key)
            if here != there:
                raise PlanError(
                    f"{key} = {show_value(here)}: the run of pipeline.measured = '{self.recorded.source}' was recorded "
                    f"with {show_value(there)}. Use {key}={show_value(there)}, record another run, or "
                    "pipeline.measured=null"
                )


def _timelines(folder: RunFolder, world_size: int) -> list[tuple[int, Path]]:
    """Return the timelines of the latest recorded window with their ranks."""
    found = []
    for path in sorted(folder.traces.glob("timeline_rank*_step*.json.gz")):
        rank, step = (int(word) for word in path.name.removeprefix("timeline_rank").split(".")[0].split("_step"))
        if rank < world_size:
            found.append((step, rank, path))
    latest = max((step for step, _, _ in found), default=0)
    return [(rank, path) for step, rank, path in found if step == latest]
