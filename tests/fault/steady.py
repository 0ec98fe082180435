"""A worker without torch that makes steps, keeps what it has done, and fails where it is told to.

Standard input: {"run": folder, "steps": n, "step_s": seconds, "faults": [{"rank", "step", "do", "generations"}],
"strikes": [step]}. Rank 0 begins no step before the strikes after earlier ones are made, however busy their controller
is. It tells of itself what a trainer tells: steps of rank 0 in metrics.jsonl, phases of its start in control/.
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

from tests.waiting import until
from windlass.dist.env import get, read_process_env
from windlass.dist.errors import CommError, DataError, SpikeError
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
        case "hang":
            threading.Event().wait()
        case "roll-back":
            ControlLog(run).append("rollback", step=fault["step"] - 2, why="the loss jumped")
            raise SpikeError("the loss jumped")


def meet(run: Path, generation: int, rank: int, world_size: int, step: int) -> bool:
    """Wait until all ranks have done this step and return whether any was asked to stop, as a collective would.

    Raises:      CommError if one has ended before
    """
    tell(run / f"at-{generation}-{step}-{rank}", str(int(stopped.is_set())))
    flags = 0
    for peer in range(world_size):
        there, alive = run / f"at-{generation}-{step}-{peer}", run / f"pid-{generation}-{peer}"
        while not there.exists():
            try:
                os.kill(int(alive.read_text()) if alive.exists() else os.getpid(), 0)
            except ProcessLookupError:
                raise CommError(f"rank {peer} is gone") from None
            time.sleep(0.001)
        flags += int(there.read_text())
    return bool(flags)


def await_strikes(run: Path, strikes: list[int], step: int) -> None:
    """Wait until all strikes that come before a step have been made."""
    if due := sum(at < step for at in strikes):
        until(lambda: stopped.is_set() or num_blows(run) >= due)


def num_blows(run: Path) -> int:
    """Return how many strikes of this launch have been made, or found that they cannot be."""
    return sum(record["kind"] == "blow" for record in ControlLog(run).since_launch())


def tell(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


def work(job: dict[str, Any]) -> int:
    env = read_process_env()
    run, generation = Path(job["run"]), int(get("WINDLASS_GENERATION"))
    phases = PhaseLog(run, generation, env.rank)
    tell(run / f"pid-{generation}-{env.rank}", str(os.getpid()))
    state = run / f"state-{env.rank}"
    kept = [run / f"state-{rank}" for rank in range(env.world_size)]
    agreed = run / f"from-{generation}"
    if env.rank == 0:
        limit = ControlLog(run).left().get(generation - 1)
        steps = [int(file.read_text()) if file.exists() else 0 for file in kept]
        tell(agreed, str(min(steps if limit is None else [*steps, limit])))
    until(agreed.exists)
    step = int(agreed.read_text())
    phases.mark("imported")
    phases.mark("met")
    phases.mark("found")
    phases.mark("loaded", step=step, tier="ram")
    (run / f"seen-{generation}-{env.rank}").write_text(f"{get('WINDLASS_NODE')} {env.world_size} {get('MARK')}")
    metrics = AppendFile(run / "metrics.jsonl")
    first = step
    stop = False
    while step < job["steps"] and not stop:
        if env.rank == 0:
            await_strikes(run, job["strikes"], step + 1)
        for fault in job["faults"]:
            if (fault["rank"], fault["step"]) == (env.rank, step + 1) and generation in fault["generations"]:
                do(fault, run)
        stopped.wait(job["step_s"])
        step += 1
        tell(state, str(step))
        if env.rank == 0:
            metrics.write(json.dumps({"step": step, "step_s": job["step_s"], "time": stamp()}))
        stop = meet(run, generation, env.rank, env.world_size, step)
        if step == first + 1:
            phases.mark("first_step")
    return 0


def stamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda signum, frame: stopped.set())
    given = json.load(sys.stdin)
    sys.exit(guarded(lambda: work(given), read_process_env()))
