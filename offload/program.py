"""One training step as tasks: what every lane does, what each task waits for, which buffers it takes.

Must not know: rates, tensors, threads, how a program is made (see `offload.compile`). How long it takes is worked out
by `offload.simulate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

COMPUTE, COMM, H2D, D2H = "compute", "comm", "h2d", "d2h"
READ, WRITE, CPU_UPDATE, DEVICE_UPDATE = "file read", "file write", "cpu update", "device update"
LANES = (COMPUTE, COMM, H2D, D2H, READ, WRITE, CPU_UPDATE, DEVICE_UPDATE)
COPY_LANES = (H2D, D2H, READ, WRITE)

# Pools of buffers: records and parameters from nvme, what passes through host memory, records on the device. Those for
# gradients on their way off the device are named by `gradient_pool`.
SLABS, PARAMS, STAGED, DEVICE_SLABS = "slab", "parameters", "staging", "device record"

Hold = tuple[str, str, int]  # tier, class, bytes


class Task(NamedTuple):
    """One thing that a lane does. A task without a lane takes no time: it is where others meet.

    Units:  `seconds` of compute; `num_bytes` over the lane (of updates: of the record); `elements` updated and `casts`
            of them cast; `copies` bytes read and written by a copy inside host memory
    """

    lane: str
    label: str
    needs: tuple[int, ...]
    seconds: float = 0.0
    num_bytes: int = 0
    elements: int = 0
    casts: int = 0
    copies: int = 0
    priority: int = 1  # 0: compute waits for it; 2: nobody does
    takes: str = ""  # the pool of which it takes one when all it needs is done, first come, first served
    gives: str = ""  # the pool that gets one back when it is done
    holds: tuple[Hold, ...] = ()  # from when it has been taken on
    frees: tuple[Hold, ...] = ()  # when it is done
    phase: str = ""  # of compute: forward, backward, update


@dataclass(frozen=True)
class Program:
    """The tasks of one step, in the order in which they are submitted, and the size of every pool.

    `rest` are the bytes by tier and class that no task takes or frees.
    """

    tasks: tuple[Task, ...]
    pools: dict[str, int] = field(default_factory=dict)
    rest: dict[str, dict[str, int]] = field(default_factory=dict)


def gradient_pool(numel: int) -> str:
    """Return the name of the pool of device buffers for gradients of a size that leave the device."""
    return f"gradients of {numel}"


def step_bytes(program: Program) -> dict[str, int]:
    """Return the bytes that every lane moves in a step; file lanes in whole pages."""
    moved: Counter[str] = Counter()
    for task in program.tasks:
        if task.num_bytes:
            moved[task.lane] += task.num_bytes
    return dict(moved)


def once(needs: Iterable[int]) -> tuple[int, ...]:
    """Return the tasks to wait for, each once."""
    return tuple(dict.fromkeys(needs))
