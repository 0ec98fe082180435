"""The order of forwards and backwards on every rank, for each family of schedules: what the rest is placed around.

A block is the pattern of one micro-batch, repeated for all of them; `gap` moves every backward that many repetitions
back, which opens the time between the last stage's forward and its backward in which the vocabulary passes run.
Forwards and backwards only: B stands for I in schedules that split the backward.
Must not know: durations, vocabulary passes, weight gradients.
"""

from __future__ import annotations

from collections import Counter

from windlass.parallel.pipeline.action import Action

Rows = list[list[Action]]


def gpipe(num_ranks: int, num_micro_batches: int, gap: int) -> Rows:
    """Run all forwards, then all backwards, which leaves room for any gap.

    Source:  Huang et al. 2019, arXiv:1811.06965
    """
    return [[Action(rank, kind, m) for kind in "FB" for m in range(num_micro_batches)] for rank in range(num_ranks)]


def one_f_one_b(num_ranks: int, num_micro_batches: int, gap: int) -> Rows:
    """Alternate after as many forwards as there are stages from here to the end, plus `gap`.

    Source:  Narayanan et al. 2019, arXiv:1806.03377
    """
    order = range(num_micro_batches)
    return [
        _alternate(
            [Action(rank, "F", m) for m in order], [Action(rank, "B", m) for m in order], num_ranks - rank - 1 + gap
        )
        for rank in range(num_ranks)
    ]


def interleaved(num_ranks: int, num_micro_batches: int, gap: int, chunks: int) -> Rows:
    """Give every rank `chunks` stages and take the micro-batches in groups, through one stage after the other.

    Groups hold at least as many micro-batches as there are ranks (if there are so many), or a group would return to
    rank 0 before it has left it; the larger ones come first, because the warm-up has to cover the largest. Forwards of
    the last stage come group by group, so that the gap counts forwards of one stage, not whole micro-batches.

    Source:  Narayanan et al. 2021, arXiv:2104.04473, section 2.2
    Differs: the number of micro-batches need not be a multiple of the ranks
    """
    num_groups = max(1, num_micro_batches // num_ranks)
    whole, larger = divmod(num_micro_batches, num_groups)
    forward: list[tuple[int, int]] = []  # chunk, micro-batch
    backward: list[tuple[int, int]] = []
    first = 0
    for group in range(num_groups):
        members = range(first, first + whole + (group < larger))
        first = members.stop
        forward += [(chunk, m) for chunk in range(chunks) for m in members]
        backward += [(chunk, m) for chunk in reversed(range(chunks)) for m in members]
    largest = whole + (larger > 0)
    return [
        _alternate(
            [Action(chunk * num_ranks + rank, "F", m) for chunk, m in forward],
            [Action(chunk * num_ranks + rank, "B", m) for chunk, m in backward],
            2 * (num_ranks - rank - 1) + (chunks - 1) * largest + gap,
        )
        for rank in range(num_ranks)
    ]


def zero_bubble_v(num_ranks: int, num_micro_batches: int, gap: int) -> Rows:
    """Fill the pipeline with 2 p stage activations per rank, so that weight gradients can fill all its bubbles.

    The order is written for as many micro-batches as fill the pipeline; those that do not exist are left out.

    Source:  Qi et al. 2023, arXiv:2401.10241, section 6; phases as in torch.distributed.pipelining
    """
    rows = []
    for rank in range(num_ranks):
        rest, number = num_ranks - rank, max(2 * num_ranks - 1, num_micro_batches + gap)
        early, late = rank, 2 * num_ranks - 1 - rank
        warm_up = (
            [(early, "F")] * (2 * rest - 1) + [(late, "F"), (early, "F")] * rank + [(late, "F"), (late, "B")] * rest
        )
        steady = [(early, "F"), (early, "B"), (late, "F"), (late, "B")] * (number - num_ranks)
        cool_down = [(early, "B"), (late, "B")] * rank + [(early, "B")] * rest
        count: Counter[tuple[int, str]] = Counter()
        row = []
        for stage, kind in warm_up + steady + cool_down:
            m = count[stage, kind] - (gap if kind == "B" else 0)
            count[stage, kind] += 1
            if 0 <= m < num_micro_batches:
                row.append(Action(stage, kind, m))
        rows.append(row)
    return rows


def v_half(num_ranks: int, num_micro_batches: int, gap: int) -> Rows:
    """Keep half of 1F1B's activations, equally many on every rank: early stages two steps apart, late ones one step.

    The times are those of a block in which F, I and W take one step each and a micro-batch six; they do not collide
    because a whole number of micro-batches, or three steps if the number of ranks is even, lies between the last
    stage's forward and its backward.

    Source:  Qi et al. 2024, arXiv:2405.15362, section 4
    """
    step = 6
    turn = (0 if num_ranks % 2 else 3) + gap * step
    rows = []
    for rank in range(num_ranks):
        early, late = rank, 2 * num_ranks - 1 - rank
        block = (
            (2 * rank, early, "F"),
            (3 * num_ranks - rank - 2, late, "F"),
            (3 * num_ranks + turn + 2 * rank - 1, late, "B"),
            (6 * num_ranks + turn - rank - 2, early, "B"),
        )
        timed = [(at + step * m, Action(stage, kind, m)) for m in range(num_micro_batches) for at, stage, kind in block]
        rows.append([action for _, action in sorted(timed)])
    return rows


def _alternate(forward: list[Action], backward: list[Action], ahead: int) -> list[Action]:
    """Run one forward, one backward, and so on after the first `ahead` forwards."""
    row = forward[:ahead]
    for i, action in enumerate(backward):
        row += [*forward[ahead + i : ahead + i + 1], action]
    return row
