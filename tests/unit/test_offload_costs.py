"""Closed forms: the bandwidths of ZeRO-Infinity, Fuyou's logs, Deep Optimizer States' shares, wear."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.offload.costs import (
    SwapModel,
    best_device_share,
    break_even_tokens,
    checkpoint_bytes,
    cpu_update_floor_s,
    device_stride,
    device_update_floor_s,
    efficiency,
    gpt_tensors,
    intensity,
    model_state_bytes,
    required_bandwidth,
    sliding_window,
    state_working_bytes,
    transformer_params,
    update_s_per_param,
    wear,
)
from windlass.offload.rates import Rates

V100 = 70e12  # FLOP/s that ZeRO-Infinity takes for achievable


def test_sizes_are_those_of_zero_infinity() -> None:
    assert model_state_bytes(128, 25600) == pytest.approx(20.1e12, rel=0.01), "one trillion parameters"
    assert checkpoint_bytes(32, 1024, 25600, 128) == pytest.approx(0.2e12, rel=0.1)
    assert state_working_bytes(25600) == 16 * 25600**2


def test_bandwidths_are_those_of_zero_infinity() -> None:
    parameters, optimizer = intensity("parameters", tokens=1024), intensity("optimizer", tokens=2 * 1024)
    assert efficiency(parameters, 70e9, V100) > 0.5
    assert required_bandwidth(0.9, optimizer, V100) == pytest.approx(1.5e12, rel=0.2)
    for hidden, gb in ((2048, 2e9), (8192, 1e9)):
        assert required_bandwidth(0.5, intensity("activations", hidden=hidden), V100) <= gb
    found = required_bandwidth(0.75, parameters, V100)
    assert efficiency(parameters, found, V100) == pytest.approx(0.75)


def lohan(batch: int, *, layers: int = 40, hidden: int = 5120, file: float = 32e9, free: float = 600e9) -> SwapModel:
    """Fuyou's machine: an RTX 4090 at 160 TFLOP/s, 20 GB/s per direction, drives at 32 GB/s."""
    tokens, params = batch * 1024, transformer_params(layers, hidden)
    flops = 2.0 * params * tokens
    inter = 2.0 * tokens * hidden * layers
    return SwapModel(params, flops, 160e12, 20e9, file, file, free, inter, gpt_tensors(tokens, hidden, layers))


def tflops(model: SwapModel) -> float:
    return 3 * model.forward_flops / model.best()[1] / 1e12


@pytest.mark.parametrize(
    ("batch", "logged"), [(8, 42.8), (16, 84.3), (32, 143.1), (64, 155.8), (128, 153.8)], ids=lambda value: str(value)
)
def test_fuyou_at_13_billion_is_within_a_fifth_of_its_logs(batch: int, logged: float) -> None:
    assert tflops(lohan(batch)) == pytest.approx(logged, rel=0.2)


@pytest.mark.parametrize(("batch", "logged"), [(8, 52.6), (16, 86.9)])
def test_fuyou_at_175_billion_is_within_a_tenth_of_its_logs(batch: int, logged: float) -> None:
    assert tflops(lohan(batch, layers=96, hidden=12288)) == pytest.approx(logged, rel=0.1)


def test_swapping_some_beats_recomputing_all_and_swapping_all() -> None:
    model = lohan(32)
    points = list(model.iterations())
    swapped, seconds = model.best()
    assert 80e9 < swapped < 130e9 and points[-1][0] == pytest.approx(226e9, rel=0.02)
    assert seconds < 0.85 * points[0][1] and seconds < 0.97 * points[-1][1]


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 256),
    file=st.floats(1e9, 100e9),
    free=st.floats(0, 1e12),
    layers=st.integers(1, 30),
)
def test_the_walk_finds_the_best_of_all_amounts(batch: int, file: float, free: float, layers: int) -> None:
    model = lohan(batch, layers=layers, file=file, free=free)
    assert model.best()[1] == pytest.approx(min(seconds for _, seconds in model.iterations()), rel=1e-9)


def test_break_even_does_not_depend_on_the_model() -> None:
    assert break_even_tokens(160e12, 32e9, 30) == pytest.approx(18.8e3, rel=0.01)
    assert break_even_tokens(160e12, 5.7e9, 30) == pytest.approx(105e3, rel=0.01)


# rate of the link, of updates and of casts on the CPU; seconds of all on the CPU, with the stride, and with the share
SHARES = [
    (25e9, 2e9, 8e9, 15.0, 2, 0.53),
    (50e9, 5e9, 20e9, 6.0, 2, 0.47),
    (25e9, 5e9, 20e9, 6.0, 3, 0.26),
    (25e9, 0.8e9, 5e9, 34.8, 2, 0.74),
]


@pytest.mark.parametrize(("link", "update", "cast", "all_cpu", "stride", "share"), SHARES)
def test_shares_and_strides_are_those_of_the_table(
    link: float, update: float, cast: float, all_cpu: float, stride: int, share: float
) -> None:
    rates = Rates(h2d=link, cpu_update=update, cpu_cast=cast)
    assert 24e9 * update_s_per_param(0.0, rates) == pytest.approx(all_cpu, rel=0.01)
    assert device_stride(rates) == stride
    assert best_device_share(rates) == pytest.approx(share, abs=0.01)


@settings(max_examples=200, deadline=None)
@given(
    link=st.floats(1e9, 500e9),
    update=st.floats(1e8, 2e10),
    cast=st.floats(1e9, 1e11),
    device=st.sampled_from([0.0, 1e9, 1e11]),
)
def test_the_best_share_is_no_worse_than_any_other(link: float, update: float, cast: float, device: float) -> None:
    rates = Rates(h2d=link, cpu_update=update, cpu_cast=cast, device_update=device)
    best = update_s_per_param(best_device_share(rates), rates)
    assert best <= min(update_s_per_param(i / 200, rates) for i in range(201)) * (1 + 1e-9)


def test_host_memory_bounds_what_a_share_can_gain() -> None:
    rates = Rates(h2d=25e9, cpu_update=5e9, cpu_cast=20e9)
    slow = replace(rates, host_memory=50e9)
    assert update_s_per_param(0.26, slow) == pytest.approx((0.74 * 28 + 0.26 * 24) / 50e9)


def test_a_window_stalls_when_loading_is_slower_than_computing() -> None:
    assert not sliding_window([1.0] * 10, 1e9, 2e9, 5e9).stalls
    window = sliding_window([0.25] * 10, 1e9, 2e9, 5.5e9)
    assert window.stalls and window.kept == 5
    assert sliding_window([1.0] * 10, 1e9, 1.25e9, 8e9, latency_s=0.5).moved == 3


def test_floors_and_wear() -> None:
    assert cpu_update_floor_s(10e9, 150e9) == pytest.approx(1.87, rel=0.01)
    assert device_update_floor_s(10e9, Rates(h2d=50e9, duplex=100e9)) == pytest.approx(2.4)
    worn = wear(2_450_000_000_000, 164.0, 1.2e15)
    assert (
        worn is not None and worn.steps == pytest.approx(490, rel=0.01) and worn.days == pytest.approx(0.93, rel=0.01)
    )
    assert wear(0, 1.0, 1e15) is None and wear(10, 1.0, 0) is None
