"""A worker as in `windlass.launch.worker`, whose steps are long compared with protecting a snapshot, as real ones are.

Rank 0 begins a step only when the snapshot of the step before the last one is protected on all nodes. What a failure
costs then follows from where it strikes, and not from how busy the machine of the tests is. The door "step" is where it
waits; everything else is the product.
"""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.dist.env import fault, read_process_env
from windlass.dist.errors import CheckpointError
from windlass.launch import trainer
from windlass.launch.control_log import job_of
from windlass.launch.job import Loaded
from windlass.launch.worker import work

PATIENCE_S = 4.0  # a snapshot process that was killed is there again by then
LOOK_S = 0.002


class Pace:
    """Stands before every step of rank 0."""

    def __init__(self, folder: NodeFolder) -> None:
        self._folder = folder

    def __call__(self, point: str, *, rank: int, step: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while point == "step" and rank == 0 and step > 2 and self._protected() < step - 2 and time.monotonic() < end:
            time.sleep(LOOK_S)
        fault(point, rank=rank, step=step)

    def _protected(self) -> int:
        try:
            with SnapshotClient.of(self._folder) as client:
                return client.status().newest.get("peers", -1)
        except CheckpointError:
            return -1


def run(loaded: Loaded) -> int:
    """Work as one rank."""
    config, env = loaded.config, read_process_env()
    trainer.fault = Pace(NodeFolder(Path(config.snapshot.folder), job_of(config.train.run_dir), env.node))
    return work(loaded, env)


if __name__ == "__main__":
    sys.exit(run(pickle.load(sys.stdin.buffer)))
