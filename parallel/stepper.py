"""The update of one step: what happens to a unit from its last reduction to new parameters, and in which order.

Units whose state stays on the device are updated when the norm of all gradients is known. Those with records may begin
as their gradients arrive during backward (`when` of the plan); what they wrote becomes the state only when the norm is
known and asks for no other scale, else it is forgotten, and made again with the right one. Adam is never inverted.
Must not know: where records rest, how gradients are formed.
Source: Liao et al. 2024, arXiv:2403.06504 (updates during backward); speculation with shadow records instead of
reversing updates, so that the result is exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from windlass.offload.lane import PRIORITY
from windlass.offload.machine import OffloadMachine
from windlass.offload.store import Lease
from windlass.parallel.unit import Unit
from windlass.parallel.unit_records import StateInRecords
from windlass.parallel.unit_state import StateOnDevice

LAG = 1  # reductions under way before the oldest is waited for


class Stepper:
    """Updates the trainable units of one rank.

    Collective:  `settle` and `finish`, and what hears of completed units; all ranks go through units in one order
    Invariant:   exactly one update per unit and step, with the scale that the norm asks for, or none at all
    """

    def __init__(self, units: Sequence[Unit], *, clips: bool, machine: OffloadMachine | None) -> None:
        self._units, self._clips, self._machine = list(units), clips, machine
        self._recorded = [u for u in units if isinstance(u.state, StateInRecords)]
        for unit in self._recorded:
            unit.on_complete = self._completed
        self._squares: dict[str, torch.Tensor] = {}
        self._reducing: deque[tuple[Unit, bool]] = deque()
        self._shared: list[Unit] = []  # that wait for the end of backward
        self._arrived: list[Unit] = []  # of the step under way, in order
        self._loads: dict[str, Future[Lease]] = {}
        self._order: list[tuple[Unit, int]] = []  # records in the order of arrival, as the last step had it
        self._updates: list[Future[None]] = []
        self._speculating = self._begun = False
        self._clipped = False  # the last step's scale was not 1
        self._steps, self._lr = 0, 0.0

    def set_steps(self, steps: int) -> None:
        """Say how many updates were made."""
        self._steps = steps
        for unit in self._units:
            unit.state.set_steps(steps)

    def begin(self, lr: float) -> None:
        """Begin a step."""
        plan = None if self._machine is None else self._machine.plan
        self._lr, self._begun = lr, False
        # A step that follows a clipped one is likely to be clipped: its updates would be made twice.
        likely = plan is not None and not (self._clipped and self._clips)
        self._speculating = plan is not None and plan.when == "backward" and plan.shadowed and likely
        self._squares.clear()
        self._arrived.clear()

    # -- during backward ---------------------------------------------------------------------------------------------

    def _completed(self, unit: Unit, last: bool) -> None:
        """Reduce what a unit's gradients hold now; one that was under way has arrived by then."""
        assert unit.reducer is not None
        if not self._begun:
            self._begun = True
            self._read_ahead()
        while any(waiting is unit for waiting, _ in self._reducing):
            self._arrive(*self._reducing.popleft())
        unit.reducer.complete(last)
        if last and unit.plan.shared:  # its sum is taken with another pipeline rank, which is elsewhere in its schedule
            self._shared.append(unit)
            return
        self._reducing.append((unit, last))
        while len(self._reducing) > (0 if unit.reducer.handed_over else LAG):
            self._arrive(*self._reducing.popleft())

    def _arrive(self, unit: Unit, last: bool) -> None:
        assert unit.reducer is not None
        if not last:
            unit.reducer.settle()
            unit.reducer.home.settled(last=False)
            return
        unit.reducer.finish()
        self._squares[unit.plan.name] = sum_of_squares(unit.reducer.grad)
        unit.reducer.home.settled(last=True)
        self._arrived.append(unit)
        if self._speculating:
            self._expect_next(unit)
            self._update([(unit, i) for i in range(_records(unit).num_chunks)], 1.0)

    def _read_ahead(self) -> None:
        """Begin to fetch records in the order in which they will be updated; slabs say how far ahead."""
        assert self._machine is not None
        for unit, i in self._in_order():
            key = _records(unit).key(i)
            self._loads[key] = self._machine.store.fetch(key, priority=PRIORITY["write"])

    def _expect_next(self, unit: Unit) -> None:
        """Give up what was fetched ahead if units arrive in another order than in the last step.

        Records wait in slabs for their gradients; waiting for slabs in another order than gradients come could end.
        """
        waiting = next(iter(self._loads), "")
        if waiting and waiting not in _records(unit).keys:
            self._forget_loads()

    def _forget_loads(self) -> None:
        assert self._machine is not None
        loads, self._loads = self._loads, {}
        for key, load in loads.items():
            lease = self._machine.lanes.wait(load, key)
            self._machine.store.drop(lease)

    # -- when backward is done ---------------------------------------------------------------------------------------

    def settle(self) -> list[torch.Tensor]:
        """Wait for all reductions; return the sums of squares of this rank's gradients, in the order of units."""
        while self._reducing:
            self._arrive(*self._reducing.popleft())
        while self._shared:
            self._arrive(self._shared.pop(0), last=True)
        for unit in self._units:
            if unit.plan.name not in self._squares:
                assert unit.reducer is not None
                unit.reducer.finish()
                self._squares[unit.plan.name] = sum_of_squares(unit.reducer.grad)
        # A unit that another pipeline rank owns is counted there.
        return [self._squares[u.plan.name] for u in self._units if not u.plan.borrowed]

    def finish(self, scale: float, *, skipped: bool, between: Callable[[], object] = lambda: None) -> None:
        """Make the updates with the gradients times `scale`, or none if the step is skipped.

        `between` is called between the updates of units, where state is half of one step and half of the next.
        """
        for number, unit in enumerate(self._units):
            if number:
                between()
            if isinstance(unit.state, StateOnDevice):
                if skipped:
                    unit.state.skip()
                else:
                    unit.state.update(self._lr, scale)
        if self._recorded:
            self._finish_records(scale, skipped=skipped)
        self._steps += not skipped
        self._clipped = scale != 1.0

    def _finish_records(self, scale: float, *, skipped: bool) -> None:
        assert self._machine is not None
        speculated = self._speculating
        self._speculating = False
        if speculated:
            self._wait()
            self._order = [(u, i) for u in self._arrived for i in range(_records(u).num_chunks)]
        if skipped:
            self._forget_loads()
            if speculated:
                self._undo()
            for unit in self._recorded:
                assert unit.reducer is not None  # nobody used its gradient, so nobody waited for it
                self._machine.lanes.wait(unit.reducer.home.rested(), f"gradient {unit.plan.name}")
            return
        if not speculated or scale != 1.0:
            if speculated:
                self._machine.store.roll_back()
            order = [(u, i) for u in self._arrived for i in range(_records(u).num_chunks)]
            if order != self._order:
                self._forget_loads()
                self._order = order
            self._update(self._in_order(), scale)
            self._wait()
        self._machine.store.commit()
        for unit in self._recorded:
            unit.residency.publish()

    def _undo(self) -> None:
        """Forget the updates that were made, and the parameters that came of them."""
        assert self._machine is not None
        self._machine.store.roll_back()
        for unit in self._recorded:
            unit.state.set_steps(self._steps)
            unit.state.refresh()

    def _in_order(self) -> list[tuple[Unit, int]]:
        """Return the records in the order in which this step updates them."""
        assert self._machine is not None
        back = self._machine.plan.order == "alternate" and self._steps % 2
        return self._order[::-1] if back and not self._speculating else list(self._order)

    def _update(self, records: Sequence[tuple[Unit, int]], scale: float) -> None:
        """Begin the updates of these records."""
        machine = self._machine
        assert machine is not None
        kept = self._kept(records)
        last = {id(unit): number for number, (unit, _) in enumerate(records)}
        first = {id(unit): number for number, (unit, _) in reversed(list(enumerate(records)))}
        begun: dict[int, list[Future[None]]] = {}
        for number, (unit, i) in enumerate(records):
            state = _records(unit)
            if first[id(unit)] == number:
                unit.residency.writable()
            key = state.key(i)
            fetched = self._loads.pop(key, None) or machine.store.fetch(key, priority=PRIORITY["write"])
            done = state.update(i, fetched, steps=self._steps + 1, lr=self._lr, scale=scale, keep=key in kept)
            begun.setdefault(id(unit), []).append(done)
            self._updates.append(done)
            if last[id(unit)] == number:
                stamp: Callable[[], Any] = _stamper(state, self._steps + 1)
                self._updates.append(machine.lanes.then(begun[id(unit)], stamp))

    def _kept(self, records: Sequence[tuple[Unit, int]]) -> set[str]:
        """Return the keys of the records that stay in host memory until the next step, which begins with them."""
        assert self._machine is not None
        plan, store = self._machine.plan, self._machine.store
        if not plan.cache or plan.shadowed:
            return set()
        on_file = [key for key in (_records(u).key(i) for u, i in records) if store.on_file(key)]
        return set(on_file[-plan.cache :])

    def _wait(self) -> None:
        assert self._machine is not None
        updates, self._updates = self._updates, []
        self._machine.lanes.wait(self._machine.lanes.all(updates, "updates"), "updates")


def _records(unit: Unit) -> StateInRecords:
    assert isinstance(unit.state, StateInRecords)
    return unit.state


def _stamper(state: StateInRecords, steps: int) -> Callable[[], None]:
    return lambda: state.set_steps(steps)


def sum_of_squares(flat: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares in fp64; 16-bit gradients are summed in fp32."""
    dtype = torch.float32 if flat.dtype == torch.bfloat16 else flat.dtype
    return torch.linalg.vector_norm(flat, dtype=dtype).double().square()
