"""Whole pipelines against one process: losses, norms and every parameter, for every schedule and vocabulary cut."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.parity import reference
from tests.parity.test_zero import assemble
from tests.tolerance import assert_close
from windlass.data.batch import IGNORE, Batch
from windlass.dist.comm import Comm
from windlass.dist.device import pick_device
from windlass.dist.mesh import ParallelismConfig, plan_mesh
from windlass.dist.trace import Tracer
from windlass.model.build import build_model
from windlass.model.config import ModelConfig
from windlass.model.loss import LossConfig
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.engine import Engine
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.pipeline.plan import plan_pipeline
from windlass.parallel.pipeline.policy import PipelineConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import is_tied
from windlass.parallel.zero import ZeroConfig

VOCAB, LAYERS, LR, STEPS = 71, 8, 0.5, 2
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "vhalf")
SMALL = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, num_layers=LAYERS, num_heads=2, intermediate_size=24, max_seq_len=reference.TOKENS
)
GPT2 = replace(
    SMALL, norm="layernorm", mlp="gelu_tanh", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True
)


@dataclass(frozen=True)
class Case:
    """One pipeline over one model."""

    schedule: str = "1f1b"
    vocab: str = "off"
    micro_batches: int = 3  # of one data-parallel column
    model: ModelConfig = SMALL
    columns: int = 1
    replicate: int = 1
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    param: str = "fp64"
    recompute: str = "keep"
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("sgd", clip_norm=0.0, weight_decay=0.0))
    pipeline: dict[str, Any] = field(default_factory=dict)
    weights: bool = False
    frozen: tuple[str, ...] = ()
    no_labels: bool = False
    tile: int = 0

    def steps(self) -> list[list[Batch]]:
        total = self.micro_batches * self.columns
        return [[self.batch(s * total + i) for i in range(total)] for s in range(STEPS)]

    def batch(self, number: int) -> Batch:
        batch = reference.make_batch(number)
        changes: dict[str, Any] = {"tokens_BT": (batch.tokens_BT * 7 + number) % VOCAB}
        labels = torch.where(batch.labels_BT == IGNORE, IGNORE, (batch.labels_BT * 7 + number) % VOCAB)
        changes["labels_BT"] = torch.full_like(labels, IGNORE) if self.no_labels and number % 2 else labels
        if self.weights:
            changes["weights_BT"] = (torch.arange(labels.numel()).view(labels.shape) % 5).double() / 2
        return replace(batch, **changes)

    def build(self) -> Any:
        model = build_model(self.model, loss=self.loss)
        for name in self.frozen:
            for parameter in model.get_submodule(name).parameters():
                parameter.requires_grad_(False)
        return model


def build_engine(comm: Comm, case: Case) -> Engine:
    model = case.build()
    num_stages = comm.world.size // case.columns
    mesh = plan_mesh(ParallelismConfig(pp=num_stages, dp_replicate=case.replicate), comm.world.size)
    activation = ActivationConfig(policy=case.recompute)
    pipeline = plan_pipeline(
        PipelineConfig(schedule=case.schedule, vocab=case.vocab, **case.pipeline),
        num_ranks=num_stages,
        num_micro_batches=case.micro_batches,
        num_blocks=case.model.num_layers,
        vocab_size=case.model.vocab_size,
        tied=is_tied(model),
        zero=case.zero,
        activation=activation,
    )
    return Engine(
        model,
        comm=comm,
        mesh=mesh,
        device=pick_device("cpu", 0),
        zero=case.zero,
        precision=PrecisionConfig(param=case.param),
        activation=activation,
        optimizer=case.optimizer,
        fill=reference.fill,
        tracer=Tracer(),
        account=lambda state, held: None,
        pipeline=pipeline,
        tile=case.tile,
    )


def train_all(comm: Comm, cases: list[Case]) -> list[dict[str, Any]]:
    """Train every case on this rank's share; return what can be compared."""
    return [train(comm, case) for case in cases]


def train(comm: Comm, case: Case) -> dict[str, Any]:
    engine = build_engine(comm, case)
    column = comm.rank % case.columns
    reports = [engine.train_step(batches[column :: case.columns], LR) for batches in case.steps()]
    evaluated = engine.evaluate(case.steps()[0][column :: case.columns])
    owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    return {
        "losses": [r.loss for r in reports],
        "norms": [r.grad_norm for r in reports],
        "owned": owned,
        "eval": evaluated,
    }


def plain(case: Case) -> reference.Trained:
    dtype = {"fp64": torch.float64, "fp32": torch.float32}[case.param]
    return reference.train_plain(case.build(), case.steps(), case.optimizer, dtype, LR)


def check(ranks: int, cases: list[Case], transport: str = "auto", factor: float = 1.0) -> None:
    results = run_world(ranks, train_all, cases, transport=transport)
    expected: dict[Any, reference.Trained] = {}
    for i, case in enumerate(cases):
        key = repr(replace(case, schedule="", vocab="", zero=ZeroConfig(), recompute="", pipeline={}, replicate=1))
        if key not in expected:
            expected[key] = plain(case)
        compare(case, [of_rank[i] for of_rank in results], expected[key], factor)


def compare(case: Case, results: list[dict[str, Any]], expected: reference.Trained, factor: float) -> None:
    dtype = next(iter(expected.parameters.values())).dtype
    for name, what in (("losses", expected.losses), ("norms", expected.norms)):
        for result in results:
            found = torch.tensor(result[name], dtype=dtype)
            assert_close(found, torch.tensor(what, dtype=dtype), f"{case}: {name}", factor)
    got = assemble(results)
    assert {k.removeprefix("model.") for k in got if k.startswith("model.")} == set(expected.parameters), case
    for name, value in expected.parameters.items():
        assert_close(got[f"model.{name}"], value, f"{case}: {name}", factor)


EVERY = [
    Case(schedule, vocab, model=model)
    for schedule, vocab, model in product(SCHEDULES, ("off", "1", "2"), (SMALL, replace(GPT2, tie_embeddings=True)))
]


SHARES = pytest.mark.parametrize("share", ["half", pytest.param("all", marks=pytest.mark.soak)])


def shared(share: str, number: int) -> list[Case]:
    """Return all cases, or every schedule and vocabulary with one of the two models: that whose turn it is."""
    return EVERY if share == "all" else [case for i, case in enumerate(EVERY) if (i // 2 + i + number) % 2 == 0]


@SHARES
@pytest.mark.parametrize(
    ("ranks", "micro_batches"),
    [(2, 1), (4, 3), *(pytest.param(*sizes, marks=pytest.mark.soak) for sizes in ((2, 3), (2, 5), (4, 1), (4, 5)))],
)
def test_every_schedule_gives_the_gradients_of_one_process(ranks: int, micro_batches: int, share: str) -> None:
    cases = shared(share, (ranks + micro_batches) // 2)
    check(ranks, [replace(case, micro_batches=micro_batches) for case in cases])


@SHARES
def test_every_schedule_works_over_process_groups(share: str) -> None:
    check(2, shared(share, 0), transport="group")


@SHARES
@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.soak) for stage in (0, 1, 2))])
def test_pipelines_combine_with_zero_over_data_parallel_columns(stage: int, share: str) -> None:
    check(4, [replace(case, columns=2, zero=ZeroConfig(stage=stage)) for case in shared(share, stage)])


def test_a_unit_reduced_twice_in_a_row_loses_nothing() -> None:
    # One block per stage: micro-batches of one stage complete it twice before any other unit of its size is reduced.
    small = replace(SMALL, num_layers=4)
    cases = [Case(name, "off", 4, small, columns=2) for name in ("interleaved", "zbv", "vhalf")]
    check(4, [replace(case, zero=ZeroConfig(stage=stage)) for case in cases for stage in (2, 3)])


def test_validation_is_cross_entropy_whatever_is_added_to_the_loss() -> None:
    losses = (LossConfig(), LossConfig(label_smoothing=0.2, z_loss=0.1))
    for vocab in ("off", "2"):
        # Without a step in between: the weights are the starting ones.
        found = run_world(2, validate, [Case("1f1b", vocab, loss=loss) for loss in losses])
        for plain_sum, regularised_sum in found:
            assert_close(torch.tensor(regularised_sum[0]), torch.tensor(plain_sum[0]), "cross entropy", 10)


def validate(comm: Comm, cases: list[Case]) -> list[tuple[float, int]]:
    return [build_engine(comm, case).evaluate(case.steps()[0]) for case in cases]


@pytest.mark.soak
def test_every_way_to_gather_gives_the_same_in_pipelines() -> None:
    cases = [case for case in EVERY if case.schedule in ("1f1b", "vhalf")]
    ways = [ZeroConfig(stage=3, reshard=reshard) for reshard in ("each", "never")]
    check(4, [replace(case, columns=2, zero=zero) for case in cases for zero in ways])


def test_replicas_of_pipelines_count_once() -> None:
    cases = [Case("1f1b", vocab, model=replace(GPT2, tie_embeddings=True)) for vocab in ("off", "2")]
    # Two replicas of shards of one: the group that sums a tied embedding then spans replicas and both its holders.
    check(4, [replace(c, columns=2, replicate=2, zero=ZeroConfig(stage=stage)) for c in cases for stage in (0, 1, 3)])


ALL_LOSSES = LossConfig(label_smoothing=0.1, z_loss=1e-2, softcap=3.0, temperature=1.5)


def test_losses_frozen_parts_recompute_and_uneven_cuts_hold_in_pipelines() -> None:
    changes: list[dict[str, Any]] = [
        {"loss": ALL_LOSSES},
        {"loss": ALL_LOSSES, "weights": True},
        {"recompute": "recompute"},
        {"frozen": ("embed",)},
        {"frozen": ("embed", "blocks.0", "blocks.1")},
        {"frozen": ("head",)},
        {"no_labels": True},
        {"pipeline": {"vocab_chunk": 16}},
        {"optimizer": OptimizerConfig("sgd", clip_norm=0.01, momentum=0.5)},
    ]
    shapes = (("1f1b", "off"), ("zb1p", "1"), ("vhalf", "2"))
    check(2, [Case(s, v, **change) for change in changes for s, v in shapes])


def test_cuts_by_hand_and_uneven_vocabularies_give_the_same() -> None:
    check(
        2,
        [
            Case("1f1b", "off", pipeline={"cut": [3, 5]}),
            Case("1f1b", "1", pipeline={"cut": [6, 2], "vocab_shares": [3.0, 1.0]}),
            Case("vhalf", "2", pipeline={"cut": [1, 3, 3, 1], "vocab_shares": [1.0, 4.0]}),
        ],
    )


def test_fp32_pipelines_agree_within_the_reordered_bound() -> None:
    check(2, [Case("1f1b", v, param="fp32") for v in ("off", "1", "2")], factor=10)
