"""The plan: what every rank of a job will hold and move, as plain data, from nothing but the configuration.

    JobConfig + world size + cluster facts  ->  Plan

No process is started and no memory is taken. Model states and traffic follow the formulas of `parallel.memory`,
activations those of `parallel.footprint`, what pipeline ranks do is planned in `parallel.pipeline`; the run books what
it really allocates beside it.
Must not know: the command line, running processes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from windlass.dist.cluster import ClusterConfig
from windlass.dist.errors import ModelError, PlanError
from windlass.dist.mesh import Mesh, plan_mesh
from windlass.launch.job import JobConfig
from windlass.launch.measured import RecordedRun
from windlass.launch.plan_cluster import capacity_bytes, comm_seconds, device_kind, unit_shards
from windlass.launch.plan_offload import Offloading, OffloadSummary, placement_json, plan_offloading
from windlass.model.build import build_model
from windlass.model.flops import flops_per_token
from windlass.model.protocol import BlockModel
from windlass.offload.placement import OffloadPlan
from windlass.parallel.footprint import Footprint, hold, measure_footprint
from windlass.parallel.memory import MODEL_STATES, Transfer, plan_traffic, scratch_bytes, state_bytes
from windlass.parallel.pipeline.measured_costs import measured_costs
from windlass.parallel.pipeline.model_costs import model_costs
from windlass.parallel.pipeline.plan import plan_pipeline
from windlass.parallel.pipeline.planned import IDLE_GOAL, PipelinePlan
from windlass.parallel.pipeline.rank_bytes import RankActivations, plan_activations, plan_messages
from windlass.parallel.units import ModelPlan, RankShare, is_tied, plan_units, vocabulary_of

FITS, DOES_NOT_FIT, UNKNOWN = "fits", "does not fit", "unknown"
USABLE = 0.95  # of a device's memory; the rest goes to fragments of the allocator
# What a process holds before the first tensor: torch and its libraries, on a GPU also the CUDA context.
RUNTIME_BYTES = {"cpu": 450 * 2**20, "cuda": 600 * 2**20}
TOKEN_BYTES = 4 * 8  # token, position, document and label, each int64
VOCABULARY = -1  # the place of a vocabulary shard's gathers in `plan_traffic`


@dataclass(frozen=True)
class UnitSummary:
    """One unit: elements as the model has them, as they are padded, and those of one shard."""

    name: str
    trainable: bool
    num_parameters: int  # tensors
    numel: int
    padded: int
    shard_numel: int
    pipeline_rank: int = 0


@dataclass(frozen=True)
class RankSummary:
    """What one pipeline rank holds, moves and does.

    Units:  bytes on its device by class of state; `in_flight` micro-batches; `idle` the simulated share of a step
    """

    stages: list[tuple[int, int]]  # blocks [first, last) of each
    vocabulary: tuple[int, int] | None  # rows [low, high); None: not cut
    num_parameters: int
    bytes: dict[str, int]
    traffic: list[Transfer]
    in_flight: float
    idle: float


@dataclass(frozen=True)
class Plan:
    """What was planned. Equal on every rank, compared by `digest` when a run starts.

    `ranks` are those of one pipeline, a single one without. All data-parallel ranks beside one of them hold the same,
    because shards are padded to equal size; `bytes` and `traffic` are those of the worst, `worst_rank` in the world.
    Units:  bytes of one rank by tier and class of state; elements and bytes of one training step; seconds at the peak
            rates of the cluster
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
    flops_per_step: float  # of the mean rank
    compute_s: float | None
    comm_s: float | None
    device: str
    capacity_bytes: int | None
    verdict: str
    ranks: list[RankSummary]
    pipeline: PipelinePlan | None = None  # None: one pipeline rank
    notes: list[str] = field(default_factory=list)
    worst_rank: int = 0
    offload: OffloadSummary | None = None  # None: all state stays on the device
    placements: tuple[OffloadPlan | None, ...] = ()  # of the pipeline ranks

    def offload_of(self, pipeline_rank: int) -> OffloadPlan | None:
        """Return what rests where on a pipeline rank; None if nothing leaves its device."""
        return self.placements[pipeline_rank] if self.placements else None

    @property
    def worst(self) -> RankSummary:
        """The pipeline rank that holds most."""
        return max(self.ranks, key=lambda rank: sum(rank.bytes.values()))

    @property
    def traffic(self) -> list[Transfer]:
        return self.worst.traffic

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
        return sum(t.elements for t in self.traffic if t.tag in ("param", "grad"))

    def as_json(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        pipeline = None if self.pipeline is None else self.pipeline.as_json()
        plain = {**asdict(replace(self, pipeline=None, placements=())), "pipeline": pipeline}
        plain["placements"] = [None if p is None else placement_json(p) for p in self.placements]
        return {**plain, "model_state_bytes": self.model_state_bytes, "device_bytes": self.device_bytes}

    def digest(self) -> str:
        """Return a hash that is equal exactly when the plans are."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:16]


class Planner:
    """Plans variants of one model: what does not depend on the variant is worked out once."""

    def __init__(self, config: JobConfig) -> None:
        self._model = build_model(config.model, loss=config.loss)
        self._flops_per_token = flops_per_token(self._model, config.train.seq_len)
        self._footprints: dict[Any, Footprint | ModelError] = {}
        self._recorded: dict[str, RecordedRun] = {}

    def plan(
        self,
        config: JobConfig,
        world_size: int,
        cluster: ClusterConfig,
        device: str | None = None,
        *,
        activations: bool = True,
        seconds: bool = True,
    ) -> Plan:
        """Plan one job of this model. See `make_plan`. Without `seconds` no step is simulated."""
        mesh, train = plan_mesh(config.parallelism, world_size), config.train
        num_micro_batches = train.num_micro_batches(mesh.size("dp"))
        sequences = train.micro_batch * num_micro_batches * mesh.size("dp")
        device = device or device_kind(config, cluster)
        pipeline = self.pipeline(config, mesh) if mesh.sizes["pp"] > 1 else None
        footprint = self._footprint(config) if activations else None
        notes = _notes(config, mesh, pipeline, footprint)
        active = self._activations(config, pipeline, footprint) if isinstance(footprint, Footprint) else None
        units, ranks, num_trainable = [], [], 0
        whole = [RankShare.whole(len(self._model.blocks))]
        shares = whole if pipeline is None else [pipeline.share(rank) for rank in range(mesh.sizes["pp"])]
        cut = unit_shards(config.zero.stage, mesh), config.offload.tile
        model_plans = [plan_units(self._model, cut[0], share, cut[1]) for share in shares]
        offloading = self.offloading(config, mesh, cluster, device, model_plans, seconds=seconds)
        for rank, (share, model_plan) in enumerate(zip(shares, model_plans, strict=True)):
            held = _held_bytes(config, model_plan, device, num_micro_batches, offloading.device_bytes(rank))
            num_trainable += model_plan.trainable_numel
            units += [
                UnitSummary(u.name, u.trainable, len(u.parameters), u.numel, u.padded, u.shard_numel, rank)
                for u in model_plan.units
            ]
            ranks.append(
                RankSummary(
                    stages=[(span.first, span.last) for span in share.stages],
                    vocabulary=None if share.shard is None else (share.shard.low, share.shard.high),
                    num_parameters=model_plan.numel,
                    bytes=held | (active[rank] if active else {}),
                    traffic=_traffic(config, mesh, model_plan, pipeline, rank),
                    in_flight=1.0 if pipeline is None else pipeline.activations_in_flight(rank),
                    idle=0.0 if pipeline is None else round(pipeline.idle[rank], 4),
                )
            )
        worst = max(range(len(ranks)), key=lambda rank: sum(ranks[rank].bytes.values()))
        host = {} if device == "cpu" else {"batch": _waiting_bytes(config, num_micro_batches)}
        offload = offloading.summary
        tiers = {} if offload is None else offload.bytes
        capacity = capacity_bytes(cluster, world_size, device)
        # What is over on the device beside what its own budget says is seen below, with activations.
        if offload is not None and set(offload.over) - ({"device"} if not config.offload.device_bytes else set()):
            verdict = DOES_NOT_FIT
        elif capacity is None or active is None:
            verdict = UNKNOWN
        else:
            verdict = FITS if sum(ranks[worst].bytes.values()) <= capacity * USABLE else DOES_NOT_FIT
        flops = self._flops_per_token * sequences * train.seq_len / world_size
        return Plan(
            world_size=world_size,
            mesh=dict(mesh.sizes),
            num_parameters=sum(rank.num_parameters for rank in ranks),
            num_trainable=num_trainable,
            units=units,
            sequences_per_step=sequences,
            tokens_per_step=sequences * train.seq_len,
            num_micro_batches=num_micro_batches,
            bytes={"device": ranks[worst].bytes, "host": tiers.get("host", {}) | host, "nvme": tiers.get("nvme", {})},
            flops_per_step=flops,
            compute_s=flops / cluster.device_flops if cluster.device_flops else None,
            comm_s=comm_seconds(ranks[worst].traffic, cluster, mesh, config.zero.stage),
            device=device,
            capacity_bytes=capacity,
            verdict=verdict,
            ranks=ranks,
            pipeline=pipeline,
            notes=[*notes, *([] if offload is None else offload.notes)],
            offload=offload,
            placements=offloading.plans,
            worst_rank=worst * mesh.size("dp"),
        )

    def offloading(
        self,
        config: JobConfig,
        mesh: Mesh,
        cluster: ClusterConfig,
        device: str,
        units: Sequence[ModelPlan] = (),
        *,
        seconds: bool = False,
    ) -> Offloading:
        """Plan the tiers of a job for the units of its pipeline ranks, without `units` those of a single one."""
        whole = RankShare.whole(len(self._model.blocks))
        units = units or [plan_units(self._model, unit_shards(config.zero.stage, mesh), whole, config.offload.tile)]
        return plan_offloading(
            config,
            self._model,
            units,
            cluster,
            num_ranks=mesh.world_size,
            num_micro_batches=config.train.num_micro_batches(mesh.size("dp")),
            scratch=scratch_bytes(units[0], config.zero, config.precision, pipelined=mesh.sizes["pp"] > 1),
            device=device,
            seconds=seconds,
        )

    def pipeline(self, config: JobConfig, mesh: Mesh) -> PipelinePlan:
        """Plan the pipeline of one job, of a single stage if it has one pipeline rank.

        Only what the configuration says of the cluster counts, not what a machine detects about itself: the choice must
        be the same on every rank, and the same here as in the run.
        """
        model, train, cluster = self._model, config.train, config.cluster
        network = cluster.network_bytes_per_s / max(1, cluster.devices_per_node)
        bytes_per_s = cluster.link_bytes_per_s if cluster.nodes <= 1 else network
        spare = cluster.device_bytes * USABLE - max(RUNTIME_BYTES.values())
        costs = model_costs(
            model,
            micro_batch=train.micro_batch,
            seq_len=train.seq_len,
            loss_chunk_tokens=config.model.loss_chunk_tokens,
            zero=config.zero,
            precision=config.precision,
            optimizer=config.optimizer,
            num_shards=unit_shards(config.zero.stage, mesh),
            flops_per_s=cluster.device_flops,
            bytes_per_s=bytes_per_s,
            limit_bytes=spare if cluster.device_bytes else math.inf,
        )
        if config.pipeline.measured is not None:
            run = self._measured(config.pipeline.measured)
            run.check(config)
            costs = measured_costs(costs, run.recorded, bytes_per_s=bytes_per_s)
        return plan_pipeline(
            config.pipeline,
            num_ranks=mesh.sizes["pp"],
            num_micro_batches=train.num_micro_batches(mesh.size("dp")),
            num_blocks=len(model.blocks),
            vocab_size=config.model.vocab_size,
            tied=is_tied(model),
            zero=config.zero,
            activation=config.activation,
            costs=costs,
            vocab_problem=_vocab_problem(model),
            sequences=train.micro_batch * mesh.size("dp"),
        )

    def _activations(
        self, config: JobConfig, pipeline: PipelinePlan | None, footprint: Footprint
    ) -> list[dict[str, int]]:
        """Return the bytes by class of what every pipeline rank holds from forward to backward."""
        if pipeline is None:
            ranks = [RankActivations(footprint.kept, footprint.workspace, 1)]
        else:
            ranks = plan_activations(
                pipeline,
                hold(footprint.parts, config.activation),
                tokens=config.train.micro_batch * config.train.seq_len,
                itemsize=config.precision.param_dtype.itemsize,
                exact=config.precision.master_dtype.itemsize,
            )
        return [
            {"activation": r.kept, "workspace": r.workspace, "context": r.contexts * footprint.context} for r in ranks
        ]

    def _measured(self, root: str) -> RecordedRun:
        if root not in self._recorded:
            self._recorded[root] = RecordedRun.read(root)
        return self._recorded[root]

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


def _held_bytes(
    config: JobConfig, units: ModelPlan, device: str, num_micro_batches: int, offloaded: dict[str, int] | None
) -> dict[str, int]:
    """Return the bytes by class of what a rank's device holds besides activations.

    `offloaded` is what it holds of state and its buffers, where some of that rests elsewhere.
    """
    scratch = _scratch(config, units)
    if offloaded is None:
        held = state_bytes(units, config.zero, config.precision, config.optimizer) | scratch
    else:
        # The gradient in the format of the master is for units whose state is updated where it is.
        resident = any(name in offloaded for name in config.optimizer.state_names)
        held = offloaded | {n: size for n, size in scratch.items() if n == "grad_slot" or (n == "update" and resident)}
    one = config.train.micro_batch * config.train.seq_len * TOKEN_BYTES
    held["batch"] = _waiting_bytes(config, num_micro_batches) if device == "cpu" else one
    held["runtime"] = RUNTIME_BYTES[device]
    return held


def _scratch(config: JobConfig, units: ModelPlan) -> dict[str, int]:
    return scratch_bytes(
        units,
        config.zero,
        config.precision,
        pipelined=config.parallelism.pp > 1,
        activation=config.activation,
    )


def _waiting_bytes(config: JobConfig, num_micro_batches: int) -> int:
    """Return the bytes of token ids that have been read ahead."""
    one = config.train.micro_batch * config.train.seq_len * TOKEN_BYTES
    return (num_micro_batches + config.data.prefetch) * one


def _traffic(
    config: JobConfig, mesh: Mesh, units: ModelPlan, pipeline: PipelinePlan | None, rank: int
) -> list[Transfer]:
    gathers = None
    if pipeline is not None and pipeline.lowering["gather"] != "none":
        gathers = Counter(
            a.place if a.kind == "GATHER" else VOCABULARY
            for a in pipeline.schedule.ranks[rank]
            if a.kind in ("GATHER", "VGATHER")
        )
    rows = plan_traffic(
        units,
        config.zero,
        config.precision,
        num_replicas=mesh.sizes["dp_replicate"],
        world_size=mesh.world_size,
        num_micro_batches=config.train.num_micro_batches(mesh.size("dp")),
        stage_gathers=gathers,
        pipelined=pipeline is not None,
        activation=config.activation,
    )
    if pipeline is not None:
        rows += plan_messages(pipeline, rank, config.precision.param_dtype.itemsize)
    return rows


def _vocab_problem(model: BlockModel) -> str:
    """Say why the vocabulary of a model cannot be cut; empty if it can."""
    try:
        vocabulary_of(model)
    except PlanError as error:
        return str(error)
    return ""


def _notes(
    config: JobConfig, mesh: Mesh, pipeline: PipelinePlan | None, footprint: Footprint | ModelError | None
) -> list[str]:
    notes = []
    if pipeline is not None and pipeline.mean_idle > IDLE_GOAL:
        m = pipeline.schedule.num_micro_batches
        note = f"the pipeline is idle for {pipeline.mean_idle:.0%} of a step of {m} micro-batch{'es' * (m > 1)}"
        enough = pipeline.enough_micro_batches()
        if enough is None:
            note += ", and more would not help: the ranks have unequal work (pipeline.vocab, pipeline.cut)"
        else:
            batch = enough * config.train.micro_batch * mesh.size("dp")
            note += f"; with train.global_batch={batch} ({enough} micro-batches) for less than {IDLE_GOAL:.0%}"
        notes.append(note)
    if footprint is None:
        notes.append("activations left out")
    elif isinstance(footprint, ModelError):
        notes.append(f"activations unknown: {footprint}")
    return notes
