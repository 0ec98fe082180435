"""One unit at run time: its flat memory on this rank, bound to the model's parameters, and its optimizer.

Must not know: which stage of ZeRO made it; residency and reducer carry that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from windlass.dist.box import boxes_of_range
from windlass.dist.state import Piece
from windlass.parallel.optim import FlatOptimizer, OptimizerConfig
from windlass.parallel.reducer import Reducer
from windlass.parallel.residency import Residency
from windlass.parallel.units import ParameterPlan, UnitPlan

Fill = Callable[
    [str, int, int, torch.Tensor], None
]  # (name, start, stop, out_1d): write row-major elements [start, stop)


class Unit:
    """Parameters, gradients and optimizer state of one unit on one rank.

    `low, high` is the flat range this rank updates (the whole when replicated); `master` covers it and is the compute
    parameter itself unless that has a lower precision.
    """

    def __init__(
        self,
        plan: UnitPlan,
        parameters: list[nn.Parameter],
        residency: Residency,
        reducer: Reducer | None,
        own_range: tuple[int, int],
        master_dtype: torch.dtype,
        optimizer: OptimizerConfig,
    ) -> None:
        self.plan = plan
        self.parameters = parameters
        self.residency = residency
        self.reducer = reducer
        self.low, self.high = own_range
        own = residency.own
        self.master = own if own.dtype == master_dtype or reducer is None else torch.zeros_like(own, dtype=master_dtype)
        self.optimizer: FlatOptimizer | None = None
        if reducer is not None:
            decayed = min(max(plan.decay_end - self.low, 0), self.high - self.low)
            self.optimizer = FlatOptimizer(optimizer, self.master, decayed)
        self._bound: torch.Tensor | None = None
        self._uses, self._completed = 1, 0

    # -- compute parameters ------------------------------------------------------------------------------------------

    def ready(self) -> torch.Tensor:
        """Point the model's parameters at the whole unit, waiting for its gather."""
        flat = self.residency.ready()
        if self._bound is not flat:
            for p, parameter in zip(self.plan.parameters, self.parameters, strict=True):
                parameter.data = flat[p.offset : p.offset + p.size].view(p.shape)
            self._bound = flat
        return flat

    def release(self) -> None:
        """Let go of the whole unit; resident units stay bound."""
        self.residency.release()

    def trainable(self) -> Iterator[tuple[ParameterPlan, nn.Parameter]]:
        if self.reducer is not None:
            yield from zip(self.plan.parameters, self.parameters, strict=True)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def expect(self, completions: int) -> None:
        """Say how often `complete` is called in the step that begins."""
        self._uses, self._completed = completions, 0

    def complete(self) -> None:
        """Say that what was added to the gradients so far may be reduced; the last call of a step reduces the rest."""
        if self.reducer is not None:
            self._completed += 1
            self.reducer.complete(last=self._completed == self._uses)

    # -- update ------------------------------------------------------------------------------------------------------

    def step(self, lr: float, scale: float) -> None:
        """Update the own range with its reduced gradients times `scale`, and publish it."""
        assert self.reducer is not None and self.optimizer is not None
        self.residency.writable()
        gradient = self.reducer.for_update()
        if scale != 1.0:
            gradient.mul_(scale)
        self.optimizer.update(gradient.to(self.master.dtype), lr)
        self.refresh()

    def skip(self) -> None:
        """Let a step pass without an update."""
        assert self.reducer is not None
        self.reducer.for_update()

    def refresh(self) -> None:
        """Rebuild the compute parameters from the master weights."""
        if self.master is not self.residency.own:
            self.residency.own.copy_(self.master)
        self.residency.publish()

    def fill(self, fill: Fill) -> None:
        """Write the initial values of the own range. Collective through `publish`."""
        for p, start, stop in self.plan.overlaps(self.low, self.high):
            first = p.offset + start - self.low
            fill(p.name, p.first + start, p.first + stop, self.master[first : first + stop - start])
        self.refresh()

    # -- state -------------------------------------------------------------------------------------------------------

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes this unit holds on this rank by state class, without shared scratch."""
        out = {"param": self.residency.held_bytes}
        if self.master is not self.residency.own:
            out["master"] = self.master.nbytes
        if self.optimizer is not None:
            out |= {name: state.nbytes for name, state in self.optimizer.state.items()}
        return out

    def pieces(self, low: int, high: int) -> Iterator[Piece]:
        """Yield the pieces of weights and optimizer state in flat range [low, high) of the own range."""
        yield from self._cut_pieces("model", self.master, low, high)
        if self.optimizer is not None:
            for name, state in self.optimizer.state.items():
                yield from self._cut_pieces(f"optimizer.{name}", state, low, high)

    def _cut_pieces(self, prefix: str, flat: torch.Tensor, low: int, high: int) -> Iterator[Piece]:
        for p, start, stop in self.plan.overlaps(max(low, self.low), min(high, self.high)):
            at = p.offset + start - self.low
            for box in boxes_of_range(p.global_shape, p.first + start, p.first + stop):
                yield Piece(f"{prefix}.{p.name}", p.global_shape, box, flat[at : at + box.numel].view(box.sizes))
                at += box.numel

    def set_optimizer_steps(self, steps: int) -> None:
        """Tell bias correction how many updates were made."""
        if self.optimizer is not None:
            self.optimizer.set_steps(steps)
