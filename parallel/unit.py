"""One unit at run time: its flat parameters bound to the model's, its gradients, and the state behind them.

Must not know: which stage of ZeRO made it, where state rests; residency, reducer and state carry that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from windlass.parallel.reducer import Reducer
from windlass.parallel.residency import Residency
from windlass.parallel.unit_state import UnitState
from windlass.parallel.units import ParameterPlan, UnitPlan

Completed = Callable[["Unit", bool], None]


class Unit:
    """Parameters, gradients and optimizer state of one unit on one rank.

    `low, high` is the flat range this rank updates (the whole when replicated). `on_complete(unit, last)` hears when
    gradients are being reduced.
    """

    def __init__(
        self,
        plan: UnitPlan,
        parameters: list[nn.Parameter],
        residency: Residency,
        reducer: Reducer | None,
        state: UnitState,
        own_range: tuple[int, int],
    ) -> None:
        self.plan = plan
        self.parameters = parameters
        self.residency = residency
        self.reducer = reducer
        self.state = state
        self.low, self.high = own_range
        self.on_complete: Completed | None = None
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
        if self._bound is not None and self.residency.transient and self._bound.device.type != "cpu":
            # Off the CPU a released buffer is freed, which the parameters' views of it would prevent.
            nothing = self._bound.new_empty(0)
            for parameter in self.parameters:
                parameter.data = nothing
            self._bound = None

    def trainable(self) -> Iterator[tuple[ParameterPlan, nn.Parameter]]:
        if self.reducer is not None:
            yield from zip(self.plan.parameters, self.parameters, strict=True)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def expect(self, completions: int) -> None:
        """Say how often `complete` is called in the step that begins."""
        self._uses, self._completed = completions, 0

    def complete(self) -> None:
        """Say that what was added to the gradients so far may be reduced; the last call of a step reduces the rest."""
        if self.reducer is None:
            return
        self._completed += 1
        last = self._completed == self._uses
        if self.on_complete is None:
            self.reducer.complete(last)
        else:
            self.on_complete(self, last)

    @property
    def completed(self) -> bool:
        """Whether this step adds no more to the gradients, so that the parameters may be rewritten from now on."""
        return self.reducer is not None and self._completed == self._uses

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes this unit holds on this rank's device by state class, without shared scratch."""
        held = {"param": self.residency.held_bytes} if self.residency.held_bytes else {}
        return held | self.state.state_bytes()
