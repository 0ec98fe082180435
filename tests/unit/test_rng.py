"""Random streams: element i has one value, however a tensor is cut, and it does not change between releases."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.errors import ConfigError
from windlass.dist.rng import CHUNK, fill_normal, fill_uniform, words


def normal(
    start: int, count: int, name: str = "blocks.0.w", seed: int = 1, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    out = torch.empty(count, dtype=dtype)
    fill_normal(out, seed=seed, name=name, start=start, std=0.02)
    return out


@given(st.integers(0, 1000), st.lists(st.integers(0, 1000), max_size=6))
def test_a_stream_does_not_depend_on_how_it_is_cut(start: int, cuts: list[int]) -> None:
    edges = sorted({start, start + 1000, *(start + c for c in cuts)})
    pieces = [normal(low, high - low) for low, high in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces), normal(start, 1000))


def test_a_stream_does_not_depend_on_the_chunks_of_the_implementation() -> None:
    whole = normal(0, 2 * CHUNK + 3)
    assert torch.equal(whole[CHUNK - 2 : CHUNK + 2], normal(CHUNK - 2, 4))
    assert abs(whole.mean()) < 1e-4 and abs(whole.std() / 0.02 - 1) < 5e-3


PINNED = [
    16849851346541911453,
    9046879954249219269,
    1642328788508819494,
    4064103509732511668,
    8727755894600320741,
    2822951716024536247,
]


def test_the_words_of_a_stream_are_pinned() -> None:
    assert words(1, "blocks.0.w", 0, 3).tolist() == PINNED[:3] and words(1, "blocks.0.w", 2, 4).tolist() == PINNED[2:]


@pytest.mark.parametrize(("name", "seed"), [("blocks.1.w", 1), ("blocks.0.w", 2)])
def test_another_name_or_seed_is_another_stream(name: str, seed: int) -> None:
    a, b = normal(0, 10_000), normal(0, 10_000, name, seed)
    assert not torch.equal(a, b) and abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.05


def test_another_format_changes_only_the_rounding() -> None:
    wide = normal(5, 1000)
    assert torch.equal(normal(5, 1000, dtype=torch.bfloat16), wide.bfloat16())
    assert torch.equal(normal(5, 1000, dtype=torch.float32), wide.float())


def test_uniform_values_lie_strictly_inside_their_bounds() -> None:
    out = torch.empty(10_000, dtype=torch.float64)
    fill_uniform(out, seed=3, name="u", start=0, low=-1.0, high=2.0)
    assert out.min() > -1 and out.max() < 2 and abs(out.mean() - 0.5) < 0.05


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed = -1: must be at least 0"):
        normal(0, 1, seed=-1)
