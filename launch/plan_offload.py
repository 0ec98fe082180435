"""The offload part of a plan: what rests on which tier of a rank, what its lanes move, how long a step takes, and wear.

    JobConfig + units of every pipeline rank + cluster facts  ->  OffloadSummary, and the OffloadPlan of every rank

What is chosen here depends on the configuration only, because every rank of a run chooses for itself, and the same.
Must not know: the command line, running processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from windlass.dist.cluster import ClusterConfig
from windlass.dist.errors import PlanError
from windlass.launch.job import JobConfig
from windlass.model.flops import attention_flops_per_token
from windlass.model.protocol import BlockModel
from windlass.offload.choose import admit, choose, coarse, excess, least_on_device
from windlass.offload.compile import build_program
from windlass.offload.costs import Wear, wear
from windlass.offload.placement import OffloadPlan, UnitPlacement, plan_offload
from windlass.offload.plan_bytes import footprints, plan_bytes
from windlass.offload.policy import POLICIES, OffloadConfig
from windlass.offload.program import COPY_LANES, step_bytes
from windlass.offload.rates import Rates
from windlass.offload.simulate import StepTimeline, simulate
from windlass.offload.workload import PartWork, Workload
from windlass.parallel.offloading import element_sizes, tile_orders, unit_facts
from windlass.parallel.units import ModelPlan

EXACT_RECORDS = 2500  # up to so many, bytes are counted record by record; above, several are taken together
DEVICE_BUDGET = 0.95  # of a device's memory, as far as a plan uses it
RUNTIME_BYTES = 600 * 2**20  # of the process and its libraries on a GPU
HOST_BUDGET = 0.9  # of a host's memory: the rest is for processes and the system


@dataclass(frozen=True)
class OffloadSummary:
    """What offloading does on the worst rank.

    Units:  bytes at rest and in buffers by tier and class; bytes by lane and step; budgets in bytes (0: not known);
            seconds of a step (None: rates are not known)
    """

    policy: str
    chosen: dict[str, Any]  # keys of the group offload that were planned, with their values
    bytes: dict[str, dict[str, int]]
    budgets: dict[str, int]
    over: dict[str, int]  # by tier, what is over the budget
    refusal: str  # why a run does not start, with the budgets that would do; empty: it does
    moved: dict[str, int]
    seconds: dict[str, float] | None = None  # forward, backward, update, and total
    busy: dict[str, float] = field(default_factory=dict)
    bound: str = ""  # the lane that is busy longest
    wear: Wear | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Offloading:
    """The plans of all pipeline ranks, and what they come to on the worst."""

    plans: tuple[OffloadPlan | None, ...]
    works: tuple[Workload, ...]
    summary: OffloadSummary | None
    config: OffloadConfig

    def device_bytes(self, rank: int) -> dict[str, int] | None:
        """Return the bytes by class on one pipeline rank's device; None if nothing is offloaded there."""
        plan = self.plans[rank]
        return None if plan is None else plan_bytes(plan, self.works[rank])["device"]


def plan_offloading(
    config: JobConfig,
    model: BlockModel,
    plans: Sequence[ModelPlan],
    cluster: ClusterConfig,
    *,
    num_ranks: int,
    num_micro_batches: int,
    scratch: Mapping[str, int],
    device: str,
    seconds: bool = True,
) -> Offloading:
    """Plan the tiers of every pipeline rank; `scratch` are the bytes of the buffers of gradients under reduction.

    Without `seconds`, no step is simulated.

    `cluster` tells rates and memory for what is shown; what is chosen follows `config.cluster`.
    Raises:  PlanError if a table names no unit, or no policy fits
    """
    works = tuple(_workload(config, model, units, num_micro_batches, cluster) for units in plans)
    if not config.offload.active:
        return Offloading((None,) * len(plans), works, None, config.offload)
    sizes = element_sizes(config.precision, config.optimizer)
    ranks_per_host = -(-num_ranks // max(1, config.cluster.nodes))
    budgets = _budgets(config, _other_bytes(config, model, scratch, device), ranks_per_host, device)
    # The rank with most parameters has least room, so it chooses for all.
    worst = max(range(len(works)), key=lambda rank: sum(unit.numel for unit in works[rank].units))
    names = [unit.name for work in works for unit in work.units]
    rates = Rates.of(config.cluster, ranks_per_host)
    own = _for_rank(config.offload, names, works[worst])
    chosen = choose(own, works[worst], sizes, rates, budgets, drives=bool(config.cluster.nvme_paths))
    settled = replace(chosen.config, table=config.offload.table)
    placed = tuple(
        plan_offload(_for_rank(settled, names, work), work.units, sizes, clips=work.clips, accumulates=work.accumulates)
        for work in works
    )
    plan = placed[worst]
    if plan is None:
        return Offloading(placed, works, None, settled)
    summary = _summary(config.offload, settled, plan, works[worst], budgets)
    if seconds and config.parallelism.pp > 1:
        summary.notes.append("transfers and seconds are planned without a pipeline only")
    elif seconds:
        summary = _with_step(summary, settled, plan, works[worst], cluster, num_ranks)
    return Offloading(placed, works, replace(summary, notes=[*summary.notes, *chosen.notes]), settled)


def simulated_step(offloading: Offloading, cluster: ClusterConfig, num_ranks: int) -> StepTimeline:
    """Return the simulated step of a job that offloads and has one pipeline rank.

    Raises:  PlanError naming the rates of the cluster that are not known
    """
    (plan,), (work,) = offloading.plans, offloading.works
    assert plan is not None
    rates = Rates.of(cluster, -(-num_ranks // max(1, cluster.nodes)))
    timeline, _ = _step(offloading.config, plan, work, rates)
    unknown = _unknown(timeline, rates, cluster)
    if unknown:
        raise PlanError(
            f"the seconds of a step are not known without {', '.join(unknown)}. Measure them with `windlass bench "
            "tiers --path FOLDER --out cluster.yaml` and add --cluster cluster.yaml, or give them as KEY=VALUE"
        )
    return timeline


def placement_json(plan: OffloadPlan) -> dict[str, Any]:
    """Return a placement as plain data, records that follow each other alike as one entry."""
    rows = [
        {
            "name": unit.name,
            "numel": unit.numel,
            "param": unit.param,
            "grad": unit.grad,
            "records": [[tier, where, len(list(run))] for (tier, where), run in groupby(_places(unit))],
        }
        for unit in plan.units
    ]
    plain = {k: v for k, v in vars(plan).items() if k not in ("units", "sizes")}
    return {**plain, "lookahead": list(plan.lookahead), "sizes": vars(plan.sizes), "units": rows}


def _places(unit: UnitPlacement) -> list[tuple[str, str]]:
    return [(chunk.tier, chunk.update_on) for chunk in unit.chunks]


def _for_rank(offload: OffloadConfig, names: Sequence[str], work: Workload) -> OffloadConfig:
    """Return the configuration with the rows of the table that concern a rank; rows that concern nobody stay."""
    here = {unit.name for unit in work.units}

    def concerns(row: Mapping[str, str]) -> bool:
        matching = {name for name in names if fnmatchcase(name, row.get("units", ""))}
        return not matching or bool(matching & here)

    return replace(offload, table=[row for row in offload.table if concerns(row)])


def _budgets(config: JobConfig, other_bytes: int, ranks_per_host: int, device: str) -> dict[str, int]:
    """Return what each tier of a rank may hold of what is planned here; 0: not known.

    The device and the host of a CPU are one memory, so there only budgets that were given bind.
    """
    offload, cluster = config.offload, config.cluster
    on_device = offload.device_bytes or int(cluster.device_bytes * DEVICE_BUDGET)
    of_host = int(cluster.host_bytes * HOST_BUDGET) // ranks_per_host if device == "cuda" else 0
    return {
        "device": max(1, on_device - other_bytes) if on_device else 0,
        "host": offload.host_bytes or of_host,
        "nvme": offload.nvme_bytes,
    }


def _other_bytes(config: JobConfig, model: BlockModel, scratch: Mapping[str, int], device: str) -> int:
    """Return what a device holds besides what rests and moves there, by formulas that need no trial run."""
    tokens, itemsize = config.train.micro_batch * config.train.seq_len, config.precision.param_dtype.itemsize
    width = config.model.hidden_size
    kept = 0
    for number, block in enumerate(model.blocks):
        recomputed = config.activation.policy == "recompute" and number % config.activation.every == 0
        inside = sum(sum(p.shape) for p in block.parameters() if p.dim() == 2)
        kept += tokens * itemsize * (width if recomputed else inside)
    chunk = min(tokens, config.model.loss_chunk_tokens or tokens) * config.model.vocab_size
    logits = chunk * (itemsize + config.precision.master_dtype.itemsize)
    # A budget that was given is for what is booked; a device's memory holds the process and its libraries besides.
    runtime = 0 if config.offload.device_bytes or device == "cpu" else RUNTIME_BYTES
    return kept + logits + scratch.get("grad_slot", 0) + runtime


def _workload(
    config: JobConfig, model: BlockModel, units: ModelPlan, num_micro_batches: int, cluster: ClusterConfig
) -> Workload:
    """Return the step of one rank: parts with seconds at the cluster's peak rate, as far as that is known."""
    train, zero = config.train, config.zero
    tokens = train.micro_batch * train.seq_len
    rate = cluster.device_flops
    attention = attention_flops_per_token(model, train.seq_len) * tokens
    parts = []
    for stage in units.stages:
        for part in stage.parts:
            linear = 2.0 * tokens * sum(units.units[u].numel for u in part.all_units)
            again, forward, backward = config.activation.recomputes(part.name), 0.0, 0.0
            if part.role == "block" and rate:
                forward = (linear + attention) / rate
                backward = (3 if again else 2) * forward
            elif part.role == "head" and rate:  # the loss forms both gradients in its forward
                forward = 3 * linear / rate
            parts.append(PartWork(part.name, part.units, forward, backward, *tile_orders(part, recomputed=again)))
    shards = units.units[0].num_shards if zero.stage else 1
    resharding = zero.resharding(config.parallelism.pp > 1)
    return Workload(
        units=tuple(unit_facts(units, zero)),
        parts=tuple(parts),
        state_names=config.optimizer.state_names,
        num_shards=shards,
        num_micro_batches=num_micro_batches,
        clips=config.optimizer.clip_norm > 0,
        reshard=resharding if resharding in ("each", "turnaround") else "never",
        prefetch=zero.prefetch,
        comm_per_s=cluster.link_bytes_per_s if cluster.nodes <= 1 else cluster.network_bytes_per_s,
    )


def _summary(
    given: OffloadConfig, settled: OffloadConfig, plan: OffloadPlan, work: Workload, budgets: Mapping[str, int]
) -> OffloadSummary:
    """Return what rests where, and what is over its budget."""
    over = excess(footprints(plan, work), budgets)
    return OffloadSummary(
        policy=settled.policy,
        chosen={
            name: value
            for name, value in vars(settled).items()
            if value != getattr(given, name) and value != getattr(POLICIES[settled.policy], name, None)
        },
        bytes=plan_bytes(plan, work),
        budgets=dict(budgets),
        over=over,
        refusal=_refusal(plan, work, budgets),
        moved={},
        notes=[least_on_device(plan, work)] if "device" in over else [],
    )


def _refusal(plan: OffloadPlan, work: Workload, budgets: Mapping[str, int]) -> str:
    try:
        admit(plan, work, budgets)
    except PlanError as error:
        return str(error)
    return ""


def _with_step(
    summary: OffloadSummary,
    settled: OffloadConfig,
    plan: OffloadPlan,
    work: Workload,
    cluster: ClusterConfig,
    num_ranks: int,
) -> OffloadSummary:
    """Add what a step moves and how long it takes."""
    ranks_per_host = -(-num_ranks // max(1, cluster.nodes))
    rates = Rates.of(cluster, ranks_per_host)
    timeline, moved = _step(settled, plan, work, rates)
    unknown = _unknown(timeline, rates, cluster)
    if unknown:
        text = f"seconds of a step unknown: give {', '.join(unknown)} (windlass bench tiers measures them)"
        return replace(summary, moved=moved, notes=[*summary.notes, text])
    seconds = {"forward": timeline.forward_s, "backward": timeline.backward_s, "update": timeline.update_s}
    written = moved.get("file write", 0) * ranks_per_host
    return replace(
        summary,
        moved=moved,
        seconds={name: round(value, 4) for name, value in (seconds | {"total": timeline.total_s}).items()},
        busy={lane: round(value, 4) for lane, value in timeline.busy.items() if value},
        bound=timeline.bound,
        wear=wear(written, timeline.total_s, float(cluster.nvme_endurance_bytes)),
    )


def _step(
    settled: OffloadConfig, plan: OffloadPlan, work: Workload, rates: Rates
) -> tuple[StepTimeline, dict[str, int]]:
    """Simulate a step; return it, and what its lanes move."""
    records = sum(len(unit.chunks) for unit in plan.units)
    if records > EXACT_RECORDS:
        larger = coarse(settled, work, EXACT_RECORDS)
        found = plan_offload(larger, work.units, plan.sizes, clips=work.clips, accumulates=work.accumulates)
        assert found is not None
        plan = found
    program = build_program(plan, work)
    moved = {lane: n for lane, n in step_bytes(program).items() if lane in COPY_LANES}
    return simulate(program, rates, comm_per_s=work.comm_per_s), moved


def _unknown(timeline: StepTimeline, rates: Rates, cluster: ClusterConfig) -> list[str]:
    """Return the keys of the cluster that a prediction of this step lacks."""
    keys = {
        "h2d": "cluster.h2d_bytes_per_s",
        "file_read": "cluster.nvme_read_bytes_per_s",
        "cpu_update": "cluster.cpu_update_per_s",
        "device_update": "cluster.device_update_per_s",
    }
    lanes = {"h2d": "h2d", "d2h": "h2d", "file read": "file_read", "file write": "file_read"}
    lanes |= {"cpu update": "cpu_update", "device update": "device_update"}
    used = {lanes[span.lane] for span in timeline.spans if span.lane in lanes}
    missing = [keys[name] for name in keys if name in used and name in rates.unknown]
    return ([] if cluster.device_flops else ["cluster.device_flops"]) + missing
