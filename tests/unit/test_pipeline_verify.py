"""Verification: every fault is one error that names the first wrong action and what would be right."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.builders import BUILDERS, build
from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.graph import dependencies
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.schedule import Layout, Schedule
from windlass.parallel.pipeline.simulate import simulate
from windlass.parallel.pipeline.verify import verify

COMPUTE = "# stage_rank: 0 1\n# micro_batches: 2\n0: 0F0 0F1 0B0 0B1\n1: 1F0 1B0 1F1 1B1\n"
LOWERED = lower(Schedule.from_text(COMPUTE)).to_text()
VOCAB = lower(build("1f1b", 2, 2, vocab=2)).to_text()
ZERO = lower(Schedule.from_text(COMPUTE), gather="run").to_text()


def refusal(text: str, *changes: tuple[str, str]) -> str:
    """Change a schedule's text and return why it is refused."""
    for old, new in changes:
        assert old in text, f"{old} is not in {text}"
        text = text.replace(old, new, 1)
    with pytest.raises(PlanError) as caught:
        verify(Schedule.from_text(text))
    return str(caught.value)


# -- complete --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [COMPUTE, LOWERED, VOCAB, ZERO])
def test_the_schedules_that_the_faults_are_put_into_are_right(text: str) -> None:
    schedule = Schedule.from_text(text)
    verify(schedule)
    assert Schedule.from_text(schedule.to_text()) == schedule and schedule.lowered == (text != COMPUTE)


@pytest.mark.parametrize(
    ("text", "change", "problem"),
    [
        (COMPUTE, (" 1F1", ""), "rank 1 lacks 1F1 (forward); missing in all: 1"),
        (COMPUTE, (" 0B0", " 0I0"), "rank 0 lacks 0W0 (gradients of the weights, some time after I)"),
        (COMPUTE, ("0B0", "0B0 0B0"), "rank 0 has 0B0 twice; keep one of them"),
        (COMPUTE, ("0B0", "0B0 1B0"), "rank 0 has 1B0, which belongs to rank 1"),
        (COMPUTE, ("0B0", "0B0 0I0 0W0"), "0B0, but stage 0 has I or W for micro-batch 0 too: either B, or I and W"),
        (COMPUTE, ("0B0", "0B0 0S0"), "rank 0 has 0S0, but the vocabulary is not cut: set vocab to 1 or 2"),
        (LOWERED, (" 1RECV_F1", ""), "rank 1 lacks 1RECV_F1"),
        (LOWERED, (" 0SEND_F1", ""), "rank 0 lacks 0SEND_F1"),
        (
            LOWERED,
            ("1B1", "1B1 1SEND_F1"),
            "rank 1 has 1SEND_F1, but stage and neighbour are on one rank, or there",
        ),
        (VOCAB, (" 1STATS1", ""), "rank 1 lacks 1STATS1"),
        (VOCAB, (" 0EB1", ""), "rank 0 lacks 0EB1"),
    ],
)
def test_what_is_missing_or_too_much_is_named(text: str, change: tuple[str, str], problem: str) -> None:
    assert problem in refusal(text, change)


def test_numbers_that_do_not_exist_are_named() -> None:
    schedule = Schedule.from_text(COMPUTE)
    for action, problem in (
        (Action(2, "F", 0), "there are stages 0 to 1"),
        (Action(0, "F", 2), "there are micro-batches 0 to 1"),
    ):
        with pytest.raises(PlanError, match=f"has {action}, but {problem}"):
            verify(replace(schedule, ranks=((*schedule.ranks[0], action), schedule.ranks[1])))


def test_a_forward_only_schedule_has_no_backward() -> None:
    assert "rank 0 has 0B0, but the schedule is forward-only" in refusal("# forward_only: true\n" + COMPUTE)


# -- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "change", "problem"),
    [
        (COMPUTE, ("1F0 1B0", "1B0 1F0"), "rank 1 has 1B0 before 1F0, whose result it needs. Put 1F0 first"),
        (COMPUTE, (" 0B0 0B1", " 0W0 0I0 0B1"), "rank 0 has 0W0 before 0I0, whose result it needs"),
        (LOWERED, ("1RECV_F0 1F0", "1F0 1RECV_F0"), "1F0 before 1RECV_F0, which must be posted first. Put 1RECV_F0"),
        (LOWERED, ("0F0 0SEND_F0", "0SEND_F0 0F0"), "rank 0 has 0SEND_F0 before 0F0, whose result it needs"),
        (VOCAB, ("1S1 1STATS1", "1STATS1 1S1"), "rank 1 has 1STATS1 before 1S1, whose result it needs"),
    ],
)
def test_what_comes_too_early_on_its_rank_is_named(text: str, change: tuple[str, str], problem: str) -> None:
    assert problem in refusal(text, change)


def test_receives_in_another_order_than_their_sends_are_named() -> None:
    both = refusal(LOWERED, ("1RECV_F0 ", ""), ("1RECV_F1 ", ""), ("1: ", "1: 1RECV_F1 1RECV_F0 "))
    assert "rank 1 posts 1RECV_F1 where rank 0 sends for 1RECV_F0" in both and "Put 1RECV_F0 before 1RECV_F1" in both


def test_collectives_in_different_orders_are_named() -> None:
    problem = refusal(VOCAB, ("1EF0 1ROWS0", "1EF0"), ("1EF1 1ROWS1", "1EF1 1ROWS1 1ROWS0"))
    assert "rank 1 has 1ROWS1 where rank 0 has 0ROWS0: collectives of one kind need one order" in problem
    assert "Put 1ROWS0 before 1ROWS1" in problem


# -- memory and ZeRO -------------------------------------------------------------------------------------------------


def test_more_activations_than_declared_are_named() -> None:
    problem = refusal("# limits: 1 1\n" + COMPUTE)
    assert "rank 0 holds 2 stage activations with 0F1 and declares 1: put a backward before it, or declare 2" in problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("0GATHER0 ", ""), "rank 0 has 0RELEASE0 without a gather before it"),
        (("1F0", "1F0 1GATHER1"), "rank 1 has 1GATHER1 while it is gathered: put a release before it"),
        (("0RELEASE0 ", ""), ""),
        (("0GATHER0", "0GATHER1"), "rank 0 has 0GATHER1: these are counted from 0 in order, write 0GATHER0"),
        ((" 0REDUCE0", ""), "rank 0 never reduces the gradients of 0B1: put 0REDUCE0 behind it"),
    ],
)
def test_gathers_releases_and_reductions_that_do_not_fit_are_named(change: tuple[str, str], problem: str) -> None:
    if problem:
        assert problem in refusal(ZERO, change)
    else:  # parameters may stay gathered after the step
        verify(Schedule.from_text(ZERO.replace(*change)))


def test_a_use_of_released_parameters_is_named() -> None:
    problem = refusal(ZERO, ("1RELEASE0 ", ""), ("1F0", "1F0 1RELEASE0"))
    assert "rank 1 has 1B0 while its parameters are not gathered: put a gather before it" in problem


# -- waiting forever -------------------------------------------------------------------------------------------------


def test_ranks_that_wait_in_a_circle_are_shown_with_what_ran_until_there() -> None:
    text = "# stage_rank: 0 1 2\n# micro_batches: 2\n0: 0F0 0F1 0B0 0B1\n1: 1F0 1B0 1F1 1B1\n2: 2F1 2B1 2F0 2B0\n"
    for schedule in (Schedule.from_text(text), lower(Schedule.from_text(text))):
        with pytest.raises(PlanError) as caught:
            verify(schedule)
        story, *grid = str(caught.value).splitlines()
        assert "rank 1 waits in 1B0 for 2B0 of rank 2, which waits in 2F1 for 1F1 of rank 1." in story
        assert "2B0, with what it needs, must come before 2F1 on rank 2." in story
        assert [line.split("|")[1].split() for line in grid] == [["F0", "F1"], ["F0"], []]


def test_the_action_that_must_come_earlier_is_never_one_that_needs_what_its_rank_stands_at() -> None:
    # Rank 0 waits for 1F0, at which rank 1 stands itself: it is 0F0 that comes too late.
    text = "# stage_rank: 0 1\n# vocab: 2\n# micro_batches: 1\n"
    text += "0: 0EF0 0S0 0F0 0T0 0B0 0EB0\n1: 1EF0 1F0 1S0 1T0 1B0 1EB0\n"
    problem = refusal(text)
    assert "rank 0 waits in 0S0 for 1F0 of rank 1, which waits in 1F0 for 0F0 of rank 0." in problem
    assert "0F0, with what it needs, must come before 0S0 on rank 0." in problem


# -- everything ------------------------------------------------------------------------------------------------------

SCHEDULES = st.builds(
    build, st.sampled_from(sorted(BUILDERS)), st.integers(1, 4), st.integers(1, 5), vocab=st.integers(0, 2)
)


@settings(max_examples=60, deadline=None)
@given(SCHEDULES, st.booleans(), st.data())
def test_no_action_can_be_left_out_or_doubled(schedule: Schedule, lowered: bool, data: st.DataObject) -> None:
    schedule = lower(schedule, gather="run") if lowered else schedule
    rank = data.draw(st.integers(0, schedule.layout.num_ranks - 1))
    row = schedule.ranks[rank]
    i = data.draw(st.integers(0, len(row) - 1))
    twice = (*row[:i], row[i], *row[i:])
    once_less = row[:i] + row[i + 1 :]
    for changed in (twice, once_less):
        ends_gathered = "RELEASE" in row[i].kind and changed is once_less
        assume(not ends_gathered)
        with pytest.raises(PlanError):
            verify(replace(schedule, ranks=(*schedule.ranks[:rank], changed, *schedule.ranks[rank + 1 :])))


@settings(max_examples=100, deadline=None)
@given(SCHEDULES, st.booleans(), st.data())
def test_what_verifies_can_be_simulated_and_what_does_not_can_be_explained(
    schedule: Schedule, lowered: bool, data: st.DataObject
) -> None:
    schedule = lower(schedule, recompute=True, gather="run") if lowered else schedule
    rank = data.draw(st.integers(0, schedule.layout.num_ranks - 1))
    row = list(schedule.ranks[rank])
    i, j = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    row.insert(j, row.pop(i))
    changed = replace(schedule, ranks=(*schedule.ranks[:rank], tuple(row), *schedule.ranks[rank + 1 :]), limits=None)
    try:
        verify(changed)
    except PlanError as error:
        assert any(str(action) in str(error) for action in row)
        if advice := re.search(r"(\S+), with what it needs, must come before (\S+) on rank", str(error)):
            assert advice[1] != advice[2]
    else:
        timeline = simulate(changed, Costs.uniform(changed.layout, head=1.0, latency_s=0.1))
        assert sum(len(row) for lanes in timeline.spans for row in lanes.values()) == sum(map(len, changed.ranks))


@settings(max_examples=40, deadline=None)
@given(SCHEDULES, st.booleans())
def test_dependencies_name_every_action_once_and_flow_in_no_circle(schedule: Schedule, lowered: bool) -> None:
    schedule = lower(schedule) if lowered else schedule
    needs = dependencies(schedule)
    assert set(needs) == {action for row in schedule.ranks for action in row}
    done: set[Action] = set()
    waiting = dict(needs)
    while ready := [action for action, wanted in waiting.items() if done.issuperset(wanted)]:
        done.update(ready)
        for action in ready:
            del waiting[action]
    assert not waiting
    free = {"F", "EF"} if not schedule.layout.vocab else {"EF"}
    assert {a.kind for a, wanted in needs.items() if not wanted and KINDS[a.kind].lane == "compute"} <= free


def test_dependencies_of_the_vocabulary_join_all_ranks() -> None:
    layout = Layout(2, (0, 1), 2)
    needs = dependencies(lower(build("1f1b", 2, 1, vocab=2)))
    text = {str(action): sorted(map(str, wanted)) for action, wanted in needs.items()}
    assert text["0F0"] == ["0ROWS0", "1ROWS0"] and text["1S0"] == ["1F0"] and text["0S0"] == ["0X0"]
    assert text["0T0"] == ["0S0", "0STATS0", "1STATS0"] and text["1X0"] == ["1F0"] and text["0X0"] == ["1X0"]
    assert text["1B0"] == ["0DX0", "0STATS0", "1DX0", "1F0", "1STATS0"]
    assert text["1EB0"] == ["1DROWS0"] and text["1DROWS0"] == ["0DROWS0"] and text["0DROWS0"] == ["0B0"]
    assert layout.head_rank == 1


def test_an_action_whose_source_is_missing_is_named_by_the_graph_too() -> None:
    schedule = Schedule.from_text(COMPUTE.replace("1F1 ", ""))
    with pytest.raises(PlanError, match="has 1B1, but not 1F1 which it needs"):
        dependencies(schedule)
