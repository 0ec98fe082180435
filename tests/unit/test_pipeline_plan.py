"""The plan of a pipeline: what is chosen and why, who holds what, and everything that cannot work."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.dist.errors import PlanError
from windlass.model.build import build_model
from windlass.model.config import ModelConfig
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.footprint import measure_footprint
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.pipeline.builders import BUILDERS, build
from windlass.parallel.pipeline.costs import Part
from windlass.parallel.pipeline.model_costs import ModelCosts, model_costs
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.plan import PipelinePlan, plan_pipeline
from windlass.parallel.pipeline.policy import PipelineConfig
from windlass.parallel.pipeline.schedule import Schedule, load_schedule, write_schedule
from windlass.parallel.pipeline.verify import verify
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import vocabulary_of
from windlass.parallel.zero import ZeroConfig


def plan(config: PipelineConfig | None = None, **changes: Any) -> PipelinePlan:
    sizes = {"num_ranks": 2, "num_micro_batches": 4, "num_blocks": 8, "vocab_size": 100} | changes
    return plan_pipeline(config or PipelineConfig(), **sizes)


def heavy(head: float, num_blocks: int = 8, **changes: Any) -> ModelCosts:
    """Blocks that cost 1 per pass under a head that costs `head` per pass."""
    part = Part(head, head, head, activation_bytes=0.1, parameter_bytes=1.0)
    facts = {"head_state_bytes": 100, "hidden_bytes": 0.1} | changes
    return replace(ModelCosts.uniform(num_blocks), head=part, **facts)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(BUILDERS)),
    vocab=st.sampled_from(["off", "1", "2", "auto"]),
    ranks=st.integers(2, 4),
    micro_batches=st.integers(1, 9),
    stage=st.integers(0, 3),
    recompute=st.booleans(),
)
def test_every_plan_is_a_schedule_that_verifies_and_shares_everything_out_once(
    name: str, vocab: str, ranks: int, micro_batches: int, stage: int, recompute: bool
) -> None:
    planned = plan(
        PipelineConfig(schedule=name, vocab=vocab),
        num_ranks=ranks,
        num_micro_batches=micro_batches,
        num_blocks=11,
        zero=ZeroConfig(stage),
        activation=ActivationConfig("recompute" if recompute else "keep"),
    )
    verify(planned.schedule)
    assert planned.schedule.lowered and planned.schedule.num_micro_batches == micro_batches
    shares = [planned.share(rank) for rank in range(ranks)]
    spans = sorted((s for share in shares for s in share.stages), key=lambda s: s.number)
    assert [b for s in spans for b in range(s.first, s.last)] == list(range(11))
    assert [s.begins for s in spans] == [i == 0 for i in range(len(spans))] and spans[-1].ends
    cut = planned.schedule.layout.vocab > 0
    assert all((share.shard is not None) == cut for share in shares)
    assert not cut or [row for s in planned.shards for row in range(s.low, s.high)] == list(range(100))
    kinds = {action.kind for row in planned.schedule.ranks for action in row}
    assert ("R" in kinds) == recompute and ("GATHER" in kinds) == (stage == 3)
    assert len(planned.idle) == ranks and all(0 <= idle < 1 for idle in planned.idle)
    json.dumps(planned.as_json())


def test_one_pipeline_rank_is_the_schedule_of_one_stage() -> None:
    planned = plan(num_ranks=1, num_micro_batches=3)
    assert planned.blocks == ((0, 8),) and planned.shards == () and planned.idle == (0.0,)
    assert [str(a) for a in planned.schedule.ranks[0] if a.kind in "FB"] == ["0F0", "0B0", "0F1", "0B1", "0F2", "0B2"]


def test_a_tied_embedding_lies_on_two_ranks_only_where_the_ends_are_apart_and_nothing_is_cut() -> None:
    def tied_on(schedule: str, vocab: str) -> list[bool]:
        planned = plan(PipelineConfig(schedule=schedule, vocab=vocab), num_ranks=3, tied=True)
        return [planned.share(rank).tied_to_peer for rank in range(3)]

    assert tied_on("1f1b", "off") == [True, False, True]
    assert tied_on("zbv", "off") == tied_on("1f1b", "2") == [False] * 3


# -- choosing ---------------------------------------------------------------------------------------------------------


def test_a_heavy_head_is_cut_and_a_light_one_is_not() -> None:
    config = PipelineConfig(schedule="1f1b")
    planned = plan(config, costs=heavy(8.0), num_micro_batches=16)
    assert planned.schedule.layout.vocab and max(planned.idle) < 0.2
    assert re.search(r"of 3 (choices|simulated steps): \d+% faster than 1f1b without vocabulary passes", planned.why)
    light = plan(config, costs=heavy(0.01, head_state_bytes=0), num_micro_batches=16)
    assert light.schedule.layout.vocab == 0 and "faster" not in light.why


def test_auto_takes_the_shortest_simulated_step_and_says_so_in_one_sentence() -> None:
    auto = plan(costs=heavy(2.0), num_micro_batches=8, num_blocks=8)
    every = [
        plan(PipelineConfig(schedule=name, vocab=vocab), costs=heavy(2.0), num_micro_batches=8)
        for name in BUILDERS
        for vocab in ("off", "1", "2")
    ]
    assert auto.step_s <= 1.02 * min(p.step_s for p in every)
    assert re.fullmatch(r"(shortest|least memory) [^.]* of 15 [^.]*", auto.why)


def test_memory_makes_auto_take_what_fits() -> None:
    free = plan(num_ranks=4, num_micro_batches=16, num_blocks=16)
    tight = plan(
        num_ranks=4,
        num_micro_batches=16,
        num_blocks=16,
        costs=replace(ModelCosts.uniform(16), limit_bytes=0.8 * max(free.peak_bytes)),
    )
    assert max(tight.peak_bytes) < 0.8 * max(free.peak_bytes) and tight.schedule.name == "vhalf"
    assert "of which fit" in tight.why


def test_a_long_step_is_chosen_for_by_its_beginning_and_end() -> None:
    assert plan(num_micro_batches=64).schedule.num_micro_batches == 64
    short, long = (plan(PipelineConfig(schedule="1f1b"), num_micro_batches=m) for m in (16, 64))
    assert short.seconds(64) == pytest.approx(long.step_s)


def test_slow_ranks_get_fewer_blocks_and_fewer_rows() -> None:
    planned = plan(PipelineConfig(schedule="1f1b", vocab="2", speeds=[1.0, 0.5]), num_blocks=9, vocab_size=4096)
    assert planned.blocks == ((0, 6), (6, 9))
    first, last = (shard.num_rows for shard in planned.shards)
    assert first == pytest.approx(2 * last, rel=0.1)
    even = plan(PipelineConfig(schedule="1f1b", vocab="2", speeds=[1.0, 0.5], vocab_shares=[1, 1]), vocab_size=4096)
    assert even.shards[0].num_rows == even.shards[1].num_rows


def test_a_share_of_the_vocabulary_or_a_chunk_of_it_asks_for_a_cut_vocabulary() -> None:
    for config in (PipelineConfig(vocab_shares=[1, 3]), PipelineConfig(vocab_chunk=32)):
        assert plan(config, costs=heavy(0.01, head_state_bytes=0)).schedule.layout.vocab > 0


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb1p", "zbv", "vhalf"])
@pytest.mark.parametrize("vocab", ["off", "2"])
def test_the_number_of_micro_batches_that_is_named_makes_the_pipeline_busy(name: str, vocab: str) -> None:
    config = PipelineConfig(schedule=name, vocab=vocab)
    lonely = plan(config, num_ranks=4, num_micro_batches=1)
    assert lonely.mean_idle > 0.5
    enough = lonely.enough_micro_batches()
    assert enough is not None and plan(config, num_ranks=4, num_micro_batches=enough).mean_idle <= 0.1


def test_no_number_of_micro_batches_helps_a_pipeline_that_waits_for_its_head() -> None:
    config = PipelineConfig(schedule="1f1b", vocab="off", cut=[4, 4])
    assert plan(config, costs=heavy(8.0)).enough_micro_batches() is None


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own.txt", "own.json"])
def test_a_schedule_file_is_used_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_schedule(build("vhalf", 2, 4, vocab=2), path)
    planned = plan(PipelineConfig(schedule=str(path)))
    assert planned.schedule == lower(load_schedule(path)) and planned.why == "as asked for"
    complete = lower(build("1f1b", 2, 4), recompute=True, gather="run")
    write_schedule(complete, path)
    planned = plan(PipelineConfig(schedule=str(path)))
    assert planned.schedule == load_schedule(path)
    assert planned.lowering["recompute"] is True and planned.lowering["gather"] == "run"


def test_a_file_that_does_not_fit_the_job_names_what_would(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    write_schedule(build("1f1b", 2, 4), path)
    config = PipelineConfig(schedule=str(path))
    assert "Use parallelism.pp=2" in told(config, num_ranks=4)
    assert "Use train.global_batch=24" in told(config, num_micro_batches=3, sequences=6)
    assert "Use pipeline.vocab=off or auto" in told(replace(config, vocab="2"))
    backwards = build("1f1b", 2, 4)
    stuck = Schedule("stuck", backwards.layout, 4, tuple(tuple(reversed(row)) for row in backwards.ranks))
    write_schedule(stuck, path)
    assert "rank 0" in told(config)
    write_schedule(lower(backwards), path)
    path.write_text(path.read_text().replace("1RECV_F2 ", ""))
    assert "1RECV_F2" in told(config)


# -- what cannot work -------------------------------------------------------------------------------------------------


def told(config: PipelineConfig | None = None, **changes: Any) -> str:
    with pytest.raises(PlanError) as caught:
        plan(config, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "changes", "parts"),
    [
        (PipelineConfig(), {"num_ranks": 9}, ["parallelism.pp = 9", "8 blocks", "parallelism.pp=8 or less"]),
        (
            PipelineConfig(schedule="zbv"),
            {"num_ranks": 4, "num_blocks": 6},
            ["needs 8 stages", "6 blocks", "schedule=gpipe or 1f1b or zb1p", "parallelism.pp=3 or less"],
        ),
        (PipelineConfig(schedule="interleaved", chunks=5), {}, ["needs 10 stages", "8 blocks", "pipeline.chunks=4"]),
        (PipelineConfig(vocab="2"), {"vocab_size": 1}, ["vocabulary of 1 rows", "pipeline.vocab=off"]),
        (PipelineConfig(vocab="1"), {"vocab_problem": "no head.proj"}, ["no head.proj"]),
        (PipelineConfig(vocab_chunk=8), {"vocab_problem": "no head.proj"}, ["no head.proj"]),
        (
            PipelineConfig(schedule="1f1b", cut=[4, 3]),
            {},
            ["pipeline.cut = [4, 3]", "8 blocks, these are 7", "such as [4, 4]"],
        ),
        (
            PipelineConfig(schedule="1f1b", cut=[3, 3, 2]),
            {},
            ["pipeline.cut = [3, 3, 2]", "1f1b has 2 stages", "such as [4, 4]"],
        ),
        (PipelineConfig(cut=[3, 3, 2]), {}, ["no schedule has 3 stages", "[4, 4] or [2, 2, 2, 2]"]),
    ],
)
def test_what_cannot_work_names_the_value_that_would(
    config: PipelineConfig, changes: dict[str, Any], parts: list[str]
) -> None:
    text = told(config, **changes)
    assert all(part in text for part in parts), text


def test_a_vocabulary_that_cannot_be_cut_is_left_whole_unless_asked_otherwise() -> None:
    assert plan(vocab_problem="no head.proj").schedule.layout.vocab == 0
    assert plan(vocab_size=1, costs=heavy(9.0)).schedule.layout.vocab == 0


def test_a_stage_that_does_not_fit_names_what_makes_it_fit() -> None:
    costs = replace(ModelCosts.uniform(8), block_state_bytes=(10,) * 8, limit_bytes=64)
    text = told(PipelineConfig(schedule="gpipe", vocab="off"), costs=costs, num_micro_batches=16)
    assert "pipeline rank 0 with 4 blocks does not fit" in text and "Use pipeline.schedule=auto" in text
    lopsided = PipelineConfig(schedule="1f1b", vocab="off", cut=[7, 1])
    assert "7 blocks" in (text := told(lopsided, costs=costs)) and text.endswith("Use pipeline.cut=[]")
    kept = replace(ModelCosts.uniform(8), block_state_bytes=(10,) * 8, limit_bytes=46)
    assert told(PipelineConfig(schedule="1f1b", vocab="off"), costs=kept).endswith("Use activation.policy=recompute")
    assert "more pipeline ranks" in told(costs=replace(costs, limit_bytes=9))


# -- the costs of a model ----------------------------------------------------------------------------------------------

SMALL = ModelConfig(vocab_size=512, hidden_size=64, num_layers=3, num_heads=2)


def costs_of(model: ModelConfig, precision: PrecisionConfig, flops_per_s: float = 0.0) -> ModelCosts:
    return model_costs(
        build_model(model),
        micro_batch=2,
        seq_len=64,
        loss_chunk_tokens=0,
        zero=ZeroConfig(1),
        precision=precision,
        optimizer=OptimizerConfig(),
        num_shards=2,
        flops_per_s=flops_per_s,
    )


@pytest.mark.parametrize("model", [SMALL, replace(SMALL, norm="layernorm", mlp="gelu_tanh", num_kv_heads=1)])
def test_activations_are_within_a_fifth_of_those_found_by_a_trial_run(model: ModelConfig) -> None:
    estimated = costs_of(model, PrecisionConfig("bf16"))
    measured = measure_footprint(
        build_model(model),
        ActivationConfig(),
        micro_batch=2,
        seq_len=64,
        dtype=PrecisionConfig("bf16").param_dtype,
    )
    assert estimated.blocks[0].activation_bytes == pytest.approx(measured.parts[1].kept, rel=0.2)


def test_the_seconds_of_a_model_are_its_flops_and_its_states_are_those_of_zero() -> None:
    costs = costs_of(SMALL, PrecisionConfig(), flops_per_s=1e6)
    tokens, block = 2 * 64, build_model(SMALL).blocks[0]
    numel = sum(p.numel() for p in block.parameters())
    products, attention = 2 * numel * tokens / 1e6, 4 * 64 * 64 * tokens / 1e6
    part = costs.blocks[0]
    assert part.forward_s == pytest.approx(products + attention)
    assert part.input_gradient_s == pytest.approx(products + 2 * attention)
    assert part.weight_gradient_s == pytest.approx(products)
    assert costs.head.forward_s == pytest.approx(2 * 512 * 64 * tokens / 1e6)
    # fp32 under stage 1: parameters and gradients whole, two moments halved between two shards
    assert costs.block_state_bytes[0] == pytest.approx(numel * (4 + 4 + 4), rel=0.01)
    unknown = costs_of(SMALL, PrecisionConfig())
    assert unknown.blocks[0].forward_s == pytest.approx(1.0) and not unknown.in_seconds and costs.in_seconds


def test_a_model_of_other_parts_keeps_its_vocabulary_whole() -> None:
    model: Any = build_model(SMALL)
    assert vocabulary_of(model)
    del model.head.proj
    with pytest.raises(PlanError, match=r"head\.proj\.weight.*Use pipeline\.vocab=off"):
        vocabulary_of(model)
