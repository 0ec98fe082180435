"""Offloading changes where state is and when it moves, never a bit of what comes out: every policy against none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness import run_world
from tests.pairwise import pairwise
from tests.parity.offload_case import (
    INF,
    OffloadCase,
    build,
    folders,
    pieces,
    run,
    same,
    same_state,
    train,
    train_all,
    without,
)
from tests.parity.test_zero import LR, Case
from windlass.dist.comm import Comm
from windlass.dist.errors import OffloadError
from windlass.offload.policy import OffloadConfig
from windlass.parallel.zero import ZeroConfig

WIDTH = 96  # blocks of several records of 2048 elements, the last of them partly decayed
POLICIES = {
    "zero-offload": OffloadConfig(policy="zero-offload"),
    "interleaved": OffloadConfig(policy="deep-optimizer-states", device_share=0.5),
    "zero-infinity": OffloadConfig(policy="zero-infinity"),
    "fuyou": OffloadConfig(policy="fuyou"),
    "superpipeline": OffloadConfig(policy="superpipeline"),
    "mlp-offload": OffloadConfig(policy="mlp-offload", cache=3),
    "shadowed after": OffloadConfig(policy="zero-infinity", clip="speculate", host_share=0.5, stride=3),
    "all on nvme": OffloadConfig(param="nvme", grad="nvme", optimizer="nvme", order="alternate", cache=2),
}
# Factors of the loss step by step: gradients of the second and third are far over the limit, the others under it.
SOME = (0.02, 5.0, 5.0, 0.02, 0.02)
CLIPPING: dict[str, tuple[float, tuple[float, ...]]] = {
    "never": (0.0, ()),
    "always": (0.01, ()),
    "some steps": (1.0, SOME),
    "a skipped step": (1.0, (0.02, INF, 5.0, 0.02)),
    "skipped steps, no limit": (0.0, (1.0, INF, INF, 1.0)),
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "partly frozen": {"frozen": True, "tied": True},
    "embedding frozen": {"frozen_embed": True, "frozen": True},
}
CHOICES: dict[str, Sequence[Any]] = {
    "policy": list(POLICIES),
    "clipping": list(CLIPPING),
    "format": [("fp32", "auto"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp64", "auto")],
    "model": list(MODELS),
    "stage": [3, 2, 1],
    "optimizer": ["adamw", "sgd"],
    "accumulated": [1, 3],
    "recompute": ["keep", "recompute"],
    "records": [(2048, 1, 1), (2048, 4, 3), (1 << 20, 2, 1)],  # chunk, slabs, drives
    "between": ["nothing", "evaluation", "saving"],
}


def case_of(choice: dict[str, Any], ranks: int) -> OffloadCase:
    """Return the case that one choice per dimension makes."""
    clip, weights = CLIPPING[choice["clipping"]]
    param, reduce = choice["format"]
    stage, (chunk, slabs, drives) = choice["stage"], choice["records"]
    case = Case(
        ZeroConfig(stage=stage),
        param=param,
        reduce=reduce,
        clip=clip,
        optimizer=choice["optimizer"],
        momentum=0.9 if choice["optimizer"] == "sgd" else 0.0,
        recompute=choice["recompute"],
        model={"width": WIDTH, **MODELS[choice["model"]]},
        micro_batches=ranks * choice["accumulated"],
    )
    offload = replace(POLICIES[choice["policy"]], chunk=chunk, slabs=slabs, watchdog_s=60.0)
    # What a stage leaves whole on every rank cannot rest elsewhere.
    offload = replace(
        offload, **({"param": "device"} if stage < 3 else {}), **({"grad": "device"} if stage < 2 else {})
    )
    between = choice["between"]
    return OffloadCase(
        case, offload, (LR,) * 4, weights, drives, evaluates=between == "evaluation", saves=between == "saving"
    )


def check(ranks: int, cases: Sequence[OffloadCase], transport: str = "auto") -> list[list[dict[str, Any]]]:
    """Train every case with and without offloading and compare; return the results by case and rank."""
    everything = [*cases, *(without(case) for case in cases)]
    results = run_world(ranks, train_all, everything, transport=transport)
    by_case = [[of_rank[i] for of_rank in results] for i in range(len(everything))]
    for case, mine, theirs in zip(cases, by_case, by_case[len(cases) :], strict=False):
        same(mine, theirs, case)
    return by_case[: len(cases)]


@pytest.mark.parametrize("share", ["half", pytest.param("all", marks=pytest.mark.soak)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_policy_gives_the_bits_of_training_without_it(ranks: int, share: str) -> None:
    cases = [case_of(choice, ranks) for choice in pairwise(CHOICES)]
    cases = cases if share == "all" else cases[ranks - 1 :: 2]  # one rank trains those that two do not
    skipped = [r["skipped"] for r in (of_case[0] for of_case in check(ranks, cases))]
    assert any(any(s) for s in skipped) and not all(any(s) for s in skipped)


@pytest.mark.soak
def test_replicas_of_shards_and_process_groups_change_nothing() -> None:
    def of(name: str, stage: int = 3, **changes: Any) -> OffloadCase:
        case = Case(ZeroConfig(stage=stage), "bf16", "fp32", micro_batches=8, model={"width": WIDTH, "tied": True})
        return OffloadCase(replace(case, **changes), replace(POLICIES[name], chunk=2048), (LR,) * 3, SOME)

    check(4, [of(name, replicate=2) for name in ("fuyou", "all on nvme", "interleaved")])
    check(2, [of("fuyou"), of("mlp-offload", stage=1)], transport="group")


# -- speculation -------------------------------------------------------------------------------------------------------


def count_updates(comm: Comm, given: OffloadCase) -> tuple[list[float], dict[str, Any]]:
    """Return how often each step updated every record, and the results of training."""
    counts = []
    with folders(1) as paths:
        engine, machine = build(comm, given, paths)
        assert machine is not None
        records = sum(len(unit.chunks) for unit in machine.plan.units)
        for batches in given.steps():
            lanes = engine.train_step(batches, LR).lanes
            counts.append(sum(lanes[name].num_tasks for name in lanes if name.endswith("update")) / records)
        out = {"owned": pieces(engine)}
        machine.close()
    return counts, out


def test_speculation_commits_does_again_and_holds_back() -> None:
    given = OffloadCase(
        Case(ZeroConfig(stage=3), "bf16", micro_batches=1, model={"width": WIDTH}),
        replace(POLICIES["fuyou"], chunk=2048, slabs=2),
        weights=SOME,
    )
    [(counts, out)] = run_world(1, count_updates, given)
    # Committed; clipped, so made twice; after a clipped step made once, when the norm is known, twice; committed.
    assert counts == [1, 2, 1, 1, 1]
    [plain] = run_world(1, train, without(given))
    same_state([out["owned"]], [plain["owned"]], "speculation")


def test_updates_that_were_made_in_vain_leave_nothing_behind() -> None:
    # The first step of all is skipped: what speculation wrote must not become the state.
    for name in ("fuyou", "shadowed after"):
        given = OffloadCase(
            Case(ZeroConfig(stage=3), "bf16", micro_batches=2, model={"width": WIDTH, "tied": True}),
            replace(POLICIES[name], chunk=2048),
            weights=(INF, INF, 0.02, INF, 5.0),
            evaluates=True,
            saves=True,
        )
        [[result]] = check(1, [given])
        assert result["skipped"] == [True, True, False, True, False]


# -- placements --------------------------------------------------------------------------------------------------------


def rows(*given: tuple[str, str]) -> list[dict[str, str]]:
    return [{"units": units, **dict(pair.split("=") for pair in places.split())} for units, places in given]


TABLES = [
    rows(("*", "param=nvme grad=host optimizer=host"), ("head", "param=device optimizer=nvme update_on=device")),
    # The gradient comes back to the device, where its records rest.
    rows(("*", "param=host optimizer=device grad=nvme"), ("embed*", "param=nvme grad=host")),
    rows(("blocks.*", "optimizer=nvme update_on=device grad=nvme param=nvme"), ("blocks.1*", "param=host")),
    rows(("blocks.0", "optimizer=host"), ("blocks.1*", "grad=nvme optimizer=nvme param=host"), ("head", "param=nvme")),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_placements_written_by_hand_give_the_same(ranks: int) -> None:
    cases = []
    for i, table in enumerate(TABLES):
        param, reduce = [("bf16", "fp32"), ("fp32", "auto")][i % 2]
        model = {"width": WIDTH, "frozen": True, "tied": bool(i % 2)}
        case = Case(ZeroConfig(stage=3), param, reduce, model=model, micro_batches=2 * ranks)
        for policy in ("none", "fuyou"):
            offload = OffloadConfig(policy=policy, table=table, chunk=2048, slabs=1, update="after")
            cases.append(OffloadCase(case, offload, (LR,) * 3, SOME, evaluates=True))
    check(ranks, cases)


def spread(comm: Comm, given: OffloadCase) -> tuple[list[int], dict[str, Any]]:
    """Return the bytes of each drive's file, and the results of training."""
    with folders(given.drives) as paths:
        engine, machine = build(comm, given, paths)
        assert machine is not None
        sizes = [file.num_bytes for file in machine.files]
        out = run(comm, given, engine, machine)
        machine.close()
    return sizes, out


def test_drives_take_records_by_their_weight() -> None:
    case = Case(ZeroConfig(stage=3), "fp32", model={"width": WIDTH}, micro_batches=2)
    offload = replace(POLICIES["zero-infinity"], chunk=2048, checksums=True, io_threads=3)
    for shares, drives in (((3.0, 1.0), 2), ((), 3), ((1.0, 2.0, 5.0), 3)):
        given = OffloadCase(case, offload, drives=drives, shares=shares)
        [(sizes, out)] = run_world(1, spread, given)
        [plain] = run_world(1, train, without(given))
        same([out], [plain], given)
        wanted = [share / sum(shares or (1.0,) * drives) for share in shares or (1.0,) * drives]
        assert [round(size / sum(sizes), 1) for size in sizes] == pytest.approx(wanted, abs=0.11)


def test_a_drive_that_gets_no_record_is_left_alone() -> None:
    case = Case(ZeroConfig(stage=3), "fp32", model={"num_blocks": 0}, micro_batches=2)
    given = OffloadCase(case, OffloadConfig(table=rows(("head", "optimizer=nvme"))), drives=3)
    [(sizes, out)] = run_world(1, spread, given)
    assert len(sizes) == 1
    [plain] = run_world(1, train, without(given))
    same([out], [plain], given)


def test_units_of_one_size_in_different_places_do_not_wait_for_each_other() -> None:
    # They share the buffers that backward writes; some leave the device from there, once their step knows of them.
    case = Case(ZeroConfig(stage=3), "bf16", clip=0.0, micro_batches=1, model={"num_blocks": 5})
    tables = [
        rows(("blocks.*", "param=host grad=host optimizer=device"), ("blocks.[13]", "param=device grad=device")),
        rows(("blocks.[024]", "optimizer=nvme grad=nvme")),
    ]
    plans = [OffloadConfig(table=table, update="backward", clip="speculate", watchdog_s=30.0) for table in tables]
    check(1, [OffloadCase(case, plan, (LR,) * 2) for plan in plans])


# -- any plan ----------------------------------------------------------------------------------------------------------

TIERS = st.sampled_from(["device", "host", "nvme"])
ROWS = st.fixed_dictionaries(
    {"units": st.sampled_from(["*", "embed*", "blocks.*", "blocks.1*", "head"])},
    optional={"param": TIERS, "grad": TIERS, "optimizer": TIERS, "update_on": st.sampled_from(["cpu", "device"])},
)
TIMES = st.sampled_from([("after", "two_pass"), ("after", "speculate"), ("backward", "speculate")])


@st.composite
def plans(draw: Any) -> OffloadConfig:
    """Any plan that the checks of a configuration let pass."""
    when, clip = draw(TIMES)
    return OffloadConfig(
        policy="none",
        param=draw(TIERS),
        grad=draw(TIERS),
        optimizer=draw(TIERS),
        table=draw(st.lists(ROWS, max_size=3)),
        update=when,
        clip=clip,
        order=draw(st.sampled_from(["arrival", "alternate"])),
        device_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        host_share=draw(st.sampled_from([0.0, 0.5])),
        param_device_share=draw(st.sampled_from([0.0, 0.5])),
        cache=draw(st.sampled_from([0, 1, 2, 50])) if clip == "two_pass" else 0,
        lookahead=tuple(sorted(draw(st.tuples(*[st.integers(0, 4)] * 3)), reverse=True)),
        window=draw(st.integers(0, 5)),
        chunk=draw(st.sampled_from([2048, 4096, 1 << 20])),
        slabs=draw(st.integers(1, 4)),
        io_threads=draw(st.integers(1, 3)),
        checksums=draw(st.booleans()),
        watchdog_s=60.0,
    )


def any_plan_is_the_same(comm: Comm, examples: int) -> int:
    """Compare that many plans with the same training without offload; return how many offloaded anything."""
    tried = 0
    known: dict[str, dict[str, Any]] = {}

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(plan=plans(), changes=st.sampled_from(ANY_CASES), saves=st.booleans())
    def holds(plan: OffloadConfig, changes: tuple[Case, tuple[float, ...]], saves: bool) -> None:
        nonlocal tried
        case, weights = changes
        mine = OffloadCase(case, plan, (LR,) * 3, weights, drives=2, saves=saves, evaluates=saves)
        theirs = without(mine)
        if repr(theirs) not in known:
            known[repr(theirs)] = train(comm, theirs)
        same([train(comm, mine)], [known[repr(theirs)]], mine)
        tried += plan.active

    holds()
    return tried


ANY_CASES = [
    (Case(ZeroConfig(stage=3, reshard=reshard), param, reduce, clip, micro_batches=count, model=model), weights)
    for reshard, (param, reduce), clip, count, model, weights in (
        ("turnaround", ("bf16", "bf16"), 1.0, 2, {"width": WIDTH, "tied": True}, (0.02, 5.0, 5.0)),
        ("each", ("fp32", "auto"), 1.0, 1, {"width": WIDTH, "frozen": True}, (0.02, INF, 5.0)),
        ("never", ("bf16", "fp32"), 0.0, 1, {"frozen_embed": True}, (1.0, INF, 1.0)),
    )
]


def test_any_plan_gives_the_same_numbers() -> None:
    assert run_world(1, any_plan_is_the_same, 60)[0] >= 30


def evaluate_after_reading(comm: Comm, given: OffloadCase) -> tuple[list[str], tuple[float, int]]:
    """Read all state after a step, frozen parameters last; return their names, and an evaluation right after."""
    with folders(1) as paths:
        engine, machine = build(comm, given, paths)
        first, second, *_ = given.steps()
        engine.train_step(first, LR)
        held = engine.held()[::-1]
        assert all(piece.tensor.isfinite().all() for piece in held)
        found = engine.evaluate(second)
        if machine is not None:
            machine.close()
    return [piece.key for piece in held], found


def test_what_was_lent_does_not_keep_the_only_slab_from_an_evaluation() -> None:
    case = Case(ZeroConfig(stage=3), "bf16", micro_batches=1, model={"frozen_embed": True})
    given = OffloadCase(case, replace(POLICIES["zero-infinity"], chunk=2048, slabs=1, watchdog_s=10.0))
    [(keys, found)], [(_, expected)] = (run_world(1, evaluate_after_reading, one) for one in (given, without(given)))
    assert keys[-1] == "model.embed.tokens.weight"
    assert found == expected


# -- versions and leases -----------------------------------------------------------------------------------------------


def read_something_old(comm: Comm, given: OffloadCase, key: str) -> str:
    with folders(1) as paths:
        engine, machine = build(comm, given, paths)
        assert machine is not None
        first, second, *_ = given.steps()
        engine.train_step(first, LR)
        assert machine.store.version(key) == 1
        machine.store.stamp(key, 0)
        try:
            engine.train_step(second, LR)
        except OffloadError as error:
            return str(error)
        finally:
            machine.close()
    return ""


@pytest.mark.parametrize("param", ["nvme", "host"])
def test_parameters_of_an_older_version_are_never_computed_with(param: str) -> None:
    for name, key in (("fp32", "blocks.1/state/0"), ("bf16", "blocks.1/param")):
        case = Case(ZeroConfig(stage=3), name, micro_batches=1)
        given = OffloadCase(case, OffloadConfig(param=param, grad="host", optimizer=param))
        [text] = run_world(1, read_something_old, given, key)
        assert f"'{key}': version 0 would be read where version 1 is due" in text


def rewrite_what_was_begun(comm: Comm, given: OffloadCase) -> int:
    """Begin to fetch a unit from every distance, and each time say that it is to be rewritten; return reads of each."""
    with folders(1) as paths:
        engine, machine = build(comm, given, paths)
        assert machine is not None
        residency = engine._units[1].residency
        machine.lanes.take_counters()
        for distance in range(residency.reach + 1):
            residency.approach(distance)
            residency.writable()
            machine.lanes.check_idle()  # nobody reads it any more
            machine.check_balanced()
        reads = machine.lanes.take_counters()["file read"].num_tasks
        machine.close()
    return reads // (residency.reach + 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_to_be_rewritten_is_not_on_its_way_any_more(ranks: int) -> None:
    given = OffloadCase(Case(ZeroConfig(stage=3), "bf16"), replace(POLICIES["all on nvme"], chunk=2048))
    assert min(run_world(ranks, rewrite_what_was_begun, given)) >= 1


def keep_a_lease(comm: Comm, given: OffloadCase) -> str:
    with folders(1) as paths:
        _, machine = build(comm, given, paths)
        assert machine is not None
        machine.lanes.wait(machine.store.fetch("head/state/0"))
        try:
            machine.check_balanced()
        except OffloadError as error:
            return str(error)
        finally:
            machine.close()
    return ""


def test_a_lease_that_does_not_come_back_is_named() -> None:
    given = OffloadCase(Case(ZeroConfig(stage=3), "fp32", micro_batches=1), POLICIES["zero-infinity"])
    [text] = run_world(1, keep_a_lease, given)
    assert "head/state/0" in text
