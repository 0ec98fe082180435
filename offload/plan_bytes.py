"""Bytes of one rank by tier and class of state under a plan: what rests where, and the buffers that moving it takes.

Classes are those that the runtime books in the ledger. `optimizer`: records of master weights and moments; units whose
state stays on the device hold master and moments there apart. `slab`: buffers for what is on its way, in host memory
between nvme and the device, on the device for records that are updated there. `grad` on the device has buffers that
gradients pass through on their way off it; `gather` is whole parameters in use or ahead, `shard` own parts of them that
were fetched.
Must not know: models, activations, what else a process holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from windlass.offload.placement import OffloadPlan, UnitPlacement, pages
from windlass.offload.workload import Workload, kept_parts

DEVICE_RECORDS = 2  # records on the device at a time, while they are updated there
GRAD_BUFFERS = 2  # gradients of a size on their way off the device


def plan_bytes(plan: OffloadPlan, work: Workload) -> dict[str, dict[str, int]]:
    """Return the bytes of one rank by tier and class, at rest and in buffers."""
    held: dict[str, Counter[str]] = {"device": Counter(), "host": Counter(), "nvme": Counter()}
    for unit, facts in zip(plan.units, work.units, strict=True):
        whole = unit.numel if facts.sharded else unit.numel * work.num_shards
        if unit.param == "device":
            held["device"]["param"] += whole * plan.sizes.param
        elif not plan.shares_master(unit):
            held[unit.param]["param"] += pages(unit.numel * plan.sizes.param)
        if facts.trainable:
            _add_states(held, plan, work, unit)
            if unit.grad == "device":
                whole = unit.numel * (work.num_shards if facts.whole_gradient else 1)
                held["device"]["grad"] += whole * plan.sizes.reduce
            elif plan.keeps_gradients:
                held[unit.grad]["grad"] += pages(unit.numel * plan.sizes.reduce)
    device, size = held["device"], plan.sizes
    device["grad"] += sum(count * pages(n * size.reduce) for n, count in gradient_buffers(plan, work).items())
    device["gather"] += sum(count * n * size.param for n, count in gather_buffers(plan, work).items())
    device["shard"] += sum(count * n * size.param for n, count in shard_buffers(plan, work).items())
    device["slab"] += DEVICE_RECORDS * device_slab_bytes(plan)
    for slab, count in ((slab_bytes(plan), plan.slabs + plan.cache), (param_slab_bytes(plan), plan.slabs)):
        held["host"]["slab"] += slab * count
    held["host"]["slab"] += plan.staging_bytes * staging_slabs(plan)
    return {tier: {name: n for name, n in classes.items() if n} for tier, classes in held.items()}


def footprints(plan: OffloadPlan, work: Workload) -> dict[str, int]:
    """Return the bytes by tier that a plan takes in all."""
    return {tier: sum(classes.values()) for tier, classes in plan_bytes(plan, work).items()}


def _add_states(held: dict[str, Counter[str]], plan: OffloadPlan, work: Workload, unit: UnitPlacement) -> None:
    """Count the master weights and moments of a unit."""
    if not unit.offloaded:
        held["device"]["master"] += 0 if plan.sizes.one_copy else unit.numel * plan.sizes.master
        held["device"].update(dict.fromkeys(work.state_names, unit.numel * plan.sizes.master))
    for chunk in unit.chunks:
        held[chunk.tier]["optimizer"] += plan.record_bytes(chunk) * (2 if plan.shadowed else 1)


# -- buffers -----------------------------------------------------------------------------------------------------------


def slab_bytes(plan: OffloadPlan) -> int:
    """Return the bytes of one slab for records of nvme."""
    return max((plan.record_bytes(c) for u in plan.units for c in u.chunks if c.tier == "nvme"), default=0)


def param_slab_bytes(plan: OffloadPlan) -> int:
    """Return the bytes of one slab for parameters on their way from nvme."""
    fetched = max((u.numel for u in plan.units if u.param == "nvme"), default=0)
    return pages(min(plan.chunk, fetched) * plan.sizes.param)


def staging_slabs(plan: OffloadPlan) -> int:
    """Return how many slabs there are for what passes through host memory: a chunk may take two at once."""
    return 2 * plan.slabs


def device_slab_bytes(plan: OffloadPlan) -> int:
    """Return the bytes of one device buffer for a record that is updated there."""
    return pages(max((plan.device_record_bytes(u, c) for u in plan.units for c in u.chunks), default=0))


def gradient_buffers(plan: OffloadPlan, work: Workload) -> dict[int, int]:
    """Return the device buffers through which gradients leave: elements of one, and how many."""
    if hands_over(plan, work):
        return {}
    leaving = Counter(u.numel for u, f in zip(plan.units, work.units, strict=True) if f.trainable and leaves(u))
    return {numel: min(GRAD_BUFFERS, users) for numel, users in leaving.items()}


def gradients_under_way(plan: OffloadPlan, work: Workload) -> dict[int, int]:
    """Return how many gradients of a size may be leaving the device at a time.

    They have buffers of their own, or leave from the slots that backward wrote.
    """
    buffers = gradient_buffers(plan, work)
    if buffers:
        return buffers
    formed = Counter(facts.numel for facts in work.units if facts.trainable and not facts.whole_gradient)
    return {numel: min(GRAD_BUFFERS, users) for numel, users in formed.items()}


def hands_over(plan: OffloadPlan, work: Workload) -> bool:
    """Return whether gradients that leave the device do so in the slot that backward wrote: nothing is summed."""
    return work.num_shards == 1 and not plan.accumulates


def leaves(unit: UnitPlacement) -> bool:
    """Return whether a unit's gradient goes off the device before it is used."""
    return unit.grad != "device"


def ahead_of(plan: OffloadPlan) -> tuple[int, int, int]:
    """Return how many parts ahead parameters are read, copied and gathered; no stage is ahead of the one before it."""
    gather = plan.lookahead[2]
    host = max(plan.lookahead[1], gather)
    return max(plan.lookahead[0], host), host, gather


def gather_buffers(plan: OffloadPlan, work: Workload) -> dict[int, int]:
    """Return the device buffers for whole units: elements of one, and how many are in use at once.

    A single rank copies from the host straight into them, so they are taken when that begins.
    """
    alone = work.num_shards == 1

    def ahead(u: int) -> int | None:
        if plan.units[u].param != "device":
            return ahead_of(plan)[1 if alone else 2]
        return work.prefetch if work.units[u].sharded else None

    found = _most_ahead(plan, work, ahead, kept_parts(work, plan.window))
    return {numel * work.num_shards: count for numel, count in found.items()}


def shard_buffers(plan: OffloadPlan, work: Workload) -> dict[int, int]:
    """Return the device buffers for a rank's own part of units that are fetched and then gathered."""
    if work.num_shards == 1:
        return {}
    return _most_ahead(plan, work, lambda u: ahead_of(plan)[1] if plan.units[u].param != "device" else None, set())


def _most_ahead(
    plan: OffloadPlan, work: Workload, ahead: Callable[[int], int | None], kept: set[int]
) -> dict[int, int]:
    """Go through forward and backward and return the most buffers of each size that are in use at once.

    `ahead` says how many parts before its use a unit takes one, or how many tiles before it a tile; None: never.
    """
    most: Counter[int] = Counter()
    never = -1
    reach = [never if (distance := ahead(u)) is None else distance for u in range(len(work.units))]
    furthest = max(reach, default=0)
    for forward in (True, False):
        order = work.order(forward=forward)
        tiles = [u for part in order for u in work.parts[part].tiles(forward=forward)]

        def near(row: Sequence[int], first: int, start: int) -> set[int]:
            """Return the units of a row that are here, `first` being used and those before `start` let go."""
            upcoming = enumerate(row[start : first + furthest + 1], start - first)
            return {u for distance, u in upcoming if distance <= reach[u]}

        at = 0
        for position, part in enumerate(order):
            units = {u for other in kept if other < part for u in work.parts[other].units if reach[u] != never}
            for distance, other in enumerate(order[position : position + furthest + 1]):
                units.update(u for u in work.parts[other].units if distance <= reach[u])
            uses = len(work.parts[part].tiles(forward=forward))
            windows = [
                near(tiles, at - 1, at) if at else set(),
                *(near(tiles, use, use) for use in range(at, at + uses)),
            ]
            at += uses
            for window in windows:
                for numel, number in Counter(plan.units[u].numel for u in units | window).items():
                    most[numel] = max(most[numel], number)
    return dict(most)
