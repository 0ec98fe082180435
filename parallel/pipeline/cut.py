"""The stage cut: which contiguous blocks form which stage, so that the slowest rank is as quick as it can be.

Two exact methods. Blocks that are all alike are dealt out one by one to whoever would then finish first; this works
for any placement of stages on ranks, because only the number of blocks on a rank matters. Blocks that differ are cut by
dynamic programming over the boundaries; with several stages per rank it minimises the slowest stage, not the slowest
rank, and each stage may fill an equal part of its rank's memory.
Must not know: schedules, models, where the costs come from.
Differs:     Holmes (arXiv:2312.03549) rounds shares in proportion to speed; here the optimum is found, under memory
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from windlass.dist.errors import PlanError


@dataclass(frozen=True)
class Blocks:
    """What each block costs, first to last.

    Units:  seconds of forward and backward of one micro-batch at speed 1; bytes that stay; bytes per micro-batch in
            flight
    """

    seconds: tuple[float, ...]
    state_bytes: tuple[int, ...]
    activation_bytes: tuple[int, ...]

    @property
    def alike(self) -> bool:
        return all(len(set(costs)) == 1 for costs in (self.seconds, self.state_bytes, self.activation_bytes))


@dataclass(frozen=True)
class Room:
    """One stage before it has blocks: the rank it is on and what it holds anyway (embedding, head, vocabulary rows).

    Units:  seconds at speed 1; bytes; `in_flight` micro-batches whose activations exist at one time at most
    """

    rank: int
    speed: float = 1.0
    fixed_s: float = 0.0
    fixed_bytes: int = 0
    in_flight: float = 1.0


def cut_blocks(blocks: Blocks, rooms: Sequence[Room], limit_bytes: float = math.inf) -> tuple[int, ...]:
    """Return the number of blocks of every stage, at least one each.

    Raises: PlanError if there are more stages than blocks, or no cut leaves every rank within `limit_bytes`
    """
    num_blocks = len(blocks.seconds)
    if len(rooms) > num_blocks:
        raise PlanError(
            f"{len(rooms)} stages for {num_blocks} blocks: every stage needs a block. Use at most {num_blocks} stages"
        )
    counts = (_deal if blocks.alike else _partition)(blocks, rooms, limit_bytes)
    if counts is None:
        quickest = cut_blocks(blocks, rooms)
        worst = max(rank_bytes(blocks, rooms, quickest).items(), key=lambda item: item[1])
        raise PlanError(
            f"no cut of {num_blocks} blocks into {len(rooms)} stages leaves every rank within "
            f"{limit_bytes / 1e9:.3g} GB: the quickest puts {worst[1] / 1e9:.3g} GB on pipeline rank {worst[0]}"
        )
    return counts


def rank_bytes(blocks: Blocks, rooms: Sequence[Room], counts: Sequence[int]) -> dict[int, float]:
    """Return what each rank holds at most under a cut."""
    held = dict.fromkeys(sorted({room.rank for room in rooms}), 0.0)
    for room, (first, last) in zip(rooms, ranges(counts), strict=True):
        activations = sum(blocks.activation_bytes[first:last]) * room.in_flight
        held[room.rank] += sum(blocks.state_bytes[first:last]) + activations + room.fixed_bytes
    return held


def ranges(counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return [first, last) of every stage."""
    return tuple(pairwise(accumulate(counts, initial=0)))


def _deal(blocks: Blocks, rooms: Sequence[Room], limit_bytes: float) -> tuple[int, ...] | None:
    """Deal equal blocks to the rank, and there to the stage, that would finish first with one more.

    Giving to the one with the least resulting time is optimal because times only grow, and independently of the others.
    """
    second, more_bytes = (
        blocks.seconds[0],
        [blocks.state_bytes[0] + blocks.activation_bytes[0] * room.in_flight for room in rooms],
    )
    counts = [1] * len(rooms)
    used = rank_bytes(blocks, rooms, counts)
    if max(used.values()) > limit_bytes:
        return None
    fixed_s = {rank: sum(room.fixed_s for room in rooms if room.rank == rank) for rank in used}
    dealt = Counter(room.rank for room in rooms)

    def after(stage: int) -> tuple[float, float, float]:
        """Return when the rank, and when the stage, would finish; among equals those with fewer activations first."""
        room = rooms[stage]
        rank_s = ((dealt[room.rank] + 1) * second + fixed_s[room.rank]) / room.speed
        return rank_s, room.in_flight, (counts[stage] + 1) * second + room.fixed_s

    for _ in range(len(blocks.seconds) - len(rooms)):
        fitting = [s for s, room in enumerate(rooms) if used[room.rank] + more_bytes[s] <= limit_bytes]
        if not fitting:
            return None
        stage = min(fitting, key=after)
        counts[stage] += 1
        dealt[rooms[stage].rank] += 1
        used[rooms[stage].rank] += more_bytes[stage]
    return tuple(counts)


def _partition(blocks: Blocks, rooms: Sequence[Room], limit_bytes: float) -> tuple[int, ...] | None:
    """Find the least possible time of the slowest stage, then among those cuts the most even one."""
    num_blocks, stages_on = len(blocks.seconds), [sum(r.rank == room.rank for r in rooms) for room in rooms]
    seconds, states, activations = (
        tuple(accumulate(costs, initial=0)) for costs in (blocks.seconds, blocks.state_bytes, blocks.activation_bytes)
    )

    def time(stage: int, first: int, last: int) -> float:
        room = rooms[stage]
        held = states[last] - states[first] + (activations[last] - activations[first]) * room.in_flight
        if held + room.fixed_bytes > limit_bytes / stages_on[stage]:
            return math.inf
        return (seconds[last] - seconds[first] + room.fixed_s) / room.speed

    def best(add: bool, most: float) -> tuple[float, tuple[int, ...]]:
        """Return the cost of the best cut, the sum of squares of its times or their maximum, and its boundaries."""
        costs = [0.0] + [math.inf] * num_blocks
        came: list[list[int]] = []
        for stage in range(len(rooms)):
            after, chosen = [math.inf] * (num_blocks + 1), [0] * (num_blocks + 1)
            for last in range(stage + 1, num_blocks - (len(rooms) - stage - 1) + 1):
                for first in range(last - 1, stage - 1, -1):
                    t = time(stage, first, last)
                    if t > most:
                        break
                    cost = costs[first] + t * t if add else max(costs[first], t)
                    if cost < after[last]:
                        after[last], chosen[last] = cost, first
            costs = after
            came.append(chosen)
        bounds = [num_blocks]
        for chosen in reversed(came):
            bounds.append(chosen[bounds[-1]])
        return costs[num_blocks], tuple(reversed(bounds))

    slowest, _ = best(add=False, most=sys.float_info.max)
    if math.isinf(slowest):
        return None
    _, bounds = best(add=True, most=slowest)
    return tuple(last - first for first, last in pairwise(bounds))
