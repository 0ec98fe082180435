"""The linear program: published closed forms are its slices, memory bounds its shares, nothing is better by chance."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.offload.costs import best_device_share, update_s_per_param
from windlass.offload.linear import Problem, solve
from windlass.offload.rates import Rates

NVME = Problem(1e9, 0.5, 1.5, Rates(h2d=20e9, file_mixed=10e9, cpu_update=2e9), param_tier="nvme", state_tier="nvme")


@pytest.mark.parametrize(
    ("link", "update", "cast"), [(25e9, 2e9, 8e9), (50e9, 5e9, 20e9), (25e9, 5e9, 20e9), (25e9, 0.8e9, 5e9)]
)
def test_the_share_of_deep_optimizer_states_is_a_slice(link: float, update: float, cast: float) -> None:
    rates = Rates(h2d=link, cpu_update=update, cpu_cast=cast)
    found = solve(Problem(24e9, 0.0, 0.0, rates, gradients_leave=False))
    assert found is not None
    assert found.device_update == pytest.approx(best_device_share(rates), rel=0.05)
    assert found.seconds == pytest.approx(24e9 * update_s_per_param(best_device_share(rates), rates), rel=0.05)


def test_the_time_of_fuyou_is_a_slice() -> None:
    rates = Rates(h2d=20e9, file_mixed=32e9, cpu_update=5e9)
    params, tokens = 175e9, 8192
    compute = 2 * params * tokens / 160e12
    problem = Problem(params, compute, 3 * compute, rates, "nvme", "nvme", in_backward=True)
    fixed = {"host": 0.0, "device_update": 0.0, "param_device": 0.0}
    found = solve(replace(problem, fixed=fixed))
    assert found is not None
    assert found.seconds == pytest.approx(max(compute, 2 * params / 20e9) + 28 * params / 32e9, rel=0.02)


def test_memory_bounds_what_stays() -> None:
    tight = solve(replace(NVME, host_free=6e9, device_free=1e9))
    assert tight is not None
    assert tight.host == pytest.approx(0.5) and tight.param_device == pytest.approx(0.5)
    roomy = solve(NVME)
    assert roomy is not None and roomy.host == 1.0 and roomy.seconds < tight.seconds
    assert solve(replace(NVME, nvme_free=1e9, host_free=1e9)) is None


@settings(max_examples=30, deadline=None)
@given(
    host=st.floats(0, 1),
    update=st.floats(0, 1),
    param=st.floats(0, 1),
    tier=st.sampled_from(["device", "host", "nvme"]),
    in_backward=st.booleans(),
    leave=st.booleans(),
)
def test_no_other_shares_are_faster(
    host: float, update: float, param: float, tier: str, in_backward: bool, leave: bool
) -> None:
    problem = replace(NVME, param_tier=tier, in_backward=in_backward, gradients_leave=leave)
    shares = {"host": host, "device_update": update, "param_device": param if tier != "device" else 0.0}
    best, other = solve(problem), solve(replace(problem, fixed=shares))
    assert best is not None and other is not None
    assert best.seconds <= other.seconds + 1e-5
