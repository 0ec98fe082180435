"""Bytes by tier: the formulas of ZeRO-Infinity's table, buffers of the walk, and nothing counted twice."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.offload.placement import OffloadPlan, Sizes, plan_offload
from windlass.offload.plan_bytes import footprints, gather_buffers, param_slab_bytes, plan_bytes, slab_bytes
from windlass.offload.policy import POLICIES, OffloadConfig
from windlass.offload.workload import Workload, uniform_workload

BF16 = Sizes(param=2, reduce=2, master=4, num_states=2)
FP32 = Sizes(param=4, reduce=4, master=4, num_states=2)
BLOCK = 1 << 20


def planned(work: Workload, sizes: Sizes = BF16, **changes: object) -> OffloadPlan:
    config = replace(OffloadConfig(policy="zero-infinity", chunk=1 << 18), **changes)  # type: ignore[arg-type]
    plan = plan_offload(config, work.units, sizes, clips=work.clips, accumulates=work.accumulates)
    assert plan is not None
    return plan


def test_states_on_nvme_are_fourteen_bytes_a_parameter_and_twelve_more_for_the_shadow() -> None:
    work = uniform_workload(8, BLOCK)
    plain = footprints(planned(work), work)["nvme"]
    shadowed = footprints(planned(work, policy="fuyou"), work)["nvme"]
    assert plain == 14 * 8 * BLOCK
    assert shadowed == plain + 12 * 8 * BLOCK


def test_zero_offload_holds_masters_moments_and_gradients_in_host_memory() -> None:
    work = uniform_workload(8, BLOCK)
    held = plan_bytes(planned(work, policy="zero-offload"), work)
    assert held["host"] == {"optimizer": 12 * 8 * BLOCK, "grad": 2 * 8 * BLOCK, "slab": 8 * 2 * (1 << 18)}
    assert held["device"]["param"] == 2 * 8 * BLOCK and not held["nvme"]


def test_parameters_of_the_format_of_the_masters_are_held_once() -> None:
    work = uniform_workload(4, BLOCK)
    assert "param" not in plan_bytes(planned(work, FP32), work)["nvme"]
    assert "param" in plan_bytes(planned(work, FP32, param="host"), work)["host"]


def test_buffers_follow_the_lookahead_and_the_window() -> None:
    work = uniform_workload(10, BLOCK)
    plan = planned(work, lookahead=(3, 2, 1))
    assert gather_buffers(plan, work) == {BLOCK: 3}, "one in use and two ahead, or kept"
    assert gather_buffers(planned(work, lookahead=(3, 2, 1), window=5), work) == {BLOCK: 5}
    assert param_slab_bytes(plan) == 2 * (1 << 18), "a chunk passes at a time"
    shared = replace(work, num_shards=4)
    assert gather_buffers(plan, shared) == {4 * BLOCK: 2}


def test_gradients_do_not_rest_when_nothing_asks_for_them_again() -> None:
    work = uniform_workload(10, BLOCK, clips=False)
    plan = planned(work, policy="fuyou")
    assert "grad" not in plan_bytes(plan, work)["host"]
    assert "grad" not in plan_bytes(plan, work)["device"], "a single rank's leave from the slots of backward"
    shared = replace(work, num_shards=2)
    assert plan_bytes(planned(shared, policy="fuyou"), shared)["device"]["grad"] == 2 * 2 * BLOCK, "two on their way"
    kept = replace(work, clips=True)
    assert plan_bytes(planned(kept, policy="fuyou"), kept)["host"]["grad"] == 10 * 2 * BLOCK


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from([name for name in POLICIES if name != "none"]),
    blocks=st.integers(1, 6),
    block=st.integers(1000, 3 * BLOCK),
    ends=st.sampled_from([0, 5000, BLOCK]),
    shards=st.sampled_from([1, 2, 8]),
    host_share=st.floats(0, 1),
    share=st.floats(0, 1),
    fp32=st.booleans(),
)
def test_every_class_is_at_least_its_elements_and_at_most_a_page_per_record_more(
    policy: str, blocks: int, block: int, ends: int, shards: int, host_share: float, share: float, fp32: bool
) -> None:
    work = uniform_workload(blocks, block, ends_numel=ends, num_shards=shards)
    sizes = FP32 if fp32 else BF16
    plan = planned(work, sizes, policy=policy, host_share=host_share, device_share=share)
    held = plan_bytes(plan, work)
    total = sum(u.numel for u in work.units)
    slots = 2 if plan.shadowed else 1
    chunks = sum(len(u.chunks) for u in plan.units)
    there = sum(classes.get("optimizer", 0) for classes in held.values())
    assert 12 * total * slots <= there <= (12 * total + 3 * 4096 * chunks) * slots
    assert all(n > 0 for classes in held.values() for n in classes.values())
    assert (slab_bytes(plan) > 0) == any(c.tier == "nvme" for u in plan.units for c in u.chunks)
