"""The plan of a pipeline: its schedule, which blocks and vocabulary rows are where, and what was simulated of a step.

Must not know: how it was found, modules, tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.schedule import Schedule
from windlass.parallel.units import RankShare, StageSpan
from windlass.parallel.vocab.shard import VocabShard

IDLE_GOAL = 0.1


@dataclass(frozen=True)
class PipelinePlan:
    """How the ranks of a pipeline share a model, and what each does in one step.

    `schedule` has its communication written out; `lowering` is what was given to `lower` for that. `blocks` is
    [first, last) per stage, `shards` the vocabulary rows per rank (empty: not cut). The rest was simulated with these
    `costs`: seconds of a step (or forwards of a mean block, if not `in_seconds`), per rank the idle share, the stage
    activations in flight and the bytes at the peak.
    """

    schedule: Schedule
    blocks: tuple[tuple[int, int], ...]
    shards: tuple[VocabShard, ...]
    tied: bool
    vocab_chunk: int
    lowering: Mapping[str, Any]
    why: str
    costs: Costs
    in_seconds: bool
    step_s: float
    idle: tuple[float, ...]
    in_flight: tuple[int, ...]
    peak_bytes: tuple[float, ...]

    @property
    def num_ranks(self) -> int:
        return self.schedule.layout.num_ranks

    @property
    def label(self) -> str:
        """Say which schedule it is, in words."""
        vocab = self.schedule.layout.vocab
        return f"{self.schedule.name} " + (
            f"with vocabulary algorithm {vocab}" if vocab else "without vocabulary passes"
        )

    @property
    def mean_idle(self) -> float:
        return sum(self.idle) / len(self.idle)

    def share(self, rank: int) -> RankShare:
        """Return what one pipeline rank holds."""
        layout, last = self.schedule.layout, len(self.blocks) - 1
        spans = tuple(StageSpan(s, *self.blocks[s], s == 0, s == last) for s in layout.stages_of(rank))
        ends = {layout.embed_rank, layout.head_rank}
        copied = self.tied and not self.shards and len(ends) == 2 and rank in ends
        return RankShare(spans, self.shards[rank] if self.shards else None, copied)

    def activations_in_flight(self, rank: int) -> float:
        """Return the most micro-batches whose activations a rank holds, each over all of its stages."""
        return self.in_flight[rank] / len(self.schedule.layout.stages_of(rank))

    def seconds(self, num_micro_batches: int) -> float:
        """Return what a step takes with another number of them: each adds the work of the busiest rank."""
        return self.step_s + (num_micro_batches - self.schedule.num_micro_batches) * max(self._busy())

    def enough_micro_batches(self) -> int | None:
        """Return how many micro-batches would leave ranks idle for less than a tenth; None if no number does."""
        busy = self._busy()
        gain = sum(busy) / len(busy) - (1 - IDLE_GOAL) * max(busy)
        if gain <= 0:
            return None
        more = self.schedule.num_micro_batches + (self.mean_idle > IDLE_GOAL)
        return max(more, math.ceil((1 - IDLE_GOAL) * self.seconds(0) / gain))

    def _busy(self) -> list[float]:
        """Return what each rank computes for one micro-batch."""
        return [(1 - idle) * self.step_s / self.schedule.num_micro_batches for idle in self.idle]

    def as_json(self) -> dict[str, Any]:
        """Return plain data for JSON; the action lists are text, so that a difference can be named."""
        return {
            "schedule": self.schedule.to_json(),
            "blocks": [list(span) for span in self.blocks],
            "vocabulary": [[shard.low, shard.high, shard.padded] for shard in self.shards],
            "vocab_chunk": self.vocab_chunk,
            "why": f"{self.label}: {self.why}",
            "idle": [round(idle, 4) for idle in self.idle],
            "in_flight": list(self.in_flight),
        }
