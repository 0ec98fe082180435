"""Pipelines whose ranks keep state off their devices: every schedule, cut of the vocabulary and stage, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.pairwise import pairwise
from tests.parity import reference, test_pipeline
from tests.parity.offload_case import INF, folders, pieces, same, settle
from tests.parity.test_offload import POLICIES, SOME
from tests.parity.test_pipeline import GPT2
from windlass.dist.comm import Comm
from windlass.dist.device import pick_device
from windlass.dist.mesh import ParallelismConfig, plan_mesh
from windlass.dist.trace import Tracer
from windlass.offload.ledger import TierLedger
from windlass.offload.machine import Drives, OffloadMachine
from windlass.offload.placement import plan_offload
from windlass.offload.policy import OffloadConfig
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.engine import Engine
from windlass.parallel.offloading import element_sizes, unit_facts
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.pipeline.plan import plan_pipeline
from windlass.parallel.pipeline.policy import PipelineConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import is_tied, plan_units
from windlass.parallel.zero import ZeroConfig

LR = 1e-2
WIDE = replace(test_pipeline.SMALL, hidden_size=32, intermediate_size=48, num_layers=4)  # several records per block
MODELS = {
    "plain": WIDE,
    "tied": replace(WIDE, tie_embeddings=True),
    "gpt2": replace(GPT2, hidden_size=32, num_layers=4, tie_embeddings=True),
}
CHOICES: dict[str, Sequence[Any]] = {
    "policy": ["zero-offload", "interleaved", "zero-infinity", "fuyou", "mlp-offload"],
    "schedule": ["1f1b", "zbv", "vhalf", "interleaved"],
    "vocab": ["off", "1", "2"],
    "zero": [*(ZeroConfig(stage=s) for s in (3, 2, 1)), ZeroConfig(stage=3, reshard="each")],
    "format": [("bf16", "fp32"), ("fp32", "auto")],
    "model": list(MODELS),
    "micro_batches": [3, 1],
    "recompute": ["keep", "recompute"],
    "clipping": [(1.0, SOME[:4]), (0.0, (1.0, INF, 1.0))],
    "frozen": [(), ("embed", "blocks.0")],
    "records": [(2048, 1), (1 << 20, 3)],
}


@dataclass(frozen=True)
class PipelineCase:
    """A case of test_pipeline under an offload policy; `weights` as in `OffloadCase`."""

    case: test_pipeline.Case
    reduce: str = "auto"
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    weights: tuple[float, ...] = ()

    def steps(self) -> list[list[Any]]:
        total = self.case.micro_batches * self.case.columns
        out = []
        for step, factor in enumerate(self.weights):
            batches = [self.case.batch(step * total + i) for i in range(total)]
            for i, batch in enumerate(batches):
                one = 1.0 if factor == INF and i else factor
                batches[i] = replace(batch, weights_BT=torch.full(batch.labels_BT.shape, one, dtype=torch.float32))
            out.append(batches)
        return out


def case_of(choice: dict[str, Any], columns: int) -> PipelineCase:
    clip, weights = choice["clipping"]
    param, reduce = choice["format"]
    chunk, slabs = choice["records"]
    zero = choice["zero"]
    case = test_pipeline.Case(
        choice["schedule"],
        choice["vocab"],
        choice["micro_batches"],
        MODELS[choice["model"]],
        columns,
        zero=zero,
        param=param,
        recompute=choice["recompute"],
        optimizer=OptimizerConfig(clip_norm=clip),
        frozen=choice["frozen"],
    )
    offload = replace(POLICIES[choice["policy"]], chunk=chunk, slabs=slabs, watchdog_s=60.0)
    changes = {"param": "device"} if zero.stage < 3 else {}
    changes |= {"grad": "device"} if zero.stage < 2 else {}
    return PipelineCase(case, reduce, replace(offload, **changes), weights)


def train(comm: Comm, given: PipelineCase) -> dict[str, Any]:
    """Train on this rank's share; return what can be compared."""
    with folders(1) as paths:
        engine, machine = build(comm, given, paths)
        try:
            return run(comm, given, engine, machine)
        finally:
            if machine is not None:
                machine.close()


def build(comm: Comm, given: PipelineCase, paths: Sequence[str]) -> tuple[Engine, OffloadMachine | None]:
    case = given.case
    model, device, tracer, ledger = case.build(), pick_device("cpu", 0), Tracer(), TierLedger()
    num_stages = comm.world.size // case.columns
    mesh = plan_mesh(ParallelismConfig(pp=num_stages), comm.world.size)
    activation = ActivationConfig(policy=case.recompute)
    pipeline = plan_pipeline(
        PipelineConfig(schedule=case.schedule, vocab=case.vocab),
        num_ranks=num_stages,
        num_micro_batches=case.micro_batches,
        num_blocks=case.model.num_layers,
        vocab_size=case.model.vocab_size,
        tied=is_tied(model),
        zero=case.zero,
        activation=activation,
    )
    precision = PrecisionConfig(param=case.param, reduce=given.reduce)
    share = pipeline.share(mesh.ranks_along("pp", comm.rank).index(comm.rank))
    plan = plan_offload(
        given.offload,
        unit_facts(plan_units(model, mesh.sizes["dp_shard"], share), case.zero),
        element_sizes(precision, case.optimizer),
        clips=case.optimizer.clip_norm > 0,
        accumulates=case.micro_batches > 1,
    )
    machine = None
    if plan is not None:
        drives = Drives(list(paths), identity="test", rank=comm.rank)
        machine = OffloadMachine(
            plan, given.offload, device=device, ledger=ledger, tracer=tracer, drives=drives, warn=print
        )
    engine = Engine(
        model,
        comm=comm,
        mesh=mesh,
        device=device,
        zero=case.zero,
        precision=precision,
        activation=activation,
        optimizer=case.optimizer,
        fill=reference.fill,
        tracer=tracer,
        account=lambda state, held: ledger.add("device", state, held),
        pipeline=pipeline,
        offload=machine,
    )
    return engine, machine


def run(comm: Comm, given: PipelineCase, engine: Engine, machine: OffloadMachine | None) -> dict[str, Any]:
    column, columns = comm.rank % given.case.columns, given.case.columns
    out: dict[str, Any] = {"losses": [], "norms": [], "skipped": [], "evals": [], "saved": []}
    for batches in given.steps():
        report = engine.train_step(batches[column::columns], LR)
        out["losses"].append(report.loss)
        out["norms"].append(report.grad_norm)
        out["skipped"].append(report.skipped)
        out["evals"].append(engine.evaluate(given.steps()[0][column::columns]))
        settle(machine)
    out["owned"] = pieces(engine)
    settle(machine)
    return out


def train_all(comm: Comm, cases: Sequence[PipelineCase]) -> list[dict[str, Any]]:
    return [train(comm, case) for case in cases]


@pytest.mark.parametrize("share", ["half", pytest.param("all", marks=pytest.mark.soak)])
@pytest.mark.parametrize(("ranks", "columns"), [(2, 1), (4, 2)])
def test_every_pipeline_gives_the_bits_of_training_without_offloading(ranks: int, columns: int, share: str) -> None:
    cases = [case_of(choice, columns) for choice in pairwise(CHOICES)]
    cases = cases if share == "all" else cases[columns - 1 :: 2]  # two ranks train those that four do not
    everything = [*cases, *(replace(case, offload=OffloadConfig()) for case in cases)]
    results = run_world(ranks, train_all, everything)
    for i, case in enumerate(cases):
        same([r[i] for r in results], [r[len(cases) + i] for r in results], case)
    assert {any(of_case["skipped"]) for of_case in results[0]} == {True, False}
