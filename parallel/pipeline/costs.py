"""What the actions of a schedule cost: seconds of compute, bytes on the wire, bytes that stay in memory.

A simulation needs nothing else about the model. Costs are measured (then the tuples are filled directly), added up from
the parts of a model (`from_parts`), or plain units for looking at a schedule (`uniform`).
Must not know: the order of actions, tensors, how costs are measured.
Source: FLOPs and bytes of `transformer_parts`: Yeung et al. 2024, arXiv:2411.05288, table 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import Action
from windlass.parallel.pipeline.schedule import Layout

PerPlace = tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """What a piece of the model costs for one micro-batch on a rank of speed 1. Parts add up: `4 * block + norm`.

    Units:  seconds, bytes. `activation_bytes` is what the backward needs, `parameter_bytes` compute parameters.
    """

    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float
    activation_bytes: float = 0.0
    parameter_bytes: float = 0.0

    def __add__(self, other: Part) -> Part:
        return Part(*(getattr(self, name) + getattr(other, name) for name in Part.__dataclass_fields__))

    def __mul__(self, factor: float) -> Part:
        return Part(*(getattr(self, name) * factor for name in Part.__dataclass_fields__))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Costs:
    """Seconds, message sizes and memory of every action. Tuples are indexed by stage or by rank, as the action's kind.

    `freed_by_input_gradient` is the share of a stage's activations that is dropped after I already. `recomputed_bytes`
    are the activations that R rebuilds; `activation_bytes` those kept from the forward on. `message_bytes` maps a
    communication kind to the bytes of one action of each stage or rank; `gathered_bytes` and `gathered_vocab_bytes` are
    what a stage's and a shard's gathered parameters occupy, `scores_bytes` what S keeps for T, `resident_bytes` what a
    rank holds all the time. A message of no bytes takes no time, any other `latency_s` + bytes / `bytes_per_s`.

    Units:  seconds, bytes
    """

    forward_s: PerPlace
    input_gradient_s: PerPlace
    weight_gradient_s: PerPlace
    scores_s: PerPlace
    transposed_s: PerPlace
    lookup_s: PerPlace
    scatter_s: PerPlace
    activation_bytes: PerPlace
    recomputed_bytes: PerPlace
    scores_bytes: PerPlace
    resident_bytes: PerPlace
    gathered_bytes: PerPlace
    gathered_vocab_bytes: PerPlace
    freed_by_input_gradient: float = 0.5
    message_bytes: Mapping[str, PerPlace] = field(default_factory=dict)
    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    @cached_property
    def _seconds(self) -> dict[str, PerPlace]:
        return {
            "F": self.forward_s,
            "R": self.forward_s,
            "I": self.input_gradient_s,
            "W": self.weight_gradient_s,
            "B": tuple(map(sum, zip(self.input_gradient_s, self.weight_gradient_s, strict=True))),
            "S": self.scores_s,
            "T": self.transposed_s,
            "EF": self.lookup_s,
            "EB": self.scatter_s,
        }

    def seconds(self, action: Action) -> float:
        """Return how long a compute action takes."""
        return self._seconds[action.kind][action.place]

    def num_bytes(self, action: Action) -> float:
        """Return the bytes that a communication action moves; 0 for kinds that have no entry."""
        per_place = self.message_bytes.get(action.kind)
        return per_place[action.place] if per_place else 0.0

    def transfer_s(self, num_bytes: float) -> float:
        """Return how long a message of this size occupies its link, without the latency."""
        return num_bytes / self.bytes_per_s

    @classmethod
    def uniform(
        cls,
        layout: Layout,
        *,
        forward: float = 1.0,
        backward: float = 2.0,
        head: float = 0.0,
        embedding: float = 0.0,
        latency_s: float = 0.0,
    ) -> Costs:
        """Return costs in which all stages are alike: for drawing a schedule and for comparing two of them.

        `head` and `embedding` are their work relative to one stage's forward and backward. Backwards are half input
        gradients and half weight gradients; activations, hidden states and shards count one byte each.
        """
        stage = Part(forward, backward / 2, backward / 2, activation_bytes=1.0, parameter_bytes=1.0)
        work = forward + backward
        return cls.from_parts(
            layout,
            [stage] * layout.num_stages,
            head=Part(head * work / 3, head * work / 3, head * work / 3, parameter_bytes=1.0),
            embedding=Part(embedding * work / 3, 0.0, embedding * work * 2 / 3, parameter_bytes=1.0),
            hidden_bytes=1.0,
            latency_s=latency_s,
        )

    @classmethod
    def from_parts(
        cls,
        layout: Layout,
        stages: Sequence[Part],
        *,
        head: Part,
        embedding: Part,
        hidden_bytes: float,
        statistics_bytes: float = 0.0,
        speeds: Sequence[float] | None = None,
        shares: Sequence[float] | None = None,
        recompute: bool = False,
        stream_scores: bool = False,
        num_shards: int = 1,
        freed_by_input_gradient: float = 0.5,
        latency_s: float = 0.0,
        bytes_per_s: float = math.inf,
    ) -> Costs:
        """Add up the costs of a model: `stages` without embedding and head, and these two as wholes.

        Without vocabulary parallelism they belong to the first and the last stage; with it every rank has its share of
        them (`shares`, default even), S and T as the layout's algorithm divides the work. `hidden_bytes` is one
        micro-batch of hidden states, `statistics_bytes` the softmax statistics of one shard. `stream_scores`: logits
        are not kept from S to T but computed again. `num_shards`: over how many ranks ZeRO cuts a stage's parameters.

        Raises:  PlanError if the numbers of parts, speeds or shares do not fit the layout
        """
        p, num_stages = layout.num_ranks, layout.num_stages
        speed = tuple(speeds or [1.0] * p)
        share = tuple(shares or [1.0 / p] * p)
        for what, given, wanted in (
            ("parts", stages, num_stages),
            ("speeds", speed, p),
            ("vocabulary shares", share, p),
        ):
            if len(given) != wanted:
                raise PlanError(f"costs of {len(given)} {what} for a pipeline of {wanted}: give {wanted}")
        parts = list(stages)
        if not layout.vocab:
            # The lookup has no input gradient; its scatter is a weight gradient.
            parts[0], parts[-1] = parts[0] + embedding, parts[-1] + head
        slow = [1.0 / speed[rank] for rank in layout.stage_rank]
        shard_slow = [part / speed[rank] if layout.vocab else 0.0 for rank, part in enumerate(share)]
        early = head.input_gradient_s if layout.vocab == 2 else 0.0  # algorithm 2 has A = P W in the scores pass
        again = head.forward_s if stream_scores else 0.0
        transposed_s = head.input_gradient_s - early + head.weight_gradient_s + again
        kept_bytes = tuple(part.activation_bytes for part in parts)
        shard_bytes = tuple(part * (head.parameter_bytes + embedding.parameter_bytes) for part in share)
        moved = (num_shards - 1) / num_shards
        stage_bytes = tuple(part.parameter_bytes for part in parts)
        per_rank, per_stage = (hidden_bytes,) * p, (hidden_bytes,) * num_stages
        return cls(
            forward_s=tuple(part.forward_s * s for part, s in zip(parts, slow, strict=True)),
            input_gradient_s=tuple(part.input_gradient_s * s for part, s in zip(parts, slow, strict=True)),
            weight_gradient_s=tuple(part.weight_gradient_s * s for part, s in zip(parts, slow, strict=True)),
            scores_s=tuple((head.forward_s + early) * s for s in shard_slow),
            transposed_s=tuple(transposed_s * s for s in shard_slow),
            lookup_s=tuple(embedding.forward_s * s for s in shard_slow),
            scatter_s=tuple((embedding.input_gradient_s + embedding.weight_gradient_s) * s for s in shard_slow),
            activation_bytes=per_stage if recompute else kept_bytes,
            recomputed_bytes=kept_bytes if recompute else (0.0,) * num_stages,
            scores_bytes=tuple(0.0 if stream_scores else part * head.activation_bytes for part in share),
            resident_bytes=(0.0,) * p,
            gathered_bytes=stage_bytes,
            gathered_vocab_bytes=shard_bytes,
            freed_by_input_gradient=freed_by_input_gradient,
            message_bytes={
                "SEND_F": per_stage,
                "SEND_B": per_stage,
                "X": per_rank,
                "STATS": (statistics_bytes,) * p,
                "DX": per_rank,
                "ROWS": tuple(part * hidden_bytes for part in share),
                "DROWS": tuple(
                    hidden_bytes * (1.0 if rank == layout.embed_rank else part) for rank, part in enumerate(share)
                ),
                "GATHER": tuple(size * moved for size in stage_bytes),
                "REDUCE": tuple(size * moved for size in stage_bytes),
                "VGATHER": tuple(size * moved for size in shard_bytes),
                "VREDUCE": tuple(size * moved for size in shard_bytes),
            },
            latency_s=latency_s,
            bytes_per_s=bytes_per_s,
        )


def transformer_parts(
    *, hidden: int, sequence: int, vocab: int, flops_per_s: float, micro_batch: int = 1
) -> tuple[Part, Part, Part]:
    """Return one block, the head and the embedding of a GPT (12 hidden^2 parameters per block) in bf16.

    A block is b s h (72 h + 12 s) FLOPs, the head 6 b s h V, the lookup 3 b s h, a third of it forward. Activations of
    a block are 34 b s h bytes, as with fused attention; those of the head its fp32 logits.

    Units:   seconds at `flops_per_s`, bytes
    Source:  Yeung et al. 2024, arXiv:2411.05288, table 4; activations: Korthikanti et al. 2022, arXiv:2205.05198
    """
    tokens = micro_batch * sequence
    third_of_block = tokens * hidden * (24 * hidden + 4 * sequence) / flops_per_s
    third_of_head = 2 * tokens * hidden * vocab / flops_per_s
    third_of_lookup = tokens * hidden / flops_per_s
    return (
        Part(third_of_block, third_of_block, third_of_block, 34 * tokens * hidden, 24 * hidden**2),
        Part(third_of_head, third_of_head, third_of_head, 4 * tokens * vocab, 2 * hidden * vocab),
        Part(third_of_lookup, 0.0, 2 * third_of_lookup, 0.0, 2 * hidden * vocab),
    )
