"""The plan's formulas are what the engine does: bytes of every class of state, and every collective of a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.parity import reference
from windlass.data.batch import Batch
from windlass.dist.comm import Comm
from windlass.dist.device import pick_device
from windlass.dist.mesh import ParallelismConfig, plan_mesh
from windlass.dist.trace import Tracer
from windlass.launch.job import JobConfig, TrainConfig
from windlass.launch.plan import make_plan
from windlass.model.build import build_model
from windlass.model.config import ModelConfig
from windlass.offload.policy import OffloadConfig
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.engine import Engine
from windlass.parallel.memory import plan_traffic, scratch_bytes, state_bytes
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.pipeline.policy import PipelineConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import plan_units
from windlass.parallel.zero import ZeroConfig


@dataclass(frozen=True)
class Case:
    zero: ZeroConfig
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model: dict[str, Any] = field(default_factory=dict)
    replicate: int = 1
    accumulate: int = 1


LOSSY = PrecisionConfig(param="bf16", reduce="bf16")
ODD = {"tied": True, "frozen": True, "num_blocks": 4}
WALKS = [ZeroConfig(3, reshard, prefetch) for reshard in ("each", "turnaround", "never") for prefetch in (0, 2)]
EVERY_STAGE = [Case(ZeroConfig(stage), LOSSY, model=ODD, accumulate=2) for stage in range(4)]
EVERY_WALK = [
    *(Case(zero, LOSSY, model=ODD, accumulate=2) for zero in WALKS),
    *(Case(zero, model={"frozen_embed": True}) for zero in WALKS[1:4]),
    Case(ZeroConfig(1), optimizer=OptimizerConfig(name="sgd", momentum=0.9)),
]
HYBRID = [Case(ZeroConfig(stage), model=ODD, replicate=2) for stage in (1, 3)]


def observe(comm: Comm, all_cases: list[Case]) -> list[tuple[dict[str, int], list[tuple[Any, ...]]]]:
    """Train one step of every case; return what was booked and what passed the door in that step."""
    seen = []
    for case in all_cases:
        held: Counter[str] = Counter()
        engine = Engine(
            reference.OddModel(**case.model),
            comm=comm,
            mesh=plan_mesh(ParallelismConfig(dp_replicate=case.replicate), comm.world.size),
            device=pick_device("cpu"),
            zero=case.zero,
            precision=case.precision,
            activation=ActivationConfig(),
            optimizer=case.optimizer,
            fill=reference.fill,
            tracer=Tracer(),
            account=lambda state, num_bytes, held=held: held.update({state: num_bytes}),
        )
        comm.ledger.clear()
        engine.train_step([reference.make_batch(i) for i in range(case.accumulate)], 1e-3)
        rows = [(*key, e.calls, e.elements, e.payload_bytes, e.wire_bytes) for key, e in comm.ledger.entries.items()]
        seen.append((dict(held), sorted(rows)))
    return seen


def expect(case: Case, ranks: int) -> tuple[dict[str, int], list[tuple[Any, ...]]]:
    shards = ranks if case.zero.stage == 0 else ranks // case.replicate
    plan = plan_units(reference.OddModel(**case.model), shards)
    held = state_bytes(plan, case.zero, case.precision, case.optimizer)
    held |= {k: n for k, n in scratch_bytes(plan, case.zero, case.precision).items() if k != "update"}
    traffic = plan_traffic(
        plan,
        case.zero,
        case.precision,
        num_replicas=case.replicate,
        world_size=ranks,
        num_micro_batches=case.accumulate,
    )
    rows = [(t.group, t.kind, t.tag, t.calls, t.elements, t.bytes, t.wire_bytes) for t in traffic]
    return held, sorted(rows)


def check(ranks: int, all_cases: list[Case]) -> None:
    for result in run_world(ranks, observe, all_cases):
        for case, (held, rows) in zip(all_cases, result, strict=True):
            planned_held, planned_rows = expect(case, ranks)
            assert rows == planned_rows, case
            assert {k: n for k, n in held.items() if n} == {k: n for k, n in planned_held.items() if n}, case


def test_two_ranks_hold_and_move_what_was_planned() -> None:
    check(2, EVERY_STAGE + EVERY_WALK)


def test_four_ranks_in_two_replicas_hold_and_move_what_was_planned() -> None:
    check(4, HYBRID)


def test_one_rank_moves_nothing() -> None:
    check(1, EVERY_STAGE[::3])


# -- pipelines ---------------------------------------------------------------------------------------------------------

LEFT_OUT = ("batch", "runtime", "update")  # nobody books these
BY_CHANCE = ("pp ROWS", "pp DROWS", "pp DX")  # how many rows there are depends on the tokens


def pipeline_job(schedule: str, vocab: str, zero: ZeroConfig, *, tied: bool = False, replicate: int = 1) -> JobConfig:
    model = ModelConfig(
        vocab_size=512, hidden_size=64, num_layers=4, num_heads=2, loss_chunk_tokens=64, tie_embeddings=tied
    )
    return JobConfig(
        model=model,
        train=TrainConfig(seq_len=64, micro_batch=2, global_batch=16, device="cpu"),
        zero=zero,
        pipeline=PipelineConfig(schedule=schedule, vocab=vocab),
        parallelism=ParallelismConfig(pp=2, dp_replicate=replicate),
    )


TILED: dict[str, Any] = {"offload": OffloadConfig(tile=64 * 16), "activation": ActivationConfig("recompute")}
PIPELINES = [
    pipeline_job("1f1b", "off", ZeroConfig(1)),
    pipeline_job("1f1b", "off", ZeroConfig(2), tied=True),
    pipeline_job("1f1b", "off", ZeroConfig(0), tied=True),
    pipeline_job("1f1b", "off", ZeroConfig(1), tied=True, replicate=2),
    pipeline_job("interleaved", "2", ZeroConfig(0)),
    pipeline_job("vhalf", "2", ZeroConfig(1)),
    pipeline_job("zbv", "1", ZeroConfig(3)),
    pipeline_job("1f1b", "2", ZeroConfig(3, "each")),
    pipeline_job("1f1b", "2", ZeroConfig(3, "never"), tied=True),
    *(
        replace(job, **TILED)
        for job in (pipeline_job("zb1p", "2", ZeroConfig(3)), pipeline_job("1f1b", "off", ZeroConfig(3, "each")))
    ),
]


def random_batch(number: int, vocab_size: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    tokens_BT, labels_BT = torch.randint(0, vocab_size, (2, 2, 64), generator=generator)
    positions_BT = torch.arange(64).expand(2, 64).contiguous()
    return Batch(tokens_BT, positions_BT, torch.zeros_like(positions_BT), labels_BT, torch.arange(2))


def observe_pipelines(comm: Comm, jobs: list[JobConfig]) -> list[tuple[dict[str, int], list[tuple[Any, ...]]]]:
    """Train one step of every job; return what was booked and what passed the door in that step."""
    seen = []
    for job in jobs:
        held: Counter[str] = Counter()
        engine = Engine(
            build_model(job.model, loss=job.loss),
            comm=comm,
            mesh=plan_mesh(job.parallelism, comm.world.size),
            device=pick_device("cpu"),
            zero=job.zero,
            precision=job.precision,
            activation=job.activation,
            optimizer=job.optimizer,
            fill=reference.fill,
            tracer=Tracer(),
            account=lambda state, num_bytes, held=held: held.update({state: num_bytes}),
            pipeline=make_plan(job, comm.world.size, job.cluster, "cpu", activations=False).pipeline,
            tile=job.offload.tile,
        )
        comm.ledger.clear()
        engine.train_step([random_batch(i, job.model.vocab_size) for i in range(job.train.num_micro_batches(2))], 1e-3)
        rows = [(*key, e.calls, e.elements, e.payload_bytes, e.wire_bytes) for key, e in comm.ledger.entries.items()]
        seen.append((dict(held), sorted(row for row in rows if row[1] != "send")))
    return seen


def test_the_ranks_of_a_pipeline_hold_and_move_what_was_planned() -> None:
    for rank, results in enumerate(run_world(4, observe_pipelines, PIPELINES)):
        for job, (held, rows) in zip(PIPELINES, results, strict=True):
            planned = make_plan(job, 4, job.cluster, "cpu", activations=False).ranks[rank // 2]
            expected = {k: n for k, n in planned.bytes.items() if n and k not in LEFT_OUT}
            assert {k: n for k, n in held.items() if n} == expected, job
            moved = sorted(
                (t.group, t.kind, t.tag, t.calls, t.elements, t.bytes, t.wire_bytes) for t in planned.traffic
            )
            assert [row[:4] for row in moved] == [row[:4] for row in rows], job
            for plan_row, row in zip(moved, rows, strict=True):
                assert row[0] in BY_CHANCE or row == plan_row, job
                assert row[-1] == pytest.approx(plan_row[-1], rel=0.1), job
