"""What is chosen: close to the best of all shares, within budgets, the same every time, cautious about the unknown."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.dist.errors import PlanError
from windlass.offload.choose import admit, choose, coarse, simulated
from windlass.offload.costs import best_device_share
from windlass.offload.placement import Sizes, plan_offload
from windlass.offload.plan_bytes import footprints
from windlass.offload.policy import POLICIES, OffloadConfig
from windlass.offload.rates import Rates
from windlass.offload.workload import Workload, uniform_workload

SIZES = Sizes(param=2, reduce=2, master=4, num_states=2)
RATES = Rates(
    h2d=25e9, file_read=6e9, file_write=4e9, cpu_update=2e9, cpu_cast=8e9, device_update=1e11, host_memory=1e11
)
BLOCK = 1 << 22
AUTO = OffloadConfig(policy="auto", chunk=1 << 20)


def chain(blocks: int, seconds: float = 0.001, **changes: object) -> Workload:
    return uniform_workload(blocks, BLOCK, forward_s=seconds, backward_s=3 * seconds, **changes)  # type: ignore[arg-type]


def best_of_all(work: Workload, budgets: Mapping[str, int]) -> float:
    """Try every policy with every share of sixths."""
    found = []
    for name in POLICIES:
        if name == "none":
            continue
        policy = POLICIES[name]
        sixths = [i / 6 for i in range(7)]
        hosts = sixths if policy.optimizer == "nvme" else [0.0]
        params = sixths if policy.param != "device" else [0.0]
        for host, param in product(hosts, params):
            config = replace(AUTO, policy=name, host_share=host, param_device_share=param)
            config = choose(config, work, SIZES, RATES, budgets).config
            plan = plan_offload(config, work.units, SIZES, clips=work.clips, accumulates=work.accumulates)
            if plan is not None and all(n <= budgets.get(tier, n) for tier, n in footprints(plan, work).items()):
                timeline = simulated(config, work, SIZES, RATES)
                assert timeline is not None
                found.append(timeline.total_s)
    return min(found)


@settings(max_examples=6, deadline=None)
@given(
    blocks=st.integers(2, 6),
    seconds=st.sampled_from([1e-4, 2e-3]),
    device=st.floats(0.3, 0.9),
    host=st.floats(0.1, 1.2),
    clips=st.booleans(),
)
def test_the_choice_is_within_three_percent_of_the_best_of_all_shares(
    blocks: int, seconds: float, device: float, host: float, clips: bool
) -> None:
    work = chain(blocks, seconds, clips=clips)
    states = 16 * blocks * BLOCK
    budgets = {"device": int(device * states) + 4 * 2 * BLOCK, "host": int(host * states) + 8 * (1 << 24)}
    chosen = choose(AUTO, work, SIZES, RATES, budgets)
    assert chosen.seconds is not None
    assert chosen.seconds <= 1.03 * best_of_all(work, budgets)
    if chosen.plan is not None:
        assert all(n <= budgets.get(tier, n) for tier, n in footprints(chosen.plan, work).items())
    assert choose(AUTO, work, SIZES, RATES, budgets) == chosen


def test_nothing_leaves_a_device_that_holds_everything() -> None:
    chosen = choose(AUTO, chain(4), SIZES, RATES, {"device": 10**12})
    assert chosen.config.policy == "none" and chosen.plan is None and not chosen.config.active


def test_unknown_rates_and_budgets_never_fail_and_are_named() -> None:
    chosen = choose(AUTO, chain(4), SIZES, Rates())
    assert chosen.config.policy == "none"
    tight = choose(AUTO, chain(4), SIZES, Rates(), {"device": 6 * 2 * BLOCK})
    assert tight.plan is not None and any("cpu_update" in note and "bench tiers" in note for note in tight.notes)
    stated = choose(OffloadConfig(policy="deep-optimizer-states"), chain(4), SIZES, Rates())
    assert stated.config.device_share == 0.5 and "offload.device_share=0.5" in stated.notes[0]


def test_numbers_left_to_the_policy_are_planned_and_numbers_given_stay() -> None:
    work = chain(4)
    planned = choose(OffloadConfig(policy="deep-optimizer-states"), work, SIZES, RATES).config
    assert planned.device_share == pytest.approx(best_device_share(RATES), abs=0.001)
    given = choose(OffloadConfig(policy="deep-optimizer-states", device_share=0.25), work, SIZES, RATES).config
    assert given.device_share == 0.25
    strided = choose(OffloadConfig(policy="deep-optimizer-states", stride=3), work, SIZES, RATES).plan
    assert strided is not None
    assert [c.update_on for u in reversed(strided.units) for c in u.chunks] == [
        "device" if i % 3 == 2 else "cpu" for i in range(4)
    ]


def test_the_cache_is_what_the_host_has_left() -> None:
    work, config = chain(4), OffloadConfig(policy="mlp-offload", chunk=1 << 20)
    bare = choose(config, work, SIZES, RATES)
    assert bare.plan is not None and bare.config.cache == 0 and "offload.host_bytes" in bare.notes[0]
    record = 12 << 20
    budget = footprints(bare.plan, work)["host"] + 5 * record + 100
    assert choose(config, work, SIZES, RATES, {"host": budget}).config.cache == 5
    assert choose(config, work, SIZES, RATES, {"host": 10**12}).config.cache == 16, "all records"
    assert choose(config, work, SIZES, RATES, {"host": 1}).config.cache == 0


def test_what_fits_nowhere_is_an_error_with_the_least_of_every_tier() -> None:
    with pytest.raises(
        PlanError, match=r"device: at least [\d,]+ bytes, 1,000 there; host: .*The largest unit, blocks"
    ):
        choose(AUTO, chain(4), SIZES, RATES, {"device": 1000, "host": 10**9})


def test_a_plan_over_its_budget_is_refused_with_the_value_that_works() -> None:
    work = chain(4)
    plan = choose(OffloadConfig(policy="zero-offload"), work, SIZES, RATES).plan
    assert plan is not None
    held = footprints(plan, work)
    admit(plan, work, held)
    with pytest.raises(PlanError, match=rf"offload.host_bytes={held['host']} holds it.*largest unit, blocks.0"):
        admit(plan, work, {"host": held["host"] - 1})


def test_many_records_are_simulated_as_few() -> None:
    work, config = chain(6, 0.001), OffloadConfig(policy="fuyou", chunk=4096, slabs=2048)
    exact = simulated(replace(config, chunk=1 << 18, slabs=32), work, SIZES, RATES)
    few = simulated(config, work, SIZES, RATES)
    assert exact is not None and few is not None
    assert few.total_s == pytest.approx(exact.total_s, rel=0.05)
    larger = coarse(config, work)
    assert larger.chunk >= 4096 * 20 and larger.chunk * larger.slabs == pytest.approx(4096 * 2048, rel=0.1)


def test_a_hundred_blocks_are_planned_quickly() -> None:
    work = uniform_workload(100, 50_000_000, ends_numel=100_000_000, forward_s=0.01, backward_s=0.03)
    choose(AUTO, chain(2), SIZES, RATES, {"device": 10**8})  # imports the solver
    started = time.process_time()  # whoever else is busy here is not counted
    chosen = choose(replace(AUTO, chunk=4 << 20), work, SIZES, RATES, {"device": 20 * 10**9, "host": 50 * 10**9})
    assert chosen.plan is not None and time.process_time() - started < 15.0
