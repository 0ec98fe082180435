"""A worker without torch for the tests of the launchers: rank r does what item r of its standard input says."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from types import FrameType

from windlass.dist.env import get, read_process_env
from windlass.dist.errors import CommError, DataError
from windlass.launch.failure import guarded

stopped = threading.Event()


def stop(signum: int, frame: FrameType | None) -> None:
    stopped.set()


def act(action: str) -> int:
    env = read_process_env()
    print(f"rank {env.rank} of {env.world_size}, local {env.local_rank} of {env.local_world_size}", flush=True)
    print(f"threads {get('OMP_NUM_THREADS')}", flush=True)
    print(f"noted on stderr by {env.rank}", file=sys.stderr, flush=True)
    if action == "value-error":
        raise ValueError(f"bad value on rank {env.rank}")
    if action == "data-error":
        raise DataError(f"shard {env.rank} is damaged")
    if action == "lost-peer":
        raise CommError("rank 1 is gone")
    if action == "late-value-error":
        time.sleep(0.4)
        raise ValueError("the real cause")
    if action == "kill":
        signal.raise_signal(signal.SIGKILL)
    if action == "code-7":
        return 7
    if action == "until-stopped":
        signal.signal(signal.SIGTERM, stop)
        print(f"waiting {env.rank}", flush=True)
        stopped.wait(60)
        print(f"saved by {env.rank}", flush=True)
    if action == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("waiting for ever", flush=True)
        threading.Event().wait(60)
    return 0


if __name__ == "__main__":
    actions = json.load(sys.stdin)
    me = read_process_env()
    sys.exit(guarded(lambda: act(actions[me.rank]), me))
