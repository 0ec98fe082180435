"""Merging partial softmax averages: any partition, order and grouping gives the dense one; empty parts are nothing."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerance import REORDERED, assert_close
from windlass.parallel.softmax import exact_dtype, merge_into, merge_partials

Pair = tuple[torch.Tensor, torch.Tensor]


def pair(scores_SC: torch.Tensor, values_CD: torch.Tensor) -> Pair:
    """The pair of some columns; with none of them an empty part that holds nonsense."""
    if not scores_SC.shape[1]:
        empty = scores_SC.new_full((len(scores_SC), values_CD.shape[1]), torch.nan)
        return empty, scores_SC.new_full((len(scores_SC),), -torch.inf)
    return scores_SC.softmax(1) @ values_CD, scores_SC.logsumexp(1)


def columns(scale: float, dtype: torch.dtype = torch.float64) -> Pair:
    generator = torch.Generator().manual_seed(0)
    scores_SC = torch.randn(5, 24, generator=generator, dtype=torch.float64) * scale
    return scores_SC.to(dtype), torch.randn(24, 3, generator=generator, dtype=torch.float64).to(dtype)


def parts(scores_SC: torch.Tensor, values_CD: torch.Tensor, bounds: list[int]) -> list[Pair]:
    edges = [0, *sorted(bounds), scores_SC.shape[1]]
    return [pair(scores_SC[:, a:b], values_CD[a:b]) for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 24), max_size=6), st.sampled_from([1.0, 50.0, 300.0]), st.randoms())
def test_any_partition_in_any_order_gives_the_dense_average(bounds: list[int], scale: float, random: Random) -> None:
    scores_SC, values_CD = columns(scale)
    pieces = parts(scores_SC, values_CD, bounds)
    random.shuffle(pieces)
    out, lse = merge_partials(pieces)
    expected, expected_lse = pair(scores_SC, values_CD)
    assert_close(out, expected, "out")
    assert_close(lse, expected_lse, "lse")


@given(st.lists(st.integers(0, 24), min_size=2, max_size=2))
def test_grouping_does_not_matter(bounds: list[int]) -> None:
    a, b, c = parts(*columns(9.0), bounds)
    left, right = merge_partials([merge_partials([a, b]), c]), merge_partials([a, merge_partials([b, c])])
    assert_close(left[0], right[0], "out")
    assert_close(left[1], right[1], "lse")


def test_a_single_part_comes_back_bit_for_bit() -> None:
    alone = pair(*columns(4.0))
    assert all(torch.equal(a, b) for a, b in zip(merge_partials([alone]), alone, strict=True))


def test_empty_parts_alone_merge_to_an_empty_part() -> None:
    empty = pair(torch.zeros(5, 0), torch.zeros(0, 3))
    out, lse = merge_partials([empty, empty])
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_rows_may_be_empty_one_by_one() -> None:
    scores_SC, values_CD = columns(2.0)
    full, other = pair(scores_SC[:, :9], values_CD[:9]), pair(scores_SC[:, 9:], values_CD[9:])
    hidden = (
        other[0].index_fill(0, torch.tensor([1]), torch.nan),
        other[1].index_fill(0, torch.tensor([1]), -torch.inf),
    )
    out, _ = merge_partials([full, hidden])
    expected, _ = merge_partials([full, other])
    assert torch.equal(out[1], full[0][1])
    assert torch.equal(out[2:], expected[2:])


def test_what_is_not_a_number_stays_visible() -> None:
    out, lse = merge_partials([pair(*columns(1.0)), (torch.ones(5, 3), torch.full((5,), torch.nan))])
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_sums_are_kept_in_the_exact_dtype(dtype: torch.dtype, exact: torch.dtype) -> None:
    scores_SC, values_CD = columns(1.0, dtype)
    out, lse = merge_partials([(o, s.to(exact)) for o, s in parts(scores_SC, values_CD, [8])])
    assert exact_dtype(dtype) == out.dtype == lse.dtype == exact
    expected = scores_SC.double().softmax(1) @ values_CD.double()
    assert (out - expected).abs().max() <= REORDERED[dtype] * expected.abs().max()


def test_merging_in_place_leads_to_the_same_as_all_at_once() -> None:
    pieces = parts(*columns(3.0), [5, 11])
    out, lse = pieces[0][0].clone(), pieces[0][1].clone()
    for out_j, lse_j in pieces[1:]:
        merge_into(out, lse, out_j, lse_j)
    expected = merge_partials(pieces)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
