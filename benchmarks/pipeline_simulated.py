"""What the simulator says, for benchmarks/pipeline.py: idle shares, published gains, steps from measured parts.

Needs no processes but this one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ranks import ROOT
from rich import box
from rich.table import Table

from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.builders import build
from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.schedule import Layout, Schedule
from windlass.parallel.pipeline.simulate import simulate
from windlass.parallel.pipeline.timeline import Timeline

NUM_RANKS, NUM_MICRO_BATCHES = 8, 128
HEAD_TO_STAGE = (0.3, 0.6, 2.4)  # work of the head in stages
BARRIER_S = 0.3  # in forwards of a stage
POINTS = 0.01  # how much more than the ideal a rank may idle
GAIN = 0.15  # how far a simulated gain may be from the published one
LINKS = ("SEND_F", "SEND_B")


def simulated_1f1b(vocab: int, head: float, barrier_s: float = 0.0) -> Timeline:
    """Return a step of 1F1B whose stages' forward takes one second; `barrier_s` delays what vocabulary passes send."""
    layout = Layout(NUM_RANKS, tuple(range(NUM_RANKS)), vocab)
    costs = Costs.uniform(layout, head=head, latency_s=barrier_s)
    costs = replace(costs, message_bytes={k: size for k, size in costs.message_bytes.items() if k not in LINKS})
    return simulate(lower(build("1f1b", NUM_RANKS, NUM_MICRO_BATCHES, vocab=vocab, costs=costs)), costs)


def idle_table() -> tuple[Table, list[str]]:
    """Return the idle shares of 1F1B with and without vocabulary passes, and which are too large."""
    ideal = (NUM_RANKS - 1) / (NUM_MICRO_BATCHES + NUM_RANKS - 1)
    table = Table(
        "vocabulary",
        *(f"head = {head} stages" for head in HEAD_TO_STAGE),
        "in flight, first and last rank",
        title=f"simulated 1F1B, {NUM_RANKS} ranks, {NUM_MICRO_BATCHES} micro-batches: idle share of the idlest rank, "
        f"step relative to algorithm 2. Ideal {ideal:.3f}, goal at most {ideal + POINTS:.3f} with free barriers",
        box=box.MARKDOWN,
        title_justify="left",
    )
    problems = []
    best = {head: simulated_1f1b(2, head).total_s for head in HEAD_TO_STAGE}
    for name, vocab, barrier_s in (
        ("off", 0, 0.0),
        ("algorithm 1", 1, 0.0),
        ("algorithm 2", 2, 0.0),
        (f"algorithm 1, barriers of {BARRIER_S} forwards", 1, BARRIER_S),
        (f"algorithm 2, barriers of {BARRIER_S} forwards", 2, BARRIER_S),
    ):
        steps = {head: simulated_1f1b(vocab, head, barrier_s) for head in HEAD_TO_STAGE}
        held = next(iter(steps.values())).peak_in_flight
        cells = [f"{max(step.idle):.3f} ({step.total_s / best[head]:.2f} x)" for head, step in steps.items()]
        table.add_row(name, *cells, f"{held[0]}, {held[-1]}")
        problems += [
            f"simulated {name}: head of {head} stages: idle {max(step.idle):.3f}, goal {ideal + POINTS:.3f}"
            for head, step in steps.items()
            if vocab and not barrier_s and max(step.idle) > ideal + POINTS
        ]
    return table, problems


def published_table(*, with_v_half: bool) -> tuple[Table, list[str]]:
    """Return the gains of vocabulary parallelism that were published beside simulated ones, and which are far apart."""
    sys.path.append(str(ROOT))  # the tests are no part of the installed package
    from tests.published import FOUR_NODES, ONE_NODE, V_HALF, V_HALF_RANGE, simulated_gain

    table = Table(
        *("schedule", "GPUs", "vocabulary", "algorithm", "published gain", "simulated gain", "simulated / published"),
        title="arXiv:2411.05288, tables 5 and 6: times as fast as with the whole head on one rank. Goal: same "
        f"direction, within {GAIN:.0%}",
        box=box.MARKDOWN,
        title_justify="left",
    )
    rows = [
        ((case.schedule, f"{case.num_ranks}", f"{vocab // 1000}k", f"{n}"), gain, simulated_gain(case, vocab, n))
        for case in (ONE_NODE, FOUR_NODES)
        for vocab, n, gain in case.cases()
    ]
    if with_v_half:
        gains = [simulated_gain(case, vocab, 1) for case in V_HALF for vocab, _ in ONE_NODE.mfu]
        ends = zip(("smallest", "largest"), V_HALF_RANGE, (min(gains), max(gains)), strict=True)
        rows += [(("vhalf", "16 to 32", which, "1"), gain, simulated) for which, gain, simulated in ends]
    problems = []
    for what, gain, simulated in rows:
        table.add_row(*what, f"{gain:.2f}", f"{simulated:.2f}", f"{simulated / gain:.2f}")
        if abs(simulated / gain - 1) > GAIN or simulated < 1:
            problems.append(f"{' '.join(what)}: simulated gain {simulated:.2f}, published {gain:.2f}")
    return table, problems


# -- measured parts ----------------------------------------------------------------------------------------------------


def predicted_step_s(ranks: Sequence[dict[str, Any]]) -> float:
    """Return what a step takes by simulation, from what every rank measured of its own actions.

    Beside the schedule a step has work that no compute action holds: the copies of messages, reductions and the
    optimizer on the slowest rank, and the norm, in whose span all but the last rank also wait.
    """
    schedule = Schedule.from_json(ranks[0]["schedule"])
    total_s = simulate(schedule, measured_costs(schedule.layout, ranks)).total_s
    phases = [rank["phase_s"] for rank in ranks]
    around_s = max(phase["reduce"] + phase["step"] + phase["outside"] for phase in phases)
    moving_s = max(sum(seconds for name, seconds in rank["action_s"].items() if not _computes(name)) for rank in ranks)
    return float(total_s + moving_s + around_s + min(phase["norm"] for phase in phases))


def _computes(name: str) -> bool:
    return KINDS[Action.parse(name).kind].lane == "compute"


def measured_costs(layout: Layout, ranks: Sequence[dict[str, Any]]) -> Costs:
    """Return costs in which every kind of action takes the mean over micro-batches of what was measured."""
    taken: dict[tuple[int, str], list[float]] = {}
    for rank in ranks:
        for name, seconds in rank["action_s"].items():
            place, kind, _ = Action.parse(name)
            taken.setdefault((place, kind), []).append(seconds)
    means = {key: sum(seconds) / len(seconds) for key, seconds in taken.items()}

    def of(kind: str, count: int) -> tuple[float, ...]:
        return tuple(means.get((place, kind), 0.0) for place in range(count))

    def part_of_backward(kind: str) -> tuple[float, ...]:
        return tuple(means.get((stage, kind), means.get((stage, "B"), 0.0) / 2) for stage in range(layout.num_stages))

    per_stage, per_rank = (0.0,) * layout.num_stages, (0.0,) * layout.num_ranks
    return Costs(
        forward_s=of("F", layout.num_stages),
        input_gradient_s=part_of_backward("I"),
        weight_gradient_s=part_of_backward("W"),
        scores_s=of("S", layout.num_ranks),
        transposed_s=of("T", layout.num_ranks),
        lookup_s=of("EF", layout.num_ranks),
        scatter_s=of("EB", layout.num_ranks),
        activation_bytes=per_stage,
        recomputed_bytes=per_stage,
        scores_bytes=per_rank,
        resident_bytes=per_rank,
        gathered_bytes=per_stage,
        gathered_vocab_bytes=per_rank,
    )
