"""Weights in tiles: the same training as with whole ones, the same bits wherever the tiles rest, less memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness import run_world
from tests.parity import reference, test_pipeline
from tests.parity.offload_case import OffloadCase, build, folders, run, same, train_all
from tests.parity.test_zero import LR, Case, assemble, check_against_plain
from tests.tolerance import assert_close
from windlass.dist.comm import Comm
from windlass.dist.device import pick_device
from windlass.dist.errors import ModelError, PlanError
from windlass.dist.mesh import ParallelismConfig, plan_mesh
from windlass.dist.trace import Tracer
from windlass.model.build import build_model
from windlass.model.config import ModelConfig
from windlass.offload.ledger import TierLedger
from windlass.offload.policy import OffloadConfig
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.engine import Engine
from windlass.parallel.fetch import FetchOnUse
from windlass.parallel.memory import plan_traffic, scratch_bytes, state_bytes
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.stepper import Stepper
from windlass.parallel.unit import Unit
from windlass.parallel.units import plan_units
from windlass.parallel.zero import ZeroConfig

STAGE_3 = ZeroConfig(stage=3)
ODD: dict[str, Any] = {"tied": True, "frozen": True}


class Awkward(nn.Module):
    """Maps in another order than they are defined in, one used twice, one never, one whose result is thrown away."""

    def __init__(self, frozen: bool, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(37, width, bias=False)
        self.never = nn.Linear(width, 40)
        self.up = nn.Linear(width, 37)
        self.wasted = nn.Linear(width, 37)
        self.norm = nn.LayerNorm(width)
        if frozen:
            self.up.requires_grad_(False)

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        mixed = self.norm(h).to(self.up.weight.dtype)
        self.wasted(mixed)
        return h + self.down(torch.tanh(self.up(mixed) * self.up(context @ mixed)))


class Transposed(reference.Mixer):
    """Reads a weight past the function that is intercepted."""

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return h + self.down(torch.tanh(self.norm(h) @ self.up.weight.t()))


class Swapped(reference.Mixer):
    """`up` is defined after `down` and used before it."""

    def __init__(self, frozen: bool, width: int) -> None:
        super().__init__(frozen, width)
        self.up = self._modules.pop("up")


class Direct(reference.Mixer):
    """Its first map works on the input itself, which needs no gradient where the embedding is frozen."""

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return h + (1 + self.gain) * self.down(torch.tanh(self.up(h)))


AWKWARD: dict[str, Any] = {"block": Awkward, "frozen": True}


def check_all(ranks: int, cases: Sequence[Case], tile: int = 400) -> None:
    """Compare with whole weights. 400 elements are 16 of the 37 rows of 24, or 10 of the 24 rows of 37."""
    given = [OffloadCase(case, OffloadConfig(tile=tile), lrs=(LR,) * 2) for case in cases]
    results = run_world(ranks, train_all, given)
    expected: dict[str, reference.Trained] = {}
    for i, one in enumerate(given):
        case = one.case
        key = repr((case.model, case.micro_batches, case.clip))
        if key not in expected:
            model = reference.OddModel(**case.model)
            expected[key] = reference.train_plain(model, one.steps(), case.optimizer_config, torch.float64, LR)
        check_against_plain([of_rank[i] for of_rank in results], expected[key])


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp64_training_in_tiles_equals_the_plain_loop(ranks: int) -> None:
    walks = [ZeroConfig(3, reshard, prefetch) for reshard, prefetch in (("each", 0), ("turnaround", 3), ("never", 1))]
    cases = [Case(zero, model=ODD) for zero in walks]
    cases += [Case(STAGE_3, model=ODD, recompute="recompute", every=every) for every in (1, 2)]
    cases += [Case(STAGE_3, model={"frozen_embed": True, "frozen": True}, micro_batches=6, clip=0.01)]
    cases += [Case(STAGE_3, model=AWKWARD, recompute=recompute) for recompute in ("keep", "recompute")]
    check_all(ranks, cases if ranks == 2 else cases[1::3])


def test_single_rows_and_hybrid_sharding_equal_the_plain_loop() -> None:
    check_all(4, [Case(STAGE_3, replicate=2, model=ODD)], tile=37)


WIDE = {"width": 96}  # units of several records
POLICIES = (
    OffloadConfig(policy="zero-offload"),
    OffloadConfig(policy="zero-infinity", slabs=1),
    OffloadConfig(policy="fuyou"),
    OffloadConfig(policy="superpipeline", window=2, lookahead=(1, 1, 1)),
    OffloadConfig(param="nvme", grad="nvme", optimizer="nvme", order="alternate", cache=2),
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_offloaded_tiles_train_bit_for_bit_like_those_on_the_device(ranks: int) -> None:
    bases = [
        Case(STAGE_3, param="fp32", model=WIDE | ODD, recompute="recompute", every=2),
        Case(STAGE_3, param="bf16", model=WIDE | AWKWARD),
    ]
    given = [
        OffloadCase(case, replace(policy, tile=96 * 16, chunk=2048), lrs=(LR,) * 3)
        for case, policies in zip(bases, (POLICIES[1::2], POLICIES[::2]), strict=True)
        for policy in (OffloadConfig(), *policies)
    ]
    results = run_world(ranks, train_all, given)
    plain, compared = 0, 0
    for i, one in enumerate(given):
        if one.offload.active:
            same([r[i] for r in results], [r[plain] for r in results], one)
            compared += 1
        else:
            plain = i
    assert compared == len(POLICIES)


def train_with_quick_updates(comm: Comm, cases: Sequence[OffloadCase]) -> tuple[list[dict[str, Any]], list[str]]:
    """Train with every update over as soon as it has begun, so that what is read after it is what it wrote.

    Also return the tiles that were read in a backward that had reduced their gradients before.
    """
    over: set[str] = set()
    late: list[str] = []
    update, complete, settle, read = Stepper._update, Unit.complete, Stepper.settle, FetchOnUse._read

    def update_now(self: Stepper, *args: Any) -> None:
        update(self, *args)
        assert self._machine is not None
        self._machine.lanes.wait(self._machine.lanes.all(self._updates))

    def note_complete(self: Unit) -> None:
        complete(self)
        over.update([self.plan.name] if self.completed else [])

    def forget_at_the_end_of_backward(self: Stepper) -> list[torch.Tensor]:
        over.clear()
        return settle(self)

    def read_in_time(self: FetchOnUse, extent: Any) -> Any:
        late.extend({self._placement.name} & over)
        return read(self, extent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "_update", update_now)
        patch.setattr(Unit, "complete", note_complete)
        patch.setattr(Stepper, "settle", forget_at_the_end_of_backward)
        patch.setattr(FetchOnUse, "_read", read_in_time)
        return train_all(comm, cases), late


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_tile_is_read_once_its_update_may_have_begun(ranks: int) -> None:
    blocks: list[dict[str, Any]] = [{"block": Swapped}, {"block": Direct, "frozen_embed": True}]
    given = [
        OffloadCase(
            Case(STAGE_3, param="bf16", clip=0.0, recompute=recompute, micro_batches=each * ranks, model=WIDE | block),
            replace(policy, tile=96 * 16, chunk=2048, watchdog_s=30.0),
            lrs=(LR,) * 2,
        )
        for block in blocks
        for each, recompute in ((1, "keep"), (2, "recompute"))
        for policy in (OffloadConfig(), OffloadConfig(policy="fuyou"))
    ]
    results = run_world(ranks, train_with_quick_updates, given)
    for plain in range(0, len(given), 2):
        same(*([trained[i] for trained, _ in results] for i in (plain + 1, plain)), given[plain])
    assert [late for _, late in results] == [[]] * ranks


DECODER = ModelConfig(
    vocab_size=reference.VOCAB, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=96, max_seq_len=16
)


def first_step(comm: Comm, param: str) -> list[tuple[float, float, dict[str, torch.Tensor]]]:
    """Take one step with whole weights, one in tiles; return loss, norm and what became of the weights."""
    found = []
    for tile in (0, 32 * 16):
        engine = engine_of(comm, build_model(DECODER), tile=tile, param=param)
        report = engine.train_step([reference.make_batch(0)], LR)
        owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
        found.append((report.loss, report.grad_norm, assemble([{"owned": owned}])))
    return found


@pytest.mark.parametrize("param", ["fp32", "bf16"])
def test_whole_groups_of_rows_give_the_same_bits_forwards_and_nearly_the_same_gradients(param: str) -> None:
    whole, tiled = run_world(1, first_step, param)[0]
    assert tiled[0] == whole[0], "the first loss comes before any gradient"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[param]
    assert_close(torch.tensor(tiled[1], dtype=dtype), torch.tensor(whole[1], dtype=dtype), "the gradient norm")
    for name, value in whole[2].items():
        assert_close(tiled[2][name].to(dtype), value.to(dtype), name)


def restore(comm: Comm, cases: Sequence[OffloadCase], saved: list[Any]) -> list[list[float]]:
    """Fill engines from pieces that another layout wrote, train on, and return the losses of each."""
    values = assemble([{"owned": saved}])
    losses = []
    for given in cases:
        engine, machine = build(comm, given, [])
        for piece in engine.wanted():
            piece.tensor.copy_(values[piece.key][piece.box.slices])
        engine.loaded()
        losses.append(run(comm, given, engine, machine)["losses"])
    return losses


def test_checkpoints_have_the_same_names_and_shapes_with_and_without_tiles() -> None:
    whole = OffloadCase(Case(STAGE_3, model=ODD), lrs=(LR,))
    tiled = replace(whole, offload=OffloadConfig(tile=400))
    both = run_world(2, train_all, [tiled, whole])
    saved = [piece for result in both for piece in result[0]["owned"]]
    shapes = {key: shape for key, shape, _, _ in saved}
    assert shapes == {key: shape for result in both for key, shape, _, _ in result[1]["owned"]}
    moved, stayed = run_world(1, restore, [whole, tiled], saved)[0]
    assert_close(torch.tensor(moved, dtype=torch.float64), torch.tensor(stayed, dtype=torch.float64), "losses")


# -- memory and traffic ------------------------------------------------------------------------------------------------

MEASURED = [
    Case(ZeroConfig(3, reshard, prefetch), recompute=recompute, micro_batches=4, model=WIDE | ODD)
    for reshard, prefetch, recompute in (("turnaround", 1, "keep"), ("each", 0, "recompute"), ("never", 2, "recompute"))
]


def observe(comm: Comm, cases: Sequence[OffloadCase]) -> list[tuple[dict[str, int], list[tuple[Any, ...]]]]:
    """Train a step of every case; return the peaks of what was booked, and what passed the door."""
    seen = []
    for given in cases:
        ledger = TierLedger()
        with folders(1) as paths:
            engine, machine = build(comm, given, paths, ledger)
            comm.ledger.clear()
            engine.train_step(given.case.steps()[0][comm.rank :: comm.world.size], LR)
            rows = [(*key, e.calls, e.elements, e.wire_bytes) for key, e in comm.ledger.entries.items()]
            if machine is not None:
                machine.close()
        seen.append((dict(ledger.peak_by_class("device")), sorted(rows)))
    return seen


@pytest.mark.parametrize("ranks", [1, 2])
def test_peaks_and_traffic_are_those_of_the_formulas_and_tiles_need_less(ranks: int) -> None:
    given = [OffloadCase(case, OffloadConfig(tile=tile)) for case in MEASURED for tile in (0, 96 * 16)]
    for results in run_world(ranks, observe, given):
        for one, (held, rows) in zip(given, results, strict=True):
            case = one.case
            activation = ActivationConfig(policy=case.recompute)
            plan = plan_units(reference.OddModel(**case.model), ranks, tile=one.offload.tile)
            precision = PrecisionConfig(param=case.param)
            expected = state_bytes(plan, case.zero, precision, case.optimizer_config)
            expected |= scratch_bytes(plan, case.zero, precision, activation=activation)
            assert {k: n for k, n in held.items() if n} == {k: n for k, n in expected.items() if n}, one
            planned = plan_traffic(
                plan,
                case.zero,
                precision,
                num_replicas=1,
                world_size=ranks,
                num_micro_batches=case.micro_batches // ranks,
                activation=activation,
            )
            assert rows == sorted((t.group, t.kind, t.tag, t.calls, t.elements, t.wire_bytes) for t in planned), one
        for whole, tiled in zip(results[::2], results[1::2], strict=True):
            assert tiled[0]["gather"] < whole[0]["gather"]
            assert tiled[0]["grad_slot"] < whole[0]["grad_slot"]


def test_a_tiled_weight_keeps_shape_and_type_and_has_no_memory() -> None:
    run_world(1, check_placeholder)


def check_placeholder(comm: Comm) -> None:
    engine = engine_of(comm, reference.OddModel(), tile=400)
    model: Any = engine._runner._walks[0].steps[1].part.module
    engine.train_step([reference.make_batch(0)], LR)
    weight = model.up.weight
    assert weight.shape == (37, 24) and weight.dtype == torch.float64
    assert weight.untyped_storage().nbytes() == 8
    assert weight.isnan().all(), "whoever looks at it past the function sees that there is nothing"


def engine_of(comm: Comm, model: Any, *, tile: int, stage: int = 3, param: str = "fp64") -> Engine:
    return Engine(
        model,
        comm=comm,
        mesh=plan_mesh(ParallelismConfig(), comm.world.size),
        device=pick_device("cpu", 0),
        zero=ZeroConfig(stage=stage),
        precision=PrecisionConfig(param=param),
        activation=ActivationConfig(),
        optimizer=OptimizerConfig("sgd", clip_norm=0.0),
        fill=reference.fill,
        tracer=Tracer(),
        account=lambda state, held: None,
        tile=tile,
    )


# -- what cannot be ----------------------------------------------------------------------------------------------------


def hold_whole(comm: Comm) -> None:
    engine_of(comm, reference.OddModel(), tile=400, stage=2)


def use_otherwise(comm: Comm) -> None:
    engine_of(comm, reference.OddModel(block=Transposed), tile=400).train_step([reference.make_batch(0)], LR)


def test_stages_that_hold_whole_weights_and_other_uses_of_a_tiled_weight_are_refused() -> None:
    with pytest.raises(PlanError, match=r"needs zero\.stage = 3; with 2 .* Use zero\.stage=3, or offload\.tile=0"):
        run_world(1, hold_whole)
    with pytest.raises(ModelError, match=r"blocks\.0\.up\.weight is cut into tiles.*gives it to t\. .*=888 or more"):
        run_world(1, use_otherwise)


# -- pipelines and other models ----------------------------------------------------------------------------------------


def test_pipelines_run_in_tiles_with_backward_whole_and_split() -> None:
    base = test_pipeline.Case(zero=STAGE_3, tile=16 * 16)
    cases = [replace(base, schedule=schedule) for schedule in ("1f1b", "zbv")]
    cases += [replace(base, schedule="zb1p", recompute="recompute", zero=ZeroConfig(3, "each"))]
    cases += [replace(base, schedule="1f1b", recompute="recompute", zero=ZeroConfig(3, "never"), vocab="1")]
    test_pipeline.check(2, cases)
    test_pipeline.check(4, [replace(base, schedule="zb1p", columns=2)])


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": reference.VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_bias": True,
    "tie_word_embeddings": False,
}


def train_folder(comm: Comm, folder: str) -> list[list[float]]:
    found = []
    for tile in (0, 24 * 8):
        model = build_model(ModelConfig(kind="transformers", hf_folder=folder))
        engine = engine_of(comm, model, tile=tile)
        assert bool(engine.plan.tile_units) == bool(tile)
        found.append([engine.train_step([reference.make_batch(i)], 0.5).loss for i in range(3)])
    return found


def test_the_library_s_own_modules_run_in_tiles(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for whole, tiled in run_world(1, train_folder, str(tmp_path)):
        assert_close(torch.tensor(tiled, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64), "losses", 1e3)
