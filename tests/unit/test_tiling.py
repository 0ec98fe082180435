"""Where weights are cut into tiles, which ones are, and what stays of the model."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.parity import reference
from windlass.dist.errors import ConfigError, PlanError
from windlass.launch.check import check_job
from windlass.launch.config import load_job
from windlass.model.build import build_model
from windlass.model.config import ModelConfig
from windlass.model.meta import weightless
from windlass.parallel.tiling import ROW_STEP, cut_rows, tile_passes, tiled_weights
from windlass.parallel.units import ALIGN, plan_units

SMALL = ModelConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=80, max_seq_len=16)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(40, 2000))
def test_tiles_cover_all_rows_once_within_the_limit_and_differ_by_one_group_of_rows(
    rows: int, width: int, most: int
) -> None:
    cut = cut_rows("w", rows, width, most)
    assert cut[0][0] == 0 and cut[-1][1] == rows
    assert all(a[1] == b[0] for a, b in pairwise(cut))
    sizes = [high - low for low, high in cut]
    assert max(sizes) * width <= most
    step = ROW_STEP if most // width >= ROW_STEP else 1
    assert all(low % step == 0 for low, _ in cut)
    assert max(sizes) - min(sizes[:-1], default=max(sizes)) <= step
    assert len(cut) == math.ceil(math.ceil(rows / step) / (most // width // step)), "as few as there can be"


def test_a_row_that_is_larger_than_a_tile_is_refused_with_the_size_that_works() -> None:
    with pytest.raises(PlanError, match=r"blocks\.0\.mlp\.down\.weight has 80 elements.*at least 80"):
        plan_units(build_model(SMALL), 2, tile=79)


def test_without_a_tile_size_nothing_is_cut() -> None:
    plan = plan_units(build_model(SMALL), 2)
    assert not plan.tile_units
    assert plan == plan_units(build_model(SMALL), 2, tile=0)


def test_tiles_are_units_of_one_size_per_weight_and_the_rest_of_a_block_stays_together() -> None:
    whole, plan = plan_units(build_model(SMALL), 2), plan_units(build_model(SMALL), 2, tile=1000)
    part = plan.stages[0].parts[1]
    names = [[plan.units[u].name for u in weight] for weight in part.tiles]
    assert [len(n) for n in names] == [2, 2, 2, 2, 5, 5, 3], "31 rows of 32 fit, 12 of 80"
    assert names[-1] == [f"blocks.0.mlp.down.tile{i}" for i in range(3)]
    for weight in part.tiles:
        sizes = {plan.units[u].padded for u in weight}
        assert len(sizes) == 1
        assert all(p.numel <= 1000 for u in weight for p in plan.units[u].parameters)
        assert all(n % (ALIGN * 2) == 0 for n in sizes)
    assert plan.numel == whole.numel
    assert plan.trainable_numel == whole.trainable_numel
    (own,) = (plan.units[u] for u in part.units)
    assert own.name == "blocks.0"
    assert all(len(p.shape) == 1 for p in own.parameters), "only norms are left"


def test_together_the_tiles_of_a_weight_are_its_elements_under_its_name() -> None:
    plan = plan_units(build_model(SMALL), 2, tile=1000)
    for part in plan.stages[0].parts:
        for weight in part.tiles:
            members = [plan.units[u].parameters[0] for u in weight]
            assert len({(p.name, p.global_shape) for p in members}) == 1
            ends = [(p.first, p.first + p.numel) for p in members]
            assert ends[0][0] == 0 and ends[-1][1] == math.prod(members[0].global_shape)
            assert all(a[1] == b[0] for a, b in pairwise(ends))


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


class Various(nn.Module):
    """Large weights that are used otherwise than by a plain linear map of this block."""

    def __init__(self, frozen: bool, width: int) -> None:
        super().__init__()
        self.plain = nn.Linear(width, 40)
        self.own = Own(width, 40)
        self.table = nn.Embedding(40, width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.tied = nn.Linear(width, 50)
        self.also = nn.Embedding(50, width)
        self.also.weight = self.tied.weight


def test_weights_that_anything_else_may_use_are_left_whole() -> None:
    model = reference.OddModel(num_blocks=2, block=Various)
    assert tiled_weights(model, 100) == {id(block.plain.weight) for block in model.blocks}
    with weightless():
        shared = nn.Linear(reference.WIDTH, 40)
    for block in model.blocks:
        block.plain = shared
    assert tiled_weights(model, 100) == set()
    assert tiled_weights(reference.OddModel(), 37 * 24) == set(), "as large as a tile is not too large"
    assert len(tiled_weights(reference.OddModel(), 37 * 24 - 1)) == 6


def test_backward_goes_through_weights_from_the_last_to_the_first() -> None:
    passes = tile_passes([("ab", False), ("cd", True)], 0)
    assert [w for w, _ in passes.forward] == list("abcd")
    assert passes.backward == [("d", True), ("c", True), ("b", True), ("a", True)]
    assert passes.rebuild == [("c", False), ("d", False)]
    assert passes.recompute == [*passes.rebuild, *passes.backward]
    assert tile_passes([("ab", False), ("cd", True)], 1).backward == [("d", True), ("c", True)]


def test_tiles_need_stage_3_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("offload: {tile: 1000000}\n")
    with pytest.raises(ConfigError, match=r"offload\.tile = 1000000 .*needs zero\.stage = 3.* Use zero\.stage=3"):
        check_job(load_job(path, ["zero.stage=2"]), 2, to_run=False)
    check_job(load_job(path, ["zero.stage=3"]), 2, to_run=False)
