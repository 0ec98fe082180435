"""ZeRO as data: where parameters, gradients and optimizer state are cut, and the units that follow from it.

A stage is residency x reducer x "my range": nothing else in Windlass asks for the stage number.
Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from windlass.dist.comm import Group, Symmetric
from windlass.offload.machine import OffloadMachine
from windlass.offload.placement import UnitPlacement
from windlass.parallel.buffers import Account, BufferPool, SlotPool
from windlass.parallel.fetch import FetchOnUse, ShardBuffers
from windlass.parallel.gradient_home import GradientBuffers, GradientHome, LeavesDevice, StaysOnDevice
from windlass.parallel.optim import OptimizerConfig, UpdateKernel
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.reducer import ReduceAtStep, ReduceInBackward, Reducer
from windlass.parallel.residency import GatherOnUse, Replicated, Residency, Resident
from windlass.parallel.unit import Unit
from windlass.parallel.unit_records import ParametersInRecord, StateInRecords
from windlass.parallel.unit_state import StateOnDevice, UnitState
from windlass.parallel.units import UnitPlan


@dataclass(frozen=True)
class ZeroConfig:
    """How much of the training state is sharded over the axis `dp_shard`."""

    stage: int = field(
        default=0,
        metadata={
            "help": "0: replicate all; 1: shard optimizer state; 2: and gradients; 3: and parameters",
            "choices": (0, 1, 2, 3),
        },
    )
    reshard: str = field(
        default="auto",
        metadata={
            "help": "stage 3: when gathered parameters are released. each: after every use (3 Psi per step); "
            "turnaround: keep those whose backward follows at once; never: keep from forward to backward (2 Psi; with "
            "a pipeline: for the whole step); run: with a pipeline, after each run of consecutive uses of a stage; "
            "auto: turnaround without a pipeline, run with one",
            "choices": ("auto", "each", "turnaround", "never", "run"),
        },
    )
    prefetch: int = field(
        default=1, metadata={"help": "stage 3: units gathered ahead of their use", "unit": "units", "ge": 0, "le": 8}
    )

    def resharding(self, pipelined: bool) -> str:
        """Return `reshard` with auto resolved; other stages keep everything gathered."""
        if self.stage < 3:
            return "never"
        return self.reshard if self.reshard != "auto" else "run" if pipelined else "turnaround"

    def lowering(self, pipelined: bool) -> dict[str, Any]:
        """Return what lowering a schedule must know: when gradients are reduced and which gathers are actions."""
        resharding = self.resharding(pipelined) if self.stage == 3 else "each"
        as_actions = {"run": "run", "never": "step" if pipelined else "none"}
        return {"reduce": "each" if self.stage >= 2 else "last", "gather": as_actions.get(resharding, "none")}


class UnitBuilder:
    """Builds the units of one rank for one stage.

    `shards` is the group that cuts the state (with stage 0: that splits the reduction); `replicas` the group of ranks
    that hold the same shard, if there is more than one; `holders` that of a shard of a unit on two pipeline ranks.
    `machine` has the tiers of what does not rest on the device, if anything does not.
    """

    def __init__(
        self,
        zero: ZeroConfig,
        precision: PrecisionConfig,
        optimizer: OptimizerConfig,
        shards: Group,
        replicas: Group | None,
        holders: Group | None,
        device: torch.device,
        account: Account,
        machine: OffloadMachine | None,
    ) -> None:
        self._zero, self._precision = zero, precision
        self._kernel = UpdateKernel(optimizer, "torch" if machine is None else machine.adam)
        self._shards, self._replicas, self._holders = shards, replicas, holders
        self._device, self._account, self._machine = device, account, machine
        self._pool = BufferPool(device, account)
        self._slots = SlotPool(self._make_slot)
        self._shard_buffers = ShardBuffers(shards, precision.param_dtype, account)
        self._gradients = None if machine is None else GradientBuffers(precision.reduce_dtype, machine)
        self._steps = 0

    def set_steps(self, steps: int) -> None:
        """Say how many updates were made: fetched parameters must be as new."""
        self._steps = steps

    def finish(self) -> None:
        """Allocate what units use in turn, when all are built."""
        if self._gradients is not None:
            self._gradients.build()

    def build(self, plan: UnitPlan, parameters: Sequence[nn.Parameter]) -> Unit:
        """Allocate one unit. Collective of the shard group."""
        replicated = self._zero.stage == 0 or (not plan.trainable and self._zero.stage < 3)
        own_range = (0, plan.padded) if replicated else plan.box(self._shards.rank)
        placement = None if self._machine is None else self._machine.plan.unit(plan.name)
        residency = self._residency(plan, replicated, placement)
        reducer = self._reducer(plan, placement) if plan.trainable else None
        state = self._state(plan, placement, residency, reducer, own_range)
        unit = Unit(plan, list(parameters), residency, reducer, state, own_range)
        for name, held in unit.state_bytes().items():
            self._account(name, held)
        return unit

    def _state(
        self,
        plan: UnitPlan,
        placement: UnitPlacement | None,
        residency: Residency,
        reducer: Reducer | None,
        own_range: tuple[int, int],
    ) -> UnitState:
        machine, precision = self._machine, self._precision
        if machine is not None and placement is not None:
            if placement.offloaded and reducer is not None:
                dtypes = precision.param_dtype, precision.master_dtype
                return StateInRecords(
                    plan, placement, residency, reducer.home, own_range[0], machine, self._kernel, *dtypes
                )
            if placement.param != "device":
                return ParametersInRecord(plan, placement, own_range[0], machine, precision.param_dtype)
        return StateOnDevice(plan, residency, reducer, own_range, precision.master_dtype, self._kernel)

    def _residency(self, plan: UnitPlan, replicated: bool, placement: UnitPlacement | None) -> Residency:
        dtype = self._precision.param_dtype
        if self._machine is not None and placement is not None and placement.param != "device":
            trained = plan.trainable
            return FetchOnUse(
                placement,
                plan.padded,
                dtype,
                self._machine,
                self._shards,
                self._pool,
                self._shard_buffers,
                version=lambda: self._steps if trained else 0,
            )
        if replicated:
            return Replicated(torch.zeros(plan.padded, dtype=dtype, device=self._device))
        if self._zero.stage < 3:
            return Resident(self._symmetric(plan.shard_numel, dtype, True, f"param {plan.name}"), plan.name)
        own = self._symmetric(plan.shard_numel, dtype, False, f"param {plan.name}")
        return GatherOnUse(own, plan.padded, self._pool, plan.name, self._zero.prefetch)

    def _reducer(self, plan: UnitPlan, placement: UnitPlacement | None) -> Reducer:
        dtype = self._precision.reduce_dtype
        replicas = self._holders if plan.shared else self._replicas
        if self._zero.stage < 2 or plan.reduce_once:
            full = self._symmetric(plan.shard_numel, dtype, True, f"grad {plan.name}")
            self._account("grad", full.tensor.nbytes)
            return ReduceAtStep(plan, full, replicas, replicated=self._zero.stage == 0, machine=self._machine)
        self._slots.register(plan.shard_numel)
        home: GradientHome
        handed_over = False
        if placement is not None and placement.grad != "device":
            assert self._machine is not None and self._gradients is not None
            handed_over = self._shards.size == 1 and replicas is None and not self._machine.plan.accumulates
            home = LeavesDevice(placement, dtype, self._machine, None if handed_over else self._gradients)
        else:
            shard = torch.zeros(plan.shard_numel, dtype=dtype, device=self._device)
            self._account("grad", shard.nbytes)
            home = StaysOnDevice(shard, plan.name, self._machine)
        return ReduceInBackward(plan, home, self._slots, replicas, handed_over=handed_over)

    def _make_slot(self, shard_numel: int, name: str) -> Symmetric:
        slot = self._symmetric(shard_numel, self._precision.reduce_dtype, True, name)
        self._account("grad_slot", slot.tensor.nbytes)
        return slot

    def _symmetric(self, shard_numel: int, dtype: torch.dtype, full: bool, name: str) -> Symmetric:
        return self._shards.symmetric(shard_numel, dtype, full=full, name=name)
