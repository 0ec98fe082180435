"""Tiles: which weights are cut by rows, where, and in which order tiles are used. Pure planning, no memory.

A weight of a linear map in a block that is larger than a limit never exists as a whole: every tile of its output rows
is a unit of its own, which is gathered, used and released before the next one. Cutting by rows leaves every sum of
forward as it was; cutting by columns would not.
Must not know: devices, ranks, who gathers.
Source: Rajbhandari et al. 2021, arXiv:2104.07857, section 5.1.3 (memory-centric tiling).
Differs: the model's modules stay as they are; maps are found by their module, and intercepted by function at run time
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from windlass.dist.errors import PlanError
from windlass.model.protocol import BlockModel

# Kernels work on this many output rows at a time: a tile that ends inside such a group could be summed by another
# instruction than the same rows of the whole weight.
ROW_STEP = 16

W = TypeVar("W")


def tiled_weights(model: BlockModel, most: int) -> set[int]:
    """Return the ids of the weights with more than `most` elements that can be cut; none with `most` = 0.

    They belong to a plain `nn.Linear` of one block and to nothing else. A module with a forward of its own may do with
    its weight what it likes, so it stays whole.
    """
    if not most:
        return set()
    users = Counter(id(p) for part in (model.embed, *model.blocks, model.head) for p in part.parameters())
    plain: set[int] = set()
    others: set[int] = set()
    for module in (module for block in model.blocks for module in block.modules()):
        linear = type(module).forward is nn.Linear.forward and not isinstance(module, NonDynamicallyQuantizableLinear)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                large = linear and name == "weight" and parameter.numel() > most
                (plain if large else others).add(id(parameter))
    return {weight for weight in plain - others if users[weight] == 1}


def cut_rows(name: str, rows: int, width: int, most: int) -> list[tuple[int, int]]:
    """Cut the rows of a weight into as few ranges of at most `most` elements as there can be, of about equal size.

    Raises:  PlanError if a single row is larger
    """
    if width > most:
        raise PlanError(
            f"offload.tile = {most}: a row of {name} has {width} elements, and rows are not cut. Use offload.tile of "
            f"at least {width}, or 0 for none"
        )
    fit = most // width
    step = ROW_STEP if fit >= ROW_STEP else 1
    steps = -(-rows // step)
    count = -(-steps // (fit // step))
    return list(pairwise(min(rows, steps * i // count * step) for i in range(count + 1)))


@dataclass(frozen=True)
class TilePasses(Generic[W]):
    """The tiled weights of one pipeline stage in the order in which its passes use them, each use with whether it is of
    backward.

    `rebuild` recomputes ahead of backward, `recompute` within it.
    """

    forward: list[tuple[W, bool]]
    rebuild: list[tuple[W, bool]]
    backward: list[tuple[W, bool]]
    recompute: list[tuple[W, bool]]


def tile_passes(parts: Sequence[tuple[Sequence[W], bool]], first_backward: int) -> TilePasses[W]:
    """Return the order of every pass over parts (their weights, whether they are recomputed).

    Modules are taken to be used in the order in which they are defined, and backward in the opposite one. Where that is
    not so, results are the same, but tiles are fetched ahead that are not the next ones.
    """
    passes = TilePasses[W]([(weight, False) for weights, _ in parts for weight in weights], [], [], [])
    for weights, again in reversed(parts[first_backward:]):
        forward = [(weight, False) for weight in weights] if again else []
        backward = [(weight, True) for weight in reversed(weights)]
        passes.rebuild.extend(forward)
        passes.backward.extend(backward)
        passes.recompute.extend(forward + backward)
    return passes
