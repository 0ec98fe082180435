"""A worker without torch for the tests of the launchers: rank r does what item r of its standard input says.

It does so once all ranks have come, which they tell in the folder on the command line: whatever follows does not depend
on how long their starts take. A rank that fails leaves the moment there, as `time.monotonic` has it.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from windlass.dist.env import ProcessEnv, get, read_process_env
from windlass.dist.errors import CommError, DataError
from windlass.launch.failure import guarded

stopped = threading.Event()


def stop(signum: int, frame: FrameType | None) -> None:
    stopped.set()


def meet(env: ProcessEnv, folder: Path) -> None:
    """Wait until all ranks are here."""
    (folder / f"here-{env.rank}").touch()
    while not all((folder / f"here-{rank}").exists() for rank in range(env.world_size)):
        time.sleep(0.005)


def act(action: str, folder: Path) -> int:
    env = read_process_env()
    print(f"rank {env.rank} of {env.world_size}, local {env.local_rank} of {env.local_world_size}", flush=True)
    print(f"threads {get('OMP_NUM_THREADS')}", flush=True)
    print(f"noted on stderr by {env.rank}", file=sys.stderr, flush=True)
    if action == "until-stopped":
        signal.signal(signal.SIGTERM, stop)
    if action == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    meet(env, folder)
    if action == "value-error":
        raise ValueError(f"bad value on rank {env.rank}")
    if action == "data-error":
        raise DataError(f"shard {env.rank} is damaged")
    if action == "lost-peer":
        raise CommError("rank 1 is gone")
    if action == "late-value-error":
        time.sleep(0.2)
        raise ValueError("the real cause")
    if action == "kill":
        signal.raise_signal(signal.SIGKILL)
    if action == "code-7":
        (folder / "failed").write_text(str(time.monotonic()))
        return 7
    if action == "until-stopped":
        print(f"waiting {env.rank}", flush=True)
        stopped.wait(150)
        print(f"saved by {env.rank}", flush=True)
    if action == "hang":
        print("waiting for ever", flush=True)
        threading.Event().wait(150)
    return 0


if __name__ == "__main__":
    actions = json.load(sys.stdin)
    me = read_process_env()
    sys.exit(guarded(lambda: act(actions[me.rank], Path(sys.argv[1])), me))
