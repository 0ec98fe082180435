"""Bytes and traffic of one rank as formulas over the unit plan: what ZeRO will hold and move, before anything exists.

With Psi parameters, Psi_t of them trainable, N ranks that share a shard and m micro-batches per step, per step and
rank (an all-gather or reduce-scatter counts the full tensor once, as in the paper):

    stage 0   Psi_t reduce-scatter + Psi_t all-gather of gradients          2 Psi
    stage 1   Psi_t reduce-scatter of gradients + Psi_t gather of weights   2 Psi
    stage 2   m Psi_t reduce-scatter + Psi_t gather                         (1 + m) Psi
    stage 3   m Psi_t reduce-scatter + gathers on use                       3 m Psi (each), 2 m Psi (never),
                                                                            in between (turnaround)

Psi is the padded size, the one that is allocated and moved. Gathers of stage 3 are counted by going through the same
order of uses as the walk, or where the schedule of a pipeline names them, by its actions. A rank of a pipeline counts
its own stages only. Must not know: models, devices, clusters.
Source: Rajbhandari et al. 2020, arXiv:1910.02054, sections 5 and 7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import ModelPlan, UnitPlan
from windlass.parallel.zero import ZeroConfig

# State that lives from step to step (the paper's "model states"); the rest is scratch of the walk.
MODEL_STATES = ("param", "grad", "master", "exp_avg", "exp_avg_sq", "momentum_buffer")


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
    plan: ModelPlan, zero: ZeroConfig, precision: PrecisionConfig, *, pipelined: bool = False
) -> dict[str, int]:
    """Return the bytes of buffers that units use in turn: gathered parameters, full gradients, the update's copy."""
    trainable = [u for u in plan.units if u.trainable]
    scratch: dict[str, int] = {}
    if zero.stage >= 2:
        sizes = Counter(u.padded for u in trainable if not u.reduce_once)
        slots = sum(min(2, count) * padded for padded, count in sizes.items())
        scratch["grad_slot"] = slots * precision.reduce_dtype.itemsize
    if zero.stage == 3:
        buffers = plan_gathers(plan, zero, pipelined=pipelined).buffers
        scratch["gather"] = sum(n * count for n, count in buffers.items()) * precision.param_dtype.itemsize
    if precision.reduce_dtype != precision.master_dtype:
        own = max((u.padded if zero.stage == 0 else u.shard_numel for u in trainable), default=0)
        scratch["update"] = own * precision.master_dtype.itemsize  # the gradient in the format of the master
    return scratch


def plan_gathers(plan: ModelPlan, zero: ZeroConfig, *, pipelined: bool = False) -> Gathers:
    """Go through one micro-batch of stage 3 in walk order and note every gather.

    Where the schedule gathers whole stages, each of them counts once, and all that a rank holds may be here at once.
    Invariant: `parallel.walk` brings and drops units at the same places; tests hold the two together.
    """
    if zero.lowering(pipelined)["gather"] != "none":
        used = tuple(range(len(plan.units)))
        return Gathers(used, dict(Counter(u.padded for u in plan.units)))
    gathered: list[int] = []
    most: Counter[int] = Counter()
    for stage in plan.stages:
        found = _gathers_of_stage(plan, [part.units for part in stage.parts], zero, pipelined)
        gathered += found.units
        most |= Counter(found.buffers)
    if plan.vocab is not None:  # looked up and scored, and transposed once more
        gathered += [plan.vocab[0], plan.vocab[1], plan.vocab[1]]
        most |= Counter({plan.units[u].padded: 1 for u in plan.vocab})  # one after the other
    return Gathers(tuple(gathered), dict(most))


def _gathers_of_stage(plan: ModelPlan, parts: Sequence[tuple[int, ...]], zero: ZeroConfig, pipelined: bool) -> Gathers:
    last = len(parts) - 1
    reshard = zero.resharding(pipelined)
    first_backward = next((i for i, units in enumerate(parts) if any(plan.units[u].trainable for u in units)), last + 1)
    forward, backward = list(range(last + 1)), list(range(last, first_backward - 1, -1))
    gathered: list[int] = []
    here: set[int] = set()
    most: Counter[int] = Counter()

    def bring(order: list[int], position: int) -> None:
        for part in order[position : position + 1 + zero.prefetch]:
            for unit in parts[part]:
                if unit not in here:
                    here.add(unit)
                    gathered.append(unit)
        now = Counter(plan.units[u].padded for u in here)
        most.update({n: count - most[n] for n, count in now.items() if count > most[n]})

    for position, part in enumerate(forward):
        bring(forward, position)
        keeps = reshard == "never" or (reshard == "turnaround" and part >= last - 1)
        if not (keeps and part >= first_backward):
            here.difference_update(parts[part])
    for position, part in enumerate(backward):
        bring(backward, position)
        here.difference_update(parts[part])
    return Gathers(tuple(gathered), dict(most))


def plan_traffic(
    plan: ModelPlan,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    *,
    num_replicas: int,
    world_size: int,
    num_micro_batches: int,
    stage_gathers: Mapping[int, int] | None = None,
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
            used = [plan.units[u] for u in plan_gathers(plan, zero).units] * num_micro_batches
        else:
            used = [plan.units[u] for place, units in _units_by_place(plan) for u in units * stage_gathers[place]]
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
