"""What offloading needs to know of a model's units: one function from units to facts. Pure.

Must not know: tiers' sizes, policies.
"""

from __future__ import annotations

from windlass.offload.placement import Sizes, UnitFacts
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.tiling import tile_passes
from windlass.parallel.units import ModelPlan, PartPlan
from windlass.parallel.zero import ZeroConfig


def unit_facts(plan: ModelPlan, zero: ZeroConfig) -> list[UnitFacts]:
    """Return the units of one rank as placement sees them, in walk order."""
    return [
        UnitFacts(
            u.name,
            u.shard_numel,
            u.trainable,
            whole_gradient=zero.stage < 2 or u.reduce_once,
            sharded=zero.stage == 3,
        )
        for u in plan.units
    ]


def tile_orders(part: PartPlan, *, recomputed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tiles of one part as its forward uses them, and as its backward does with what it recomputes."""
    passes = tile_passes([(part.tiles, recomputed)], 0)
    forward, backward = (tuple(u for weight, _ in uses for u in weight) for uses in (passes.forward, passes.recompute))
    return forward, backward


def element_sizes(precision: PrecisionConfig, optimizer: OptimizerConfig) -> Sizes:
    """Return the bytes of one element by class."""
    return Sizes(
        param=precision.param_dtype.itemsize,
        reduce=precision.reduce_dtype.itemsize,
        master=precision.master_dtype.itemsize,
        num_states=len(optimizer.state_names),
    )
