"""What snapshots in memory will take of every node, from the plan of a job. Pure.

Must not know: how a snapshot is taken, the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from windlass.checkpoint.memory.groups import AUTO_GROUP, memory_factor, num_parity
from windlass.dist.cluster import ClusterConfig
from windlass.launch.check_recovery import needs_process
from windlass.launch.plan import Plan

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig

PROCESS_BYTES = 64 << 20  # the snapshot process itself


@dataclass(frozen=True)
class SnapshotSummary:
    """Snapshots of one node.

    Units:  bytes; `copied` and `exchanged` per snapshot and rank; `group` nodes protect each other, `survives` of them
            may go
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
    per_node = max(1, plan.world_size // nodes)
    wanted = snapshot.parity + 1 if snapshot.redundancy == "replica" else snapshot.group or min(AUTO_GROUP, nodes)
    group = max(1, min(wanted, nodes)) if snapshot.redundancy != "none" else 1
    survives = num_parity(snapshot.redundancy, snapshot.parity, group)
    factor = memory_factor(snapshot.redundancy, snapshot.parity, group)
    local = survives == 1 and (config.zero.stage == 0 or replicas >= group)
    parity_bytes = round(rank_bytes * (factor - 1))
    return SnapshotSummary(
        slots=snapshot.slots,
        rank_bytes=rank_bytes,
        ranks_per_node=per_node,
        group=group,
        survives=survives,
        node_bytes=round(per_node * snapshot.slots * rank_bytes * factor) + PROCESS_BYTES,
        copied=rank_bytes + (parity_bytes if local else 0),
        exchanged=0 if local else parity_bytes * (group - survives if group > 1 else 0),
        host_bytes=cluster.host_bytes,
    )
