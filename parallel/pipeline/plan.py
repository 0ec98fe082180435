"""From the pipeline's policy to its plan.

    PipelineConfig + sizes of the model + what its parts cost  ->  PipelinePlan

Pure, so every rank plans the same. What the policy leaves open is chosen by simulating a step: the shortest one that
fits wins, and among those about as short the one that takes the least memory.
Must not know: modules, tensors, the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from windlass.dist.errors import PlanError
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.pipeline.candidates import PipelineJob
from windlass.parallel.pipeline.model_costs import ModelCosts
from windlass.parallel.pipeline.planned import PipelinePlan
from windlass.parallel.pipeline.policy import PipelineConfig
from windlass.parallel.zero import ZeroConfig

__all__ = ["PipelinePlan", "plan_pipeline"]

AS_GOOD = 1.02  # simulated steps closer than this are alike


def plan_pipeline(
    config: PipelineConfig,
    *,
    num_ranks: int,
    num_micro_batches: int,
    num_blocks: int,
    vocab_size: int,
    tied: bool = False,
    zero: ZeroConfig | None = None,
    activation: ActivationConfig | None = None,
    costs: ModelCosts | None = None,
    vocab_problem: str = "",
    sequences: int = 0,
) -> PipelinePlan:
    """Plan the pipeline of a model.

    Without `costs` all blocks are alike and head and embedding cost next to nothing. `vocab_problem` says why the
    vocabulary of this model cannot be cut, `sequences` how many of them one micro-batch of all data-parallel ranks has.
    Raises: PlanError for whatever cannot work, naming the value that would
    """
    if num_ranks > num_blocks:
        raise PlanError(
            f"parallelism.pp = {num_ranks}: the model has {num_blocks} blocks and every pipeline rank needs one. "
            f"Use parallelism.pp={num_blocks} or less"
        )
    zero, activation = zero or ZeroConfig(), activation or ActivationConfig()
    recompute = num_ranks > 1 and activation.policy == "recompute"
    job = PipelineJob(
        config,
        num_ranks,
        num_micro_batches,
        vocab_size,
        tied,
        zero.lowering(num_ranks > 1) | {"recompute": recompute},
        costs or ModelCosts.uniform(num_blocks),
        vocab_problem,
        sequences,
    )
    choices, few = job.choices(), job
    if len(choices) > 1 and config.schedule != "gpipe":  # which keeps every micro-batch in memory
        # The beginning and the end of a step, and enough of its middle: the rest of a long one repeats it.
        few = replace(job, num_micro_batches=min(num_micro_batches, 4 * num_ranks))
    plans = [few.plan(*choice) for choice in choices]
    fitting = [plan for plan in plans if _fits(few, plan)]
    if not fitting:
        raise PlanError(_too_big(few, plans))
    best = _best(fitting, num_micro_batches)
    why = _reason(best, fitting, len(plans), num_micro_batches) if len(plans) > 1 else "as asked for"
    if few != job:
        best = job.plan(*choices[plans.index(best)])
    source = job.costs.source
    return replace(best, why=f"{why}, costs measured by '{source}'" if source else why)


def _fits(job: PipelineJob, plan: PipelinePlan) -> bool:
    return max(plan.peak_bytes) <= job.costs.limit_bytes


def _best(fitting: Sequence[PipelinePlan], num_micro_batches: int) -> PipelinePlan:
    """Return the plan with the shortest step, or one that takes less memory and is about as short."""
    about = AS_GOOD * min(plan.seconds(num_micro_batches) for plan in fitting)
    return min(
        (plan for plan in fitting if plan.seconds(num_micro_batches) <= about), key=lambda plan: max(plan.peak_bytes)
    )


def _reason(best: PipelinePlan, fitting: Sequence[PipelinePlan], num_choices: int, num_micro_batches: int) -> str:
    """Say in one sentence why this plan was taken."""
    simplest, seconds = fitting[0], best.seconds(num_micro_batches)
    shorter = sum(plan.seconds(num_micro_batches) < seconds for plan in fitting)
    why = f"shortest simulated step of {num_choices} choices"
    if shorter:
        why = f"least memory of those within 2% of the shortest of {num_choices} simulated steps"
    if len(fitting) < num_choices:
        why += f", {len(fitting)} of which fit"
    if best is simplest:
        return why
    faster = simplest.seconds(num_micro_batches) / seconds - 1
    lighter = 1 - max(best.peak_bytes) / max(simplest.peak_bytes)
    speed = f"{abs(faster):.0%} {'faster' if faster >= 0 else 'slower'}"
    memory = f"{abs(lighter):.0%} {'less' if lighter > 0 else 'more'}" if round(lighter, 2) else "the same"
    return f"{why}: {speed} than {simplest.label}, with {memory} memory on the fullest rank"


def _too_big(job: PipelineJob, plans: Sequence[PipelinePlan]) -> str:
    """Say how much the least of the plans needs, and what would make it fit."""
    if job.costs.limit_bytes <= 0:
        return (
            f"nothing is left for a stage: what every rank holds besides is {-job.costs.limit_bytes / 1e9:.3g} GB more "
            "than a device has. Raise cluster.device_bytes"
        )
    least = min(plans, key=lambda plan: max(plan.peak_bytes))
    most = max(least.peak_bytes)
    rank = least.peak_bytes.index(most)
    blocks = sum(least.blocks[stage][1] - least.blocks[stage][0] for stage in least.schedule.layout.stages_of(rank))
    text = (
        f"pipeline rank {rank} with {blocks} blocks does not fit: it needs about {most / 1e9:.3g} GB under "
        f"{least.label}, and may use {job.costs.limit_bytes / 1e9:.3g} GB. Use "
    )
    config, lowering = job.config, job.lowering | {"recompute": True}
    ways = (
        ("pipeline.cut=[]", replace(job, config=replace(config, cut=[]))),
        (
            "pipeline.schedule=auto" + (" pipeline.vocab=auto" if config.vocab != "auto" else ""),
            replace(job, config=replace(config, schedule="auto", vocab="auto")),
        ),
        ("activation.policy=recompute", replace(job, lowering=lowering)),
    )
    for way, changed in ways:
        if changed != job and any(_fits(job, changed.plan(*choice)) for choice in changed.choices()):
            return text + way
    lacking = (most - job.costs.limit_bytes) / 1e9
    return f"{text}more pipeline ranks, a higher zero.stage, or devices with {lacking:.3g} GB more"
