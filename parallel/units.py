"""Units: the parameters that are gathered, reduced and stepped together, laid out flat. Pure planning, no memory.

A unit is one part of the model (embedding, one block, head); its frozen parameters form a second unit, because they
are gathered but never reduced or stepped. Inside a unit, parameters with weight decay come first, so that a shard cut
anywhere needs at most two optimizer groups. Every parameter starts at a multiple of `ALIGN` elements and the whole is
padded to a multiple of `ALIGN` per shard: then kernels see the same alignment under every cut, which is what makes
the stages of ZeRO bitwise equal. Must not know: process groups, devices, dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from windlass.model.protocol import BlockModel

ALIGN = 64  # elements; a cache line of bf16 holds 32, and vector loops of 64 never leave a scalar tail


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class ParameterPlan:
    """Where one parameter lies in the flat buffer of its unit (offset and numel in elements)."""

    name: str
    shape: tuple[int, ...]
    numel: int
    offset: int
    decay: bool


@dataclass(frozen=True)
class UnitPlan:
    """The flat layout of one unit, cut into `num_shards` equal boxes."""

    name: str
    trainable: bool
    parameters: tuple[ParameterPlan, ...]
    decay_end: int  # elements [0, decay_end) are subject to weight decay
    padded: int  # elements of the flat buffer
    num_shards: int

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def shard_numel(self) -> int:
        return self.padded // self.num_shards

    def box(self, shard: int) -> tuple[int, int]:
        """Return the element range of one shard."""
        return shard * self.shard_numel, (shard + 1) * self.shard_numel

    def overlaps(self, low: int, high: int) -> Iterator[tuple[ParameterPlan, int, int]]:
        """Yield (parameter, start, stop): the elements of each parameter that fall into flat range [low, high)."""
        for p in self.parameters:
            start, stop = max(low - p.offset, 0), min(high - p.offset, p.numel)
            if start < stop:
                yield p, start, stop


@dataclass(frozen=True)
class StagePlan:
    """One step of the walk: a part of the model and the units it reads (its own, and that of a tied parameter)."""

    name: str
    units: tuple[int, ...]


@dataclass(frozen=True)
class ModelPlan:
    """Units, and the order in which the walk uses them."""

    units: tuple[UnitPlan, ...]
    stages: tuple[StagePlan, ...]

    @property
    def numel(self) -> int:
        return sum(u.numel for u in self.units)

    @property
    def trainable_numel(self) -> int:
        return sum(u.numel for u in self.units if u.trainable)


def model_parts(model: BlockModel) -> list[tuple[str, nn.Module]]:
    """Return the parts of a model in walk order, by checkpoint name."""
    return [("embed", model.embed), *((f"blocks.{i}", b) for i, b in enumerate(model.blocks)), ("head", model.head)]


def plan_units(model: BlockModel, num_shards: int) -> ModelPlan:
    """Lay out the parameters of a model (on any device, meta included) in units cut into `num_shards`.

    A parameter shared by two parts belongs to the first; the second part lists that unit among those it reads.
    """
    owner: dict[int, int] = {}  # id(parameter) -> unit index
    units: list[UnitPlan] = []
    stages: list[StagePlan] = []
    for part, module in model_parts(model):
        used: list[int] = []
        fresh: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
        for name, parameter in module.named_parameters():
            if id(parameter) in owner:
                used.append(owner[id(parameter)])
            else:
                fresh[parameter.requires_grad].append((f"{part}.{name}", parameter))
        for trainable, members in fresh.items():
            if members:
                for _, parameter in members:
                    owner[id(parameter)] = len(units)
                used.append(len(units))
                units.append(_lay_out(part if trainable else f"{part}.frozen", trainable, members, num_shards))
        stages.append(StagePlan(part, tuple(sorted(set(used)))))
    return ModelPlan(tuple(units), tuple(stages))


def _lay_out(name: str, trainable: bool, members: list[tuple[str, nn.Parameter]], num_shards: int) -> UnitPlan:
    # Biases and norm gains (fewer than two dims) are not decayed: the usual rule of GPT-style training.
    ordered = sorted(members, key=lambda m: m[1].dim() < 2)
    plans: list[ParameterPlan] = []
    end = decay_end = 0
    for parameter_name, parameter in ordered:
        decay = parameter.dim() >= 2
        plans.append(ParameterPlan(parameter_name, tuple(parameter.shape), parameter.numel(), end, decay))
        end = _up(end + parameter.numel(), ALIGN)
        decay_end = end if decay else decay_end
    return UnitPlan(name, trainable, tuple(plans), decay_end, _up(end, ALIGN * num_shards), num_shards)
