"""Bytes and traffic of one rank as formulas over the unit plan: what ZeRO will hold and move, before anything exists.

With Psi parameters, Psi_t of them trainable, N ranks that share a shard and m micro-batches per step, per step and
rank (an all-gather or reduce-scatter counts the full tensor once, as in the paper):

    stage 0   Psi_t reduce-scatter + Psi_t all-gather of gradients          2 Psi
    stage 1   Psi_t reduce-scatter of gradients + Psi_t gather of weights   2 Psi
    stage 2   m Psi_t reduce-scatter + Psi_t gather                         (1 + m) Psi
    stage 3   m Psi_t reduce-scatter + gathers on use                       3 m Psi (each), 2 m Psi (never),
                                                                            in between (turnaround)

Psi is the padded size, the one that is allocated and moved. Gathers of stage 3 are counted by going through the same
order of uses as the walk, or where the schedule of a pipeline names them, by its actions. Tiles of large weights are
gathered at each use, so there recomputing counts as well. A rank of a pipeline counts its own stages only.
Must not know: models, devices, clusters.
Source: Rajbhandari et al. 2020, arXiv:1910.02054, sections 5 and 7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from windlass.parallel.activation import ActivationConfig
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.tiling import tile_passes
from windlass.parallel.units import ModelPlan, PartPlan, UnitPlan
from windlass.parallel.zero import ZeroConfig

# State that lives from step to step (the paper's "model states"); the rest is scratch of the walk.
KEEP = ActivationConfig()
MODEL_STATES = ("param", "grad", "master", "exp_avg", "exp_avg_sq", "momentum_buffer", "optimizer")


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step, as one rank counts it.

    Units:  elements and bytes of the full tensors (an all-reduce counts twice); wire_bytes received from peers
    """

    group: str  # "shard", "replicate" or "world"
    kind: str
    tag: str
    calls: int
    elements: int
    bytes: int
    wire_bytes: int


@dataclass(frozen=True)
class Gathers:
    """What stage 3 gathers in one micro-batch, and the most buffers of each size that are in use at once."""

    units: tuple[int, ...]  # unit index of every gather, in order
    buffers: dict[int, int]  # elements of a buffer -> how many


def state_bytes(
    plan: ModelPlan, zero: ZeroConfig, precision: PrecisionConfig, optimizer: OptimizerConfig
) -> dict[str, int]:
    """Return the bytes that one rank holds by state class, in the layout of `parallel.zero`.

    Every rank holds the same, because units are padded to equal shards.
    """
    param, reduce, master = (
        d.itemsize for d in (precision.param_dtype, precision.reduce_dtype, precision.master_dtype)
    )
    held: Counter[str] = Counter()
    for unit in plan.units:
        held["param"] += (unit.shard_numel if zero.stage == 3 else unit.padded) * param
        if unit.trainable:
            own = unit.padded if zero.stage == 0 else unit.shard_numel
            held["grad"] += (unit.padded if zero.stage < 2 or unit.reduce_once else unit.shard_numel) * reduce
            held["master"] += 0 if precision.param_dtype == precision.master_dtype else own * master
            for name in optimizer.state_names:
                held[name] += own * master
    return dict(held)


def scratch_bytes(
    plan: ModelPlan,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    *,
    pipelined: bool = False,
    activation: ActivationConfig = KEEP,
) -> dict[str, int]:
    """Return the bytes of buffers that units use in turn: gathered parameters, full gradients, the update's copy."""
    trainable = [u for u in plan.units if u.trainable]
    scratch: dict[str, int] = {}
    if zero.stage >= 2:
        sizes = Counter(u.padded for u in trainable if not u.reduce_once)
        slots = sum(min(2, count) * padded for padded, count in sizes.items())
        scratch["grad_slot"] = slots * precision.reduce_dtype.itemsize
    if zero.stage == 3:
        buffers = plan_gathers(plan, zero, pipelined=pipelined, activation=activation).buffers
        scratch["gather"] = sum(n * count for n, count in buffers.items()) * precision.param_dtype.itemsize
    if precision.reduce_dtype != precision.master_dtype:
        own = max((u.padded if zero.stage == 0 else u.shard_numel for u in trainable), default=0)
        scratch["update"] = own * precision.master_dtype.itemsize  # the gradient in the format of the master
    return scratch


def plan_gathers(
    plan: ModelPlan, zero: ZeroConfig, *, pipelined: bool = False, activation: ActivationConfig = KEEP
) -> Gathers:
    """Go through one micro-batch of stage 3 in walk order and note every gather.

    Where the schedule gathers whole stages, each of them counts once, and all that a rank holds may be here at once,
    but for tiles. In a pipeline recomputing is a use of its own. Every tile counts in backward, though a map whose
    input needs no gradient does without.
    Invariant: `parallel.walk` brings and drops units at the same places; tests hold the two together.
    """
    scheduled = zero.lowering(pipelined)["gather"] != "none"
    gathered: list[int] = []
    most: Counter[int] = Counter()
    if scheduled:
        tiles = plan.tile_units
        gathered += [u for u in range(len(plan.units)) if u not in tiles]
        most.update(plan.units[u].padded for u in gathered)
    in_turn: Counter[int] = Counter()
    for stage in plan.stages:
        parts = [replace(part, units=()) for part in stage.parts] if scheduled else stage.parts
        found = _Uses(plan, parts, zero, activation, pipelined, _first_backward(plan, stage.parts)).find()
        gathered += found.units
        in_turn |= Counter(found.buffers)
    if scheduled:
        return Gathers(tuple(gathered), dict(most + in_turn))
    most |= in_turn
    if pipelined:  # recomputed ahead of backward, for which units are brought once more
        again = (part for stage in plan.stages for part in stage.parts if activation.recomputes(part.name))
        gathered += [u for part in again for u in part.units]
    if plan.vocab is not None:  # looked up and scored, and transposed once more
        gathered += [plan.vocab[0], plan.vocab[1], plan.vocab[1]]
        most |= Counter({plan.units[u].padded: 1 for u in plan.vocab})  # one after the other
    return Gathers(tuple(gathered), dict(most))


def _first_backward(plan: ModelPlan, parts: Sequence[PartPlan]) -> int:
    """Return the part at which backward ends: the first with something to train."""
    trained = (i for i, part in enumerate(parts) if any(plan.units[u].trainable for u in part.all_units))
    return next(trained, len(parts))


class _Uses:
    """Goes through one stage forwards and backwards: units with their parts, tiles one after another inside them."""

    def __init__(
        self,
        plan: ModelPlan,
        parts: Sequence[PartPlan],
        zero: ZeroConfig,
        activation: ActivationConfig,
        pipelined: bool,
        first_backward: int,
    ) -> None:
        self._plan, self._parts, self._prefetch = plan, parts, zero.prefetch
        self._reshard, self._first_backward = zero.resharding(pipelined), first_backward
        self._again = [activation.recomputes(part.name) for part in parts]
        self._gathered: list[int] = []
        self._here: set[int] = set()
        self._most: Counter[int] = Counter()

    def find(self) -> Gathers:
        """Return what is gathered, and the most buffers that are in use at once."""
        parts, last = self._parts, len(self._parts) - 1
        passes = tile_passes(
            [(part.tiles, again) for part, again in zip(parts, self._again, strict=True)], self._first_backward
        )
        forward, backward = list(range(last + 1)), list(range(last, self._first_backward - 1, -1))
        tiles = [u for weight, _ in passes.forward for u in weight]
        at = 0
        for position, part in enumerate(forward):
            self._bring(forward, position)
            at = self._use(tiles, at, sum(map(len, parts[part].tiles)))
            keeps = self._reshard == "never" or (self._reshard == "turnaround" and part >= last - 1)
            if not (keeps and part >= self._first_backward):
                self._here.difference_update(parts[part].units)
        tiles = [u for weight, _ in passes.recompute for u in weight]
        at = 0
        for position, part in enumerate(backward):
            self._bring(backward, position)
            at = self._use(tiles, at, sum(map(len, parts[part].tiles)) * (2 if self._again[part] else 1))
            self._here.difference_update(parts[part].units)
        return Gathers(tuple(self._gathered), dict(self._most))

    def _bring(self, order: list[int], position: int) -> None:
        """Bring a part's units, and those of the next parts."""
        self._gather(u for part in order[position : position + 1 + self._prefetch] for u in self._parts[part].units)

    def _use(self, tiles: list[int], first: int, count: int) -> int:
        """Use the next tiles one after another, bringing those that follow; return what comes after them."""
        for at in range(first, first + count):
            self._gather(tiles[at : at + 1 + self._prefetch])
            self._here.discard(tiles[at])
        return first + count

    def _gather(self, units: Iterable[int]) -> None:
        for unit in units:
            if unit not in self._here:
                self._here.add(unit)
                self._gathered.append(unit)
        self._most |= Counter(self._plan.units[u].padded for u in self._here)


def plan_traffic(
    plan: ModelPlan,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    *,
    num_replicas: int,
    world_size: int,
    num_micro_batches: int,
    stage_gathers: Mapping[int, int] | None = None,
    pipelined: bool = False,
    activation: ActivationConfig = KEEP,
) -> list[Transfer]:
    """Return what one rank moves in one training step for ZeRO, as the ledger of `dist` will count it.

    The unit plan is cut over every rank at stage 0 and over one shard group otherwise. Groups of one move nothing.
    `stage_gathers` says how often a pipeline's schedule gathers each stage (-1: the vocabulary) in a step.
    """
    trainable = [u for u in plan.units if u.trainable]
    reduce, param = precision.reduce_dtype.itemsize, precision.param_dtype.itemsize
    num_shards = plan.units[0].num_shards
    times = num_micro_batches if zero.stage >= 2 else 1
    reduced = [u for u in trainable for _ in range(1 if u.reduce_once else times)]
    rows = [_transfer("shard", "reduce_scatter", "grad", reduced, reduce, num_shards)]
    if zero.stage == 0:
        rows.append(_transfer("shard", "all_gather", "grad", trainable, reduce, num_shards))
    elif zero.stage < 3:
        rows.append(_transfer("shard", "all_gather", "param", trainable, param, num_shards))
    else:
        if stage_gathers is None:
            used = [plan.units[u] for u in plan_gathers(plan, zero, pipelined=pipelined, activation=activation).units]
            used *= num_micro_batches
        else:
            used = [plan.units[u] for place, units in _units_by_place(plan) for u in units * stage_gathers[place]]
            tiles, once = plan.tile_units, plan_gathers(plan, zero, pipelined=True, activation=activation).units
            used += [plan.units[u] for u in once if u in tiles] * num_micro_batches
        rows.append(_transfer("shard", "gather_into", "param", used, param, num_shards))
    if zero.stage > 0:
        own = [u.shard_numel for u in trainable if not u.shared]
        rows.append(_all_reduces("replicate", "grad", own, reduce, num_replicas))
    # A unit on two pipeline ranks is summed over both and their replicas at once.
    shared = [u.shard_numel for u in trainable if u.shared]
    holders = 2 * num_replicas if shared else 1
    rows.append(_all_reduces("tied", "grad", shared, reduce, holders))
    # Valid tokens (one number), then loss and norm (two), in fp64.
    rows.append(_all_reduces("world", "scalar", [1, 2], 8, world_size))
    sizes = {"shard": num_shards, "replicate": num_replicas, "tied": holders, "world": world_size}
    return [row for row in rows if sizes[row.group] > 1]


def _units_by_place(plan: ModelPlan) -> Iterator[tuple[int, list[int]]]:
    for stage in plan.stages:
        yield stage.number, sorted({u for part in stage.parts for u in part.units})
    if plan.vocab is not None:
        yield -1, sorted(set(plan.vocab))


def _transfer(group: str, kind: str, tag: str, units: list[UnitPlan], itemsize: int, size: int) -> Transfer:
    elements = sum(u.padded for u in units)
    wire = sum(u.shard_numel for u in units) * (size - 1) * itemsize
    return Transfer(group, kind, tag, len(units), elements, elements * itemsize, wire)


def _all_reduces(group: str, tag: str, numels: list[int], itemsize: int, size: int) -> Transfer:
    elements = 2 * sum(numels)
    wire = sum(2 * (size - 1) * -(-n // size) for n in numels) * itemsize
    return Transfer(group, "all_reduce", tag, len(numels), elements, elements * itemsize, wire)
