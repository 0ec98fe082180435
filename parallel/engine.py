"""The engine of one rank: units over a mesh, walked forwards and backwards and stepped.

One call per step, one report back. Gradients are sums; the division by the global number of valid tokens happens where
backward is seeded, so accumulation, packing and uneven work cannot change the result.
Must not know: files, launchers, data order, learning-rate schedules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from windlass.data.batch import Batch
from windlass.dist.comm import Comm, Group
from windlass.dist.device import Device
from windlass.dist.env import fault
from windlass.dist.errors import ModelError
from windlass.dist.mesh import Mesh
from windlass.dist.state import Piece
from windlass.dist.trace import Tracer
from windlass.model.loss import PLAIN
from windlass.model.protocol import BlockModel
from windlass.offload.lane import LaneCounters
from windlass.offload.machine import OffloadMachine
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.buffers import Account
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.pipeline.builders import forward_only, one_stage
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.plan import PipelinePlan
from windlass.parallel.pipeline.schedule import Layout, Schedule
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.stages import TURNAROUND, build_runner, gathers, hidden_width, realise
from windlass.parallel.stepper import Stepper
from windlass.parallel.tiles import check_tiles
from windlass.parallel.unit import Unit
from windlass.parallel.unit_state import Fill
from windlass.parallel.units import ModelPlan, RankShare, plan_units
from windlass.parallel.zero import UnitBuilder, ZeroConfig


@dataclass(frozen=True)
class StepReport:
    """What one training step did, equal on every rank but for the seconds.

    Units:       loss nats per valid token; seconds by phase; stall_s seconds in which this rank moved or awaited bytes
                 of peers; lanes: what every lane of the tiers did in the step
    """

    loss: float
    tokens: int  # valid tokens of the global batch
    grad_norm: float  # before clipping
    skipped: bool  # the norm was not finite and nothing was updated
    seconds: dict[str, float]
    stall_s: float
    lanes: dict[str, LaneCounters] = field(default_factory=dict)


class Engine:
    """Trains a `BlockModel` under ZeRO stages 0-3 on a `pp x dp_replicate x dp_shard` mesh. A `StateSource`.

    The model's parameters are built on the meta device and get their values through `fill(name, start, stop, out_1d)`,
    asked only for the elements this rank holds. `account(state class, bytes)` is told of every buffer. `pipeline` says
    which stages and rows of the vocabulary are where and in what order they run; without one there is one stage.
    `offload` has the tiers of what does not rest on the device. Weights with more than `tile` elements are gathered in
    tiles (0: none are).

    Collective:  construction, every step, evaluation; all ranks of the mesh
    Raises:      ModelError if the model has nothing to train or a buffer was left on the meta device; PlanError
                 for tiles below stage 3
    """

    def __init__(
        self,
        model: BlockModel,
        *,
        comm: Comm,
        mesh: Mesh,
        device: Device,
        zero: ZeroConfig,
        precision: PrecisionConfig,
        activation: ActivationConfig,
        optimizer: OptimizerConfig,
        fill: Fill,
        tracer: Tracer,
        account: Account,
        pipeline: PipelinePlan | None = None,
        offload: OffloadMachine | None = None,
        tile: int = 0,
    ) -> None:
        self._comm, self._device, self._tracer = comm, device, tracer
        self._precision, self._optimizer = precision, optimizer
        self._world = comm.world
        rank = self._world.rank
        self._pipeline = pipeline
        head: Any = model.head
        config = getattr(getattr(head, "loss", None), "config", PLAIN)
        self._regularised = bool(config.label_smoothing or config.z_loss)
        self._lowering = zero.lowering(mesh.sizes["pp"] > 1)
        if pipeline is not None and not gathers(pipeline.schedule):  # a file that leaves gathers to the walk
            self._lowering["gather"] = "none"
        self._schedules: dict[tuple[int, bool], Schedule] = {}
        column = mesh.ranks_along("pp", rank)
        self._pp_rank = column.index(rank)
        share = RankShare.whole(len(model.blocks)) if pipeline is None else pipeline.share(self._pp_rank)
        # Stage 0 splits only the reduction, so it may as well split it over every data-parallel rank.
        axes = ("dp_replicate", "dp_shard") if zero.stage == 0 else ("dp_shard",)
        self._shards = comm.group(mesh.ranks_along(axes, rank), "shard")
        replicas = mesh.ranks_along("dp_replicate", rank) if zero.stage > 0 else (rank,)
        self._replicas = tuple(mesh.ranks_along(axes, rank)) if zero.stage == 0 else tuple(replicas)
        self._num_replicas = len(replicas)
        self._replica_index = replicas.index(rank)
        self.whole: ModelPlan = plan_units(model, 1)
        if not any(u.trainable for u in self.whole.units):
            raise ModelError("the model has no trainable parameter: set requires_grad on what is to be trained")
        self.plan: ModelPlan = plan_units(model, self._shards.size, share, tile)
        check_tiles(self.plan, zero.stage)
        width = hidden_width(model) if len(column) > 1 else 0
        by_name = realise(model, self.plan, share, precision.param_dtype, device.torch_device)
        builder = UnitBuilder(
            zero,
            precision,
            optimizer,
            self._shards,
            comm.group(replicas, "replicate") if len(replicas) > 1 else None,
            self._holders(mesh, replicas, share),
            device.torch_device,
            account,
            offload,
        )
        self._offload, self._builder = offload, builder
        self._units: list[Unit] = []
        tiles = self.plan.tile_units
        for number, unit_plan in enumerate(self.plan.units):
            parameters = [by_name[p.name] for p in unit_plan.parameters]
            if number in tiles:
                parameters = [nn.Parameter(torch.empty_like(p), requires_grad=p.requires_grad) for p in parameters]
            unit = builder.build(unit_plan, parameters)
            unit.state.fill(fill)
            self._units.append(unit)
        builder.finish()
        trainable = [u for u in self._units if u.reducer is not None]
        self._stepper = Stepper(trainable, clips=optimizer.clip_norm > 0, machine=offload)
        for unit in self._units:
            if not unit.residency.transient:
                unit.ready()
        self._runner = build_runner(
            model,
            self.plan,
            share,
            self._units,
            self._schedule(1, train=True) if pipeline is None else pipeline.schedule,
            shards=() if pipeline is None else pipeline.shards,
            vocab_chunk=0 if pipeline is None else pipeline.vocab_chunk,
            comm=comm,
            ranks=column,
            zero=zero,
            activation=activation,
            dtype=precision.param_dtype,
            device=device.torch_device,
            width=width,
            tracer=tracer,
            window=(offload.plan.window if offload is not None else 0) or TURNAROUND,
            account=account if offload is not None else None,
        )
        self._steps = 0
        self._seconds: dict[str, float] = {}
        self.gate: Callable[[], object] = _open_gate  # passed before state changes: whoever copies it may wait there

    def _holders(self, mesh: Mesh, replicas: Sequence[int], share: RankShare) -> Group | None:
        """Return the group of ranks that hold the same shard of a tied embedding that lies on two pipeline ranks.

        Collective:  every rank of the world
        """
        if self._pipeline is None:
            return None
        ends = [pp for pp in range(self._pipeline.num_ranks) if self._pipeline.share(pp).tied_to_peer]
        if not ends:
            return None
        ranks = [mesh.rank_at({**mesh.coords(replica), "pp": pp}) for pp in ends for replica in replicas]
        return self._comm.group(sorted(ranks) if share.tied_to_peer else (self._world.rank,), "tied")

    def _schedule(self, num_micro_batches: int, *, train: bool) -> Schedule:
        """Return the schedule of a step, or of an evaluation, with that many micro-batches."""
        key = (num_micro_batches, train)
        if key not in self._schedules:
            layout = Layout(1, (0,)) if self._pipeline is None else self._pipeline.schedule.layout
            if not train:
                self._schedules[key] = lower(forward_only(layout, num_micro_batches), **self._lowering)
            elif self._pipeline is None:
                self._schedules[key] = lower(one_stage(num_micro_batches), **self._lowering)
            else:
                self._schedules[key] = self._pipeline.schedule
        return self._schedules[key]

    @property
    def num_parameters(self) -> int:
        return self.whole.numel

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far (skipped steps make none)."""
        return self._steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        self._steps = steps
        self._stepper.set_steps(steps)
        self._builder.set_steps(steps)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepReport:
        """Run one optimizer step over this rank's micro-batches.

        Collective:  every rank, with the same number of micro-batches (rows without labels are fine)
        """
        self._seconds = {}
        waited = self._comm.waited_s
        if self._offload is not None:
            self._offload.loans.give_back()
        self._stepper.begin(lr)
        with self._phase("count"):
            # Every pipeline rank has the same rows.
            tokens = self._global_sum(float(sum(b.num_valid for b in batches)) if self._pp_rank == 0 else 0.0)
        seed = 1.0 / tokens if tokens else 0.0
        with self._phase("forward_backward"):
            on_device = [self._put(batch) for batch in batches]
            self._fault("train.forward")
            losses = self._runner.run(self._schedule(len(batches), train=True), on_device, seed)
            self._fault("train.backward")
        with self._phase("reduce"):
            squares = self._stepper.settle()
        with self._phase("norm"):
            local = torch.stack([_total(losses), _total(squares)])
            self._world.all_reduce(local, tag="scalar", label="loss and norm").wait()
            loss = local[0].item() * seed
            # Each replica contributed the same sum of squares.
            norm = math.sqrt(local[1].item() / self._num_replicas) if local[1].item() >= 0 else math.nan
        skipped = not (math.isfinite(norm) and math.isfinite(loss))
        with self._phase("gate"):
            self.gate()
        with self._phase("step"):
            # The same formula as torch.nn.utils.clip_grad_norm_, so that runs can be compared.
            scale = min(1.0, self._optimizer.clip_norm / (norm + 1e-6)) if self._optimizer.clip_norm else 1.0
            self._stepper.finish(scale, skipped=skipped, between=lambda: self._fault("train.update"))
            self._steps += not skipped
            self._builder.set_steps(self._steps)
            if self._offload is not None:
                self._offload.check_balanced()
        self._device.synchronize()
        lanes = {} if self._offload is None else self._offload.take_counters()
        waited = self._comm.waited_s - waited
        return StepReport(loss, int(tokens), norm, skipped, dict(self._seconds), waited, lanes)

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Return the global cross entropy in nats and the global number of valid tokens, without touching any state.

        What is added to the loss in training (smoothing, penalties, weights of tokens) is left out.
        Collective:  every rank, with the same number of micro-batches
        """
        losses = self._forward(batches, per_token=self._regularised)
        if self._regularised:
            losses = [-logp_BT.sum() for logp_BT in losses]
        tokens = float(sum(b.num_valid for b in batches)) if self._pp_rank == 0 else 0.0
        both = torch.stack([_total(losses), torch.tensor(tokens, dtype=torch.float64)])
        self._world.all_reduce(both, tag="scalar", label="evaluation").wait()
        return both[0].item(), int(both[1].item())

    def log_probs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Return the log-probability of every label, logp_BT per micro-batch (fp32 or fp64, 0 without a label).

        On the pipeline rank of the head; on others the list is empty.
        Collective:  every rank, with the same number of micro-batches
        """
        return self._forward(batches, per_token=True)

    def _forward(self, batches: Sequence[Batch], *, per_token: bool = False) -> list[torch.Tensor]:
        if self._offload is not None:
            self._offload.loans.give_back()  # its slab may be the only one
        on_device = [self._put(batch) for batch in batches]
        schedule = self._schedule(len(batches), train=False)
        return self._runner.run(schedule, on_device, gradients=False, per_token=per_token)

    # -- StateSource -------------------------------------------------------------------------------------------------

    def owned(self) -> Sequence[Piece]:
        """Return the pieces this rank writes: its shard, from the first replica only."""
        return list(self._pieces(mine_only=True)) if self._replica_index == 0 else []

    def wanted(self) -> Sequence[Piece]:
        """Return the pieces this rank must have filled."""
        return list(self._pieces(mine_only=False))

    def held(self) -> Sequence[Piece]:
        """Return all state of this rank, the same on each of `replicas`."""
        return [p for u in self._units if not u.plan.borrowed for p in u.state.pieces(u.low, u.high, write=False)]

    @property
    def replicas(self) -> tuple[int, ...]:
        """The ranks of the world that hold the same state as this one, itself included."""
        return self._replicas

    @property
    def movable(self) -> bool:
        """Whether state may be elsewhere or change before the gate of the next step."""
        return self._offload is not None

    def loaded(self) -> None:
        """Rebuild compute parameters after a restore. Collective through publish."""
        for unit in self._units:
            unit.residency.writable()
            unit.state.refresh()

    def _pieces(self, mine_only: bool) -> Iterator[Piece]:
        for unit in self._units:
            if mine_only and unit.plan.borrowed:
                continue
            low, high = unit.plan.box(self._shards.rank) if mine_only else (unit.low, unit.high)
            yield from unit.state.pieces(low, high, write=not mine_only)

    # ----------------------------------------------------------------------------------------------------------------

    def _fault(self, point: str) -> None:
        fault(point, rank=self._world.rank, step=self._steps + 1)

    def _put(self, batch: Batch) -> Batch:
        return batch.to(self._device.torch_device)

    def _global_sum(self, value: float) -> float:
        total = torch.tensor([value], dtype=torch.float64)
        self._world.all_reduce(total, tag="scalar", label="valid tokens").wait()
        return total.item()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with self._tracer.span(name, "phase"):
            yield
        self._seconds[name] = time.perf_counter() - began


def _open_gate() -> None:
    """Nobody copies state."""


def _total(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum in fp64 on the host, zero of none."""
    return torch.stack([v.double() for v in values]).sum().cpu() if values else torch.zeros((), dtype=torch.float64)
