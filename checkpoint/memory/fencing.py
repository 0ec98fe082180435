"""Ends what older generations left on a node, before a new one begins there: those that train there. Workers that have
not come so far are found by a launcher's own records.

Must not know: torch, networks, who begins a generation and why.
"""

from __future__ import annotations

import os

from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.heartbeat import is_alive, read_heartbeat
from windlass.dist.errors import CheckpointError

KILL_S = 5.0


def fence(folder: NodeFolder, generation: int) -> list[int]:
    """Make the node of `folder` refuse older generations, kill their trainers and wait until they are gone.

    Return the numbers of those that lived. The caller is left alone, whatever it is. A trainer's heartbeat is what it
    is found by, so a trainer of the new generation must not take that over before.

    Invariant:   the generation is raised first: a trainer that starts meanwhile finds that it is over
    Blocks:      host, at most KILL_S
    Raises:      CheckpointError if a newer generation has begun, or a trainer cannot be killed
    """
    now = folder.raise_generation(generation)
    if now > generation:
        raise CheckpointError(f"node {folder.node} is at generation {now}: {generation} is over")
    beats = [beat for beat in map(read_heartbeat, folder.beating().values()) if beat is not None]
    older = [(b.pid, b.started) for b in beats if b.generation < generation and b.pid != os.getpid()]
    living = [who for who in older if is_alive(*who)]
    left = pids.kill(living, KILL_S)
    if left:
        raise CheckpointError(
            f"node {folder.node}: processes {left} of an older generation cannot be killed within {KILL_S:g} s (state "
            "D in ps: they wait for hardware). The node must be taken for lost"
        )
    return [pid for pid, _ in living]
