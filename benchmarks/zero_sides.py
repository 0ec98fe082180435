"""One rank of one side of benchmarks/zero.py: build the side, warm up, time steps, then step while memory is sampled.

Every side trains the same decoder from the same weights on the same batches with AdamW (torch's fused kernel), decay
groups and gradient clipping. The peers get the Windlass decoder wrapped as one ordinary `nn.Module`; each runs as its
documentation recommends. bf16 means: fp32 master weights everywhere; compute through autocast (alone, DDP), through
the peer's own mixed precision (FSDP2, DeepSpeed), or Windlass's.

Not meant to be started by hand: see benchmarks/zero.py.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from ranks import Reporter
from torch import nn
from workload import Workload

from windlass.data.batch import Batch
from windlass.dist import env

if TYPE_CHECKING:
    from windlass.dist.device import Device
    from windlass.dist.trace import Tracer
    from windlass.offload.machine import OffloadMachine
    from windlass.parallel.pipeline.plan import PipelinePlan

# A step runs one optimizer step and returns the loss: this rank's mean for the peers, the global mean for Windlass.
Step = Callable[[int], "torch.Tensor | float"]


@dataclass(frozen=True)
class Side:
    """A built side: `step(i)` trains on batch i, `meet` waits for all ranks; `loss_is_global` as said above."""

    step: Step
    meet: Callable[[], object] = dist.barrier
    close: Callable[[], object] = dist.destroy_process_group
    loss_is_global: bool = False
    facts: Callable[[], dict[str, Any]] = dict  # what it can say after its steps beside their times


class OneModule(nn.Module):
    """The Windlass decoder as peers expect a model: one module whose forward returns the mean loss."""

    def __init__(self, workload: Workload, *, autocast: bool = False) -> None:
        super().__init__()
        model = workload.model(autocast=autocast)
        self.embed, self.blocks, self.head = model.embed, model.blocks, model.head
        self._context, self._dtype = model.context, workload.dtype

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor, labels: torch.Tensor
    ) -> Any:
        context = self._context(positions, documents, self._dtype)
        h = self.embed(tokens, context)
        for block in self.blocks:
            h = block(h, context)
        return self.head(h, labels) / (labels != -100).sum()


def decay_groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups: tensors with two or more dims are decayed, the rest is not."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def inputs(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.tokens_BT, batch.positions_BT, batch.documents_BT, batch.labels_BT


def adamw(workload: Workload) -> dict[str, Any]:
    return {"lr": workload.lr, "betas": workload.betas, "eps": workload.eps, "fused": True}


def plain_step(
    workload: Workload, net: nn.Module, params: Iterable[nn.Parameter], optimizer: Any, autocast: bool
) -> Step:
    """Return the usual PyTorch loop body."""
    params = list(params)

    def step(index: int) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(workload.device).type, torch.bfloat16) if autocast else nullcontext():
            loss = net(*inputs(workload.batch(index)))
        loss.backward()
        if workload.clip:
            torch.nn.utils.clip_grad_norm_(params, workload.clip)
        optimizer.step()
        return loss.detach()

    return step


def build_alone(workload: Workload) -> Side:
    """No communication: every rank trains its own replica (an upper bound for any side)."""
    net = OneModule(workload, autocast=workload.bf16)
    optimizer = torch.optim.AdamW(decay_groups(net, workload.decay), **adamw(workload))
    return Side(plain_step(workload, net, net.parameters(), optimizer, workload.bf16))


def build_ddp(workload: Workload, *, sharded_optimizer: bool = False) -> Side:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    net = DistributedDataParallel(OneModule(workload, autocast=workload.bf16), gradient_as_bucket_view=True)
    groups = decay_groups(net, workload.decay)
    optimizer: Any
    if sharded_optimizer:
        optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **adamw(workload))
    else:
        optimizer = torch.optim.AdamW(groups, **adamw(workload))
    return Side(plain_step(workload, net, net.parameters(), optimizer, workload.bf16))


def build_fsdp2(workload: Workload, *, reshard: bool, offload: bool = False) -> Side:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (workload.world_size,)),
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if workload.bf16 else MixedPrecisionPolicy(),
        "reshard_after_forward": reshard,
    }
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)  # nothing can be pinned without an accelerator
    net = OneModule(workload)
    for block in net.blocks:
        fully_shard(block, **options)
    fully_shard(net, **options)
    optimizer = torch.optim.AdamW(decay_groups(net, workload.decay), **adamw(workload))
    return Side(plain_step(workload, net, net.parameters(), optimizer, False))


def build_deepspeed(
    workload: Workload,
    *,
    zero: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
    own_adam: bool = False,
    partition_first: bool = False,
) -> Side:
    """Build DeepSpeed's engine.

    `zero` and `more` are keys of its configuration; `own_adam` takes its optimizer instead of torch's;
    `partition_first` cuts and moves parameters before the engine is built, not while.
    """
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    net = OneModule(workload)
    groups = decay_groups(net, workload.decay)
    optimizer: Any
    if own_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(groups, lr=workload.lr, betas=workload.betas, eps=workload.eps, adamw_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, **adamw(workload))
    config = {
        "train_micro_batch_size_per_gpu": workload.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": workload.clip,
        "bf16": {"enabled": workload.bf16},
        "zero_optimization": dict(zero),
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs at memory speed too
        "steps_per_print": 10**9,
        **(more or {}),
    }
    if partition_first:
        deepspeed.zero.Init(module=net, config_dict_or_path=config)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)

    def step(index: int) -> torch.Tensor:
        loss = engine(*inputs(workload.batch(index)))
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Side(step)


def windlass_engine(
    workload: Workload,
    *,
    stage: int,
    device: str = "cpu",
    recompute: bool = False,
    reduce: str = "auto",
    pipeline: PipelinePlan | None = None,
    offload: Callable[[Device, Tracer], OffloadMachine | None] = lambda device, tracer: None,
    account: Callable[[str, int], None] = lambda state, num_bytes: None,
) -> tuple[Any, Any]:
    """Return Windlass's engine at a ZeRO stage, under a pipeline over all ranks or none, and its communicator.

    `offload` builds what holds state off the device.
    """
    from windlass.dist.comm import Comm
    from windlass.dist.device import pick_device
    from windlass.dist.mesh import ParallelismConfig, plan_mesh
    from windlass.dist.trace import Tracer
    from windlass.parallel.activation import ActivationConfig
    from windlass.parallel.engine import Engine
    from windlass.parallel.optim import OptimizerConfig
    from windlass.parallel.precision import PrecisionConfig
    from windlass.parallel.zero import ZeroConfig

    who, tracer = env.read_process_env(), Tracer()
    here = pick_device(device, who.local_rank)
    comm = Comm.start(who, here, transport="auto", timeout_s=120, tracer=tracer)
    model, fill = workload.empty_model()
    engine = Engine(
        model,
        comm=comm,
        mesh=plan_mesh(ParallelismConfig(pp=1 if pipeline is None else who.world_size), who.world_size),
        device=here,
        zero=ZeroConfig(stage=stage),
        precision=PrecisionConfig(param="bf16" if workload.bf16 else "fp32", reduce=reduce),
        activation=ActivationConfig(policy="recompute" if recompute else "keep"),
        optimizer=OptimizerConfig(
            betas=workload.betas, eps=workload.eps, weight_decay=workload.decay, clip_norm=workload.clip
        ),
        fill=fill,
        tracer=tracer,
        account=account,
        pipeline=pipeline,
        offload=offload(here, tracer),
    )
    return engine, comm


def build_windlass(workload: Workload, *, stage: int) -> Side:
    engine, comm = windlass_engine(workload, stage=stage)

    def step(index: int) -> float:
        return float(engine.train_step([workload.batch(index)], workload.lr).loss)

    return Side(step, lambda: comm.world.barrier(label="benchmark"), comm.close, loss_is_global=True)


SIDES: dict[str, Callable[[Workload], Side]] = {
    "alone": build_alone,
    "ddp": build_ddp,
    "zero-redundancy": lambda w: build_ddp(w, sharded_optimizer=True),
    "deepspeed-1": lambda w: build_deepspeed(w, zero={"stage": 1}),
    "deepspeed-2": lambda w: build_deepspeed(w, zero={"stage": 2}),
    "deepspeed-3": lambda w: build_deepspeed(w, zero={"stage": 3}),
    "fsdp2-keep": lambda w: build_fsdp2(w, reshard=False),
    "fsdp2": lambda w: build_fsdp2(w, reshard=True),
    "windlass-0": lambda w: build_windlass(w, stage=0),
    "windlass-1": lambda w: build_windlass(w, stage=1),
    "windlass-2": lambda w: build_windlass(w, stage=2),
    "windlass-3": lambda w: build_windlass(w, stage=3),
}


def add_phases(parser: argparse.ArgumentParser) -> None:
    """Add the options that say for how long a rank runs."""
    parser.add_argument("--events", type=int, required=True, help="file number of the pipe for reports")
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="timed steps")
    parser.add_argument("--memory-steps", type=int, required=True, help="further steps while memory is sampled")


@dataclass(frozen=True)
class Phases:
    """What the phases of one rank gave. Units: seconds of each timed step; bytes from and to drives in all of them."""

    seconds: list[float]
    losses: torch.Tensor  # of all steps, timed or not
    read_bytes: int
    written_bytes: int


def run_phases(side: Side, reporter: Reporter, given: argparse.Namespace) -> Phases:
    """Warm up, time steps, step while memory is sampled."""
    losses: list[torch.Tensor | float] = []
    reporter.phase("warmup")
    losses += [side.step(i) for i in range(given.warmup)]
    side.meet()
    reporter.phase("timed")
    seconds = []
    read_before, written_before = drive_bytes()
    for i in range(given.steps):
        began = time.perf_counter()
        losses.append(side.step(given.warmup + i))
        seconds.append(time.perf_counter() - began)
    read_after, written_after = drive_bytes()
    side.meet()
    reporter.phase("memory")
    losses += [side.step(given.warmup + given.steps + i) for i in range(given.memory_steps)]
    side.meet()
    reporter.phase("end")
    values = torch.tensor([float(loss) for loss in losses], dtype=torch.float64)
    return Phases(seconds, values, read_after - read_before, written_after - written_before)


def drive_bytes() -> tuple[int, int]:
    """Return what this process has read from and written to drives so far, the page cache's part left out."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def meet_peers(who: env.ProcessEnv) -> None:
    """Start torch.distributed over gloo."""
    assert who.rendezvous is not None
    store = dist.FileStore(who.rendezvous.removeprefix("file://"), who.world_size)
    dist.init_process_group("gloo", store=store, rank=who.rank, world_size=who.world_size)


def train(build: Callable[[Workload], Side], given: argparse.Namespace) -> None:
    """Be one rank of a side: build it, run its phases, report."""
    reporter = Reporter(given.events)
    who = env.read_process_env()
    torch.set_num_threads(1)
    workload = Workload.from_arguments(given, who.rank, who.world_size)
    if not given.side.startswith("windlass"):
        meet_peers(who)
    reporter.phase("build")
    side = build(workload)
    phases = run_phases(side, reporter, given)
    losses = phases.losses
    if not side.loss_is_global:
        dist.all_reduce(losses)
        losses /= who.world_size
    reporter.result(
        step_s=statistics.median(phases.seconds),
        steps_s=phases.seconds,
        losses=losses.tolist(),
        read_bytes=phases.read_bytes,
        written_bytes=phases.written_bytes,
        max_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        num_parameters=workload.num_parameters,
        facts=side.facts(),
    )
    side.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, required=True)
    add_phases(parser)
    Workload.add_arguments(parser)
    given = parser.parse_args()
    train(SIDES[given.side], given)


if __name__ == "__main__":
    main()
