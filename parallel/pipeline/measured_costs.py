"""What the parts of a model took in a recorded step, in the place of what their FLOPs say.

    ModelCosts + the spans that ranks recorded  ->  ModelCosts in seconds

The walk records every part of a stage, the runner every action; waiting for peers inside of them is taken out. Bytes
stay as they are. What no rank recorded costs as much more, or less, than its FLOPs say as the blocks do.
Must not know: files, configurations, modules.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from windlass.dist.errors import PlanError
from windlass.dist.trace import Event
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.costs import Part
from windlass.parallel.pipeline.model_costs import ModelCosts, link
from windlass.parallel.pipeline.timeline import without_waits

# Blocks that differ by less are alike: then the difference is noise, and cuts of blocks that are alike are better where
# ranks have several stages.
NOISE = 0.1
HOW = "train with profiler.start_step=5 profiler.all_ranks=true profiler.operators=false"
BACKWARDS = ("backward", "input gradient", "weight gradient")

Taken = tuple[Event, float]  # a span and what it took itself, in seconds


@dataclass(frozen=True)
class Recording:
    """The spans of one rank, its share of the vocabulary (0: not cut) and its relative speed."""

    events: Sequence[Event]
    share: float = 0.0
    speed: float = 1.0


@dataclass(frozen=True)
class Recorded:
    """What the ranks of a run recorded, and how the run worked.

    `vocab` is the vocabulary algorithm, `streamed` says that T computes scores again, `recompute_every` that every n-th
    block is recomputed (0: none).
    """

    source: str
    ranks: Sequence[Recording]
    vocab: int = 0
    streamed: bool = False
    recompute_every: int = 0


def measured_costs(costs: ModelCosts, recorded: Recorded, *, bytes_per_s: float = 0.0) -> ModelCosts:
    """Replace the seconds of a model's parts by measured ones; a rate of 0 between ranks is not known.

    Raises: PlanError if no block was recorded
    """
    own = [(rank, list(own_seconds(rank.events))) for rank in recorded.ranks]
    parts, actions = _part_seconds(own), _action_seconds(own)
    inside = 0 if actions.get("R") else recorded.recompute_every  # or it is in actions of its own
    blocks = {
        i: _block(modelled, parts, f"blocks.{i}", rebuilt=bool(inside) and i % inside == 0)
        for i, modelled in enumerate(costs.blocks)
        if f"forward blocks.{i}" in parts
    }
    if not blocks:
        raise PlanError(
            f"pipeline.measured = '{recorded.source}': no rank recorded a block in a training step. Record one: {HOW}"
        )
    typical = Part(*(statistics.median(column) for column in zip(*map(_three, blocks.values()), strict=True)))
    if all(abs(_total(part) - _total(typical)) <= NOISE * _total(typical) for part in blocks.values()):
        blocks = {}
    measured = tuple(_timed(part, blocks.get(i, typical)) for i, part in enumerate(costs.blocks))
    slower = sum(map(_total, measured)) / sum(map(_total, costs.blocks))
    forward_s = statistics.fmean(part.forward_s for part in measured)
    latency_s, rate = link(costs.hidden_bytes, forward_s, bytes_per_s)
    return replace(
        costs,
        blocks=measured,
        head=_timed(costs.head, _head(recorded, parts, actions) or slower * costs.head),
        embedding=_timed(costs.embedding, _embedding(recorded, parts, actions) or slower * costs.embedding),
        latency_s=latency_s,
        bytes_per_s=rate,
        in_seconds=True,
        source=recorded.source,
    )


def own_seconds(events: Sequence[Event]) -> Iterator[Taken]:
    """Yield every part and compute action of training steps with what it took itself, without waiting for peers."""
    steps = [(event.start_s, event.start_s + event.duration_s) for event in events if event.lane == "step"]
    for event, seconds in without_waits(events):
        if event.lane in ("parts", "compute") and any(first <= event.start_s < last for first, last in steps):
            yield event, seconds


def _part_seconds(own: Iterable[tuple[Recording, list[Taken]]]) -> dict[str, float]:
    """Return the median of every part, as on a rank of speed 1."""
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for rank, spans in own:
        for event, seconds in spans:
            if event.lane == "parts":
                taken[event.name].append(seconds * rank.speed)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _action_seconds(own: Iterable[tuple[Recording, list[Taken]]]) -> dict[str, float]:
    """Return what the actions of one rank take for a micro-batch and the whole vocabulary, by kind.

    Medians of the ranks are added up before they are scaled, because lookups are not spread evenly.
    """
    whole: defaultdict[str, float] = defaultdict(float)
    shares: defaultdict[str, float] = defaultdict(float)
    for rank, spans in own:
        taken: defaultdict[str, list[float]] = defaultdict(list)
        for event, seconds in spans:
            if "action" in event.args and event.lane == "compute":
                taken[Action.parse(event.name).kind].append(seconds * rank.speed)
        for kind, samples in taken.items():
            whole[kind] += statistics.median(samples)
            shares[kind] += rank.share if KINDS[kind].place == "rank" else 1.0
    return {kind: seconds / shares[kind] for kind, seconds in whole.items() if shares[kind]}


def _block(modelled: Part, parts: Mapping[str, float], name: str, *, rebuilt: bool) -> Part:
    """Return the seconds of one block. If nothing up to it is trained, it has no backward."""
    forward_s = parts[f"forward {name}"]
    whole_s, input_s, weight_s = (parts.get(f"{words} {name}", 0.0) for words in BACKWARDS)
    again_s = forward_s if rebuilt else 0.0
    both = modelled.input_gradient_s + modelled.weight_gradient_s
    split = modelled.input_gradient_s / both if both else 0.0
    whole_s, input_s = max(0.0, whole_s - again_s), max(0.0, input_s - again_s)
    return Part(forward_s, input_s + split * whole_s, weight_s + (1 - split) * whole_s)


def _head(recorded: Recorded, parts: Mapping[str, float], actions: Mapping[str, float]) -> Part | None:
    """Return the seconds of the head over the whole vocabulary, in three passes; None if nobody recorded it.

    Passes that were recorded as one are products of the same size.
    """
    if recorded.vocab:
        if "S" not in actions or "T" not in actions:
            return None
        early = recorded.vocab == 2  # S forms the input gradient
        scores_s = actions["S"] / (2 if early else 1)
        later_s = max(0.0, actions["T"] - recorded.streamed * scores_s)
        return Part(scores_s, scores_s, later_s) if early else Part(scores_s, later_s / 2, later_s / 2)
    if "forward head" not in parts:
        return None
    third = sum(parts.get(f"{words} head", 0.0) for words in ("forward", *BACKWARDS)) / 3
    return Part(third, third, third)


def _embedding(recorded: Recorded, parts: Mapping[str, float], actions: Mapping[str, float]) -> Part | None:
    """Return the seconds of the embedding over the whole vocabulary; None if nobody recorded it."""
    if recorded.vocab:
        return Part(actions["EF"], 0.0, actions["EB"]) if "EF" in actions and "EB" in actions else None
    if "forward embed" not in parts:
        return None
    return Part(parts["forward embed"], 0.0, sum(parts.get(f"{words} embed", 0.0) for words in BACKWARDS))


def _three(part: Part) -> tuple[float, float, float]:
    return part.forward_s, part.input_gradient_s, part.weight_gradient_s


def _total(part: Part) -> float:
    return sum(_three(part))


def _timed(part: Part, seconds: Part) -> Part:
    """Return a part with the seconds of another one, and its own bytes."""
    return Part(*_three(seconds), part.activation_bytes, part.parameter_bytes)
