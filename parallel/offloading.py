"""What offloading needs to know of a model's units: one function from units to facts. Pure.

Must not know: tiers' sizes, policies.
"""

from __future__ import annotations

from windlass.offload.placement import Sizes, UnitFacts
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import ModelPlan
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


def element_sizes(precision: PrecisionConfig, optimizer: OptimizerConfig) -> Sizes:
    """Return the bytes of one element by class."""
    return Sizes(
        param=precision.param_dtype.itemsize,
        reduce=precision.reduce_dtype.itemsize,
        master=precision.master_dtype.itemsize,
        num_states=len(optimizer.state_names),
    )
