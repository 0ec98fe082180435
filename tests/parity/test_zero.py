"""ZeRO 0-3 against a plain single-process loop: losses, gradient norms, parameters, and the bytes that were moved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.parity import reference
from tests.tolerance import assert_close
from windlass.dist.comm import Comm
from windlass.dist.device import pick_device
from windlass.dist.mesh import ParallelismConfig, plan_mesh
from windlass.dist.trace import Tracer
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.engine import Engine
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.zero import ZeroConfig

STEPS, LR = 5, 1e-2


@dataclass(frozen=True)
class Case:
    """One way to train the same thing."""

    zero: ZeroConfig = field(default_factory=ZeroConfig)
    param: str = "fp64"
    reduce: str = "auto"
    clip: float = 1.0
    optimizer: str = "adamw"
    momentum: float = 0.0
    replicate: int = 1
    recompute: str = "keep"
    every: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 4  # per step over all ranks: the same data for every world size

    @property
    def optimizer_config(self) -> OptimizerConfig:
        return OptimizerConfig(name=self.optimizer, momentum=self.momentum, clip_norm=self.clip)

    def steps(self) -> list[list[Any]]:
        return [
            [reference.make_batch(s * self.micro_batches + i) for i in range(self.micro_batches)] for s in range(STEPS)
        ]


def build_engine(comm: Comm, case: Case, account: Any = lambda state, held: None) -> Engine:
    return Engine(
        reference.OddModel(**case.model),
        comm=comm,
        mesh=plan_mesh(ParallelismConfig(dp_replicate=case.replicate), comm.world.size),
        device=pick_device("cpu", 0),
        zero=case.zero,
        precision=PrecisionConfig(param=case.param, reduce=case.reduce),
        activation=ActivationConfig(policy=case.recompute, every=case.every),
        optimizer=case.optimizer_config,
        fill=reference.fill,
        tracer=Tracer(),
        account=account,
    )


def train(comm: Comm, case: Case) -> dict[str, Any]:
    """Train on this rank's share; return what can be compared, parameters from the pieces this rank wants."""
    engine = build_engine(comm, case)
    size, rank = comm.world.size, comm.world.rank
    losses, norms = [], []
    for micro_batches in case.steps():
        share = micro_batches[rank::size]
        report = engine.train_step(share, LR)
        losses.append(report.loss)
        norms.append(report.grad_norm)
    with_eval = engine.evaluate(case.steps()[0][rank::size])
    owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    return {"losses": losses, "norms": norms, "owned": owned, "eval": with_eval}


def assemble(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put the owned pieces of all ranks together, checking that every element is owned exactly once."""
    tensors: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for result in results:
        for key, shape, box, tensor in result["owned"]:
            tensors.setdefault(key, torch.zeros(shape, dtype=tensor.dtype))[box.slices] = tensor
            counts.setdefault(key, torch.zeros(shape, dtype=torch.int64))[box.slices] += 1
    assert all(bool((c == 1).all()) for c in counts.values())
    return tensors


def plain(case: Case) -> reference.Trained:
    dtype = torch.float64 if case.param == "fp64" else torch.float32
    return reference.train_plain(reference.OddModel(**case.model), case.steps(), case.optimizer_config, dtype, LR)


def check_against_plain(results: list[dict[str, Any]], expected: reference.Trained, factor: float = 1.0) -> None:
    got = assemble(results)
    dtype = next(iter(expected.parameters.values())).dtype
    for name, what in (("losses", expected.losses), ("norms", expected.norms)):
        for result in results:
            assert_close(torch.tensor(result[name], dtype=dtype), torch.tensor(what, dtype=dtype), name, factor)
    assert {k.removeprefix("model.") for k in got if k.startswith("model.")} == set(expected.parameters)
    for name, value in expected.parameters.items():
        assert_close(got[f"model.{name}"], value, name, factor)


ODD = {"tied": True, "frozen": True}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "transport"), [(1, "auto"), (2, "auto"), (2, "group"), (4, "auto")])
def test_fp64_training_equals_the_plain_loop(stage: int, ranks: int, transport: str) -> None:
    case = Case(ZeroConfig(stage=stage), model=ODD)
    check_against_plain(run_world(ranks, train, case, transport=transport), plain(case))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.0},
        {"clip": 0.01},
        {"micro_batches": 6},
        {"optimizer": "sgd", "momentum": 0.9},
        {"recompute": "recompute"},
        {"recompute": "recompute", "every": 2},
        {"model": {"frozen_embed": True, "frozen": True}},
        {"model": {"num_blocks": 0}},
    ],
    ids=str,
)
def test_fp64_training_equals_the_plain_loop_whatever_the_policy(stage: int, changes: dict[str, Any]) -> None:
    case = Case(ZeroConfig(stage=stage), **changes)
    check_against_plain(run_world(2, train, case), plain(case))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_hybrid_sharding_equals_the_plain_loop(stage: int) -> None:
    case = Case(ZeroConfig(stage=stage), replicate=2, micro_batches=8, model=ODD)
    check_against_plain(run_world(4, train, case), plain(case))


@pytest.mark.parametrize("reshard", ["each", "turnaround", "never"])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_stage_3_is_the_same_whenever_it_gathers(reshard: str, prefetch: int) -> None:
    case = Case(ZeroConfig(stage=3, reshard=reshard, prefetch=prefetch), model=ODD)
    check_against_plain(run_world(2, train, case), plain(case))


def train_all_stages(ranks: int, case: Case) -> list[tuple[Any, Any, dict[str, torch.Tensor]]]:
    runs = []
    for stage in (0, 1, 2, 3):
        results = run_world(ranks, train, replace(case, zero=ZeroConfig(stage=stage)))
        check_against_plain(results, plain(case))
        runs.append((results[0]["losses"], results[0]["norms"], assemble(results)))
    return runs


def check_bitwise(a: tuple[Any, Any, dict[str, torch.Tensor]], b: tuple[Any, Any, dict[str, torch.Tensor]]) -> None:
    assert a[:2] == b[:2]
    assert all(torch.equal(a[2][k], b[2][k]) for k in b[2])


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_stages_are_bitwise_equal_to_each_other_in_fp32(ranks: int) -> None:
    case = Case(param="fp32", clip=0.5, micro_batches=ranks, model={"frozen": True, "tied": True})
    first, *others = train_all_stages(ranks, case)
    for other in others:
        check_bitwise(first, other)


def test_with_accumulation_the_stages_are_bitwise_equal_in_pairs() -> None:
    # Stages 0 and 1 add micro-batches before ranks, 2 and 3 ranks before micro-batches.
    stages = train_all_stages(2, Case(param="fp32", clip=0.5, micro_batches=6))
    check_bitwise(stages[0], stages[1])
    check_bitwise(stages[2], stages[3])


def test_transports_are_bitwise_equal_to_each_other() -> None:
    case = Case(ZeroConfig(stage=3), param="fp32")
    a, b = (run_world(2, train, case, transport=t) for t in ("shm", "group"))
    assert a[0]["losses"] == b[0]["losses"]
    assert all(torch.equal(assemble(a)[k], v) for k, v in assemble(b).items())


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_bf16_compute_stays_near_fp32(stage: int, reduce: str) -> None:
    case = Case(ZeroConfig(stage=stage), param="bf16", reduce=reduce)
    results = run_world(2, train, case)
    expected = plain(case)
    assert_close(
        torch.tensor(results[0]["losses"], dtype=torch.bfloat16),
        torch.tensor(expected.losses, dtype=torch.bfloat16),
        "losses",
    )
    assert next(iter(assemble(results).values())).dtype == torch.float32, "the master weights are what is saved"


def test_evaluation_equals_the_plain_loss() -> None:
    case = Case(ZeroConfig(stage=3))
    results = run_world(2, train, case)
    model = reference.OddModel()
    named = reference.realise(model, torch.float64)
    for key, tensor in assemble(results).items():
        if key.startswith("model."):
            named[key.removeprefix("model.")].data = tensor
    expected = sum(reference.loss_sum(model, b, torch.float64).item() for b in case.steps()[0])
    for result in results:
        assert abs(result["eval"][0] - expected) < 1e-9
        assert result["eval"][1] == sum(b.num_valid for b in case.steps()[0])


def count_traffic(comm: Comm, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    engine = build_engine(comm, case)
    comm.ledger.clear()
    size, rank = comm.world.size, comm.world.rank
    engine.train_step(case.steps()[0][rank::size], LR)
    sizes = {u.name: u.padded for u in engine.plan.units}
    return {tag: comm.ledger.total(tag=tag).elements for tag in ("param", "grad")}, sizes


@pytest.mark.parametrize(
    ("zero", "param", "grad"),
    [
        (ZeroConfig(stage=0), 0, 2),
        (ZeroConfig(stage=1), 1, 1),
        (ZeroConfig(stage=2), 1, 1),
        (ZeroConfig(stage=3, reshard="each"), 2, 1),
        (ZeroConfig(stage=3, reshard="never"), 1, 1),
    ],
    ids=str,
)
def test_the_comm_ledger_equals_the_zero_formulas(zero: ZeroConfig, param: int, grad: int) -> None:
    (moved, sizes), *_ = run_world(2, count_traffic, Case(zero, micro_batches=2))
    psi = sum(sizes.values())
    assert moved == {"param": param * psi, "grad": grad * psi}


def test_keeping_the_turnaround_units_saves_their_second_gather() -> None:
    (moved, sizes), *_ = run_world(2, count_traffic, Case(ZeroConfig(stage=3), micro_batches=2))
    psi = sum(sizes.values())
    assert moved == {"param": 2 * psi - sizes["head"] - sizes["blocks.2"], "grad": psi}


def train_with_a_poisoned_step(comm: Comm, case: Case) -> tuple[list[bool], list[float], int]:
    engine = build_engine(comm, case)
    reports = []
    for i, batches in enumerate(case.steps()):
        for unit in engine._units:
            if i == 1 and unit.plan.name == "head" and comm.world.rank == 0:
                unit.ready()[0] = float("nan")
        reports.append(engine.train_step(batches[comm.world.rank :: comm.world.size], LR))
        if i == 1:
            for unit in engine._units:
                unit.state.fill(reference.fill)
    return [r.skipped for r in reports], [r.loss for r in reports], engine.optimizer_steps


def test_a_non_finite_gradient_skips_the_step_on_every_rank() -> None:
    for skipped, losses, updates in run_world(2, train_with_a_poisoned_step, Case(ZeroConfig(stage=2))):
        assert skipped == [False, True, False, False, False]
        assert updates == 4
        assert all(x == x for x in losses[2:])


def restore_into(comm: Comm, case: Case, saved: list[Any], steps: int) -> dict[str, Any]:
    """Fill an engine of another layout from pieces, and train on."""
    engine = build_engine(comm, case)
    whole = assemble([{"owned": saved}])
    for piece in engine.wanted():
        piece.tensor.copy_(whole[piece.key][piece.box.slices])
    engine.optimizer_steps = steps
    engine.loaded()
    size, rank = comm.world.size, comm.world.rank
    losses = [engine.train_step(batches[rank::size], LR).loss for batches in case.steps()]
    return {"losses": losses}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 3), (4, 2)])
def test_state_moves_between_layouts_through_its_pieces(ranks: int, stage: int) -> None:
    first = Case(ZeroConfig(stage=3), model=ODD)
    saved = [piece for result in run_world(4, train, first) for piece in result["owned"]]
    same = run_world(4, restore_into, first, saved, STEPS)[0]["losses"]
    moved = run_world(ranks, restore_into, Case(ZeroConfig(stage=stage), model=ODD), saved, STEPS)[0]["losses"]
    assert_close(torch.tensor(moved, dtype=torch.float64), torch.tensor(same, dtype=torch.float64), "losses")


def measure_memory(comm: Comm, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    held: dict[str, int] = {}

    def account(state: str, nbytes: int) -> None:
        held[state] = held.get(state, 0) + nbytes

    engine = build_engine(comm, case, account)
    engine.train_step(case.steps()[0][comm.world.rank :: comm.world.size], LR)
    return held, {u.name: u.padded for u in engine.plan.units}


@pytest.mark.parametrize(("stage", "param", "grad", "moment"), [(0, 1, 1, 1), (1, 1, 1, 2), (2, 1, 2, 2), (3, 2, 2, 2)])
def test_each_stage_holds_the_share_of_state_that_zero_promises(stage: int, param: int, grad: int, moment: int) -> None:
    (held, sizes), *_ = run_world(2, measure_memory, Case(ZeroConfig(stage=stage), param="fp32"))
    psi = 4 * sum(sizes.values())
    assert held["param"] == psi // param
    assert held["grad"] == psi // grad
    assert held["exp_avg"] == held["exp_avg_sq"] == psi // moment
    assert "master" not in held, "in fp32 the parameter is its own master"
