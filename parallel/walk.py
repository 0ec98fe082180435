"""The walk over one pipeline stage: its parts forwards, and back, with autograd running only inside one part at a time.

Between parts plain Python gathers, releases and reduces units, so what is where at which moment is readable here and
needs no hooks on modules. Activations of a part are kept as its autograd graph or rebuilt from its input. Parameters
that a kept graph saved for backward are remembered as a place in their unit, not as memory, so a gathered buffer may
be reused between forward and backward. Several micro-batches may be under way.
Backward is one piece, or two: gradients of inputs now, the products that give weight gradients later.
Must not know: ZeRO stages, optimizers, ranks, schedules. Source of gather on use: arXiv:1910.02054; of recompute: Chen
et al. 2016, arXiv:1604.06174; of the split backward: Qi et al. 2023, arXiv:2401.10241.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from windlass.data.batch import Batch
from windlass.dist.trace import Tracer
from windlass.model.loss import label_log_probs
from windlass.parallel.buffers import Account
from windlass.parallel.deferred import DeferProducts, Product
from windlass.parallel.tiles import TiledWeight, TileUses, plan_passes
from windlass.parallel.unit import Unit
from windlass.parallel.units import ParameterPlan, Part

Gradients = list[tuple[ParameterPlan, torch.Tensor]]


@dataclass(frozen=True)
class Step:
    """One part of the model at run time."""

    part: Part
    units: tuple[Unit, ...]
    keep_graph: bool  # activations are kept from forward to backward
    keep_gathered: bool  # its units stay gathered from forward to backward, which then follows at once
    scheduled: bool = False  # its units are gathered and released by the schedule, not here
    weights: tuple[TiledWeight, ...] = ()  # gathered and released tile by tile where they are used

    @property
    def tiles(self) -> list[Unit]:
        """Units that are tiles."""
        return [unit for weight in self.weights for unit in weight.units]

    @property
    def as_places(self) -> bool:
        """Whether a graph that is kept may outlive the gathered parameters."""
        return self.keep_graph and not self.keep_gathered and any(u.residency.transient for u in self.units)


@dataclass
class _Saved:
    """What backward needs of one part's forward."""

    input: torch.Tensor | None  # the leaf that the graph starts from; None for token ids
    output: torch.Tensor | None  # None: to be recomputed
    held: dict[int, int] = field(default_factory=dict)  # storage -> bytes that were booked for this part
    products: list[Product] = field(default_factory=list)  # weight gradients that wait
    gradients: dict[int, Gradients] = field(default_factory=dict)  # by position of the unit: those that came at once
    uses: TileUses | None = None  # of its tiles, where it has some and a graph was recorded


@dataclass
class _MicroBatch:
    """One micro-batch under way in this stage."""

    batch: Batch
    context: Any
    saved: list[_Saved]
    booked: set[int] = field(default_factory=set)  # storages whose bytes are booked
    rebuilt: bool = False  # what was not kept was recomputed ahead of backward


class Walk:
    """Runs micro-batches through the parts of one stage.

    `wants_input`: something before this stage is trained, so the gradient of its input is needed. `split`: backward
    comes in two pieces. `account` is told of the bytes that wait for backward, where somebody has a budget for them.
    Invariant: every rank issues the same gathers and reductions in the same order, because the order is the list.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        wants_input: bool,
        split: bool,
        tracer: Tracer,
        account: Account | None = None,
    ) -> None:
        self.steps = list(steps)
        self._split, self._tracer, self._account = split, tracer, account
        # Where the schedule gathers, it also says when.
        self._reach = max((u.residency.reach for s in steps for u in s.units if not s.scheduled), default=0)
        last = len(self.steps) - 1
        trainable = [i for i, s in enumerate(self.steps) if any(u.reducer is not None for u in (*s.units, *s.tiles))]
        # The backward walk ends at the first part that has something to train, or somebody before it who waits.
        self._first_backward = 0 if wants_input else trainable[0] if trainable else last + 1
        self._wants_input = wants_input
        self._order_forward = list(range(last + 1))
        self._order_backward = list(range(last, self._first_backward - 1, -1))
        # A unit read by several parts is complete once the earliest of them has run backward.
        self._completes: dict[int, list[Unit]] = {i: [] for i in self._order_forward}
        seen: set[int] = set()
        for i, step in enumerate(self.steps):
            for unit in step.units:
                if unit.reducer is not None and id(unit) not in seen:
                    seen.add(id(unit))
                    self._completes[i].append(unit)
        self._passes = plan_passes([(s.weights, not s.keep_graph) for s in self.steps], self._first_backward)
        self._under_way: dict[int, _MicroBatch] = {}

    @property
    def tiles(self) -> list[Unit]:
        """Units that this stage reads one after another, on its own account."""
        return [unit for step in self.steps for unit in step.tiles]

    @property
    def units(self) -> list[Unit]:
        """Units that this stage reads, but for tiles."""
        return list({id(u): u for step in self.steps for u in step.units}.values())

    @property
    def completed_units(self) -> list[Unit]:
        """Units whose gradients this stage completes, in no matter which of its parts."""
        whole = [unit for units in self._completes.values() for unit in units]
        return whole + [unit for unit in self.tiles if unit.reducer is not None]

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, number: int, h: torch.Tensor | None, batch: Batch, context: Any) -> torch.Tensor:
        """Run micro-batch `number` forwards and remember what backward needs; return the output, detached.

        Collective:  every rank of the shard group, in the same order
        """
        run = self._under_way[number] = _MicroBatch(batch, context, [])
        for i in self._order_forward:
            step = self.steps[i]
            with self._tracer.span(f"forward {step.part.name}", "parts"):
                self._bring(self._order_forward, i)
                keep = step.keep_graph and i >= self._first_backward
                leaf = None if h is None else h.detach().requires_grad_(i > self._first_backward or self._wants_input)
                saved = _Saved(leaf, None)
                if i >= self._first_backward:
                    self._book(run, saved, leaf)
                with (
                    torch.enable_grad() if keep else torch.no_grad(),
                    self._recording(step, run, saved, keep, "forward"),
                ):
                    out = self._call(step.part, leaf, batch, context)
                self._advance(self._order_forward, i)
                saved.output = out if keep else None
                run.saved.append(saved)
                h = out.detach()
                self._drop(step, "forward", keep=step.keep_gathered and i >= self._first_backward)
        assert h is not None
        return h

    @torch.no_grad()
    def evaluate(self, h: torch.Tensor | None, batch: Batch, context: Any, *, per_token: bool = False) -> torch.Tensor:
        """Run one micro-batch forwards without gradients and forget it.

        `per_token`: a head returns the log-probability of every label, logp_BT, instead of the loss sum.
        """
        for i in self._order_forward:
            step = self.steps[i]
            with self._tracer.span(f"evaluate {step.part.name}", "parts"):
                self._bring(self._order_forward, i)
                if per_token and step.part.role == "head" and h is not None:
                    h = label_log_probs(step.part.module, h, batch.labels_BT)
                else:
                    with TileUses(step.weights, self._passes["forward"]).calls() if step.weights else nullcontext():
                        h = self._call(step.part, h, batch, context)
                self._advance(self._order_forward, i)
                self._drop(step, "forward")
        assert h is not None
        return h

    # -- backward ----------------------------------------------------------------------------------------------------

    def rebuild(self, number: int) -> None:
        """Recompute what forward of micro-batch `number` did not keep, before its backward needs it."""
        run = self._under_way[number]
        run.rebuilt = True
        for i in self._order_backward:
            step, saved = self.steps[i], run.saved[i]
            if saved.output is None:
                for unit in step.units:
                    unit.ready()
                self._recompute(step, saved, run, "rebuild")
                self._drop(step, "rebuild")

    def both_gradients(self, number: int, gradient: torch.Tensor, *, complete: bool) -> torch.Tensor | None:
        """Run micro-batch `number` backwards; return the gradient of the stage's input where it is wanted.

        `complete` says that the gradients gathered up so far may be reduced.
        Collective:  every rank of the shard group, in the same order
        """
        below: torch.Tensor | None = gradient
        run = self._under_way.pop(number)
        for i in self._order_backward:
            with self._tracer.span(f"backward {self.steps[i].part.name}", "parts"):
                below = self._back(i, run, below)
                self._hand_in(i, run.saved[i], complete)
        return below if self._wants_input else None

    def input_gradient(self, number: int, gradient: torch.Tensor) -> torch.Tensor | None:
        """Run the first piece of backward: the gradient of the input. Products for weights wait for the second."""
        below: torch.Tensor | None = gradient
        run = self._under_way[number]
        for i in self._order_backward:
            with self._tracer.span(f"input gradient {self.steps[i].part.name}", "parts"):
                below = self._back(i, run, below)
        return below if self._wants_input else None

    def weight_gradient(self, number: int, *, complete: bool) -> None:
        """Run the second piece of backward: form the weight gradients and hand all of them to the reducers."""
        run = self._under_way.pop(number)
        for i in self._order_backward:
            with self._tracer.span(f"weight gradient {self.steps[i].part.name}", "parts"):
                self._hand_in(i, run.saved[i], complete)

    def _back(self, i: int, run: _MicroBatch, gradient: torch.Tensor | None) -> torch.Tensor | None:
        step, saved = self.steps[i], run.saved[i]
        passed = "backward" if run.rebuilt else "recompute"
        self._bring(self._order_backward, len(self.steps) - 1 - i)
        if saved.output is None:
            self._recompute(step, saved, run, passed)
        if saved.uses is not None:
            saved.uses.now = self._passes[passed]
        below = self._differentiate(step, saved, gradient)
        self._advance(self._order_backward, len(self.steps) - 1 - i)
        self._strike(run, saved)
        self._drop(step, passed)
        return below

    def _recompute(self, step: Step, saved: _Saved, run: _MicroBatch, passed: str) -> None:
        with torch.enable_grad(), self._recording(step, run, saved, True, passed):
            saved.output = self._call(step.part, saved.input, run.batch, run.context)

    def _differentiate(self, step: Step, saved: _Saved, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Run autograd inside one part; note the parameters' gradients and return that of the input."""
        assert saved.output is not None
        trainable = [(u, p, parameter) for u, unit in enumerate(step.units) for p, parameter in unit.trainable()]
        inputs: list[torch.Tensor] = [parameter for _, _, parameter in trainable]
        # Gradients of tiles are formed on the way; asking for those of their weights says that they are wanted.
        inputs += [weight.parameter for weight in step.weights if weight.trained]
        wants_input = saved.input is not None and saved.input.requires_grad
        if wants_input:
            assert saved.input is not None
            inputs.append(saved.input)
        if not saved.output.requires_grad or gradient is None:
            return None
        found = list(torch.autograd.grad(saved.output, inputs, gradient, allow_unused=True))
        saved.output = None
        below = found.pop() if wants_input else None
        if wants_input and below is None:
            assert saved.input is not None
            below = torch.zeros_like(saved.input)
        for (u, p, _), g in zip(trainable, found[: len(trainable)], strict=True):
            if g is not None:
                saved.gradients.setdefault(u, []).append((p, g))
        saved.input = None
        return below

    def _hand_in(self, i: int, saved: _Saved, complete: bool) -> None:
        """Give a part's gradients to the reducers."""
        step = self.steps[i]
        if saved.products:
            plans = {id(parameter): (u, p) for u, unit in enumerate(step.units) for p, parameter in unit.trainable()}
            for product in saved.products:
                u, p = plans[id(product.parameter)]
                saved.gradients.setdefault(u, []).append((p, product.compute()))
            saved.products.clear()
        for u, gradients in saved.gradients.items():
            reducer = step.units[u].reducer
            assert reducer is not None
            reducer.add(gradients)
        saved.gradients.clear()
        if saved.uses is not None:
            saved.uses.hand_in(complete=complete)
        if complete:
            for unit in self._completes[i]:
                unit.complete()

    # ----------------------------------------------------------------------------------------------------------------

    def _call(self, part: Part, h: torch.Tensor | None, batch: Batch, context: Any) -> torch.Tensor:
        module: Any = part.module
        out: torch.Tensor
        if part.role == "embed":
            out = module(batch.tokens_BT, context)
        elif part.role == "place":
            out = module.place(h, context)
        elif part.role == "norm":
            out = module(h)
        elif part.role == "head":
            weights = () if batch.weights_BT is None else (batch.weights_BT,)
            out = module(h, batch.labels_BT, *weights)
        else:
            out = module(h, context)
        return out

    def _bring(self, order: Sequence[int], position: int) -> None:
        """Make this part's units ready, and begin to gather those of the next parts in walk order."""
        for distance, ahead in enumerate(order[position : position + 1 + self._reach]):
            for unit in self.steps[ahead].units:
                unit.residency.approach(distance)
        for unit in self.steps[order[position]].units:
            unit.ready()

    def _advance(self, order: Sequence[int], position: int) -> None:
        """Begin what had to wait until this part's work was issued, for the next parts in walk order."""
        for distance, ahead in enumerate(order[position + 1 : position + 1 + self._reach], 1):
            for unit in self.steps[ahead].units:
                unit.residency.advance(distance)

    def _drop(self, step: Step, passed: str, *, keep: bool = False) -> None:
        self._passes[passed].drop(step.weights)
        if not keep and not step.scheduled:
            for unit in step.units:
                unit.release()

    def _recording(
        self, step: Step, run: _MicroBatch, saved: _Saved, keep: bool, passed: str
    ) -> AbstractContextManager[Any]:
        """Record a graph so that gathered buffers can be reused, weight products can wait and bytes are booked."""
        recording = ExitStack()
        if step.weights:
            saved.uses = TileUses(step.weights, self._passes[passed], split=self._split)
            recording.enter_context(saved.uses.calls())
        if not keep or not (self._split or step.as_places or self._account is not None):
            return recording
        if step.as_places or self._account is not None:
            where = {unit.ready().untyped_storage().data_ptr(): unit for unit in step.units}

            def pack(tensor: torch.Tensor) -> torch.Tensor | _Place:
                unit = where.get(tensor.untyped_storage().data_ptr())
                if unit is None:
                    self._book(run, saved, tensor)
                elif step.as_places:
                    return _Place(unit, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
                return tensor

            recording.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _unpack))
        if self._split:
            parameters = [parameter for unit in step.units for _, parameter in unit.trainable()]
            recording.enter_context(DeferProducts(parameters, saved.products))
        return recording

    def _book(self, run: _MicroBatch, saved: _Saved, tensor: torch.Tensor | None) -> None:
        """Book memory that waits for this part's backward, once for all that share it."""
        if self._account is None or tensor is None:
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in run.booked:
            self._account("activation", storage.nbytes())
            run.booked.add(storage.data_ptr())
            saved.held[storage.data_ptr()] = storage.nbytes()

    def _strike(self, run: _MicroBatch, saved: _Saved) -> None:
        """Take the bytes of a part off the books when its backward is done."""
        if self._account is not None and saved.held:
            self._account("activation", -sum(saved.held.values()))
            run.booked.difference_update(saved.held)
            saved.held.clear()


@dataclass(frozen=True)
class _Place:
    """A tensor saved for backward that lies in a gathered unit."""

    unit: Unit
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: torch.Tensor | _Place) -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    return saved.unit.ready().as_strided(saved.size, saved.stride, saved.offset)
