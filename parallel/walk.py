"""The walk: embed -> blocks -> head forwards, and back, with autograd running only inside one part at a time.

Between parts plain Python gathers, releases and reduces units, so what is where at which moment is readable here and
needs no hooks on modules. Activations of a part are kept as its autograd graph or rebuilt from its input. Parameters
that a kept graph saved for backward are remembered as a place in their unit, not as memory, so a gathered buffer may
be reused between forward and backward.
Must not know: ZeRO stages, optimizers, ranks. Source of gather on use: arXiv:1910.02054; of recompute: Chen et al.
2016, arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from windlass.data.batch import Batch
from windlass.dist.trace import Tracer
from windlass.model.protocol import BlockModel
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.unit import Unit
from windlass.parallel.units import ModelPlan, model_parts


@dataclass(frozen=True)
class Stage:
    """One part of the model at run time."""

    name: str
    module: nn.Module
    units: tuple[Unit, ...]
    keep_graph: bool  # activations are kept from forward to backward
    keep_gathered: bool  # its units stay gathered from forward to backward


@dataclass
class _Saved:
    """What backward needs of a stage's forward."""

    input: torch.Tensor | None  # the leaf that the graph starts from; None for the embedding
    output: torch.Tensor | None  # None: to be recomputed


@dataclass(frozen=True)
class _Place:
    """A tensor saved for backward that lies in a gathered unit."""

    unit: Unit
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def plan_stages(
    model: BlockModel, plan: ModelPlan, units: Sequence[Unit], activation: ActivationConfig, reshard: str
) -> list[Stage]:
    """Say for every part of the model what is kept between its forward and its backward."""
    parts = model_parts(model)
    stages = []
    for i, ((name, module), stage) in enumerate(zip(parts, plan.stages, strict=True)):
        block = 0 < i < len(parts) - 1
        recompute = activation.policy == "recompute" and block and (i - 1) % activation.every == 0
        # The head's backward follows its forward, and the last block's follows that: keeping both costs no memory
        # beyond the prefetch buffers, which have nothing to prefetch at that moment.
        turnaround = reshard == "turnaround" and i >= len(parts) - 2
        own = tuple(units[u] for u in stage.units)
        resident = not any(unit.residency.transient for unit in own)
        stages.append(Stage(name, module, own, not recompute, resident or reshard == "never" or turnaround))
    return stages


class Walk:
    """Runs micro-batches through the stages.

    Invariant: every rank issues the same gathers and reductions in the same order, because the order is the list.
    """

    def __init__(
        self, model: BlockModel, stages: Sequence[Stage], prefetch: int, dtype: torch.dtype, tracer: Tracer
    ) -> None:
        self._model = model
        self._stages = list(stages)
        self._prefetch = prefetch
        self._dtype = dtype
        self._tracer = tracer
        last = len(self._stages) - 1
        # The backward walk ends at the first stage that has something to train.
        trainable = [i for i, s in enumerate(self._stages) if any(u.reducer is not None for u in s.units)]
        self._first_backward = trainable[0] if trainable else last + 1
        self._order_forward = list(range(last + 1))
        self._order_backward = list(range(last, self._first_backward - 1, -1))
        # A tied unit is complete once the earliest stage that reads it has run backward.
        self._completes: dict[int, list[Unit]] = {i: [] for i in self._order_forward}
        seen: set[int] = set()
        for i, stage in enumerate(self._stages):
            for unit in stage.units:
                if unit.reducer is not None and id(unit) not in seen:
                    seen.add(id(unit))
                    self._completes[i].append(unit)

    def forward_backward(self, batch: Batch, seed: float, last: bool) -> torch.Tensor:
        """Run one micro-batch both ways; return the loss summed over its valid tokens (detached, on its device).

        `seed` multiplies the loss where backward starts: one over the global number of valid tokens. `last` says that
        no further micro-batch of this step follows.

        Collective:  every rank of the shard group, once per micro-batch
        """
        context = self._context(batch)
        saved: list[_Saved] = []
        h: torch.Tensor | None = None
        for i in self._order_forward:
            stage = self._stages[i]
            with self._tracer.span(f"forward {stage.name}", "compute"):
                self._bring(self._order_forward, i)
                keep = stage.keep_graph and i >= self._first_backward
                leaf = None if h is None else h.detach().requires_grad_(i > self._first_backward)
                with torch.enable_grad() if keep else torch.no_grad(), self._saving(stage):
                    out = self._run(stage, leaf, batch, context)
                saved.append(_Saved(leaf, out if keep else None))
                h = out.detach()
                self._drop(stage, keep=stage.keep_gathered and i >= self._first_backward)
        assert h is not None
        loss = h
        gradient: torch.Tensor | None = torch.full_like(loss, seed)
        for i in self._order_backward:
            stage = self._stages[i]
            with self._tracer.span(f"backward {stage.name}", "compute"):
                self._bring(self._order_backward, len(self._stages) - 1 - i)
                record, saved[i] = saved[i], _Saved(None, None)
                if record.output is None:
                    with torch.enable_grad():
                        record.output = self._run(stage, record.input, batch, context)
                gradient = self._differentiate(stage, record, gradient)
                self._drop(stage, keep=False)
                for unit in self._completes[i]:
                    assert unit.reducer is not None
                    unit.reducer.complete(last)
        return loss

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the loss summed over the valid tokens of one micro-batch, without gradients."""
        context = self._context(batch)
        h: torch.Tensor | None = None
        for i in self._order_forward:
            stage = self._stages[i]
            with self._tracer.span(f"evaluate {stage.name}", "compute"):
                self._bring(self._order_forward, i)
                h = self._run(stage, h, batch, context)
                self._drop(stage, keep=False)
        assert h is not None
        return h

    def _context(self, batch: Batch) -> Any:
        with torch.no_grad():
            return self._model.context(batch.positions_BT, batch.documents_BT, self._dtype)

    def _run(self, stage: Stage, h: torch.Tensor | None, batch: Batch, context: Any) -> torch.Tensor:
        out: torch.Tensor
        if stage is self._stages[0]:
            out = stage.module(batch.tokens_BT, context)
        elif stage is self._stages[-1]:
            out = stage.module(h, batch.labels_BT)
        else:
            out = stage.module(h, context)
        return out

    def _differentiate(self, stage: Stage, record: _Saved, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Run autograd inside one stage; hand parameter gradients to the reducers, return that of the input."""
        assert record.output is not None
        trainable = [(unit, p, parameter) for unit in stage.units for p, parameter in unit.trainable()]
        inputs: list[torch.Tensor] = [parameter for _, _, parameter in trainable]
        wants_input = record.input is not None and record.input.requires_grad
        if wants_input:
            assert record.input is not None
            inputs.append(record.input)
        if not record.output.requires_grad:
            return None
        found = list(torch.autograd.grad(record.output, inputs, gradient, allow_unused=True))
        record.output = None
        below = found.pop() if wants_input else None
        if wants_input and below is None:
            assert record.input is not None
            below = torch.zeros_like(record.input)
        by_unit: dict[int, list[Any]] = {}
        for (unit, p, _), g in zip(trainable, found, strict=True):
            if g is not None:
                by_unit.setdefault(id(unit), []).append((p, g))
        for unit in stage.units:
            if id(unit) in by_unit:
                assert unit.reducer is not None
                unit.reducer.add(by_unit.pop(id(unit)))
        return below

    def _bring(self, order: Sequence[int], position: int) -> None:
        """Make this stage's units ready, and begin to gather those of the next stages in walk order."""
        for ahead in order[position : position + 1 + self._prefetch]:
            for unit in self._stages[ahead].units:
                unit.residency.start()
        for unit in self._stages[order[position]].units:
            unit.ready()

    def _drop(self, stage: Stage, keep: bool) -> None:
        if not keep:
            for unit in stage.units:
                unit.release()

    @contextmanager
    def _saving(self, stage: Stage) -> Iterator[None]:
        """Record saved parameters of a released stage as places, so that the gathered buffer can be reused."""
        if stage.keep_gathered or not stage.keep_graph:
            yield
            return
        where = {unit.ready().untyped_storage().data_ptr(): unit for unit in stage.units}
        with torch.autograd.graph.saved_tensors_hooks(_packer(where), _unpack):
            yield


def _packer(where: dict[int, Unit]) -> Callable[[torch.Tensor], torch.Tensor | _Place]:
    def pack(tensor: torch.Tensor) -> torch.Tensor | _Place:
        unit = where.get(tensor.untyped_storage().data_ptr())
        return tensor if unit is None else _Place(unit, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    return pack


def _unpack(saved: torch.Tensor | _Place) -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    return saved.unit.ready().as_strided(saved.size, saved.stride, saved.offset)
