"""Windlass under an offload policy, for benchmarks/offload.py and gpu_offload.py: its steps, and what its lanes did."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workload import Workload
from zero_sides import Side, windlass_engine

from windlass.dist.device import Device
from windlass.dist.trace import Tracer
from windlass.offload.ledger import TierLedger
from windlass.offload.machine import Drives, OffloadMachine
from windlass.offload.placement import OffloadPlan, plan_offload
from windlass.offload.policy import OffloadConfig
from windlass.parallel.offloading import element_sizes, unit_facts
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import plan_units
from windlass.parallel.zero import ZeroConfig


def offload_plan(
    workload: Workload, offload: OffloadConfig, *, stage: int = 3, num_micro_batches: int = 1, reduce: str = "auto"
) -> OffloadPlan | None:
    """Return where one rank's state rests under a policy."""
    model, _ = workload.empty_model()
    facts = unit_facts(plan_units(model, workload.world_size), ZeroConfig(stage=stage))
    precision = PrecisionConfig(param="bf16" if workload.bf16 else "fp32", reduce=reduce)
    sizes = element_sizes(precision, OptimizerConfig())
    return plan_offload(offload, facts, sizes, clips=workload.clip > 0, accumulates=num_micro_batches > 1)


class WindlassSteps:
    """The engine and what its steps said: seconds by phase, work by lane."""

    def __init__(
        self,
        workload: Workload,
        offload: OffloadConfig,
        folder: Path | None,
        *,
        stage: int = 3,
        device: str = "cpu",
        recompute: bool = False,
        num_micro_batches: int = 1,
        reduce: str = "auto",
    ) -> None:
        self.workload, self.num_micro_batches, self.ledger = workload, num_micro_batches, TierLedger()
        self.machine: OffloadMachine | None = None
        self.plan = offload_plan(workload, offload, stage=stage, num_micro_batches=num_micro_batches, reduce=reduce)
        self.phases: list[dict[str, float]] = []
        self.lanes: list[dict[str, dict[str, float]]] = []
        self.norms: list[float] = []

        def machine(here: Device, tracer: Tracer) -> OffloadMachine | None:
            if self.plan is not None:
                drives = Drives((str(folder),) if folder else (), rank=workload.rank)
                self.machine = OffloadMachine(
                    self.plan,
                    offload,
                    device=here,
                    ledger=self.ledger,
                    tracer=tracer,
                    drives=drives,
                    warn=warnings.warn,
                )
            return self.machine

        self.engine, self.comm = windlass_engine(
            workload,
            stage=stage,
            device=device,
            recompute=recompute,
            reduce=reduce,
            offload=machine,
            account=lambda state, num_bytes: self.ledger.add("device", state, num_bytes),
        )

    def step(self, index: int) -> float:
        """Train on the batches of a step and return the global loss."""
        batches = [self.workload.batch(index * self.num_micro_batches + i) for i in range(self.num_micro_batches)]
        report = self.engine.train_step(batches, self.workload.lr)
        self.phases.append(dict(report.seconds))
        self.norms.append(report.grad_norm)
        self.lanes.append({lane: asdict(counter) for lane, counter in report.lanes.items()})
        return float(report.loss)

    def facts(self, first: int, last: int) -> dict[str, Any]:
        """Return what steps [first, last) took: medians of seconds by phase, means by lane; peaks of bytes by tier.

        `clipped` are those after which a policy that speculates had to make its updates again.
        """
        phases, lanes = self.phases[first:last], self.lanes[first:last]
        speculates = self.plan is not None and self.plan.shadowed
        clip = self.workload.clip if speculates else 0.0
        return {
            "clipped": sum(norm > clip > 0 for norm in self.norms[first:last]),
            "phases": {name: statistics.median(p[name] for p in phases) for name in phases[0]},
            "lanes": mean_lanes(lanes),
            "tiers": {tier: dict(self.ledger.peak_by_class(tier)) for tier in ("device", "host", "nvme")},
        }

    def close(self) -> None:
        """Stop lanes, give memory and files back."""
        if self.machine is not None:
            self.machine.close()
        self.comm.close()


def mean_lanes(steps: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean over steps of every lane's counters."""
    names = {name: dict.fromkeys(counters) for step in steps for name, counters in step.items()}
    return {
        name: {key: statistics.mean(step.get(name, {}).get(key, 0.0) for step in steps) for key in keys}
        for name, keys in names.items()
    }


def build_windlass(
    workload: Workload, offload: Mapping[str, Any], folder: Path, *, stage: int, timed: tuple[int, int]
) -> Side:
    """Return Windlass as a side; `timed` are the first and the end of the steps that its facts are about."""
    steps = WindlassSteps(workload, OffloadConfig(**offload), folder, stage=stage)

    def meet() -> object:
        return steps.comm.world.barrier(label="benchmark")

    return Side(steps.step, meet, steps.close, loss_is_global=True, facts=lambda: steps.facts(*timed))
