"""What snapshots in memory will take of every node, from the plan of a job. Pure.

Must not know: how a snapshot is taken, the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from windlass.checkpoint.memory.groups import Groups, groups_of_replicas, memory_factor, num_parity
from windlass.dist.cluster import ClusterConfig
from windlass.dist.mesh import Mesh, plan_mesh
from windlass.launch.check_recovery import needs_process

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig
    from windlass.launch.plan import Plan

PROCESS_BYTES = 64 << 20  # the snapshot process itself


@dataclass(frozen=True)
class SnapshotSummary:
    """Snapshots of one node.

    Units:  bytes; `copied` and `exchanged` per snapshot and rank; `group` nodes protect each other, `survives` of them
            may go: those of the smallest group where groups differ, while bytes are those of the node that takes most
    """

    slots: int
    rank_bytes: int  # state of one rank, in one slot
    ranks_per_node: int
    group: int
    survives: int
    node_bytes: int  # all slots with their parity, and the process
    copied: int  # from the device
    exchanged: int  # received from other nodes for parity; none where replicas compute it from their own state
    host_bytes: int  # of one host, 0: not known


def plan_snapshots(config: JobConfig, plan: Plan, cluster: ClusterConfig) -> SnapshotSummary | None:
    """Return what the snapshots of a job take; None if it takes none. For the fullest pipeline rank."""
    snapshot = config.snapshot
    if not needs_process(snapshot.every, config.checkpoint.mode):
        return None
    master = config.precision.master_dtype.itemsize
    trained, frozen = master * (1 + len(config.optimizer.state_names)), config.precision.param_dtype.itemsize
    by_rank = [0] * len(plan.ranks)
    for unit in plan.units:
        by_rank[unit.pipeline_rank] += unit.shard_numel * (trained if unit.trainable else frozen)
    replicas = plan.mesh["dp_replicate"] if config.zero.stage > 0 else 1
    rank_bytes = -(-max(by_rank) // replicas)
    nodes = config.launch.nodes or cluster.nodes or 1
    groups, local = planned_groups(config, plan_mesh(config.parallelism, plan.world_size), nodes)
    sizes = {len(group) for group in groups}
    lost = {size: num_parity(snapshot.redundancy, snapshot.parity, size) for size in sizes}
    factor = max(memory_factor(snapshot.redundancy, snapshot.parity, size) for size in sizes)
    per_node = ranks_per_node(plan.world_size, nodes)
    return SnapshotSummary(
        slots=snapshot.slots,
        rank_bytes=rank_bytes,
        ranks_per_node=per_node,
        group=min(sizes),
        survives=lost[min(sizes)],
        node_bytes=round(per_node * snapshot.slots * rank_bytes * factor) + PROCESS_BYTES,
        copied=rank_bytes + (round(rank_bytes * (factor - 1)) if local else 0),
        exchanged=0 if local else rank_bytes * max(lost.values()),
        host_bytes=cluster.host_bytes,
    )


def ranks_per_node(world_size: int, nodes: int) -> int:
    """Return how many ranks the fullest of so many nodes has."""
    return -(-world_size // nodes)


def planned_groups(config: JobConfig, mesh: Mesh, nodes: int) -> tuple[Groups, bool]:
    """Return which ranks will protect each other on so many nodes, each a failure domain, and whether replicas compute
    their parity from their own state: as `Snapshots.protect` does it once the ranks have met.

    Raises:      PlanError if a group cannot be as large as asked for
    """
    snapshot, ranks = config.snapshot, range(mesh.world_size)
    names = [f"node-{rank // ranks_per_node(mesh.world_size, nodes)}" for rank in ranks]
    # At stage 0 every data-parallel rank holds the same state, as the engine sees it too.
    axes = ("dp_replicate", "dp_shard") if config.zero.stage == 0 else ("dp_replicate",)
    firsts = [rank for rank in ranks if not any(mesh.coords(rank)[axis] for axis in axes)]
    replicas = [mesh.ranks_along(axes, rank) for rank in firsts]
    scheme, size, k = snapshot.redundancy, snapshot.group, snapshot.parity
    return groups_of_replicas(names, {}, replicas, scheme, size, k, degraded=mesh.world_size < config.launch.workers)
