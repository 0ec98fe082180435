"""A worker without torch that makes steps and says each of them, for recovery in a Ray cluster.

Standard input: {"run": folder, "steps": n, "step_s": seconds}. What a rank has done is in a file of the run folder.
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
from windlass.launch.failure import guarded

stopped = threading.Event()


def work(job: dict[str, Any]) -> int:
    env = read_process_env()
    run = Path(job["run"])
    state = run / f"state-{env.rank}"
    step = int(state.read_text()) if state.exists() else 0
    while step < job["steps"] and not stopped.wait(job["step_s"]):
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
