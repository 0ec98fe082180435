"""The plan: what every rank of a job will hold and move, as plain data, from nothing but the configuration.

    JobConfig + world size + cluster facts  ->  Plan

No process is started and no memory is taken. Model states and traffic follow the formulas of `parallel.memory`,
activations those of `parallel.footprint`; the run books what it really allocates beside it.
Must not know: the command line, running processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from windlass.dist.cluster import ClusterConfig
from windlass.dist.errors import ModelError
from windlass.dist.mesh import Mesh, plan_mesh
from windlass.launch.job import JobConfig, value_at
from windlass.model.build import build_model
from windlass.model.flops import flops_per_token
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.footprint import Footprint, measure_footprint
from windlass.parallel.memory import MODEL_STATES, Transfer, plan_traffic, scratch_bytes, state_bytes
from windlass.parallel.units import ModelPlan, plan_units

FITS, DOES_NOT_FIT, UNKNOWN = "fits", "does not fit", "unknown"
USABLE = 0.95  # of a device's memory; the rest goes to fragments of the allocator
# What a process holds before the first tensor: torch and its libraries, on a GPU also the CUDA context.
RUNTIME_BYTES = {"cpu": 450 * 2**20, "cuda": 600 * 2**20}
MAX_DOUBLINGS = 8  # of the number of ranks, when looking for a change that fits
TOKEN_BYTES = 4 * 8  # token, position, document and label, each int64


@dataclass(frozen=True)
class UnitSummary:
    """One unit: elements as the model has them, as they are padded, and those of one shard."""

    name: str
    trainable: bool
    num_parameters: int  # tensors
    numel: int
    padded: int
    shard_numel: int


@dataclass(frozen=True)
class Plan:
    """What was planned. Equal on every rank, compared by `digest` when a run starts.

    Units:  bytes of one rank by tier and class of state, of the worst rank (shards are padded to equal size, so every
            rank is the worst); elements and bytes of one training step; seconds at the peak rates of the cluster
    """

    world_size: int
    mesh: dict[str, int]
    num_parameters: int
    num_trainable: int
    units: list[UnitSummary]
    sequences_per_step: int
    tokens_per_step: int
    num_micro_batches: int
    bytes: dict[str, dict[str, int]]
    traffic: list[Transfer]
    flops_per_step: float  # of one rank
    compute_s: float | None
    comm_s: float | None
    device: str
    capacity_bytes: int | None
    verdict: str
    notes: list[str] = field(default_factory=list)
    worst_rank: int = 0

    @property
    def model_state_bytes(self) -> int:
        """Bytes of the ZeRO paper's model states: parameters, gradients, optimizer states."""
        return sum(n for name, n in self.bytes["device"].items() if name in MODEL_STATES)

    @property
    def device_bytes(self) -> int:
        return sum(self.bytes["device"].values())

    @property
    def elements_per_step(self) -> int:
        """Elements of gradients and parameters that pass through collectives, as the ZeRO paper counts them."""
        return sum(t.elements for t in self.traffic if t.tag != "scalar")

    def as_json(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "model_state_bytes": self.model_state_bytes, "device_bytes": self.device_bytes}

    def digest(self) -> str:
        """Return a hash that is equal exactly when the plans are."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:16]


class Planner:
    """Plans variants of one model: what does not depend on the variant is worked out once."""

    def __init__(self, config: JobConfig) -> None:
        self._model = build_model(config.model)
        self._flops_per_token = flops_per_token(self._model, config.train.seq_len)
        self._footprints: dict[Any, Footprint | ModelError] = {}

    def plan(
        self,
        config: JobConfig,
        world_size: int,
        cluster: ClusterConfig,
        device: str | None = None,
        *,
        activations: bool = True,
    ) -> Plan:
        """Plan one job of this model. See `make_plan`."""
        mesh, train = plan_mesh(config.parallelism, world_size), config.train
        num_shards = mesh.size("dp") if config.zero.stage == 0 else mesh.sizes["dp_shard"]
        units = plan_units(self._model, num_shards)
        num_micro_batches = train.num_micro_batches(world_size)
        sequences = train.micro_batch * num_micro_batches * world_size
        device = device or _device(config, cluster)
        held, notes = self._bytes(config, units, device, num_micro_batches, activations)
        traffic = plan_traffic(
            units,
            config.zero,
            config.precision,
            num_replicas=mesh.sizes["dp_replicate"],
            world_size=world_size,
            num_micro_batches=num_micro_batches,
        )
        capacity = _capacity(cluster, world_size, device)
        if capacity is None or "activation" not in held["device"]:
            verdict = UNKNOWN
        else:
            verdict = FITS if sum(held["device"].values()) <= capacity * USABLE else DOES_NOT_FIT
        flops = self._flops_per_token * train.seq_len * train.micro_batch * num_micro_batches
        return Plan(
            world_size=world_size,
            mesh=dict(mesh.sizes),
            num_parameters=units.numel,
            num_trainable=units.trainable_numel,
            units=[
                UnitSummary(u.name, u.trainable, len(u.parameters), u.numel, u.padded, u.shard_numel)
                for u in units.units
            ],
            sequences_per_step=sequences,
            tokens_per_step=sequences * train.seq_len,
            num_micro_batches=num_micro_batches,
            bytes=held,
            traffic=traffic,
            flops_per_step=flops,
            compute_s=flops / cluster.device_flops if cluster.device_flops else None,
            comm_s=_comm_seconds(traffic, cluster, mesh, config.zero.stage),
            device=device,
            capacity_bytes=capacity,
            verdict=verdict,
            notes=notes,
        )

    def _bytes(
        self, config: JobConfig, units: ModelPlan, device: str, num_micro_batches: int, activations: bool
    ) -> tuple[dict[str, dict[str, int]], list[str]]:
        train, notes = config.train, []
        held = state_bytes(units, config.zero, config.precision, config.optimizer)
        held |= scratch_bytes(units, config.zero, config.precision)
        footprint = self._footprint(config) if activations else None
        if footprint is None:
            notes.append("activations left out")
        elif isinstance(footprint, Footprint):
            held |= {"activation": footprint.kept, "workspace": footprint.workspace, "context": footprint.context}
        else:
            notes.append(f"activations unknown: {footprint}")
        micro_batch = train.micro_batch * train.seq_len * TOKEN_BYTES
        waiting = (num_micro_batches + config.data.prefetch) * micro_batch
        held["batch"] = waiting if device == "cpu" else micro_batch
        held["runtime"] = RUNTIME_BYTES[device]
        return {"device": held, "host": {} if device == "cpu" else {"batch": waiting}, "nvme": {}}, notes

    def _footprint(self, config: JobConfig) -> Footprint | ModelError:
        train = config.train
        key = (config.activation, train.micro_batch, train.seq_len, config.precision.param)
        if key not in self._footprints:
            try:
                self._footprints[key] = measure_footprint(
                    self._model,
                    config.activation,
                    micro_batch=train.micro_batch,
                    seq_len=train.seq_len,
                    dtype=config.precision.param_dtype,
                )
            except ModelError as error:
                self._footprints[key] = error
        return self._footprints[key]


def make_plan(
    config: JobConfig,
    world_size: int,
    cluster: ClusterConfig,
    device: str | None = None,
    *,
    activations: bool = True,
) -> Plan:
    """Plan a job for a number of ranks on a cluster (facts that are zero are unknown).

    `device` ("cpu" or "cuda") says what `train.device = auto` came to; without it, cuda if the cluster's devices have
    memory of their own. Without `activations` they are left out, and the verdict is unknown.
    Raises: PlanError if the mesh does not fit the world size; ModelError if the model cannot be built
    """
    return Planner(config).plan(config, world_size, cluster, device, activations=activations)


@dataclass(frozen=True)
class Change:
    """A change of a job after which it fits."""

    overrides: list[str]
    world_size: int
    plan: Plan


def nearest_change(
    config: JobConfig, world_size: int, cluster: ClusterConfig, device: str | None = None
) -> Change | None:
    """Return the change that disturbs a job the least and makes it fit, or None if none of those tried does.

    Order: a higher stage, then recomputation, then a smaller micro-batch at the same batch per step, then more ranks.
    """
    planner = Planner(config)
    for overrides, variant, ranks in _variants(config, world_size):
        plan = planner.plan(variant, ranks, cluster, device)
        if plan.verdict == FITS:
            return Change(overrides, ranks, plan)
    return None


def _variants(config: JobConfig, world_size: int) -> Iterator[tuple[list[str], JobConfig, int]]:
    train = config.train
    divisors = [n for n in range(train.micro_batch, 0, -1) if train.micro_batch % n == 0]
    policies = [config.activation, ActivationConfig(policy="recompute")]
    for ranks in (world_size * 2**k for k in range(MAX_DOUBLINGS + 1)):
        batch = train.global_batch or train.micro_batch * ranks
        parallelism = config.parallelism if ranks == world_size else replace(config.parallelism, dp_shard=-1)
        for size, activation in product(divisors, policies[: 1 + (policies[0] != policies[1])]):
            if batch % (size * ranks):
                continue
            for stage in range(config.zero.stage, 4) if ranks > 1 else (config.zero.stage,):
                fixed_batch = train.global_batch if size == train.micro_batch else batch
                variant = replace(
                    config,
                    zero=replace(config.zero, stage=stage),
                    activation=activation,
                    train=replace(train, micro_batch=size, global_batch=fixed_batch),
                    parallelism=parallelism,
                )
                yield _overrides(config, variant), variant, ranks


def _overrides(config: JobConfig, variant: JobConfig) -> list[str]:
    """Say on the command line what a variant changes."""
    keys = (
        "zero.stage",
        "activation.policy",
        "activation.every",
        "train.micro_batch",
        "train.global_batch",
        "parallelism.dp_shard",
    )
    return [f"{key}={value_at(variant, key)}" for key in keys if value_at(variant, key) != value_at(config, key)]


def _device(config: JobConfig, cluster: ClusterConfig) -> str:
    if config.train.device != "auto":
        return config.train.device
    return "cuda" if cluster.device_bytes else "cpu"


def _capacity(cluster: ClusterConfig, world_size: int, device: str) -> int | None:
    """Return the bytes one rank may use: of its device, or its share of the host; None when that is not known."""
    if cluster.device_bytes:
        return cluster.device_bytes
    per_host = -(-world_size // max(1, cluster.nodes))
    return cluster.host_bytes // per_host if device == "cpu" and cluster.host_bytes else None


def _comm_seconds(traffic: list[Transfer], cluster: ClusterConfig, mesh: Mesh, stage: int) -> float | None:
    """Return the seconds a step's traffic takes at the cluster's bandwidths, without overlap; None if one is unknown.

    Ranks of a host are neighbours on `dp_shard`. A ring through whole hosts enters each once; groups of one rank per
    host share its network.
    """
    per_host, link, network = cluster.devices_per_node, cluster.link_bytes_per_s, cluster.network_bytes_per_s
    sizes = {"shard": mesh.size("dp") if stage == 0 else mesh.sizes["dp_shard"]}
    seconds = 0.0
    for t in traffic:
        within = cluster.nodes <= 1 or sizes.get(t.group, mesh.world_size) <= per_host
        rate = link if within else network if t.group == "shard" else network / max(1, per_host)
        if not rate:
            return None
        seconds += t.wire_bytes / rate
    return seconds
