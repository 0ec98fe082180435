"""Units: the parameters that are gathered, reduced and stepped together, laid out flat. Pure planning, no memory.

A unit is one part of the model (embedding, one block, head); its frozen parameters form a second unit, because they
are gathered but never reduced or stepped. A pipeline rank plans the parts of its own stages only; where the vocabulary
is cut over the ranks, its rows of the embedding and of the output projection are units of their own; so are the tiles
of weights that are too large to be gathered at once. Inside a unit,
parameters with weight decay come first, so that a shard cut anywhere needs at most two optimizer groups. Every
parameter starts at a multiple of `ALIGN` elements and the whole is padded to a multiple of `ALIGN` per shard: then
kernels see the same alignment under every cut, which is what makes the stages of ZeRO bitwise equal.
Must not know: process groups, devices, dtypes, the order in which stages run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from windlass.dist.errors import PlanError
from windlass.model.protocol import BlockModel
from windlass.parallel.tiling import cut_rows, tiled_weights
from windlass.parallel.vocab.shard import VocabShard

ALIGN = 64  # elements; a cache line of bf16 holds 32, and vector loops of 64 never leave a scalar tail


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class StageSpan:
    """One pipeline stage: its number and blocks [first, last); whether it starts and whether it ends the model."""

    number: int
    first: int
    last: int
    begins: bool
    ends: bool


@dataclass(frozen=True)
class RankShare:
    """What one pipeline rank holds of a model: its stages, and its rows of the vocabulary where that is cut."""

    stages: tuple[StageSpan, ...]
    shard: VocabShard | None = None
    tied_to_peer: bool = False  # a tied embedding lies on two ranks: the first stage's and, as a copy, the last one's

    @staticmethod
    def whole(num_blocks: int) -> RankShare:
        """Return the share of a rank without a pipeline."""
        return RankShare((StageSpan(0, 0, num_blocks, True, True),))


@dataclass(frozen=True)
class Part:
    """One step of the walk.

    `role` says how it is called: "embed" and "head" whole; with a cut vocabulary "place" (positions added to looked-up
    rows) and "norm" (the head without projection and loss) instead of them.
    """

    name: str
    module: nn.Module
    role: str  # "embed" | "place" | "block" | "norm" | "head"


@dataclass(frozen=True)
class ParameterPlan:
    """Where one parameter, or the rows of it that this rank holds, lies in the flat buffer of its unit.

    Units: elements. `shape` is that of the local tensor, which may end in padding; the `numel` real elements are
    [first, first + numel) of the whole parameter of `global_shape`, in row-major order.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    offset: int
    decay: bool
    global_shape: tuple[int, ...]
    first: int = 0

    @property
    def size(self) -> int:
        """Elements of the local tensor with its padding."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class UnitPlan:
    """The flat layout of one unit, cut into `num_shards` equal boxes."""

    name: str
    trainable: bool
    parameters: tuple[ParameterPlan, ...]
    decay_end: int  # elements [0, decay_end) are subject to weight decay
    padded: int  # elements of the flat buffer
    num_shards: int
    reduce_once: bool = False  # several stages or passes add to its gradient: it is reduced at the end of the step
    borrowed: bool = False  # a copy of a unit that another pipeline rank owns
    shared: bool = False  # another pipeline rank holds it as well

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
        """Yield (parameter, start, stop): the local elements of parameters that fall into flat range [low, high)."""
        for p in self.parameters:
            start, stop = max(low - p.offset, 0), min(high - p.offset, p.numel)
            if start < stop:
                yield p, start, stop


@dataclass(frozen=True)
class PartPlan:
    """One step of the walk and the units it reads (its own, and that of a tied parameter).

    `tiles` are units too, by weight: each is gathered while its weight is used, not with the part.
    """

    name: str
    role: str
    units: tuple[int, ...]
    tiles: tuple[tuple[int, ...], ...] = ()

    @property
    def all_units(self) -> tuple[int, ...]:
        """Units and tiles."""
        return self.units + tuple(u for weight in self.tiles for u in weight)


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage of this rank as parts in walk order."""

    number: int
    parts: tuple[PartPlan, ...]


@dataclass(frozen=True)
class ModelPlan:
    """Units of one rank, and the order in which the walk uses them."""

    units: tuple[UnitPlan, ...]
    stages: tuple[StagePlan, ...]
    vocab: tuple[int, int] | None = None  # units of the embedding's and of the projection's rows (tied: the same)

    @property
    def numel(self) -> int:
        """Parameters that this rank counts as its own."""
        return sum(u.numel for u in self.units if not u.borrowed)

    @property
    def tile_units(self) -> frozenset[int]:
        """Units that are a tile of a weight."""
        parts = [part for stage in self.stages for part in stage.parts]
        return frozenset(u for part in parts for weight in part.tiles for u in weight)

    @property
    def trainable_numel(self) -> int:
        return sum(u.numel for u in self.units if u.trainable and not u.borrowed)


def model_parts(model: BlockModel) -> list[tuple[str, nn.Module]]:
    """Return the parts of a model in walk order, by checkpoint name."""
    return [("embed", model.embed), *((f"blocks.{i}", b) for i, b in enumerate(model.blocks)), ("head", model.head)]


def stage_parts(model: BlockModel, share: RankShare) -> list[tuple[StageSpan, list[Part]]]:
    """Return the stages of one rank as parts."""
    cut = share.shard is not None
    out = []
    for span in share.stages:
        parts = [Part("embed", model.embed, "place" if cut else "embed")] if span.begins else []
        parts += [Part(f"blocks.{i}", model.blocks[i], "block") for i in range(span.first, span.last)]
        if span.ends:
            head: Any = model.head
            parts.append(Part("head.norm", head.norm, "norm") if cut else Part("head", head, "head"))
        out.append((span, parts))
    return out


def vocabulary_of(model: BlockModel) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the embedding table and the output projection of a model whose vocabulary can be cut.

    Raises: PlanError if the model has other parts than that needs
    """
    embed: Any = model.embed
    head: Any = model.head
    wanted = {
        "embed.tokens.weight": getattr(getattr(embed, "tokens", None), "weight", None),
        "embed.place": getattr(embed, "place", None),
        "head.norm": getattr(head, "norm", None),
        "head.proj.weight": getattr(getattr(head, "proj", None), "weight", None),
        "head.loss.config": getattr(getattr(head, "loss", None), "config", None),
    }
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        raise PlanError(
            f"pipeline.vocab: the vocabulary of this model cannot be cut, because it has no {', '.join(missing)} (see "
            "docs/your-own-model.md). Use pipeline.vocab=off"
        )
    return embed.tokens.weight, head.proj.weight


def is_tied(model: BlockModel) -> bool:
    """Return whether embedding and head share a parameter."""
    ids = {id(p) for p in model.embed.parameters()}
    return any(id(p) in ids for p in model.head.parameters())


def plan_units(model: BlockModel, num_shards: int, share: RankShare | None = None, tile: int = 0) -> ModelPlan:
    """Lay out the parameters that one rank holds (on any device, meta included) in units cut into `num_shards`.

    A parameter shared by two parts belongs to the first; the second part lists that unit among those it reads. Linear
    maps of blocks with more than `tile` elements are cut into tiles of at most that (0: none are).
    Raises:      PlanError if the vocabulary is to be cut and cannot be, or a row of a weight is larger than a tile
    """
    share = share or RankShare.whole(len(model.blocks))
    builder = _Builder(num_shards, tile, tiled_weights(model, tile))
    apart: dict[int, str] = {}
    vocab = None
    if share.shard is not None:
        vocab = builder.add_rows(share.shard, *vocabulary_of(model))
    elif share.tied_to_peer:
        apart = {id(p): f"embed.{name}" for name, p in model.embed.named_parameters() if _in(p, model.head)}
    stages = []
    for span, parts in stage_parts(model, share):
        stages.append(StagePlan(span.number, tuple(builder.add_part(part, apart, span) for part in parts)))
    plan = ModelPlan(tuple(builder.units), tuple(stages), vocab)
    users = [{s.number for s in stages for part in s.parts if u in part.units} for u in range(len(plan.units))]
    units = tuple(
        replace(u, reduce_once=u.reduce_once or len(users[i]) > 1 or u.shared) for i, u in enumerate(plan.units)
    )
    return replace(plan, units=units)


def _in(parameter: nn.Parameter, module: nn.Module) -> bool:
    return any(parameter is other for other in module.parameters())


class _Builder:
    """Collects units; every parameter object goes into one."""

    def __init__(self, num_shards: int, tile: int, tiled: set[int]) -> None:
        self.units: list[UnitPlan] = []
        self._num_shards, self._tile, self._tiled = num_shards, tile, tiled
        self._owner: dict[int, int] = {}  # id(parameter) -> unit index

    def add_rows(self, shard: VocabShard, table: nn.Parameter, projection: nn.Parameter) -> tuple[int, int]:
        """Add the rows of the embedding and of the projection that this rank holds; return their units."""
        for name, parameter in (("embed.tokens.weight", table), ("head.proj.weight", projection)):
            if id(parameter) not in self._owner:
                rows, width = parameter.shape
                low, numel = shard.low * width, (shard.high - shard.low) * width
                plan = ParameterPlan(name, (shard.padded, width), numel, 0, True, (rows, width), low)
                self._add(name.removesuffix(".weight"), parameter.requires_grad, [(plan, parameter)], reduce_once=True)
        return self._owner[id(table)], self._owner[id(projection)]

    def add_part(self, part: Part, apart: dict[int, str], span: StageSpan) -> PartPlan:
        """Add the parameters of a part that are new, those in `apart` as a unit of their own."""
        used: set[int] = set()
        fresh: dict[bool, list[tuple[ParameterPlan, nn.Parameter]]] = {True: [], False: []}
        large: list[tuple[ParameterPlan, nn.Parameter]] = []
        for name, parameter in part.module.named_parameters():
            if part.role == "place" and name == "tokens.weight":
                continue  # its rows are cut over the ranks
            if id(parameter) in self._owner:
                used.add(self._owner[id(parameter)])
                continue
            name = apart.get(id(parameter), f"{part.name}.{name}")
            shape = tuple(parameter.shape)
            plan = ParameterPlan(name, shape, parameter.numel(), 0, parameter.dim() >= 2, shape)
            if id(parameter) in apart:
                borrowed = not span.begins
                self._add(name, parameter.requires_grad, [(plan, parameter)], shared=True, borrowed=borrowed)
                used.add(self._owner[id(parameter)])
            elif id(parameter) in self._tiled:
                large.append((plan, parameter))
            else:
                fresh[parameter.requires_grad].append((plan, parameter))
        for trainable, members in fresh.items():
            if members:
                used.add(self._add(part.name if trainable else f"{part.name}.frozen", trainable, members))
        tiles = tuple(self._add_tiles(*member) for member in large)
        return PartPlan(part.name, part.role, tuple(sorted(used)), tiles)

    def _add_tiles(self, whole: ParameterPlan, parameter: nn.Parameter) -> tuple[int, ...]:
        """Add the tiles of one weight. All get the size of the largest, so that they use the same buffers in turn."""
        rows, width = whole.shape
        ranges = cut_rows(whole.name, rows, width, self._tile)
        name, largest = whole.name.removesuffix(".weight"), max(high - low for low, high in ranges) * width
        units = []
        for number, (low, high) in enumerate(ranges):
            shape = (high - low, width)
            plan = replace(whole, shape=shape, numel=math.prod(shape), first=low * width)
            members = [(plan, parameter)]
            units.append(self._add(f"{name}.tile{number}", parameter.requires_grad, members, room=largest))
        return tuple(units)

    def _add(
        self,
        name: str,
        trainable: bool,
        members: list[tuple[ParameterPlan, nn.Parameter]],
        room: int = 0,
        **facts: bool,
    ) -> int:
        # Biases and norm gains (fewer than two dims) are not decayed: the usual rule of GPT-style training.
        plans: list[ParameterPlan] = []
        end = decay_end = 0
        for plan, parameter in sorted(members, key=lambda m: not m[0].decay):
            self._owner[id(parameter)] = len(self.units)
            plans.append(replace(plan, offset=end))
            end = _up(end + plan.size, ALIGN)
            decay_end = end if plan.decay else decay_end
        padded = _up(max(end, room), ALIGN * self._num_shards)
        self.units.append(UnitPlan(name, trainable, tuple(plans), decay_end, padded, self._num_shards, **facts))
        return len(self.units) - 1
