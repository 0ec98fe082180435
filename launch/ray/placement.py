"""Where the workers of a run sit in a Ray cluster: bundles for the placement group, then ranks by node. Pure.

Must not know Ray: nodes are names with numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from windlass.dist.errors import PlanError

Resources = dict[str, float]


@dataclass(frozen=True)
class Placement:
    """A placement group: its strategy, its bundles, the bundle of each worker and what one worker takes."""

    strategy: str
    bundles: tuple[Resources, ...]
    bundle_of_worker: tuple[int, ...]
    worker: Resources


@dataclass(frozen=True)
class Seat:
    """The place of one worker: ranks of a node are contiguous."""

    worker: int
    rank: int
    local_rank: int
    local_world_size: int
    node_rank: int


def plan_placement(num_workers: int, *, num_nodes: int, spread: bool, gpu: bool) -> Placement:
    """Choose strategy and bundles.

    num_nodes = 0 leaves the number of nodes to Ray: as few as possible (PACK), or as many (SPREAD). Otherwise every
    node holds the same number of workers: one node (STRICT_PACK), or one bundle on each of several (STRICT_SPREAD).
    """
    worker: Resources = {"CPU": 1, "GPU": 1} if gpu else {"CPU": 1}
    if num_nodes == 0:
        strategy = "SPREAD" if spread else "PACK"
        return Placement(strategy, (worker,) * num_workers, tuple(range(num_workers)), worker)
    if num_workers % num_nodes:
        fitting = ", ".join(str(n) for n in range(1, num_workers + 1) if num_workers % n == 0)
        raise PlanError(
            f"--nodes {num_nodes}: launch.workers = {num_workers} cannot be divided evenly among {num_nodes} nodes. "
            f"Use --nodes with one of {fitting}, or leave it out"
        )
    if spread and num_nodes == 1:
        raise PlanError("--spread with --nodes 1: one node cannot be spread. Leave out one of them")
    per_node = num_workers // num_nodes
    bundle = {name: amount * per_node for name, amount in worker.items()}
    strategy = "STRICT_PACK" if num_nodes == 1 else "STRICT_SPREAD"
    return Placement(strategy, (bundle,) * num_nodes, tuple(w // per_node for w in range(num_workers)), worker)


def slots_of_node(room: int, num_workers: int, *, num_nodes: int, spread: bool, rooms: Iterable[int]) -> int:
    """Return how many of the workers a node with this room takes; `rooms`: those of all nodes that can be used.

    The same wishes as above. Spread out, no node takes more than it must for all to have a place.
    """
    if num_nodes:
        each = num_workers // num_nodes
        return each if room >= each else 0
    if not spread:
        return room
    rooms = list(rooms)
    enough = (share for share in range(1, num_workers) if sum(min(has, share) for has in rooms) >= num_workers)
    return min(room, next(enough, num_workers))


def check_fits(placement: Placement, nodes: Mapping[str, Mapping[str, float]]) -> None:
    """Raise PlanError if even an idle cluster of these nodes could not hold the placement."""
    bundle = placement.bundles[0]
    alone = placement.strategy == "STRICT_SPREAD"
    places = 0
    for has in nodes.values():
        room = int(min(has.get(kind, 0) // amount for kind, amount in bundle.items()))
        places += min(room, 1) if alone else room
    if places >= len(placement.bundles):
        return
    wanted = " ".join(f"{kind}={amount:g}" for kind, amount in bundle.items())
    has_text = "; ".join(
        f"{name}: " + " ".join(f"{kind}={resources.get(kind, 0):g}" for kind in bundle)
        for name, resources in nodes.items()
    )
    where = "each on its own node" if alone else "on any node"
    raise PlanError(
        f"the Ray cluster is too small: {len(placement.bundles)} x ({wanted}) {where} needed, room for {places} "
        f"({has_text}). Lower launch.workers or --nodes, or add nodes"
    )


def seat_workers(node_of_worker: Sequence[str]) -> list[Seat]:
    """Give ranks so that those of a node are contiguous, nodes in order of their first worker. Result is by rank."""
    nodes = list(dict.fromkeys(node_of_worker))
    seats: list[Seat] = []
    for node_rank, node in enumerate(nodes):
        members = [worker for worker, where in enumerate(node_of_worker) if where == node]
        for local_rank, worker in enumerate(members):
            seats.append(Seat(worker, len(seats), local_rank, len(members), node_rank))
    return seats
