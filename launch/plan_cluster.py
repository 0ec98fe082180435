"""What is known of a cluster, and what that means for a plan: which device, how much memory, how long traffic takes.

Must not know: how a plan is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from windlass.dist.cluster import ClusterConfig
from windlass.dist.device import pick_device
from windlass.dist.mesh import Mesh
from windlass.launch.job import JobConfig
from windlass.parallel.memory import Transfer


def planned_ranks(config: JobConfig, world: int = 0) -> int:
    """Return for how many ranks a job is planned: those asked for, all devices of its cluster, or its own workers."""
    return world or config.cluster.nodes * config.cluster.devices_per_node or config.launch.workers


def known_facts(config: JobConfig, world: int = 0) -> tuple[ClusterConfig, str | None]:
    """Return the facts that a plan for `world` ranks (0: as the job says) counts on, and the kind of device if found.

    A job that says how many ranks there are is for another cluster; else what it leaves open is found on this machine.
    """
    if world or config.cluster.nodes * config.cluster.devices_per_node:
        return config.cluster, None
    facts = config.cluster.completed(config.train.device)
    device = pick_device(config.train.device).kind
    if device == "cpu":  # workers share the host, however many cores it has
        facts = replace(facts, device_bytes=config.cluster.device_bytes)
    return facts, device


def device_kind(config: JobConfig, cluster: ClusterConfig) -> str:
    """Return what `train.device = auto` comes to on a cluster."""
    if config.train.device != "auto":
        return config.train.device
    return "cuda" if cluster.device_bytes else "cpu"


def capacity_bytes(cluster: ClusterConfig, world_size: int, device: str) -> int | None:
    """Return the bytes one rank may use: of its device, or its share of the host; None when that is not known."""
    if cluster.device_bytes:
        return cluster.device_bytes
    per_host = -(-world_size // max(1, cluster.nodes))
    return cluster.host_bytes // per_host if device == "cpu" and cluster.host_bytes else None


def unit_shards(stage: int, mesh: Mesh) -> int:
    """Return over how many ranks a unit is cut; ZeRO stage 0 cuts only its reduction, so over all of them."""
    return mesh.size("dp") if stage == 0 else mesh.sizes["dp_shard"]


def comm_seconds(traffic: Sequence[Transfer], cluster: ClusterConfig, mesh: Mesh, stage: int) -> float | None:
    """Return the seconds a step's traffic takes at the cluster's bandwidths, without overlap; None if one is unknown.

    Ranks of a host are neighbours on `dp_shard`. A ring through whole hosts enters each once; groups of one rank per
    host share its network.
    """
    per_host, link, network = cluster.devices_per_node, cluster.link_bytes_per_s, cluster.network_bytes_per_s
    sizes = {"shard": unit_shards(stage, mesh)}
    seconds = 0.0
    for t in traffic:
        within = cluster.nodes <= 1 or sizes.get(t.group, mesh.world_size) <= per_host
        rate = link if within else network if t.group == "shard" else network / max(1, per_host)
        if not rate:
            return None
        seconds += t.wire_bytes / rate
    return seconds
