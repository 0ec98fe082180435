"""What the ranks of a planned pipeline hold between forward and backward, and what they receive from each other.

Must not know: how the plan was found, devices, the data-parallel ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from windlass.parallel.footprint import HeldPart
from windlass.parallel.memory import Transfer
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.planned import PipelinePlan
from windlass.parallel.pipeline.simulate import simulate


@dataclass(frozen=True)
class RankActivations:
    """Units: bytes of activations and messages that wait, and while one part runs; `contexts` in use at one time."""

    kept: int
    workspace: int
    contexts: int


def plan_activations(
    plan: PipelinePlan, parts: Sequence[HeldPart], *, tokens: int, itemsize: int, exact: int
) -> list[RankActivations]:
    """Return what each rank holds at most; `parts` are those of the whole model, from embedding to head.

    Units:  `tokens` of one micro-batch; `itemsize` and `exact` are bytes of an element in compute and in sums
    """
    layout, hidden = plan.schedule.layout, plan.costs.message_bytes["SEND_F"][0]
    blocks, cut = parts[1:-1], bool(plan.shards)
    stages: list[list[HeldPart]] = [list(blocks[first:last]) for first, last in plan.blocks]
    if cut:  # what is left of embedding and head gives out hidden states and keeps no more
        ends = HeldPart(int(hidden), 0, int(hidden))
        stages[0].insert(0, ends)
        stages[-1].append(ends)
    else:
        stages[0].insert(0, parts[0])
        stages[-1].append(parts[-1])
    exactly = replace(
        plan.costs,
        activation_bytes=tuple(float(sum(part.kept for part in stage)) for stage in stages),
        recomputed_bytes=tuple(float(sum(part.rebuilt for part in stage)) for stage in stages),
        resident_bytes=(0.0,) * plan.num_ranks,
        gathered_bytes=(0.0,) * len(stages),
        gathered_vocab_bytes=(0.0,) * plan.num_ranks,
    )
    peaks = simulate(plan.schedule, exactly).peak_bytes
    found = []
    for rank, peak in enumerate(peaks):
        workspace = max(part.workspace for stage in layout.stages_of(rank) for part in stages[stage])
        if cut:
            workspace = max(workspace, _shard_workspace(plan, rank, tokens, itemsize, exact))
        found.append(RankActivations(int(peak), workspace, _under_way(plan.schedule.ranks[rank])))
    return found


def _shard_workspace(plan: PipelinePlan, rank: int, tokens: int, itemsize: int, exact: int) -> int:
    """Return what S and T need while they run: scores that are not kept, and the gradient of the shard's rows."""
    num_rows = plan.shards[rank].padded
    width = int(plan.costs.message_bytes["SEND_F"][0]) // (tokens * itemsize)
    scores = 0 if not plan.vocab_chunk and itemsize == exact else tokens * min(plan.vocab_chunk or num_rows, num_rows)
    return scores * (exact + (itemsize if itemsize < exact else 0)) + num_rows * width * exact


def _under_way(actions: Sequence[Action]) -> int:
    """Return the most micro-batches between the first and the last action that names them."""
    numbers = [a.number for a in actions if not KINDS[a.kind].ordinal]
    last = {number: i for i, number in enumerate(numbers)}
    most, open_numbers = 0, set()
    for i, number in enumerate(numbers):
        open_numbers.add(number)
        most = max(most, len(open_numbers))
        if last[number] == i:
            open_numbers.discard(number)
    return most


def plan_messages(plan: PipelinePlan, rank: int, itemsize: int) -> list[Transfer]:
    """Return what a rank receives from its pipeline in one step, if tokens are spread evenly over rows."""
    layout, sizes, p = plan.schedule.layout, plan.costs.message_bytes, plan.num_ranks
    hidden = sizes["SEND_F"][0]
    counts = Counter(action.kind for action in plan.schedule.ranks[rank])
    total = sum(shard.num_rows for shard in plan.shards)
    share = plan.shards[rank].num_rows / total if plan.shards else 0.0
    at_head, at_embed = rank == layout.head_rank, rank == layout.embed_rank
    received = {
        "RECV_F": hidden,
        "RECV_B": hidden,
        "X": 0.0 if at_head else hidden,
        "STATS": (p - 1) * sizes["STATS"][rank],
        # Algorithm 2 sends the rows of the labels apart.
        "DX": (p - 1 + (layout.vocab == 2) * (1 - share)) * hidden if at_head else 0.0,
        "ROWS": (1 - share) * hidden if at_embed else 0.0,
        "DROWS": 0.0 if at_embed else share * hidden,
    }
    rows = []
    for kind, size in received.items():
        if num_bytes := int(counts[kind] * size):
            name = kind.removeprefix("RECV_")
            found = (counts[kind], num_bytes // itemsize, num_bytes, num_bytes)
            rows.append(Transfer(f"pp {name}", "receive", f"pipeline {name}", *found))
    return rows
