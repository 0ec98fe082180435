"""Which shares to choose, as a linear program: what of the state rests in host memory, which updates the device makes,
which parameters never leave the device. Rounded to chunks and simulated, its answer is a candidate among others.

Every phase lasts as long as its slowest resource; memory bounds the shares. The published closed forms are its slices:
with everything else fixed, the device's share is that of Deep Optimizer States, and the time that of Fuyou.
Must not know: units, chunks, lanes in time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from windlass.offload.costs import STREAMED_DRAM_BYTES, UPDATE_DRAM_BYTES
from windlass.offload.rates import Rates

SHARES = ("host", "device_update", "param_device")
PHASES = ("forward", "backward", "update")

Row = np.ndarray  # a sum that is bounded: a constant and the coefficients of the three shares
ONE, HOST, UPDATE, PARAM = np.eye(4)


@dataclass(frozen=True)
class Problem:
    """One step of one rank, with tiers and times of updates as a policy has them.

    Units:  elements; seconds of compute; bytes of one element by class; `slots` of a record; bytes of memory that are
            free for what the shares decide (infinite: not known)
    """

    params: float
    forward_s: float
    backward_s: float
    rates: Rates
    param_tier: str = "device"
    state_tier: str = "host"
    gradients_leave: bool = True
    in_backward: bool = False
    fetches: float = 2.0  # of parameters in a step, forward and backward together
    param_bytes: int = 2
    reduce_bytes: int = 2
    state_bytes: int = 12
    slots: int = 1
    device_free: float = math.inf
    host_free: float = math.inf
    nvme_free: float = math.inf
    fixed: Mapping[str, float] = field(default_factory=dict)  # shares that are given


@dataclass(frozen=True)
class Solution:
    """The best shares, and the seconds that the linear program gives them."""

    host: float
    device_update: float
    param_device: float
    seconds: float


def solve(problem: Problem) -> Solution | None:
    """Return the shares with the shortest step; None if memory holds none.

    Invariant:   deterministic; milliseconds
    """
    from scipy.optimize import linprog  # takes longer to import than to solve

    rows, limits = [], []
    for number, name in enumerate(PHASES):
        for row in _phases(problem)[name]:
            rows.append([*row[1:], *(-1.0 if number == i else 0.0 for i in range(len(PHASES)))])
            limits.append(-row[0])
    for row, free in _memory(problem):
        if math.isfinite(free):
            size = max(1.0, *np.abs(row))  # the solver wants numbers near 1
            rows.append([*(row[1:] / size), 0.0, 0.0, 0.0])
            limits.append((free - row[0]) / size)
    # Of equally fast shares those that move least: what stays counts as a little time saved.
    little = 1e-6 * max(problem.forward_s + problem.backward_s, 1e-3)
    bounds = [_bounds(problem, name) for name in SHARES] + [(0.0, None)] * len(PHASES)
    found = linprog([-little, little, -little, 1, 1, 1], A_ub=rows, b_ub=limits, bounds=bounds, method="highs")
    if not found.success:
        return None
    host, update, param, *times = (float(value) for value in found.x)
    return Solution(_clip(host), _clip(update), _clip(param), sum(times))


def _clip(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def _bounds(problem: Problem, name: str) -> tuple[float, float | None]:
    if name in problem.fixed:
        return problem.fixed[name], problem.fixed[name]
    free = {
        "host": problem.state_tier == "nvme",
        "device_update": problem.state_tier != "device",
        "param_device": problem.param_tier != "device",
    }
    return (0.0, 1.0) if free[name] else (0.0, 0.0)


def _phases(p: Problem) -> dict[str, list[Row]]:
    """Return by phase the rows whose largest is its time."""
    rates, size, grads, states = p.rates, p.params * p.param_bytes, p.params * p.reduce_bytes, p.params * p.state_bytes
    none = 0 * ONE
    fetched = size * p.fetches / 2 * (ONE - PARAM) if p.param_tier != "device" else none
    read = fetched if p.param_tier == "nvme" else none
    # Records that the device updates go there and back. Otherwise gradients come down and new parameters go up.
    up, down = states * UPDATE, states * UPDATE
    up = up + size * ((ONE - UPDATE) if p.param_tier == "device" else PARAM)
    leaving = grads * (ONE if p.gradients_leave else ONE - UPDATE)
    up = up + (grads * UPDATE if p.gradients_leave else none)
    files = states * (ONE - HOST) if p.state_tier == "nvme" else none
    written = files + (size * (ONE - PARAM) if p.param_tier == "nvme" else none)
    device_s = p.params / rates.device_update if rates.device_update else 0.0
    update = [p.params * rates.cpu_s_per_element * (ONE - UPDATE), device_s * UPDATE]
    if rates.host_memory:
        dram = UPDATE_DRAM_BYTES * ONE + (STREAMED_DRAM_BYTES - UPDATE_DRAM_BYTES) * UPDATE
        update.append(p.params / rates.host_memory * dram)
    forward = [p.forward_s * ONE, fetched / rates.alone("h2d"), read / rates.alone("file read")]
    backward = [p.backward_s * ONE]
    if p.in_backward:
        backward += update
        backward += _link(rates, "h2d", "d2h", up + fetched, down + leaving)
        backward += _link(rates, "file read", "file write", files + read, written)
        return {"forward": forward, "backward": backward, "update": []}
    backward += [*_link(rates, "h2d", "d2h", fetched, leaving if p.gradients_leave else none), forward[2]]
    update += _link(rates, "h2d", "d2h", up, down if p.gradients_leave else down + leaving)
    update += _link(rates, "file read", "file write", files, written)
    return {"forward": forward, "backward": backward, "update": update}


def _link(rates: Rates, one: str, other: str, there: Row, back: Row) -> list[Row]:
    """Return what a link of two directions takes: each alone, and both at their joint rate."""
    both = rates.together(one) + rates.together(other)
    return [there / rates.alone(one), back / rates.alone(other), (there + back) / both]


def _memory(p: Problem) -> list[tuple[Row, float]]:
    """Return by tier what the shares take of it, and what is free."""
    states, size = p.params * p.state_bytes * p.slots, p.params * p.param_bytes
    device = size * PARAM if p.param_tier != "device" else 0 * ONE
    host, nvme = 0 * ONE, 0 * ONE
    if p.state_tier == "nvme":
        host, nvme = host + states * HOST, nvme + states * (ONE - HOST)
    elif p.state_tier == "host":
        host = host + states * ONE
    if p.param_tier == "host":
        host = host + size * (ONE - PARAM)
    elif p.param_tier == "nvme":
        nvme = nvme + size * (ONE - PARAM)
    return [(device, p.device_free), (host, p.host_free), (nvme, p.nvme_free)]
