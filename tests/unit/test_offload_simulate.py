"""The program of a step and its simulation: bytes of every lane, rules of lanes and pools, published times."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.dist.errors import PlanError
from windlass.offload.compile import build_program
from windlass.offload.costs import STATE_BYTES, best_device_share, cpu_update_floor_s, update_s_per_param
from windlass.offload.placement import OffloadPlan, Sizes, UnitFacts, pages, plan_offload
from windlass.offload.plan_bytes import plan_bytes
from windlass.offload.policy import POLICIES, OffloadConfig
from windlass.offload.program import COPY_LANES, Program, Task
from windlass.offload.program import step_bytes as all_bytes
from windlass.offload.rates import Rates
from windlass.offload.simulate import StepTimeline, simulate
from windlass.offload.workload import PartWork, Workload, uniform_workload

BF16 = Sizes(param=2, reduce=2, master=4, num_states=2)
FP32 = Sizes(param=4, reduce=4, master=4, num_states=2)
BLOCK = 1 << 20


def planned(work: Workload, sizes: Sizes = BF16, **changes: object) -> OffloadPlan:
    config = replace(OffloadConfig(policy="zero-infinity", chunk=1 << 18), **changes)  # type: ignore[arg-type]
    plan = plan_offload(config, work.units, sizes, clips=work.clips, accumulates=work.accumulates)
    assert plan is not None
    return plan


def step_bytes(program: Program) -> dict[str, int]:
    return {lane: n for lane, n in all_bytes(program).items() if lane in COPY_LANES}


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("window", [0, 4])
def test_states_on_nvme_move_what_the_formulas_say(micro_batches: int, window: int) -> None:
    work = uniform_workload(10, BLOCK, num_micro_batches=micro_batches)
    params, m = 10 * BLOCK, micro_batches
    fetched = 2 * (2 * 10 - (window or 2)) * BLOCK * m
    moved = step_bytes(build_program(planned(work, window=window), work))
    assert moved["file read"] == fetched + 12 * params
    assert moved["file write"] == 14 * params
    assert moved["h2d"] == fetched + 2 * params * (m - 1)
    assert moved["d2h"] == 2 * params * m


def test_states_in_host_memory_move_gradients_down_and_parameters_up() -> None:
    work = uniform_workload(5, BLOCK)
    assert step_bytes(build_program(planned(work, policy="zero-offload"), work)) == {
        "h2d": 2 * 5 * BLOCK,
        "d2h": 2 * 5 * BLOCK,
    }
    on_device = step_bytes(build_program(planned(work, policy="deep-optimizer-states", device_share=1.0), work))
    assert on_device == {"h2d": 12 * 5 * BLOCK, "d2h": 12 * 5 * BLOCK}


def test_files_are_read_and_written_in_whole_pages() -> None:
    work = uniform_workload(3, 1000)
    moved = step_bytes(build_program(planned(work), work))
    record, param = 3 * pages(4000), pages(2000)
    assert moved["file write"] == 3 * (record + param)
    assert moved["file read"] == 3 * record + (2 * 3 - 2) * param
    assert moved["h2d"] == (2 * 3 - 2) * 2000


def test_gradients_on_nvme_are_written_and_read_once_more() -> None:
    work = uniform_workload(4, BLOCK)
    plain, kept = (step_bytes(build_program(planned(work, grad=tier), work)) for tier in ("host", "nvme"))
    assert kept["file write"] - plain["file write"] == kept["file read"] - plain["file read"] == 2 * 4 * BLOCK


def test_parameters_that_are_the_master_weights_are_not_written_twice() -> None:
    work = uniform_workload(6, BLOCK)
    moved = step_bytes(build_program(planned(work, FP32), work))
    assert moved["file write"] == 12 * 6 * BLOCK
    assert moved["file read"] == 12 * 6 * BLOCK + 4 * (2 * 6 - 2) * BLOCK


def test_what_is_kept_in_host_memory_is_neither_read_nor_written() -> None:
    work = uniform_workload(8, BLOCK)
    programs = [build_program(planned(work, policy="mlp-offload", cache=c), work) for c in (0, 7)]
    bare, cached = map(step_bytes, programs)
    record = 12 * (1 << 18)
    assert bare["file read"] - cached["file read"] == bare["file write"] - cached["file write"] == 7 * record
    assert step_bytes(build_program(planned(work, cache=7), work))["file read"] > cached["file read"], "needs the order"


def test_a_tied_unit_is_fetched_for_every_use_and_reduced_once() -> None:
    units = (
        UnitFacts("embed", 4096, trainable=True, whole_gradient=True),
        *(UnitFacts(f"blocks.{i}", 4096, trainable=True) for i in range(8)),
        UnitFacts("head", 2048, trainable=True),
    )
    parts = (PartWork("embed", (0,)), *(PartWork(f"blocks.{i}", (i + 1,)) for i in range(8)), PartWork("head", (9, 0)))
    work = Workload(units, parts)
    program = build_program(planned(work), work)
    brought = Counter(task.label for task in program.tasks if task.lane == "h2d")
    assert brought["fetch embed"] == 3, "embedding, head, embedding again; the head's is kept for its backward"
    assert brought["fetch head"] == 1 and brought["fetch blocks.0"] == 2
    carried = Counter(task.label for task in program.tasks if task.lane == "d2h")
    assert carried["gradient embed"] == 1, "it stays on the device until its update"


def test_backward_ends_at_the_first_trainable_part() -> None:
    work = uniform_workload(4, BLOCK)
    frozen = replace(work, units=(replace(work.units[0], trainable=False), *work.units[1:]))
    labels = [task.label for task in build_program(planned(frozen), frozen).tasks]
    assert "backward blocks.0" not in labels and "backward blocks.1" in labels
    assert labels.count("fetch blocks.0") == 4, "in four chunks"


# -- rules of the simulation -----------------------------------------------------------------------------------------

CASES = {
    "policy": st.sampled_from([name for name in POLICIES if name != "none"]),
    "blocks": st.integers(1, 5),
    "block": st.integers(3000, 100_000),
    "ends": st.sampled_from([0, 20_000]),
    "shards": st.sampled_from([1, 2]),
    "micro_batches": st.integers(1, 3),
    "clips": st.booleans(),
    "fp32": st.booleans(),
    "config": st.fixed_dictionaries(
        {
            "chunk": st.sampled_from([4096, 20_480]),
            "slabs": st.integers(1, 4),
            "cache": st.integers(-1, 5),
            "window": st.integers(-1, 4),
            "lookahead": st.tuples(*[st.integers(0, 4)] * 3),
            "host_share": st.sampled_from([0.0, 0.5]),
            "device_share": st.sampled_from([-1.0, 0.5, 1.0]),
            "grad": st.sampled_from(["auto", "device", "host", "nvme"]),
            "update": st.sampled_from(["auto", "backward", "after"]),
            "clip": st.sampled_from(["auto", "two_pass", "speculate"]),
            "order": st.sampled_from(["auto", "alternate"]),
        }
    ),
    "step": st.integers(1, 2),
}
RATES = Rates(h2d=2e6, d2h=1e6, duplex=2.5e6, file_read=1e6, file_write=5e5, cpu_update=1e6, device_update=1e7)


@settings(max_examples=80, deadline=None)
@given(**CASES)
def test_any_plan_ends_and_keeps_the_rules_of_lanes_pools_and_budgets(
    policy: str,
    blocks: int,
    block: int,
    ends: int,
    shards: int,
    micro_batches: int,
    clips: bool,
    fp32: bool,
    config: dict[str, object],
    step: int,
) -> None:
    work = uniform_workload(
        blocks,
        block,
        ends_numel=ends,
        forward_s=0.01,
        backward_s=0.03,
        num_shards=shards,
        num_micro_batches=micro_batches,
        clips=clips,
    )
    plan = planned(work, FP32 if fp32 else BF16, policy=policy, **config)
    program = build_program(plan, work, step=step)
    timeline = simulate(program, RATES, comm_per_s=1e6)
    updated = sum(task.elements for task in program.tasks)
    assert updated == sum(u.numel for u in work.units), "every element is updated exactly once"
    by_lane: dict[str, list[tuple[float, float]]] = {}
    for span in timeline.spans:
        by_lane.setdefault(span.lane, []).append((span.start_s, span.end_s))
    for spans in by_lane.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans)), "one task at a time"
    taken, budget = timeline.peaks, plan_bytes(plan, work)
    for tier, classes in taken.items():
        for name, num_bytes in classes.items():
            assert num_bytes <= budget[tier].get(name, 0), f"{tier} {name}"
    seconds = timeline.forward_s + timeline.backward_s + timeline.update_s
    assert seconds == pytest.approx(timeline.total_s)
    assert timeline.total_s >= max(timeline.busy.values()) - 1e-9
    idle = timeline.total_s - timeline.busy["compute"]
    assert sum(timeline.stalled.values()) == pytest.approx(idle, abs=1e-6)
    assert simulate(program, RATES, comm_per_s=1e6) == timeline


def test_tasks_that_wait_for_each_other_are_an_error_that_names_one() -> None:
    tasks = (Task("h2d", "first", (), takes="slab"), Task("h2d", "second", (0,), takes="slab", gives="slab"))
    with pytest.raises(PlanError, match="'second' of lane 'h2d' cannot start"):
        simulate(Program(tasks, {"slab": 1}), Rates())


def test_two_directions_slow_each_other_down_as_measured() -> None:
    up, down = Task("h2d", "up", (), num_bytes=30), Task("d2h", "down", (), num_bytes=10)
    rates = Rates(h2d=10, d2h=10, duplex=10)
    spans = {s.label: s.end_s for s in simulate(Program((up, down)), rates).spans}
    assert spans == pytest.approx({"down": 2.0, "up": 4.0}), "5 each for 2 s, then 10"
    alone = {s.label: s.end_s for s in simulate(Program((up, down)), replace(rates, duplex=0.0)).spans}
    assert alone == pytest.approx({"down": 1.0, "up": 3.0}), "links are full-duplex unless measured otherwise"
    files = (Task("file read", "r", (), num_bytes=10), Task("file write", "w", (), num_bytes=10))
    assert simulate(Program(files), Rates(file_mixed=10)).total_s == pytest.approx(2.0), "drives are not"


def test_the_most_urgent_task_of_those_that_are_ready_runs_first() -> None:
    tasks = (
        Task("h2d", "running", (), num_bytes=1),
        Task("h2d", "write", (), num_bytes=1, priority=2),
        Task("h2d", "ahead", (), num_bytes=1),
        Task("compute", "late", (), seconds=0.5, phase="forward"),
        Task("h2d", "blocking", (3,), num_bytes=1, priority=0),
    )
    spans = sorted(simulate(Program(tasks), Rates(h2d=1)).spans, key=lambda s: s.start_s)
    assert [s.label for s in spans if s.lane == "h2d"] == ["running", "blocking", "ahead", "write"]


# -- published and closed forms --------------------------------------------------------------------------------------


def gpt(params: float, layers: int, tokens: int, flops_per_s: float, **changes: object) -> Workload:
    forward_s = 2 * params / layers * tokens / flops_per_s
    numel = int(params / layers)
    return uniform_workload(layers, numel, forward_s=forward_s, backward_s=3 * forward_s, **changes)  # type: ignore[arg-type]


def run(work: Workload, rates: Rates, **changes: object) -> StepTimeline:
    return simulate(build_program(planned(work, **changes), work), rates)


def test_175_billion_parameters_on_twelve_drives_take_what_fuyou_measured() -> None:
    work = gpt(175e9, 96, 8192, 160e12, clips=False)
    rates = Rates(h2d=20e9, file_mixed=32e9, cpu_update=5e9)
    timeline = run(work, rates, policy="fuyou", chunk=256 << 20)
    assert timeline.total_s == pytest.approx(163, rel=0.1)
    assert timeline.bound in ("file read", "file write")
    after = run(work, rates, chunk=256 << 20)
    assert after.total_s / timeline.total_s > 1.2, "updates inside backward are what makes the difference"


@pytest.mark.parametrize(
    ("link", "update", "cast", "seconds"),
    [(25e9, 2e9, 8e9, 7.07), (50e9, 5e9, 20e9, 3.21), (25e9, 5e9, 20e9, 4.46), (25e9, 0.8e9, 5e9, 9.2)],
)
def test_shares_of_updates_on_the_device_take_what_the_table_says(
    link: float, update: float, cast: float, seconds: float
) -> None:
    work = uniform_workload(24, 10**9)
    rates = Rates(h2d=link, cpu_update=update, cpu_cast=cast, device_update=1e11)
    share = best_device_share(rates)
    found = run(work, rates, policy="deep-optimizer-states", chunk=10**8, slabs=8, device_share=share).total_s
    assert found == pytest.approx(seconds, rel=0.05)
    assert found == pytest.approx(24e9 * update_s_per_param(share, rates), rel=0.05)
    stride = run(
        work, rates, policy="deep-optimizer-states", chunk=10**8, slabs=8, stride=2 if share > 0.4 else 3
    ).total_s
    assert found < 0.97 * stride


@settings(max_examples=10, deadline=None)
@given(update=st.floats(1e8, 1e10), file=st.floats(1e9, 1e11), tokens=st.integers(64, 65536))
def test_fuyou_is_bounded_by_its_slowest_resource_and_close_to_it(update: float, file: float, tokens: int) -> None:
    params, layers = 4e9, 32
    work = gpt(params, layers, tokens, 1e14, clips=False)
    rates = Rates(h2d=25e9, file_mixed=file, cpu_update=update)
    found = run(work, rates, policy="fuyou", chunk=16 << 20, slabs=8, lookahead=(6, 3, 1))
    forward = max(2 * params * tokens / 1e14, 2 * params / 25e9, 2 * params / file)
    backward = max(3 * 2 * params * tokens / 1e14, 2 * params / 25e9, 28 * params / file, params / update)
    assert found.total_s == pytest.approx(forward + backward, rel=0.1)


def test_updating_after_backward_takes_the_sum_and_reads_ahead() -> None:
    work = gpt(1e9, 10, 1000, 1e12)
    rates = Rates(h2d=1e10, cpu_update=1e8, cpu_cast=1e9)
    found = run(work, rates, policy="zero-offload")
    compute = 8e9 * 1000 / 1e12
    assert found.total_s == pytest.approx(compute + 1e9 * rates.cpu_s_per_element, rel=0.05)
    assert found.update_s > 0.95 * 1e9 * rates.cpu_s_per_element
    assert cpu_update_floor_s(1e9, 2.8e10) == pytest.approx(1.0) and STATE_BYTES == 12


def test_keeping_records_from_step_to_step_saves_their_time() -> None:
    work = gpt(1e8, 10, 1000, 1e12)
    rates = Rates(h2d=1e10, file_mixed=1e9, cpu_update=1e9)
    without, kept = (run(work, rates, policy="mlp-offload", chunk=1 << 20, cache=c).total_s for c in (0, 40))
    saved = 2 * 40 * 12 * (1 << 20) / 1e9
    assert without - kept == pytest.approx(saved, rel=0.1)
