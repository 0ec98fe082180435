"""Vocabulary passes of a schedule: which there are, and how far they may run ahead or behind.

Every rank scores its shard after the last stage's forward (S), forms its weight gradient (T), looks its rows of the
embedding up before the first stage's forward (EF) and adds up their gradients after its backward (EB).
Must not know: durations, where forwards and backwards stand.
Source: Yeung et al. 2024, arXiv:2411.05288, sections 4 and 5, appendix C.
Differs:     the passes are placed by letting them run (arrange.py) instead of at fixed offsets of the block
"""

from __future__ import annotations

from windlass.parallel.pipeline.action import Action
from windlass.parallel.pipeline.schedule import Layout

# Repetitions of the block between the last stage's forward and its backward, by algorithm: one per exchange between
# all ranks. Algorithm 1 exchanges statistics and then partial gradients, algorithm 2 both at once.
GAP = {0: 0, 1: 2, 2: 1}

# Micro-batches by which lookups run ahead and scatters behind: what the first stage holds of them stays this small,
# and nobody waits for the transfer.
_LOOKUPS_AHEAD = 2
_SCATTERS_BEHIND = 1

# Algorithm 2 keeps the scores of at most this many micro-batches until the weight gradient is formed.
_SCORES_KEPT = 2


def vocabulary_passes(layout: Layout, num_micro_batches: int, *, forward_only: bool = False) -> list[list[Action]]:
    """Return the vocabulary passes of every rank, in no particular order."""
    kinds = () if not layout.vocab else ("EF", "S") if forward_only else ("EF", "S", "T", "EB")
    return [
        [Action(rank, kind, m) for kind in kinds for m in range(num_micro_batches)] for rank in range(layout.num_ranks)
    ]


def vocabulary_order(layout: Layout, num_micro_batches: int, gradient: str) -> dict[Action, list[Action]]:
    """Return what a vocabulary pass comes after, beyond the data it needs.

    `gradient` is the kind that makes the gradient of the first stage's input; empty if the schedule has forwards only.
    """
    after: dict[Action, list[Action]] = {}
    if not layout.vocab:
        return after
    for rank in range(layout.num_ranks):
        for m in range(_LOOKUPS_AHEAD, num_micro_batches):
            after[Action(rank, "EF", m)] = [Action(0, "F", m - _LOOKUPS_AHEAD)]
        if not gradient:
            continue
        for m in range(num_micro_batches - _SCATTERS_BEHIND):
            after[Action(rank, "EB", m)] = [Action(0, gradient, m + _SCATTERS_BEHIND)]
        for m in range(_SCORES_KEPT, num_micro_batches):
            after[Action(rank, "S", m)] = [Action(rank, "T", m - _SCORES_KEPT)]
    return after
