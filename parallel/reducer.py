"""How a unit's gradients are kept and summed over ranks: one protocol, two members.

Gradients are plain sums over all ranks; the one division, by the global number of valid tokens, happened where
backward was seeded. Must not know: parameters' values, optimizers, models.
Source: Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.1 and 5.2; hybrid sharding: the replicas' sum is taken
once per step, of the accumulated shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from windlass.dist.comm import Group, Pending, Symmetric
from windlass.dist.errors import OffloadError
from windlass.offload.machine import OffloadMachine
from windlass.parallel.buffers import GradSlot, SlotPool
from windlass.parallel.gradient_home import GradientHome, LeavesDevice, StaysOnDevice
from windlass.parallel.units import ParameterPlan, UnitPlan

Gradients = Iterable[tuple[ParameterPlan, torch.Tensor]]


class Reducer(Protocol):
    """The gradients of one unit during one step."""

    grad: torch.Tensor  # own box, (shard_numel,): after `finish` the sum over all ranks and micro-batches
    home: GradientHome  # where that goes
    handed_over: bool  # nothing is summed: what is completed is there at once, in a buffer that others wait for

    def add(self, gradients: Gradients) -> None:
        """Add the gradients of one use of the unit in this micro-batch."""

    def add_rows(self, plan: ParameterPlan, index_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        """Add gradients of some rows of a parameter; a row may come more than once."""

    def complete(self, last: bool) -> None:
        """Say that this micro-batch adds no more (`last`: nor does this step); may start reducing."""

    def settle(self) -> None:
        """Wait until `grad` holds what was completed so far."""

    def finish(self) -> None:
        """Wait until `grad` holds the sum over all ranks. Collective where there are replicas."""

    def for_update(self) -> torch.Tensor:
        """Return the gradients of the part this rank updates, free to be overwritten."""


class _Accumulator:
    """Writes gradients into a flat unit buffer: the first one of a parameter overwrites, later ones add."""

    def __init__(self, plan: UnitPlan) -> None:
        self._plan = plan
        self._seen: set[int] = set()

    @property
    def empty(self) -> bool:
        return not self._seen

    def add(self, flat: torch.Tensor, gradients: Gradients) -> None:
        for p, gradient in gradients:
            target = flat[p.offset : p.offset + p.size].view(p.shape)
            if p.offset in self._seen:
                target.add_(gradient)
            else:
                target.copy_(gradient)
                self._seen.add(p.offset)

    def add_rows(self, flat: torch.Tensor, p: ParameterPlan, index_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        target = flat[p.offset : p.offset + p.size].view(p.shape)
        if p.offset not in self._seen:
            target.zero_()
            self._seen.add(p.offset)
        target.index_add_(0, index_K, rows_KD.to(target.dtype))

    def close(self, flat: torch.Tensor) -> None:
        """Zero the parameters that got no gradient and start over."""
        for p in self._plan.parameters:
            if p.offset not in self._seen:
                flat[p.offset : p.offset + p.size].zero_()
        self._seen.clear()


class ReduceAtStep:
    """The whole unit's gradients stay here and are reduced once, during the last backward (stages 0 and 1).

    With `replicated`, every rank gets the whole sum (stage 0): a reduce-scatter followed by a gather, so that the sum
    is formed in the same order as in the sharded stages and the stages are bitwise equal.
    """

    def __init__(
        self,
        plan: UnitPlan,
        symmetric: Symmetric,
        replicas: Group | None,
        replicated: bool,
        machine: OffloadMachine | None = None,
    ) -> None:
        self.home: GradientHome = StaysOnDevice(symmetric.mine, plan.name, machine)
        self.handed_over = False
        self._symmetric = symmetric
        self._replicas = replicas
        self._replicated = replicated
        self._label = f"grad {plan.name}"
        self._accumulator = _Accumulator(plan)
        self._pending: Pending[None] | None = None
        self.grad = symmetric.mine

    def add(self, gradients: Gradients) -> None:
        if self._accumulator.empty:
            self._symmetric.wait_free()
        self._accumulator.add(self._symmetric.tensor, gradients)

    def add_rows(self, plan: ParameterPlan, index_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        if self._accumulator.empty:
            self._symmetric.wait_free()
        self._accumulator.add_rows(self._symmetric.tensor, plan, index_K, rows_KD)

    def complete(self, last: bool) -> None:
        if last:
            self._accumulator.close(self._symmetric.tensor)
            self._pending = self._symmetric.reduce_scatter(self.grad, accumulate=False, tag="grad", label=self._label)

    def settle(self) -> None:
        """It is reduced once, at the end."""

    def finish(self) -> None:
        assert self._pending is not None
        self._pending.wait()
        self._pending = None
        if self._replicas is not None:
            self._replicas.all_reduce(self.grad, tag="grad", label=self._label).wait()
        if self._replicated:
            self._pending = self._symmetric.all_gather(tag="grad", label=self._label)

    def for_update(self) -> torch.Tensor:
        if not self._replicated:
            return self.grad
        assert self._pending is not None
        self._pending.wait()
        self._pending = None
        self._symmetric.wait_free()
        return self._symmetric.tensor


class ReduceInBackward:
    """Only the own box stays; a unit's gradients are reduced as soon as its backward is done (stages 2 and 3).

    `handed_over`: a single rank has nobody to sum with, and its one micro-batch nothing to add to, so the slot that
    backward wrote is the sum; it leaves the device from there.
    """

    def __init__(
        self, plan: UnitPlan, home: GradientHome, slots: SlotPool, replicas: Group | None, *, handed_over: bool = False
    ) -> None:
        self._plan, self.home, self.handed_over = plan, home, handed_over
        self._slots = slots
        self._replicas = replicas
        self._label = f"grad {plan.name}"
        self._accumulator = _Accumulator(plan)
        self._layout = tuple((p.offset, p.size) for p in plan.parameters)
        self._slot: GradSlot | None = None
        self._last_slot: GradSlot | None = None
        self._pending: Pending[None] | None = None
        self._accumulate = False
        self.grad = torch.empty(0)  # the home's buffer, once something was completed

    def add(self, gradients: Gradients) -> None:
        self._accumulator.add(self._filling().symmetric.tensor, gradients)

    def add_rows(self, plan: ParameterPlan, index_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        self._accumulator.add_rows(self._filling().symmetric.tensor, plan, index_K, rows_KD)

    def _filling(self) -> GradSlot:
        if self._slot is None:
            self._slot = self._slots.take(self._plan.shard_numel, self._layout)
        return self._slot

    def complete(self, last: bool) -> None:
        """Begin to reduce what was added since the last call."""
        self.settle()  # two reductions into one shard must not run in either order
        slot, self._slot = self._filling(), None
        self._accumulator.close(slot.symmetric.tensor)
        slot.held = False
        if self.handed_over:
            self._hand_over(slot, last)
            return
        self.grad = self.home.take(accumulate=self._accumulate)
        slot.pending = self._pending = slot.symmetric.reduce_scatter(
            self.grad, accumulate=self._accumulate, tag="grad", label=self._label
        )
        self._last_slot = slot
        self._accumulate = not last

    def _hand_over(self, slot: GradSlot, last: bool) -> None:
        if not last:
            raise OffloadError(
                f"{self._label}: the tiers were planned for one micro-batch per step, and there are more. Plan "
                "for them: train.global_batch"
            )
        assert isinstance(self.home, LeavesDevice)
        self.grad = slot.symmetric.tensor
        slot.pending = self.home.adopt(self.grad)

    def settle(self) -> None:
        """Wait for this unit's latest reduction, unless whoever took its slot since has done so."""
        if self._last_slot is not None and self._last_slot.pending is self._pending:
            self._last_slot.settle()
        self._last_slot = self._pending = None

    def finish(self) -> None:
        self.settle()
        if self._replicas is not None:
            self._replicas.all_reduce(self.grad, tag="grad", label=self._label).wait()

    def for_update(self) -> torch.Tensor:
        return self.grad
