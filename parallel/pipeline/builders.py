"""Schedules from their names: GPipe, 1F1B, interleaved 1F1B, ZB1P, ZBV and V-Half, each with and without vocabulary.

A builder is a placement of stages, an order of forwards and backwards (blocks.py) and, for the zero-bubble family, a
backward that is split; vocabulary passes and weight gradients are then put where they wait for nobody (arrange.py).
What comes out has compute actions only; passes.py writes the communication out.
Must not know: models, devices, how a schedule is run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline import blocks
from windlass.parallel.pipeline.action import Action
from windlass.parallel.pipeline.arrange import arrange
from windlass.parallel.pipeline.blocks import Rows
from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.schedule import Layout, Schedule
from windlass.parallel.pipeline.timeline import peak_in_flight
from windlass.parallel.pipeline.vocabulary import GAP, vocabulary_order, vocabulary_passes

After = dict[Action, list[Action]]


@dataclass(frozen=True)
class Builder:
    """What makes one family of schedules.

    `order` takes ranks, micro-batches, the gap and the stages per rank. `split`: backward as I and W. `turning`: the
    stages of a rank are far apart, so that before the first backward and after the last forward whatever is ready runs.
    `patient`: the head's weight gradient fills idle time; elsewhere it runs at once, because neighbours wait for each
    other in every step and would feel it come at different times.
    """

    order: Callable[[int, int, int, int], Rows]
    placement: Callable[[int, int], tuple[int, ...]]
    split: bool = False
    turning: bool = False
    patient: bool = True


def _line(num_ranks: int, chunks: int) -> tuple[int, ...]:
    return tuple(range(num_ranks))


def _rounds(num_ranks: int, chunks: int) -> tuple[int, ...]:
    return tuple(range(num_ranks)) * chunks


def _vee(num_ranks: int, chunks: int) -> tuple[int, ...]:
    return (*range(num_ranks), *reversed(range(num_ranks)))


BUILDERS: dict[str, Builder] = {
    "gpipe": Builder(lambda p, m, gap, chunks: blocks.gpipe(p, m, gap), _line, patient=False),
    "1f1b": Builder(lambda p, m, gap, chunks: blocks.one_f_one_b(p, m, gap), _line),
    "interleaved": Builder(blocks.interleaved, _rounds, patient=False),
    "zb1p": Builder(lambda p, m, gap, chunks: blocks.one_f_one_b(p, m, gap), _line, split=True),
    "zbv": Builder(lambda p, m, gap, chunks: blocks.zero_bubble_v(p, m, gap), _vee, split=True, turning=True),
    "vhalf": Builder(lambda p, m, gap, chunks: blocks.v_half(p, m, gap), _vee, split=True, turning=True),
}


def num_stages(name: str, num_ranks: int, chunks: int = 2) -> int:
    """Return how many stages a schedule has, without building it."""
    return num_ranks * chunks if name == "interleaved" else len(BUILDERS[name].placement(num_ranks, chunks))


def build(
    name: str, num_ranks: int, num_micro_batches: int, *, vocab: int = 0, chunks: int = 2, costs: Costs | None = None
) -> Schedule:
    """Build a schedule of compute actions: the same on every rank for the same arguments.

    `chunks` are the stages per rank of `interleaved`; the V-shaped schedules have two, the others one. Of `costs` only
    the ratios matter; they say where weight gradients and vocabulary passes fit, not the order of the rest. Without
    them the stages are alike and a head that is cut costs as much as one.

    Raises:  PlanError if there is no such schedule or a number is too small
    """
    if name not in BUILDERS:
        raise PlanError(f"there is no schedule '{name}'. There are {', '.join(BUILDERS)}, and files")
    for what, value, least in (
        ("pipeline ranks", num_ranks, 1),
        ("micro-batches", num_micro_batches, 1),
        ("stages per rank", chunks, 2 if name == "interleaved" else 1),
    ):
        if value < least:
            raise PlanError(f"schedule '{name}' of {value} {what}: it needs at least {least}")
    builder = BUILDERS[name]
    layout = Layout(num_ranks, builder.placement(num_ranks, chunks), vocab)
    rows = builder.order(num_ranks, num_micro_batches, GAP[vocab], chunks)
    schedule = _arrange_around(
        [[a._replace(kind="I") if builder.split and a.kind == "B" else a for a in row] for row in rows],
        Schedule(name, layout, num_micro_batches, ((),) * num_ranks),
        gradient="I" if builder.split else "B",
        turning=builder.turning,
        fillers="TW" if vocab == 2 and builder.patient else "W",
        costs=costs,
    )
    return replace(schedule, limits=tuple(map(peak_in_flight, schedule.ranks)))


def one_stage(num_micro_batches: int) -> Schedule:
    """Return the schedule without a pipeline: forward and backward of one micro-batch after the other."""
    row = tuple(Action(0, kind, m) for m in range(num_micro_batches) for kind in "FB")
    return Schedule("one_stage", Layout(1, (0,)), num_micro_batches, (row,), (1,))


def forward_only(layout: Layout, num_micro_batches: int, costs: Costs | None = None) -> Schedule:
    """Return the schedule of an evaluation: forwards, lookups and scores.

    A rank with several stages starts a micro-batch so much later that those it began before come by in between.
    """
    widest = max(len(layout.stages_of(rank)) for rank in range(layout.num_ranks))
    rows: Rows = [[] for _ in range(layout.num_ranks)]
    for _, stage, m in sorted(
        (stage + widest * m, stage, m) for stage in range(layout.num_stages) for m in range(num_micro_batches)
    ):
        rows[layout.stage_rank[stage]].append(Action(stage, "F", m))
    schedule = Schedule("forward_only", layout, num_micro_batches, ((),) * layout.num_ranks, forward_only=True)
    return _arrange_around(rows, schedule, gradient="", turning=False, fillers="", costs=costs)


def _arrange_around(
    rows: Rows, schedule: Schedule, *, gradient: str, turning: bool, fillers: str, costs: Costs | None
) -> Schedule:
    """Fill an empty schedule with these rows and what belongs to them: weight gradients of I, vocabulary passes."""
    layout, num_micro_batches = schedule.layout, schedule.num_micro_batches
    after: After = defaultdict(list, vocabulary_order(layout, num_micro_batches, gradient))
    _keep_order(rows, after, turning)
    _hold_activations(rows, after)
    weights = [[a._replace(kind="W") for a in row if a.kind == "I"] for row in rows]
    passes = vocabulary_passes(layout, num_micro_batches, forward_only=schedule.forward_only)
    everything = tuple((*row, *ws, *vs) for row, ws, vs in zip(rows, weights, passes, strict=True))
    return arrange(replace(schedule, ranks=everything), costs or _usual_costs(layout), after, fillers)


def _usual_costs(layout: Layout) -> Costs:
    """Return stages that are alike and a head that costs as much as one; exchanges between all ranks take a moment.

    The moment keeps passes of different ranks from being placed at one instant, where any delay makes somebody wait.
    """
    return Costs.uniform(layout, head=1.0, latency_s=0.02) if layout.vocab else Costs.uniform(layout)


def _keep_order(rows: Rows, after: After, turning: bool) -> None:
    """Make every action of a row wait for the one before it; in the free ends of a turning one, within its stage."""
    for row in rows:
        backwards = [i for i, action in enumerate(row) if action.kind != "F"]
        forwards = [i for i, action in enumerate(row) if action.kind == "F"]
        begin, end = (backwards[0], forwards[-1]) if turning else (0, len(row) - 1)
        last: dict[tuple[int, str], Action] = {}
        for i, action in enumerate(row):
            key = action.place, action.kind
            if begin < i <= end:
                after[action].append(row[i - 1])
            elif i == begin:
                after[action] += row[:i]
            else:
                after[action] += [last[key]] if key in last else []
                after[action] += [row[end]] if i > end else []
            last[key] = action


def _hold_activations(rows: Rows, after: After) -> None:
    """Make forwards wait for split-off weight gradients, so that no rank holds more than the order needs anywhere.

    Ranks that would need less keep weight gradients back for the time when they have nothing else to do.
    """
    limit = max(peak_in_flight(a._replace(kind="W") if a.kind == "I" else a for a in row) for row in rows)
    for row in rows:
        forwards = [action for action in row if action.kind == "F"]
        gradients = [action for action in row if action.kind == "I"]
        for forward, gradient in zip(forwards[limit:], gradients, strict=False):
            after[forward].append(gradient._replace(kind="W"))
