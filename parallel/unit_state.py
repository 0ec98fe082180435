"""A unit's master weights and optimizer state that stay on the device, and the face that both kinds of state show.

Must not know: ZeRO stages, when updates are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from windlass.dist.box import boxes_of_range
from windlass.dist.state import Loan, Piece
from windlass.parallel.optim import FlatOptimizer, UpdateKernel
from windlass.parallel.reducer import Reducer
from windlass.parallel.residency import Residency
from windlass.parallel.units import UnitPlan

Fill = Callable[
    [str, int, int, torch.Tensor], None
]  # (name, start, stop, out_1d): write row-major elements [start, stop)


class UnitState(Protocol):
    """Master weights and optimizer state of the own range of a unit."""

    def fill(self, fill: Fill) -> None:
        """Write the initial values. Collective through `publish`."""

    def refresh(self) -> None:
        """Rebuild the compute parameters from the master weights. Collective through `publish`."""

    def pieces(self, low: int, high: int, *, write: bool) -> Iterator[Piece]:
        """Yield the pieces of weights and optimizer state in flat range [low, high) of the unit, to read or `write`."""

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes held on the device by state class."""

    def set_steps(self, steps: int) -> None:
        """Say how many updates were made, for bias correction."""


class StateOnDevice:
    """Resident state: `master` covers the own range and is the compute parameter itself unless that is lower."""

    def __init__(
        self,
        plan: UnitPlan,
        residency: Residency,
        reducer: Reducer | None,
        own_range: tuple[int, int],
        master_dtype: torch.dtype,
        kernel: UpdateKernel,
    ) -> None:
        self._plan, self._residency, self._reducer = plan, residency, reducer
        self._low, self._high = own_range
        own = residency.own
        self.master = own if own.dtype == master_dtype or reducer is None else torch.zeros_like(own, dtype=master_dtype)
        self.optimizer: FlatOptimizer | None = None
        if reducer is not None:
            decayed = min(max(plan.decay_end - self._low, 0), self._high - self._low)
            self.optimizer = FlatOptimizer(kernel, self.master, decayed)

    def update(self, lr: float, scale: float) -> None:
        """Update the own range with its reduced gradients times `scale`, and publish it."""
        assert self._reducer is not None and self.optimizer is not None
        self._residency.writable()
        gradient = self._reducer.for_update()
        if scale != 1.0:
            gradient.mul_(scale)
        self.optimizer.update(gradient.to(self.master.dtype), lr)
        self.refresh()

    def skip(self) -> None:
        """Let a step pass without an update."""
        assert self._reducer is not None
        self._reducer.for_update()

    def refresh(self) -> None:
        if self.master is not self._residency.own:
            self._residency.own.copy_(self.master)
        self._residency.publish()

    def fill(self, fill: Fill) -> None:
        fill_range(self._plan, fill, self.master, self._low)
        self.refresh()

    def pieces(self, low: int, high: int, *, write: bool) -> Iterator[Piece]:
        yield from cut_pieces(self._plan, "model", self.master, self._low, low, high)
        if self.optimizer is not None:
            for name, state in self.optimizer.state.items():
                yield from cut_pieces(self._plan, f"optimizer.{name}", state, self._low, low, high)

    def state_bytes(self) -> dict[str, int]:
        out = {}
        if self.master is not self._residency.own:
            out["master"] = self.master.nbytes
        if self.optimizer is not None:
            out |= {name: state.nbytes for name, state in self.optimizer.state.items()}
        return out

    def set_steps(self, steps: int) -> None:
        if self.optimizer is not None:
            self.optimizer.set_steps(steps)


def fill_range(plan: UnitPlan, fill: Fill, flat: torch.Tensor, low: int) -> None:
    """Write initial values of parameters into `flat`, which covers the unit's elements from `low` on."""
    for p, start, stop in plan.overlaps(low, low + flat.numel()):
        first = p.offset + start - low
        fill(p.name, p.first + start, p.first + stop, flat[first : first + stop - start])


def cut_pieces(
    plan: UnitPlan, prefix: str, flat: torch.Tensor | Loan, first: int, low: int, high: int, numel: int | None = None
) -> Iterator[Piece]:
    """Yield the pieces in flat range [low, high) of a unit of what `flat` holds: its elements from `first` on."""
    count = flat.numel() if isinstance(flat, torch.Tensor) else numel or 0
    for p, start, stop in plan.overlaps(max(low, first), min(high, first + count)):
        at = p.offset + start - first
        for box in boxes_of_range(p.global_shape, p.first + start, p.first + stop):
            part = slice(at, at + box.numel)
            if isinstance(flat, torch.Tensor):
                source: torch.Tensor | Loan = flat[part].view(box.sizes)
            else:
                source = Loan(flat.dtype, _part_of(flat, part))
            yield Piece(f"{prefix}.{p.name}", p.global_shape, box, source)
            at += box.numel


def _part_of(loan: Loan, part: slice) -> Callable[[], torch.Tensor]:
    return lambda: loan.open()[part]
