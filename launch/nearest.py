"""The nearest change: what would make a job fit that does not, and disturbs it the least.

Must not know: how a plan is made, the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from windlass.dist.cluster import ClusterConfig
from windlass.dist.errors import PlanError
from windlass.launch.job import JobConfig, value_at
from windlass.launch.plan import FITS, Plan, Planner
from windlass.offload.policy import OffloadConfig
from windlass.parallel.activation import ActivationConfig

MAX_DOUBLINGS = 8  # of the number of ranks


@dataclass(frozen=True)
class Change:
    """A change of a job after which it fits."""

    overrides: list[str]
    world_size: int
    plan: Plan


def nearest_change(
    config: JobConfig, world_size: int, cluster: ClusterConfig, device: str | None = None
) -> Change | None:
    """Return the change that disturbs a job the least and makes it fit, or None if none of those tried does.

    Order: a higher stage, then recomputation, then a smaller micro-batch at the same batch per step, then state in host
    memory or, where the cluster has drives, on nvme, then more ranks.
    """
    planner = Planner(config)
    for overrides, variant, ranks in _variants(config, world_size, cluster):
        try:
            plan = planner.plan(variant, ranks, cluster, device, seconds=False)
        except PlanError:  # a pipeline of which no stage cut fits
            continue
        if plan.verdict == FITS:
            return Change(overrides, ranks, plan)
    return None


def _variants(config: JobConfig, world_size: int, cluster: ClusterConfig) -> Iterator[tuple[list[str], JobConfig, int]]:
    train = config.train
    divisors = [n for n in range(train.micro_batch, 0, -1) if train.micro_batch % n == 0]
    policies = [config.activation, ActivationConfig(policy="recompute")]
    for ranks in (world_size * 2**k for k in range(MAX_DOUBLINGS + 1)):
        data_ranks = ranks // config.parallelism.pp
        batch = train.global_batch or train.micro_batch * data_ranks
        parallelism = config.parallelism if ranks == world_size else replace(config.parallelism, dp_shard=-1)
        sizes = list(product(divisors, policies[: 1 + (policies[0] != policies[1])]))
        for offload, (size, activation) in product(_tiers(config, cluster), sizes):
            if batch % (size * data_ranks):
                continue
            stages = range(config.zero.stage, 4) if data_ranks > 1 else (config.zero.stage,)
            for stage in stages if offload == config.offload else (3,):
                fixed_batch = train.global_batch if size == train.micro_batch else batch
                variant = replace(
                    config,
                    zero=replace(config.zero, stage=stage),
                    activation=activation,
                    train=replace(train, micro_batch=size, global_batch=fixed_batch),
                    parallelism=parallelism,
                    offload=offload,
                )
                yield _overrides(config, variant), variant, ranks


def _tiers(config: JobConfig, cluster: ClusterConfig) -> list[OffloadConfig]:
    """Return what is offloaded now and, if that is nothing, what could be, from the least on."""
    if config.offload.active or not cluster.host_bytes:  # whether it fits there is not known
        return [config.offload]
    names = ["zero-offload", "superpipeline", *(["fuyou"] if cluster.nvme_paths else [])]
    return [config.offload, *(replace(config.offload, policy=name) for name in names)]


def _overrides(config: JobConfig, variant: JobConfig) -> list[str]:
    """Say on the command line what a variant changes."""
    keys = (
        "zero.stage",
        "activation.policy",
        "activation.every",
        "train.micro_batch",
        "train.global_batch",
        "parallelism.dp_shard",
        "offload.policy",
    )
    return [f"{key}={value_at(variant, key)}" for key in keys if value_at(variant, key) != value_at(config, key)]
