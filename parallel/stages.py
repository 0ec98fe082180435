"""Builds what one pipeline rank runs: walks over its stages, its share of the vocabulary, and the runner over them.

Must not know: schedules' order, the optimizer, data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from windlass.data.batch import Batch
from windlass.dist.comm import Comm
from windlass.dist.errors import ModelError
from windlass.dist.trace import Tracer
from windlass.model.protocol import BlockModel
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.buffers import Account
from windlass.parallel.pipeline.channels import Channels
from windlass.parallel.pipeline.runner import Runner
from windlass.parallel.pipeline.schedule import Schedule
from windlass.parallel.pipeline.vocabulary_passes import Rows, VocabularyPasses
from windlass.parallel.tiles import find_weights
from windlass.parallel.unit import Unit
from windlass.parallel.units import ModelPlan, RankShare, model_parts, stage_parts
from windlass.parallel.vocab.head import VocabHead
from windlass.parallel.vocab.shard import VocabShard
from windlass.parallel.walk import Step, Walk
from windlass.parallel.zero import ZeroConfig

SPLIT_KINDS = ("I", "W")
# The head's backward follows its forward, and the last block's follows that: keeping both gathered costs no memory
# beyond the prefetch buffers, which have nothing to prefetch at that moment.
TURNAROUND = 2


def build_runner(
    model: BlockModel,
    plan: ModelPlan,
    share: RankShare,
    units: Sequence[Unit],
    schedule: Schedule,
    *,
    shards: Sequence[VocabShard],
    vocab_chunk: int,
    comm: Comm,
    ranks: Sequence[int],
    zero: ZeroConfig,
    activation: ActivationConfig,
    dtype: torch.dtype,
    device: torch.device,
    width: int,
    tracer: Tracer,
    window: int = TURNAROUND,
    account: Account | None = None,
) -> Runner:
    """Build the runner of this rank; `ranks` are the world ranks of its pipeline column, `width` that of h.

    `window`: how many parts keep what they gathered from forward to backward where the two follow each other;
    `account` is told of activations.

    Collective:  every rank of the world
    """
    layout, rank = schedule.layout, list(ranks).index(comm.rank)
    pipelined = layout.num_ranks > 1
    channels = Channels(comm, ranks, layout, device)
    resharding = zero.resharding(pipelined)
    scheduled = gathers(schedule)
    split = any(action.kind in SPLIT_KINDS for row in schedule.ranks for action in row)
    begins = _first_trained(model)
    walks: dict[int, Walk] = {}
    for (span, parts), stage in zip(stage_parts(model, share), plan.stages, strict=True):
        steps: list[Step] = []
        for part, part_plan in zip(parts, stage.parts, strict=True):
            recompute = activation.recomputes(part.name)
            own = tuple(units[u] for u in part_plan.units)
            resident = not any(unit.residency.transient for unit in own)
            turnaround = resharding == "turnaround" and len(steps) >= len(parts) - window
            kept = resident or turnaround or (resharding == "never" and not scheduled)
            steps.append(Step(part, own, not recompute, kept, scheduled, find_weights(part, part_plan, units)))
        wants_input = not span.begins and begins < span.first + 1
        if span.begins and share.shard is not None and plan.vocab is not None:
            wants_input = plan.units[plan.vocab[0]].trainable
        walks[span.number] = Walk(steps, wants_input=wants_input, split=split, tracer=tracer, account=account)
    vocabulary = None
    if share.shard is not None and plan.vocab is not None:
        head_module: Any = model.head
        head = VocabHead(tuple(shards), rank, head_module.loss.config, layout.vocab, vocab_chunk)
        rows = [Rows.of(units[u]) for u in plan.vocab]
        vocabulary = VocabularyPasses(
            layout, rank, shards, head, rows[0], rows[1], channels, dtype=dtype, scheduled=scheduled
        )

    def context(batch: Batch) -> Any:
        with torch.no_grad():
            return model.context(batch.positions_BT, batch.documents_BT, dtype)

    return Runner(rank, walks, channels, vocabulary, context=context, width=width, dtype=dtype, tracer=tracer)


def gathers(schedule: Schedule) -> bool:
    """Return whether the schedule says when parameters are gathered; otherwise the walk does as it needs them."""
    return any(action.kind in ("GATHER", "VGATHER") for row in schedule.ranks for action in row)


def _first_trained(model: BlockModel) -> int:
    """Return the first part of the walk that trains something: 0 is the embedding, 1 + i block i."""
    parts = model_parts(model)
    trained = (i for i, (_, module) in enumerate(parts) if any(p.requires_grad for p in module.parameters()))
    return next(trained, len(parts))


def hidden_width(model: BlockModel) -> int:
    """Return the width of the hidden states of a model on the meta device: that of the embedding's first matrix."""
    for parameter in model.embed.parameters():
        if parameter.dim() == 2:
            return int(parameter.shape[1])
    raise ModelError("the embedding has no matrix, so the width of the hidden states that stages exchange is not known")


def realise(
    model: BlockModel, plan: ModelPlan, share: RankShare, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Parameter]:
    """Replace the parameters that this rank holds by empty real ones, tied ones once; return them by checkpoint name.

    Raises:      ModelError if a buffer was left on the meta device
    """
    wanted = {p.name for unit in plan.units for p in unit.parameters}
    modules: Mapping[str, nn.Module] = dict(model_parts(model))
    fresh: dict[int, nn.Parameter] = {}
    by_name: dict[str, nn.Parameter] = {}
    held = {part.name for _, parts in stage_parts(model, share) for part in parts}
    for part, module in modules.items():
        here = part in held or f"{part}.norm" in held
        for prefix, child in module.named_modules():
            for name, old in list(child._parameters.items()):
                full = f"{part}.{prefix}.{name}" if prefix else f"{part}.{name}"
                if old is None or (id(old) not in fresh and full not in wanted):
                    continue
                if id(old) not in fresh:
                    empty = torch.empty(0, dtype=dtype, device=device)
                    fresh[id(old)] = by_name[full] = nn.Parameter(empty, requires_grad=old.requires_grad)
                child._parameters[name] = fresh[id(old)]
            for name, buffer in list(child._buffers.items()) if here else []:
                if buffer is not None and buffer.is_meta:
                    where = ".".join(filter(None, (part, prefix, name)))
                    raise ModelError(
                        f"buffer '{where}' is on the meta device, so its values are unknown: build only parameters on "
                        "meta and buffers on the CPU"
                    )
                if buffer is not None:
                    child._buffers[name] = buffer.to(device)
    missing = wanted - set(by_name)
    assert not missing, missing
    return by_name
