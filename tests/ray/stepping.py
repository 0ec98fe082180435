"""A worker without torch that makes steps and says each of them, for recovery in a Ray cluster.

Standard input: {"run": folder, "steps": n, "step_s": seconds, "strikes": [step]}. What a rank has done is in a file of
the run folder. No rank begins a step before the strikes after earlier ones are under way, however long a controller
takes, and however often it is started again. The command line is for whoever looks for the workers of a run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from windlass.dist.env import read_process_env
from windlass.launch.control_log import ControlLog
from windlass.launch.failure import guarded

stopped = threading.Event()


def await_strikes(run: Path, strikes: list[int], step: int) -> None:
    """Wait until all strikes that come before a step are noted as such, or this worker is to end."""
    if due := sum(at < step for at in strikes):
        while sum(record["kind"] == "struck" for record in ControlLog(run).since_launch()) < due:
            if stopped.wait(0.02):
                return


def work(job: dict[str, Any]) -> int:
    env = read_process_env()
    run = Path(job["run"])
    state = run / f"state-{env.rank}"
    step = int(state.read_text()) if state.exists() else 0
    while step < job["steps"] and not stopped.wait(job["step_s"]):
        await_strikes(run, job["strikes"], step + 1)
        if stopped.is_set():
            break
        step += 1
        told = {"step": step, "rank": env.rank, "generation": env.generation, "node": env.node, "pid": os.getpid()}
        print(json.dumps(told))
        draft = state.with_name(f".{state.name}.{os.getpid()}")
        draft.write_text(str(step))
        draft.replace(state)
        if env.rank == 0:
            with open(run / "metrics.jsonl", "a") as metrics:
                when = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
                metrics.write(json.dumps({"step": step, "step_s": job["step_s"], "time": when}) + "\n")
    if stopped.is_set():
        print(f"saved by {env.rank} at {step}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda signum, frame: stopped.set())
    given = json.load(sys.stdin)
    sys.exit(guarded(lambda: work(given), read_process_env()))
