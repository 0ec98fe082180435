"""`python -m windlass.launch.worker`: one worker of a run that a launcher of ours started.

The launcher has loaded and checked the job already and hands it over on standard input, so every worker of a run has
the same job whatever happens to the YAML file meanwhile. Must not know which launcher it was.
"""

from __future__ import annotations

import pickle
import sys
from typing import TYPE_CHECKING

from windlass.dist.env import ProcessEnv, read_process_env
from windlass.dist.errors import ConfigError
from windlass.launch.failure import guarded
from windlass.launch.local import WorkerCommand, num_cores, threads_per_worker
from windlass.launch.signals import hold_signals

if TYPE_CHECKING:
    from windlass.launch.job import Loaded


def worker_command(loaded: Loaded) -> WorkerCommand:
    """Return the command of a worker that trains this job."""
    return WorkerCommand(("-m", "windlass.launch.worker"), pickle.dumps(loaded))


def check_num_workers(loaded: Loaded, env: ProcessEnv) -> None:
    """Raise ConfigError if the job asks for another number of workers than torchrun or Slurm has started."""
    if "launch.workers" in loaded.given and loaded.config.launch.workers != env.world_size:
        raise ConfigError(
            f"{loaded.at('launch.workers')}: has no effect here, {env.launcher} has started {env.world_size} workers. "
            f"Remove it or use launch.workers={env.world_size}"
        )


def work(loaded: Loaded, env: ProcessEnv) -> int:
    """Train as one rank, whoever started it; report a failure and return the exit code."""

    def run() -> int:
        import torch

        from windlass.launch.run import run_worker

        # torchrun gives every worker one thread, whatever the machine has
        torch.set_num_threads(threads_per_worker(loaded.config.launch, env.local_world_size, num_cores()))
        return run_worker(loaded.config, env)

    return guarded(run, env)


if __name__ == "__main__":
    hold_signals()
    sys.exit(work(pickle.load(sys.stdin.buffer), read_process_env()))
