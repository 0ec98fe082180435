"""The passes: what they insert, where, and that they change nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.builders import BUILDERS, build, forward_only, one_stage
from windlass.parallel.pipeline.graph import dependencies, makes_gradients, unit_of, uses_parameters
from windlass.parallel.pipeline.passes import insert_zero, lower
from windlass.parallel.pipeline.schedule import Layout, Schedule
from windlass.parallel.pipeline.verify import verify

BUILT = st.builds(
    build, st.sampled_from(sorted(BUILDERS)), st.integers(1, 4), st.integers(1, 6), vocab=st.integers(0, 2)
)


def rows(text: str, stage_rank: str, vocab: int = 0, m: int = 1) -> list[str]:
    """Lower a compute-only schedule and return its rows as text."""
    header = f"# stage_rank: {stage_rank}\n# vocab: {vocab}\n# micro_batches: {m}\n"
    schedule = lower(Schedule.from_text(header + text))
    return schedule.to_text().splitlines()[-schedule.layout.num_ranks :]


def compute(schedule: Schedule, leave_out: str = "") -> list[list[Action]]:
    kept = [kind.name for kind in KINDS.values() if kind.lane == "compute" and kind.name != leave_out]
    return [[action for action in row if action.kind in kept] for row in schedule.ranks]


# -- the whole -------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(BUILT, st.booleans(), st.sampled_from(["none", "run", "step"]), st.sampled_from(["last", "each"]))
def test_lowering_keeps_every_compute_action_in_its_place_and_the_result_verifies(
    schedule: Schedule, recompute: bool, gather: str, reduce: str
) -> None:
    lowered = lower(schedule, recompute=recompute, gather=gather, reduce=reduce)
    assert compute(lowered, leave_out="R") == [list(row) for row in schedule.ranks]
    assert (lowered.layout, lowered.limits, lowered.name) == (schedule.layout, schedule.limits, schedule.name)
    verify(lowered)


@pytest.mark.parametrize("vocab", [0, 1, 2])
def test_forward_only_schedules_get_forward_communication_only(vocab: int) -> None:
    schedule = lower(forward_only(Layout(2, (0, 1), vocab), 3), gather="run")
    verify(schedule)
    kinds = {action.kind for row in schedule.ranks for action in row}
    stage = {"F", "SEND_F", "RECV_F", "GATHER", "RELEASE"}
    assert kinds == (stage | {"EF", "S", "X", "STATS", "ROWS", "VGATHER", "VRELEASE"} if vocab else stage)


def test_one_stage_on_one_rank_needs_a_reduction_and_nothing_else() -> None:
    schedule = lower(one_stage(2))
    assert [str(action) for action in schedule.ranks[0]] == ["0F0", "0B0", "0F1", "0B1", "0REDUCE0"]


def test_a_schedule_is_lowered_once() -> None:
    with pytest.raises(PlanError, match="has its communication already and is run as it is"):
        lower(lower(one_stage(1)))


def test_choices_that_do_not_exist_and_schedules_that_lack_something_are_refused() -> None:
    with pytest.raises(PlanError, match=r"gather = 'always'.*choose from \('none', 'run', 'step'\)"):
        lower(one_stage(1), gather="always")
    with pytest.raises(PlanError, match="rank 1 lacks 1B0"):
        lower(Schedule.from_text("# stage_rank: 0 1\n# micro_batches: 1\n0: 0F0 0B0\n1: 1F0\n"))


# -- point to point --------------------------------------------------------------------------------------------------


def test_sends_follow_their_producer_and_receives_are_posted_one_action_ahead() -> None:
    assert rows("0: 0F0 0F1 0B0 0B1\n1: 1F0 1B0 1F1 1B1\n", "0 1", m=2) == [
        "0: 0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1 0REDUCE0",
        "1: 1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1 1REDUCE0",
    ]


def test_stages_of_one_rank_hand_over_without_messages() -> None:
    assert rows("0: 0F0 1F0 1I0 0I0 1W0 0W0\n", "0 0") == ["0: 0F0 1F0 1I0 0I0 1W0 1REDUCE0 0W0 0REDUCE0"]


def test_receives_are_posted_in_the_order_of_the_sends_even_if_used_in_another() -> None:
    _, second = rows("0: 0F0 0F1 0B1 0B0\n1: 1F1 1F0 1B1 1B0\n", "0 1", m=2)
    assert second.startswith("1: 1RECV_F0 1RECV_F1 1F1 1F0 1B1 1SEND_B1 1B0")


# -- recomputation ---------------------------------------------------------------------------------------------------


def test_activations_are_rebuilt_while_the_gradient_is_under_way() -> None:
    schedule = lower(
        Schedule.from_text("# stage_rank: 0 1\n# micro_batches: 1\n0: 0F0 0B0\n1: 1F0 1I0 1W0\n"),
        recompute=True,
    )
    assert [[str(a) for a in row] for row in schedule.ranks] == [
        ["0F0", "0SEND_F0", "0RECV_B0", "0R0", "0B0", "0REDUCE0"],
        ["1RECV_F0", "1F0", "1R0", "1I0", "1SEND_B0", "1W0", "1REDUCE0"],
    ]
    needs = dependencies(schedule)
    assert needs[Action(0, "B", 0)] == (Action(0, "R", 0), Action(0, "RECV_B", 0))


# -- ZeRO ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(BUILT, st.booleans())
def test_runs_gather_ahead_of_use_and_never_more_than_two_units(schedule: Schedule, recompute: bool) -> None:
    for row in lower(schedule, recompute=recompute, gather="run").ranks:
        gathered: set[tuple[int, str]] = set()
        released: set[tuple[int, str]] = set()  # since the last compute action
        for action in row:
            unit, kind = unit_of(action), action.kind.removeprefix("V")
            if kind == "GATHER":
                assert unit not in released, "what is released here is gathered again here"
                gathered.add(unit)
            elif kind == "RELEASE":
                gathered.remove(unit)
                released.add(unit)
            elif KINDS[action.kind].lane == "compute":
                assert unit in gathered or not uses_parameters(action)
                released = set()
            assert len(gathered) <= 2
        assert not gathered


def test_one_gather_serves_a_run_of_uses_and_alternating_units_stay() -> None:
    text = "# stage_rank: 0 1 1\n# micro_batches: 2\n0: 0F0 0F1 0B0 0B1\n1: 1F0 1F1 2F0 2F1 2B0 2B1 1B0 1B1\n"
    zero = insert_zero(Schedule.from_text(text), "run", "last")
    assert " ".join(map(str, zero.ranks[1])) == (
        "1GATHER0 1F0 2GATHER0 1F1 1RELEASE0 2F0 2F1 2B0 1GATHER1 2B1 2RELEASE0 2REDUCE0 1B0 1B1 1RELEASE1 1REDUCE0"
    )
    turns = text.replace("1F0 1F1 2F0 2F1 2B0 2B1 1B0 1B1", "1F0 2F0 2B0 1B0 1F1 2F1 2B1 1B1")
    assert " ".join(map(str, insert_zero(Schedule.from_text(turns), "run", "last").ranks[1])) == (
        "1GATHER0 2GATHER0 1F0 1RELEASE0 2F0 1GATHER1 2B0 2RELEASE0 1B0 2GATHER1 1F1 1RELEASE1 2F1 1GATHER2 2B1 "
        "2RELEASE1 2REDUCE0 1B1 1RELEASE2 1REDUCE0"
    )
    swap = text.replace("1F0 1F1 2F0 2F1 2B0 2B1 1B0 1B1", "1F0 2F0 1F1 2F1 2B0 2B1 1B0 1B1")
    counts = Counter(a.kind for a in insert_zero(Schedule.from_text(swap), "run", "last").ranks[1])
    assert counts["GATHER"] == counts["RELEASE"] == 3, "stages 1 and 2 stay while they take turns; 1 comes back"


@settings(max_examples=30, deadline=None)
@given(BUILT)
def test_step_gathers_every_unit_once_and_none_leaves_it_to_the_walk(schedule: Schedule) -> None:
    for row in lower(schedule, gather="step").ranks:
        gathers = [unit_of(a) for a in row if a.kind in ("GATHER", "VGATHER")]
        assert sorted(gathers) == sorted({unit_of(a) for a in row if uses_parameters(a)})
    kinds = {action.kind for row in lower(schedule).ranks for action in row}
    assert not kinds & {"GATHER", "VGATHER", "RELEASE", "VRELEASE"}


@settings(max_examples=30, deadline=None)
@given(BUILT, st.sampled_from(["last", "each"]))
def test_gradients_are_reduced_once_or_after_every_backward_but_a_shard_always_once(
    schedule: Schedule, reduce: str
) -> None:
    for row in lower(schedule, reduce=reduce).ranks:
        reductions = Counter(unit_of(a) for a in row if a.kind in ("REDUCE", "VREDUCE"))
        gradients = Counter(unit_of(a) for a in row if makes_gradients(a))
        assert reductions == {u: n if reduce == "each" and not u[1] else 1 for u, n in gradients.items()}
        last = {unit_of(a): i for i, a in enumerate(row) if makes_gradients(a)}
        final = {unit_of(a): i for i, a in enumerate(row) if a.kind in ("REDUCE", "VREDUCE")}
        assert all(final[unit] > i for unit, i in last.items())


# -- vocabulary ------------------------------------------------------------------------------------------------------

TWO_STAGES = "0: 0EF0 0F0 0S0 0T0 0B0 0EB0\n1: 1EF0 1F0 1S0 1T0 1B0 1EB0\n"


def test_algorithm_1_sends_partial_gradients_after_t() -> None:
    assert rows(TWO_STAGES, "0 1", vocab=1) == [
        "0: 0EF0 0ROWS0 0X0 0F0 0SEND_F0 0S0 0STATS0 0RECV_B0 0T0 0DX0 0B0 0DROWS0 0REDUCE0 0EB0 0VREDUCE0",
        "1: 1RECV_F0 1EF0 1ROWS0 1F0 1X0 1S0 1STATS0 1T0 1DX0 1DROWS0 1B0 1SEND_B0 1REDUCE0 1EB0 1VREDUCE0",
    ]


def test_algorithm_2_sends_them_after_s() -> None:
    first, second = rows(TWO_STAGES, "0 1", vocab=2)
    assert "0S0 0STATS0 0DX0" in first and "1S0 1STATS0 1DX0" in second
    assert "0T0 0B0" in first and "1T0 1DROWS0 1B0" in second


@settings(max_examples=40, deadline=None)
@given(BUILT)
def test_every_rank_takes_part_in_every_collective_in_one_order(schedule: Schedule) -> None:
    lowered = lower(schedule)
    for kind in ("ROWS", "X", "STATS", "DX", "DROWS"):
        orders = [[a.number for a in row if a.kind == kind] for row in lowered.ranks]
        assert all(order == orders[0] for order in orders)
        assert sorted(orders[0]) == (list(range(schedule.num_micro_batches)) if schedule.layout.vocab else [])
