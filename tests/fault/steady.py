"""A worker without torch that makes steps, keeps what it has done, and fails where it is told to.

Standard input: {"run": folder, "steps": n, "step_s": seconds, "faults": [{"rank", "step", "do", "generation"}]}. It
tells of itself what a trainer tells: steps of rank 0 in metrics.jsonl, phases of its start in control/.
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

from windlass.dist.env import get, read_process_env
from windlass.dist.errors import CommError, DataError
from windlass.launch.control_log import ControlLog, PhaseLog
from windlass.launch.failure import guarded
from windlass.launch.metrics import AppendFile

stopped = threading.Event()


def do(fault: dict[str, Any], run: Path) -> None:
    match fault["do"]:
        case "kill":
            signal.raise_signal(signal.SIGKILL)
        case "raise":
            raise ValueError("a bad batch")
        case "data-error":
            raise DataError("the shard is damaged")
        case "lost-peer":
            raise CommError("rank 1 is gone")
        case "roll-back":
            ControlLog(run).append("rollback", step=fault["step"] - 2, why="the loss jumped")
            sys.exit(9)


def work(job: dict[str, Any]) -> int:
    env = read_process_env()
    run, generation = Path(job["run"]), int(get("WINDLASS_GENERATION"))
    phases = PhaseLog(run, generation, env.rank)
    state = run / f"state-{env.rank}"
    limit = ControlLog(run).limit()
    step = int(state.read_text()) if state.exists() else 0
    step = step if limit is None else min(step, limit)
    phases.mark("imported")
    phases.mark("met")
    phases.mark("found")
    phases.mark("loaded", step=step, tier="ram")
    (run / f"seen-{generation}-{env.rank}").write_text(f"{get('WINDLASS_NODE')} {env.world_size} {get('MARK')}")
    metrics = AppendFile(run / "metrics.jsonl")
    first = step
    while step < job["steps"] and not stopped.is_set():
        for fault in job["faults"]:
            if (fault["rank"], fault["step"]) == (env.rank, step + 1) and generation in fault["generations"]:
                do(fault, run)
        stopped.wait(job["step_s"])
        step += 1
        draft = state.with_name(f".{state.name}.{os.getpid()}")
        draft.write_text(str(step))
        draft.replace(state)
        if env.rank == 0:
            metrics.write(json.dumps({"step": step, "step_s": job["step_s"], "time": stamp()}))
        if step == first + 1:
            phases.mark("first_step")
    return 0


def stamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda signum, frame: stopped.set())
    given = json.load(sys.stdin)
    sys.exit(guarded(lambda: work(given), read_process_env()))
