"""Large weights at run time: fetched tile by tile inside the linear maps that use them.

The module's own parameter keeps its shape and dtype but has no memory of its own. Inside a part, calls of `linear` with
such a parameter are intercepted by its identity; each loops over the tiles: gather, multiply, release, with the next
ones on their way. Backward fetches the tiles again, adds up the gradient of the input in the order of tiles, and hands
every tile's weight gradient to its reducer before the next tile's is formed, so that neither the weight nor its
gradient ever exists as a whole.
Must not know: ZeRO stages, tiers, schedules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from windlass.dist.errors import ModelError, PlanError
from windlass.parallel.deferred import bind
from windlass.parallel.tiling import TilePasses, tile_passes
from windlass.parallel.unit import Unit
from windlass.parallel.units import ModelPlan, Part, PartPlan

_Product = tuple[torch.Tensor, torch.Tensor]  # grad_SO, x_SI: the weight gradient is grad^T @ x


def check_tiles(plan: ModelPlan, stage: int) -> None:
    """Refuse tiles where every rank holds whole weights anyway.

    Raises:  PlanError below stage 3
    """
    if plan.tile_units and stage < 3:
        raise PlanError(
            f"offload.tile: tiles are gathered one after another, which needs zero.stage = 3; with {stage} every rank "
            "holds whole weights. Use zero.stage=3, or offload.tile=0"
        )


class TiledWeight:
    """One weight that exists in tiles only, at most one of them and those on their way at a time.

    `parameter` is the module's: of the right shape, dtype and device, and NaN wherever it is looked at.
    """

    def __init__(self, parameter: nn.Parameter, units: Sequence[Unit]) -> None:
        self.parameter, self.units = parameter, tuple(units)
        plans = [unit.plan.parameters[0] for unit in units]
        self.name = plans[0].name
        self.num_rows, width = plans[0].global_shape
        self.rows = tuple((p.first // width, p.first // width + p.shape[0]) for p in plans)
        self.trained = units[0].reducer is not None
        nothing = torch.full((1, 1), math.nan, dtype=parameter.dtype, device=parameter.device)
        parameter.data = nothing.expand(self.num_rows, width)

    def tile(self, index: int) -> torch.Tensor:
        """Return the rows of one tile, which is here."""
        return self.units[index].parameters[0].detach()


def find_weights(part: Part, plan: PartPlan, units: Sequence[Unit]) -> tuple[TiledWeight, ...]:
    """Return the tiled weights of one part, in the order in which its modules are defined."""
    parameters = dict(part.module.named_parameters())
    found = []
    for tiles in plan.tiles:
        own = [units[u] for u in tiles]
        name = own[0].plan.parameters[0].name
        found.append(TiledWeight(parameters[name.removeprefix(f"{part.name}.")], own))
    return tuple(found)


class TilePass:
    """One way through the tiles of a stage: brings those that are used, and begins what is due for the next ones."""

    def __init__(self, uses: Iterable[tuple[TiledWeight, bool]]) -> None:
        self._units: list[Unit] = []
        self._starts: dict[tuple[int, bool], int] = {}
        for weight, backward in uses:
            self._starts[id(weight), backward] = len(self._units)
            self._units += weight.units
        self._reach = max((unit.residency.reach for unit in self._units), default=0)
        self._ahead: dict[int, Unit] = {}  # begun, but not used yet

    def bring(self, weight: TiledWeight, tile: int, *, backward: bool) -> torch.Tensor:
        """Return one tile, and begin to bring the next ones. Collective of the shard group, in the order of calls."""
        unit = weight.units[tile]
        unit.residency.approach(0)
        for distance, following in self._following(weight, tile, backward):
            following.residency.approach(distance)
            self._ahead[id(following)] = following
        self._ahead.pop(id(unit), None)
        unit.ready()
        return weight.tile(tile)

    def leave(self, weight: TiledWeight, tile: int, *, backward: bool) -> None:
        """Say that the work on a tile was issued. Collective of the shard group, in the order of calls."""
        for distance, following in self._following(weight, tile, backward):
            following.residency.advance(distance)
        weight.units[tile].release()

    def drop(self, weights: Iterable[TiledWeight]) -> None:
        """Let go of tiles that were brought ahead but not used: what is on its way may be out of date next time."""
        for unit in (unit for weight in weights for unit in weight.units):
            if self._ahead.pop(id(unit), None) is not None:
                unit.ready()
                unit.release()

    def _following(self, weight: TiledWeight, tile: int, backward: bool) -> list[tuple[int, Unit]]:
        """Return the tiles that are taken to come next, with their distance; the same ones on every rank.

        Where weights are used in another order than taken, one whose use is over may be among them. In backward its
        update may have begun, which rewrites what would be read, and nobody needs it again in this step.
        """
        position = self._starts[id(weight), backward] + tile
        upcoming = enumerate(self._units[position + 1 : position + 1 + self._reach], 1)
        over = weight.units[tile]
        return [(d, unit) for d, unit in upcoming if unit is not over and not (backward and unit.completed)]


def plan_passes(parts: Sequence[tuple[Sequence[TiledWeight], bool]], first_backward: int) -> dict[str, TilePass]:
    """Return the passes of one stage by name; the parts come with whether they are recomputed."""
    orders: TilePasses[TiledWeight] = tile_passes(parts, first_backward)
    return {name: TilePass(uses) for name, uses in vars(orders).items()}


class TileUses:
    """How one part uses its tiles in one micro-batch, from its forward to the end of its backward.

    `now` is the pass under way. A weight's gradient is formed in the backward of its last use, or with `split` when it
    is handed in: then tile by tile, each reduced before the next, because there are few buffers for gradients.
    """

    def __init__(self, weights: Sequence[TiledWeight], now: TilePass, *, split: bool = False) -> None:
        self.weights, self.now, self._split = weights, now, split
        self._pending: Counter[int] = Counter()  # uses whose backward is to come
        self._waiting: dict[int, list[_Product]] = {}
        self._reduced: set[int] = set()

    def calls(self) -> TileCalls:
        """Return the mode under which the part is to be called."""
        return TileCalls(self)

    def expect(self, weight: TiledWeight) -> None:
        """Note a use that will have a backward."""
        self._pending[id(weight)] += 1

    def due(self, weight: TiledWeight, product: _Product) -> list[_Product]:
        """Take what a weight gradient is made of; return all of it if it is to be formed now."""
        waiting = self._waiting.setdefault(id(weight), [])
        waiting.append(product)
        self._pending[id(weight)] -= 1
        if self._split or self._pending[id(weight)]:
            return []
        self._reduced.add(id(weight))
        return self._waiting.pop(id(weight))

    def reduce(self, weight: TiledWeight, tile: int, products: Sequence[_Product]) -> None:
        """Form the gradient of one tile and begin to reduce it. Collective of the shard group, in the order of calls"""
        unit, (low, high) = weight.units[tile], weight.rows[tile]
        assert unit.reducer is not None
        for grad_SO, x_SI in products:
            unit.reducer.add([(unit.plan.parameters[0], grad_SO[:, low:high].t() @ x_SI)])
        unit.complete()

    def hand_in(self, *, complete: bool) -> None:
        """Reduce the tiles whose gradients were not reduced in backward; without any, they are zero.

        Raises:  PlanError if gradients are to be added up over micro-batches before they are reduced
        """
        for weight in self.weights:
            if not weight.trained:
                continue
            if not complete:
                raise PlanError(
                    "offload.tile: this schedule reduces the gradients of several micro-batches at once, so those of "
                    "all tiles would have to be kept whole. Use a schedule with a REDUCE after every B or W, or "
                    "offload.tile=0"
                )
            if id(weight) not in self._reduced:
                products = self._waiting.pop(id(weight), [])
                for tile in range(len(weight.units)):
                    self.reduce(weight, tile, products)


class _TiledLinear(torch.autograd.Function):
    """x W^T + b with one tile of W at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        parameter: nn.Parameter,
        bias: torch.Tensor | None,
        weight: TiledWeight,
        uses: TileUses,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.facts = weight, uses, bias is not None
        out = x.new_empty((*x.shape[:-1], weight.num_rows))
        for tile, (low, high) in enumerate(weight.rows):
            rows_OI = uses.now.bring(weight, tile, backward=False)
            out[..., low:high] = linear(x, rows_OI, None if bias is None else bias[low:high])
            uses.now.leave(weight, tile, backward=False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight, uses, has_bias = ctx.facts
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_SO, x_SI = (t.detach().reshape(-1, t.shape[-1]) for t in (grads[0], x))
        products = uses.due(weight, (grad_SO, x_SI)) if wants_weight else []
        total_SI: torch.Tensor | None = None
        if not wants_x:  # nobody brings what was begun for this use, and the updates below may rewrite it
            uses.now.drop([weight])
        for tile, (low, high) in enumerate(weight.rows):
            if wants_x:
                rows_OI = uses.now.bring(weight, tile, backward=True)
                total_SI = _add(total_SI, grad_SO[:, low:high] @ rows_OI)
                uses.now.leave(weight, tile, backward=True)
            if products:
                uses.reduce(weight, tile, products)
        grad_x = None if total_SI is None else total_SI.to(x.dtype).view(x.shape)
        return grad_x, None, grad_SO.sum(0) if has_bias and wants_bias else None, None, None


def _add(total: torch.Tensor | None, partial: torch.Tensor) -> torch.Tensor:
    """Add up in fp32 at least: 16-bit sums would lose a bit or more per tile."""
    if total is None:
        return partial.float() if partial.dtype.itemsize < 4 else partial
    return total.add_(partial)


class TileCalls(TorchFunctionMode):
    """Lets linear maps by tiled weights go from tile to tile, and refuses other uses of these weights.

    Raises:  ModelError where a function gets a tiled weight and makes a tensor of it
    """

    def __init__(self, uses: TileUses) -> None:
        super().__init__()
        self._uses = uses
        self._by_id: Mapping[int, TiledWeight] = {id(weight.parameter): weight for weight in uses.weights}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            x, parameter, bias = bind(("input", "weight", "bias"), args, kwargs)
            weight = self._by_id.get(id(parameter))
            if weight is not None:
                if torch.is_grad_enabled() and weight.trained:
                    self._uses.expect(weight)
                return _TiledLinear.apply(x, parameter, bias, weight, self._uses)
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor | list | tuple):
            self._check(func, args, kwargs, out)
        return out

    def _check(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = _tensors((*args, *kwargs.values()))
        weight = next((self._by_id[id(tensor)] for tensor in given if id(tensor) in self._by_id), None)
        if weight is not None and next(_tensors(out), None) is not None:
            raise ModelError(
                f"{weight.name} is cut into tiles (offload.tile), so only torch.nn.functional.linear may use it, but "
                f"its block gives it to {getattr(func, '__name__', func)}. Use offload.tile="
                f"{weight.parameter.numel()} or more, or 0"
            )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _tensors(member)
