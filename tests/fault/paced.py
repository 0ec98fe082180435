"""A worker as in `windlass.launch.worker`, whose steps are long compared with protecting a snapshot, as real ones are.

Rank 0 begins a step only when the snapshot of the one before is where the command line says: "peers" (protected on all
nodes), "storage", "local", and, for every STEP@FILE on it, once that file is there if it is past that step; it does not
wait for ever. What a failure costs then follows from where it strikes, and not from how busy the machine of the tests
is. The door "step" is where it waits; everything else is the product.
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
from windlass.launch.signals import hold_signals
from windlass.launch.worker import work

PATIENCE_S = 45.0  # a snapshot process that was killed is there again by then; less than recovery.hang_s
LOOK_S = 0.01


class Pace:
    """Stands before every step of rank 0 until the levels have what they shall have by then, and `files`, each of which
    is waited for after a step, are there.
    """

    def __init__(
        self, folder: NodeFolder, every: dict[str, int], generation: int, files: list[tuple[int, Path]]
    ) -> None:
        self._folder, self._every, self._generation, self._files = folder, every, generation, files

    def __call__(self, point: str, *, rank: int, step: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while point == "step" and rank == 0 and not self._kept(step) and time.monotonic() < end:
            time.sleep(LOOK_S)
        fault(point, rank=rank, step=step)

    def _kept(self, step: int) -> bool:
        if not all(file.exists() for after, file in self._files if after < step):
            return False
        wanted = {level: (step - 1) // n * n for level, n in self._every.items()}
        wanted = {level: least for level, least in wanted.items() if least > 0}
        if not wanted:
            return True
        try:
            with SnapshotClient.of(self._folder) as client:
                status = client.status()
        except CheckpointError:
            return False
        mine = [slot for slot in status.slots if slot["generation"] == self._generation]
        if self._generation > 1 and not any(slot["state"] == "COMMITTED" for slot in mine):
            return False  # until the seed is protected, slots may all be taken
        newest = status.newest
        return all(newest.get(level, -1) >= least for level, least in wanted.items())


def run(loaded: Loaded, given: list[str]) -> int:
    """Work as one rank."""
    levels = [text for text in given if "@" not in text]
    waits = [text.split("@", 1) for text in given if "@" in text]
    files = [(int(after), Path(file)) for after, file in waits]
    config, env = loaded.config, read_process_env()
    every = {"peers": 1, "storage": config.checkpoint.every, "local": config.checkpoint.local_every}
    folder = NodeFolder(Path(config.snapshot.folder), job_of(config.train.run_dir), env.node)
    trainer.fault = Pace(folder, {level: every[level] for level in levels}, env.generation, files)
    return work(loaded, env)


if __name__ == "__main__":
    hold_signals()
    sys.exit(run(pickle.load(sys.stdin.buffer), sys.argv[1:]))
