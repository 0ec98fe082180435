"""What the simulator says about a step under an offload policy, for benchmarks/offload.py. Needs no processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload_windlass import offload_plan
from workload import Workload

from windlass.offload.compile import build_program
from windlass.offload.policy import OffloadConfig
from windlass.offload.rates import Rates
from windlass.offload.simulate import simulate
from windlass.offload.workload import PartWork
from windlass.offload.workload import Workload as Work
from windlass.parallel.offloading import unit_facts
from windlass.parallel.units import plan_units
from windlass.parallel.zero import ZeroConfig


def predicted_step_s(
    workload: Workload, offload: Mapping[str, Any], rates: Rates, computing_s: float, *, reduce: str = "auto"
) -> float:
    """Return the step that the simulator expects of one rank at ZeRO stage 3.

    Computing is spread over the parts by their parameters, a third of it in forward; the embedding only looks up rows.
    """
    plan = offload_plan(workload, OffloadConfig(**offload), reduce=reduce)
    assert plan is not None
    model, _ = workload.empty_model()
    units = plan_units(model, workload.world_size)
    parts = [part for stage in units.stages for part in stage.parts]
    weights = [0 if p.role == "embed" else sum(units.units[u].numel for u in p.units) for p in parts]
    each = computing_s / sum(weights)
    work = Work(
        tuple(unit_facts(units, ZeroConfig(stage=3))),
        tuple(
            PartWork(part.name, part.units, weight * each / 3, weight * each * 2 / 3)
            for part, weight in zip(parts, weights, strict=True)
        ),
        num_shards=workload.world_size,
        clips=workload.clip > 0,
    )
    return simulate(build_program(plan, work), rates).total_s
