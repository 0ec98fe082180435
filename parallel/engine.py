"""The engine of one rank: units over a mesh, walked forwards and backwards and stepped.

One call per step, one report back. Gradients are sums; the division by the global number of valid tokens happens where
backward is seeded, so accumulation, packing and uneven work cannot change the result.
Must not know: files, launchers, data order, learning-rate schedules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from windlass.data.batch import Batch
from windlass.dist.comm import Comm
from windlass.dist.device import Device
from windlass.dist.errors import ModelError
from windlass.dist.mesh import Mesh
from windlass.dist.state import Piece
from windlass.dist.trace import Tracer
from windlass.model.protocol import BlockModel
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.buffers import Account
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.unit import Fill, Unit
from windlass.parallel.units import ModelPlan, model_parts, plan_units
from windlass.parallel.walk import Walk, plan_stages
from windlass.parallel.zero import UnitBuilder, ZeroConfig


@dataclass(frozen=True)
class StepReport:
    """What one training step did, equal on every rank but for the seconds.

    Units:       loss nats per valid token; seconds by phase; stall_s seconds in which this rank moved or awaited bytes
    """

    loss: float
    tokens: int  # valid tokens of the global batch
    grad_norm: float  # before clipping
    skipped: bool  # the norm was not finite and nothing was updated
    seconds: dict[str, float]
    stall_s: float


class Engine:
    """Trains a `BlockModel` under ZeRO stages 0-3 on a `dp_replicate x dp_shard` mesh. A `StateSource`.

    The model's parameters are built on the meta device and get their values through `fill(name, start, stop, out_1d)`,
    asked only for the elements this rank holds. `account(state class, bytes)` is told of every buffer.

    Collective:  construction, every step, evaluation; all ranks of the mesh
    Raises:      ModelError if the model has nothing to train or a buffer was left on the meta device
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
    ) -> None:
        self._comm, self._device, self._tracer = comm, device, tracer
        self._precision, self._optimizer = precision, optimizer
        self._world = comm.world
        # Stage 0 splits only the reduction, so it may as well split it over every data-parallel rank.
        axes = ("dp_replicate", "dp_shard") if zero.stage == 0 else ("dp_shard",)
        rank = self._world.rank
        self._shards = comm.group(mesh.ranks_along(axes, rank), "shard")
        replicas = mesh.ranks_along("dp_replicate", rank) if zero.stage > 0 else (rank,)
        self._num_replicas = len(replicas)
        self._replica_index = replicas.index(rank)
        self.plan: ModelPlan = plan_units(model, self._shards.size)
        if not any(u.trainable for u in self.plan.units):
            raise ModelError("the model has no trainable parameter: set requires_grad on what is to be trained")
        by_name = _realise(model, self.plan, precision.param_dtype, device.torch_device)
        builder = UnitBuilder(
            zero,
            precision,
            optimizer,
            self._shards,
            comm.group(replicas, "replicate") if len(replicas) > 1 else None,
            device.torch_device,
            account,
        )
        self._units: list[Unit] = []
        for unit_plan in self.plan.units:
            unit = builder.build(unit_plan, [by_name[p.name] for p in unit_plan.parameters])
            unit.fill(fill)
            self._units.append(unit)
        self._trainable = [u for u in self._units if u.reducer is not None]
        stages = plan_stages(model, self.plan, self._units, activation, zero.reshard if zero.stage == 3 else "never")
        for unit in self._units:
            if not unit.residency.transient:
                unit.ready()
        self._walk = Walk(model, stages, zero.prefetch, precision.param_dtype, tracer)
        self._steps = 0
        self._seconds: dict[str, float] = {}

    @property
    def num_parameters(self) -> int:
        return self.plan.numel

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far (skipped steps make none)."""
        return self._steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        self._steps = steps
        for unit in self._units:
            unit.set_optimizer_steps(steps)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepReport:
        """Run one optimizer step over this rank's micro-batches.

        Collective:  every rank, with the same number of micro-batches (rows without labels are fine)
        """
        self._seconds = {}
        waited = self._comm.waited_s
        with self._phase("count"):
            tokens = self._global_sum(float(sum(b.num_valid for b in batches)))
        seed = 1.0 / tokens if tokens else 0.0
        with self._phase("forward_backward"):
            losses = [
                self._walk.forward_backward(self._put(batch), seed, last=i == len(batches) - 1)
                for i, batch in enumerate(batches)
            ]
        with self._phase("reduce"):
            for unit in self._trainable:
                assert unit.reducer is not None
                unit.reducer.finish()
        with self._phase("norm"):
            squares = torch.stack([_sum_of_squares(u.reducer.grad) for u in self._trainable if u.reducer])
            local = torch.stack([torch.stack(losses).double().sum(), squares.sum()]).cpu()
            self._world.all_reduce(local, tag="scalar", label="loss and norm").wait()
            loss = local[0].item() * seed
            # Each replica contributed the same sum of squares.
            norm = math.sqrt(local[1].item() / self._num_replicas) if local[1].item() >= 0 else math.nan
        skipped = not (math.isfinite(norm) and math.isfinite(loss))
        with self._phase("step"):
            # The same formula as torch.nn.utils.clip_grad_norm_, so that runs can be compared.
            scale = min(1.0, self._optimizer.clip_norm / (norm + 1e-6)) if self._optimizer.clip_norm else 1.0
            for unit in self._trainable:
                if skipped:
                    unit.skip()
                else:
                    unit.step(lr, scale)
            self._steps += not skipped
        self._device.synchronize()
        return StepReport(loss, int(tokens), norm, skipped, dict(self._seconds), self._comm.waited_s - waited)

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Return the global loss sum in nats and the global number of valid tokens, without touching any state.

        Collective:  every rank, with the same number of micro-batches
        """
        total = torch.zeros((), dtype=torch.float64, device=self._device.torch_device)
        for batch in batches:
            total += self._walk.forward(self._put(batch)).double()
        both = torch.stack([total.cpu(), torch.tensor(float(sum(b.num_valid for b in batches)), dtype=torch.float64)])
        self._world.all_reduce(both, tag="scalar", label="evaluation").wait()
        return both[0].item(), int(both[1].item())

    # -- StateSource -------------------------------------------------------------------------------------------------

    def owned(self) -> Sequence[Piece]:
        """Return the pieces this rank writes: its shard, from the first replica only."""
        return list(self._pieces(mine_only=True)) if self._replica_index == 0 else []

    def wanted(self) -> Sequence[Piece]:
        """Return the pieces this rank must have filled."""
        return list(self._pieces(mine_only=False))

    def loaded(self) -> None:
        """Rebuild compute parameters after a restore. Collective through publish."""
        for unit in self._units:
            unit.residency.writable()
            unit.refresh()

    def _pieces(self, mine_only: bool) -> Iterator[Piece]:
        for unit in self._units:
            low, high = unit.plan.box(self._shards.rank) if mine_only else (unit.low, unit.high)
            yield from unit.pieces(low, high)

    # ----------------------------------------------------------------------------------------------------------------

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


def _sum_of_squares(flat: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares in fp64; 16-bit gradients are summed in fp32."""
    dtype = torch.float32 if flat.dtype == torch.bfloat16 else flat.dtype
    return torch.linalg.vector_norm(flat, dtype=dtype).double().square()


def _realise(model: BlockModel, plan: ModelPlan, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Parameter]:
    """Replace the model's parameters by empty real ones, tied ones once; return them by checkpoint name."""
    fresh: dict[int, nn.Parameter] = {}
    by_name: dict[str, nn.Parameter] = {}
    for part, module in model_parts(model):
        for prefix, child in module.named_modules():
            for name, old in list(child._parameters.items()):
                if old is None:
                    continue
                if id(old) not in fresh:
                    empty = torch.empty(0, dtype=dtype, device=device)
                    fresh[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
                    by_name[f"{part}.{prefix}.{name}" if prefix else f"{part}.{name}"] = fresh[id(old)]
                child._parameters[name] = fresh[id(old)]
            for name, buffer in list(child._buffers.items()):
                if buffer is not None and buffer.is_meta:
                    where = ".".join(filter(None, (part, prefix, name)))
                    raise ModelError(
                        f"buffer '{where}' is on the meta device, so its values are unknown: build only parameters on "
                        "meta and buffers on the CPU"
                    )
                if buffer is not None:
                    child._buffers[name] = buffer.to(device)
    missing = [p.name for u in plan.units for p in u.parameters if p.name not in by_name]
    assert not missing, missing
    return by_name
