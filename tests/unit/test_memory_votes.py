"""When a step is committed: the leader's decisions, under lost, doubled and reordered messages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.votes import NOTHING, Ballot, Decree, Report
from windlass.dist.errors import CheckpointError

NODES = {"a": [0], "b": [1], "c": [2]}


def report(node: str, sent: int, steps: dict[int, State], passed: int = NOTHING) -> Report:
    rank = NODES[node][0]
    return Report(node, 1, sent, {rank: {step: int(state) for step, state in steps.items()}}, {rank: passed})


def test_a_step_is_committed_when_every_rank_has_encoded_it_and_not_before() -> None:
    ballot = Ballot(1, NODES)
    ballot.hear(report("a", 1, {4: State.ENCODED}))
    ballot.hear(report("b", 1, {4: State.ENCODED}))
    assert ballot.watermark == NOTHING and ballot.missing(4) == [2]
    ballot.hear(report("c", 1, {4: State.FILLED}))
    assert ballot.watermark == NOTHING and ballot.missing(4) == [2]
    assert ballot.hear(report("c", 2, {4: State.ENCODED}))
    assert ballot.watermark == 4


def test_an_older_report_that_comes_late_changes_nothing() -> None:
    ballot = Ballot(1, {"a": [0]})
    ballot.hear(report("a", 5, {4: State.COMMITTED, 5: State.ENCODED}))
    assert ballot.watermark == 5
    assert not ballot.hear(report("a", 3, {4: State.FILLED}))
    assert ballot.reports["a"].sent == 5


def test_a_leader_that_starts_anew_learns_what_was_committed_from_the_slots() -> None:
    ballot = Ballot(1, NODES)
    ballot.hear(report("b", 9, {7: State.COMMITTED, 8: State.FILLED}))
    assert ballot.watermark == 7
    assert not ballot.dropped


def test_a_step_that_some_rank_never_took_is_dropped_and_one_that_may_still_come_is_not() -> None:
    ballot = Ballot(1, NODES)
    ballot.hear(report("a", 1, {10: State.COMMITTED, 11: State.ENCODED}, passed=11))
    ballot.hear(report("b", 1, {10: State.COMMITTED, 12: State.ENCODED}, passed=11))
    ballot.hear(report("c", 1, {10: State.COMMITTED, 12: State.FILLING}, passed=11))
    assert ballot.dropped == {11} and ballot.num_dropped == 1, "12 may still come from a"
    ballot.hear(report("a", 2, {10: State.COMMITTED, 11: State.ENCODED}, passed=12))
    assert ballot.dropped == {11, 12} and ballot.num_dropped == 2
    decree = Decree(1, 1, ballot.watermark, tuple(ballot.dropped))
    assert decree.frees(1, 11, State.ENCODED) and not decree.frees(1, 10, State.COMMITTED)
    assert not decree.frees(1, 13, State.FILLED)


def test_nothing_is_dropped_before_every_node_has_been_heard() -> None:
    ballot = Ballot(1, NODES)
    ballot.hear(report("a", 1, {9: State.COMMITTED, 10: State.ENCODED}, passed=12))
    ballot.hear(report("b", 1, {9: State.COMMITTED}, passed=12))  # its slot of step 10 was damaged
    assert not ballot.dropped
    ballot.hear(report("c", 1, {10: State.COMMITTED}, passed=12))  # which is why it was committed and 9 freed
    assert ballot.watermark == 10 and not ballot.dropped


def test_a_vote_of_another_generation_or_of_a_stranger_is_refused() -> None:
    ballot = Ballot(1, NODES)
    with pytest.raises(CheckpointError, match="generation 1 expects ranks"):
        ballot.hear(Report("a", 2, 1, {0: {}}))
    with pytest.raises(CheckpointError, match="'d'"):
        ballot.hear(Report("d", 1, 1, {3: {}}))


def test_nothing_of_an_older_generation_is_freed_before_the_first_commit() -> None:
    assert not Decree(2).frees(1, 20, State.COMMITTED)
    assert not Decree(2, dropped=(20,)).frees(1, 20, State.COMMITTED)
    assert Decree(2, watermark=11).frees(1, 20, State.COMMITTED), "a later step of an older generation is older"
    assert not Decree(2, watermark=11).frees(3, 5, State.FILLED)


def test_a_pinned_step_stays_whatever_else_is_decided() -> None:
    decree = Decree(1, watermark=9, pins=(6,))
    assert not decree.frees(1, 6, State.COMMITTED) and decree.frees(1, 7, State.COMMITTED)


@pytest.mark.parametrize("fields", [{}, {"node": "a", "generation": 1, "sent": 1, "held": 3, "passed": {}}])
def test_a_malformed_vote_or_decree_is_named(fields: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="vote is malformed"):
        Report.parse(fields)
    with pytest.raises(CheckpointError, match="decree is malformed"):
        Decree.parse(fields)


def test_votes_and_decrees_survive_the_wire() -> None:
    told = report("a", 3, {4: State.ENCODED}, passed=2)
    assert Report.parse(told.dump()) == told
    decree = Decree(1, 2, 3, (4, 5), (3,), {"storage": 3}, 1, "disk full")
    assert Decree.parse(decree.dump()) == decree


@st.composite
def histories(draw: st.DrawFn) -> tuple[dict[str, list[dict[int, State]]], list[tuple[str, int]]]:
    """What every node held over time, and which of its reports arrive when."""
    held: dict[str, list[dict[int, State]]] = {}
    for node in NODES:
        now: dict[int, State] = {}
        moments = [dict(now)]
        for step in range(draw(st.integers(1, 4))):
            for state in draw(st.sampled_from([(State.FILLING,), (State.FILLING, State.FILLED, State.ENCODED)])):
                now = now | {step: state}
                moments.append(dict(now))
        held[node] = moments
    messages = [(node, i) for node, moments in held.items() for i in range(len(moments))]
    arriving = draw(st.lists(st.sampled_from(messages), max_size=40))
    return held, arriving


@settings(max_examples=200)
@given(histories())
def test_whatever_order_reports_come_in_only_a_step_that_all_have_encoded_is_committed(
    history: tuple[dict[str, list[dict[int, State]]], list[tuple[str, int]]],
) -> None:
    held, arriving = history
    ballot = Ballot(1, NODES)
    marks = [NOTHING]
    for node, moment in arriving:
        ballot.hear(report(node, moment, held[node][moment]))
        marks.append(ballot.watermark)
        assert ballot.watermark not in ballot.dropped
    assert marks == sorted(marks), "what is committed stays committed"
    encoded = [{s for s, state in moments[-1].items() if state == State.ENCODED} for moments in held.values()]
    assert ballot.watermark in {NOTHING} | set.intersection(*encoded)


@given(st.permutations([Decree(1, 1, 3, (4,)), Decree(1, 2, 5, (), (5,)), Decree(1, 3, 5, (6,))]))
def test_decrees_that_come_in_any_order_lead_to_the_same_end(order: list[Decree]) -> None:
    merged = Decree(1)
    for decree in [*order, order[0]]:
        merged = decree.after(merged)
    assert merged == Decree(1, 3, 5, (6,))


def test_a_step_that_was_given_up_is_not_committed_by_reports_from_before_it_was_freed() -> None:
    ballot = Ballot(1, NODES)
    whole, later = {10: State.COMMITTED, 11: State.ENCODED}, {10: State.COMMITTED, 12: State.FILLING}
    ballot.hear(report("a", 1, whole, passed=11))
    ballot.hear(report("b", 1, whole, passed=11))
    ballot.hear(report("c", 1, later, passed=12))  # it looked at one slot before 11 was filled, at the other after
    assert ballot.dropped == {11}
    ballot.hear(report("c", 2, {**later, 11: State.ENCODED}, passed=12))
    assert ballot.watermark == 10 and ballot.dropped == {11}
