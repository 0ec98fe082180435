"""One rank of one side of benchmarks/pipeline.py: build the side, warm up, time steps, step while memory is sampled.

A side is called SYSTEM-SCHEDULE-DETAIL. `windlass-1f1b-2` is Windlass's 1F1B with vocabulary algorithm 2 (`off`:
without vocabulary passes; `2c`: logits of a few thousand vocabulary rows at a time). `torch-1f1b-best` is the schedule
of that name of torch.distributed.pipelining with the stages that Windlass cuts without vocabulary passes,
`torch-1f1b-even` with as many blocks in every stage. Every side trains the same decoder from the same weights on the
same batches with torch's fused AdamW and a global gradient norm limit, each rank holding nothing but its own stages.

Windlass's sides end with traced steps, from which the launcher predicts what a step takes. With `--hollow` the parts of
the model compute nothing, so that what remains is the runner's own work. Not meant to be started by hand.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from ranks import Reporter
from torch import nn
from workload import Fill, Workload, plain_loss
from zero_sides import Side, adamw, add_phases, decay_groups, meet_peers, run_phases, windlass_engine

from windlass.dist import env
from windlass.dist.trace import Event
from windlass.launch.start import initial_values
from windlass.model.build import materialise
from windlass.model.config import ModelConfig
from windlass.model.loss import PLAIN, Loss, LossConfig
from windlass.model.meta import weightless
from windlass.model.protocol import BlockModel, Init
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.model_costs import model_costs
from windlass.parallel.pipeline.plan import PipelinePlan, plan_pipeline
from windlass.parallel.pipeline.policy import PipelineConfig
from windlass.parallel.pipeline.timeline import without_waits
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.zero import ZeroConfig

ZERO_STAGE = 1
CHUNK_ROWS = 8192  # of the vocabulary, in a side whose logits are streamed


class HollowPart(nn.Module):
    """A block that computes nothing. It copies a few bytes, because torch's split backward cannot handle views."""

    def forward(self, h_BTD: torch.Tensor, context: Any) -> torch.Tensor:
        return h_BTD.clone()


class HollowEmbed(nn.Module):
    """The least that makes hidden states of token ids."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, tokens_BT: torch.Tensor, context: Any) -> torch.Tensor:
        h_BTD: torch.Tensor = self.tokens(tokens_BT)
        return h_BTD


class HollowHead(nn.Module):
    """The least that makes a loss of hidden states."""

    def forward(self, h_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        return h_BTD.square().sum()


class HollowModel(nn.Module):
    """A `BlockModel` around which everything happens as always, and in which nothing does."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed: nn.Module = HollowEmbed(config)
        self.head: nn.Module = HollowHead()
        self.blocks = nn.ModuleList(HollowPart() for _ in range(config.num_layers))

    def context(self, positions_BT: torch.Tensor, documents_BT: torch.Tensor, dtype: torch.dtype) -> None:
        return None

    def init(self, name: str) -> Init:
        return Init("normal", 1.0)


class HollowWorkload(Workload):
    """A job without work."""

    def empty_model(self, loss: Loss | LossConfig = PLAIN) -> tuple[BlockModel, Fill]:
        with weightless():
            model = HollowModel(self.config)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        return model, initial_values(model, self.seed)


def plan_for(workload: Workload, schedule: str, vocab: str, num_micro_batches: int, chunk: int = 0) -> PipelinePlan:
    """Plan a pipeline over all ranks as `windlass plan` would. Parts that compute nothing count as alike."""
    model, _ = workload.empty_model()
    costs = (
        None
        if isinstance(workload, HollowWorkload)
        else model_costs(
            model,
            micro_batch=workload.micro_batch,
            seq_len=workload.seq_len,
            loss_chunk_tokens=workload.config.loss_chunk_tokens,
            zero=ZeroConfig(stage=ZERO_STAGE),
            precision=PrecisionConfig(param="fp32"),
            optimizer=OptimizerConfig(),
            num_shards=1,
        )
    )
    return plan_pipeline(
        PipelineConfig(schedule=schedule, vocab=vocab, vocab_chunk=chunk),
        num_ranks=workload.world_size,
        num_micro_batches=num_micro_batches,
        num_blocks=len(model.blocks),
        vocab_size=workload.config.vocab_size,
        zero=ZeroConfig(stage=ZERO_STAGE),
        costs=costs,
    )


# -- Windlass --------------------------------------------------------------------------------------------------------


def build_windlass(workload: Workload, schedule: str, detail: str, num_micro_batches: int, traced_steps: int) -> Side:
    streamed = detail.endswith("c")
    plan = plan_for(
        workload, schedule, detail.removesuffix("c"), num_micro_batches, chunk=CHUNK_ROWS if streamed else 0
    )
    engine, comm = windlass_engine(workload, stage=ZERO_STAGE, pipeline=plan)
    phases: list[dict[str, float]] = []

    def step(index: int) -> float:
        began = time.perf_counter()
        batches = [workload.batch(index, i) for i in range(num_micro_batches)]
        working = time.process_time()
        report = engine.train_step(batches, workload.lr)
        busy = time.process_time() - working  # a rank that waits for a peer sleeps
        outside = time.perf_counter() - began - sum(report.seconds.values())
        phases.append({**report.seconds, "outside": outside, "busy": busy})
        return float(report.loss)

    def facts() -> dict[str, Any]:
        own = {name: statistics.median(seconds[name] for seconds in phases) for name in ("forward_backward", "busy")}
        phases.clear()
        comm.tracer.events.clear()
        comm.tracer.enabled = True
        for index in range(traced_steps):
            step(index)
        return {
            "blocks": plan.blocks,
            "schedule": plan.schedule.to_json(),
            "num_actions": len(plan.schedule.ranks[comm.rank]),
            "runner_s": own["forward_backward"],
            "busy_s": own["busy"],
            "action_s": action_seconds(comm.tracer.events),
            "phase_s": {name: statistics.median(p[name] for p in phases) for name in phases[0]} if phases else {},
        }

    return Side(step, lambda: comm.world.barrier(label="benchmark"), comm.close, True, facts)


def action_seconds(events: Iterable[Event]) -> dict[str, float]:
    """Return what each action takes by itself, compute without waiting for peers: the median over steps."""
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for event, seconds in without_waits(events):
        if "action" in event.args:
            compute = KINDS[Action.parse(event.name).kind].lane == "compute"
            taken[event.name].append(seconds if compute else event.duration_s)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


# -- torch.distributed.pipelining ------------------------------------------------------------------------------------


class TorchStage(nn.Module):
    """Some blocks of the Windlass decoder as `PipelineStage` expects them: one tensor in, one out.

    The head belongs to the loss function, so that the last stage has the decoder's own loss, which forms its gradients
    in place, instead of sending logits through the schedule.
    """

    def __init__(self, model: BlockModel, blocks: range, context: Any, num_tokens: int) -> None:
        super().__init__()
        self.embed = model.embed if blocks.start == 0 else None
        self.blocks = nn.ModuleList(model.blocks[i] for i in blocks)
        self.head = model.head if blocks.stop == len(model.blocks) else None
        self._context, self._num_tokens = context, num_tokens

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            h = self.embed(h, self._context)
        for block in self.blocks:
            h = block(h, self._context)
        return h

    def loss(self, h_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Return this micro-batch's share of the mean loss."""
        assert self.head is not None
        share: torch.Tensor = self.head(h_BTD, labels_BT) / self._num_tokens
        return share


def even_cut(num_blocks: int, num_stages: int) -> tuple[tuple[int, int], ...]:
    """Return [first, last) of stages with as many blocks each as possible."""
    return tuple(pairwise(i * num_blocks // num_stages for i in range(num_stages + 1)))


def torch_stages(
    workload: Workload, cut: Sequence[Sequence[int]], mine: Sequence[int], num_tokens: int, loss: Loss | LossConfig
) -> list[TorchStage]:
    """Return this rank's stages, the only ones that get memory."""
    model, fill = workload.empty_model(loss)
    held = {i for stage in mine for i in range(*cut[stage])}
    for i in set(range(len(model.blocks))) - held:
        model.blocks[i] = nn.Identity()
    if 0 not in mine:
        model.embed = nn.Identity()
    if len(cut) - 1 not in mine:
        model.head = nn.Identity()
    materialise(model, fill, torch.float32)
    batch = workload.batch(0, 0)
    context = model.context(batch.positions_BT, batch.documents_BT, workload.dtype)
    return [TorchStage(model, range(*cut[stage]), context, num_tokens) for stage in mine]


def build_torch(workload: Workload, schedule: str, detail: str, num_micro_batches: int, traced_steps: int) -> Side:
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining import schedules as theirs

    plan = plan_for(workload, schedule, "off", num_micro_batches)
    layout = plan.schedule.layout
    cut = plan.blocks if detail == "best" else even_cut(workload.config.num_layers, layout.num_stages)
    mine = layout.stages_of(workload.rank)
    begins, ends = 0 in mine, layout.num_stages - 1 in mine
    num_tokens = num_micro_batches * workload.micro_batch * workload.seq_len
    # torch splits a backward by walking the graph twice through what leads to weights. Our loss is one such node, and
    # runs once; there it gets the ordinary loss.
    parts = torch_stages(workload, cut, mine, num_tokens, plain_loss if schedule in ("zb1p", "zbv") else PLAIN)
    hidden = torch.empty(workload.micro_batch, workload.seq_len, workload.config.hidden_size)
    ids = torch.empty(workload.micro_batch, workload.seq_len, dtype=torch.int64)
    stages: list[Any] = [
        PipelineStage(
            part,
            stage,
            layout.num_stages,
            torch.device("cpu"),
            input_args=ids if stage == 0 else hidden.detach().requires_grad_(),
            output_args=hidden.detach().requires_grad_(),
        )
        for stage, part in zip(mine, parts, strict=True)
    ]
    one_per_rank = {"gpipe": theirs.ScheduleGPipe, "1f1b": theirs.Schedule1F1B}
    several = {
        "interleaved": theirs.ScheduleInterleaved1F1B,
        "zb1p": theirs.ScheduleInterleavedZeroBubble,
        "zbv": theirs.ScheduleZBVZeroBubble,
    }
    # Where there is a loss function there is a backward, so every rank gets one; the last stage calls it.
    options: dict[str, Any] = {"loss_fn": parts[-1].loss, "scale_grads": False}
    runner: Any
    if schedule in one_per_rank:
        runner = one_per_rank[schedule](stages[0], num_micro_batches, **options)
    else:
        runner = several[schedule](stages, num_micro_batches, **options)
    net = nn.ModuleList(parts)
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(decay_groups(net, workload.decay), **adamw(workload)) if params else None

    def step(index: int) -> torch.Tensor:
        net.zero_grad(set_to_none=True)
        batches = [workload.batch(index, i) for i in range(num_micro_batches)]
        losses: list[torch.Tensor] = []
        given = (torch.cat([b.tokens_BT for b in batches]),) if begins else ()
        wanted = {"target": torch.cat([b.labels_BT for b in batches]), "losses": losses} if ends else {}
        runner.step(*given, **wanted, return_outputs=False)
        gradients = [p.grad for p in params if p.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).double().square() if gradients else torch.zeros(()).double()
        dist.all_reduce(square)
        if workload.clip and params:
            torch.nn.utils.clip_grads_with_norm_(params, workload.clip, square.sqrt().float())
        if optimizer is not None:
            optimizer.step()
        return torch.stack(losses).sum().detach() if losses else torch.zeros(())

    return Side(step, facts=lambda: {"blocks": cut})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", required=True)
    parser.add_argument("--num-micro-batches", type=int, required=True)
    parser.add_argument("--traced-steps", type=int, required=True, help="steps after all others, Windlass only")
    parser.add_argument("--hollow", action="store_true", help="parts that compute nothing")
    add_phases(parser)
    Workload.add_arguments(parser)
    given = parser.parse_args()
    reporter = Reporter(given.events)
    who = env.read_process_env()
    torch.set_num_threads(1)
    workload = (HollowWorkload if given.hollow else Workload).from_arguments(given, who.rank, who.world_size)
    system, schedule, detail = given.side.split("-")
    if system == "torch":
        meet_peers(who)
    reporter.phase("build")
    build = {"torch": build_torch, "windlass": build_windlass}[system]
    side = build(workload, schedule, detail, given.num_micro_batches, given.traced_steps)
    phases = run_phases(side, reporter, given)
    losses = phases.losses
    if not side.loss_is_global:
        dist.all_reduce(losses)  # only the rank of the last stage knows them
    reporter.result(
        step_s=statistics.median(phases.seconds),
        losses=losses.tolist(),
        num_parameters=workload.num_parameters,
        **side.facts(),
    )
    side.close()


if __name__ == "__main__":
    main()
