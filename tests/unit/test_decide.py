"""What is decided after failures: examples of every rule, and what must hold for all histories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.launch.control_log import ControlLog
from windlass.launch.decide import Decision, Failed, History, Limits, Restart, Stop, Wait, decide, seat
from windlass.launch.fleet import Node, Seating

FOUR = Limits(workers=4, sizes=(2, 4), max_restarts=3, node_failures=2, crash_loops=2)


def nodes(*slots: int, lost: Sequence[int] = (), drain: Sequence[int] = ()) -> list[Node]:
    return [
        Node(f"node-{i}", f"rack-{i}", count, i not in lost, 1.0 if i in drain else None)
        for i, count in enumerate(slots)
    ]


def failed(
    step: int,
    *,
    kind: str = "worker",
    node: str = "node-0",
    code: int = 137,
    repeats: bool = False,
    restored: int | None = None,
    time: float = 0.0,
) -> Failed:
    return Failed(1, kind, step, "it broke", node, 0, code, repeats, time, restored)


def loop(*failures: Failed) -> int:
    return len(after(*failures).looping)


def after(*failures: Failed, seating: Seating | None = None) -> History:
    return History(failures, seating or Seating(("node-0", "node-0", "node-1", "node-1")))


def restarted(decision: Decision) -> Restart:
    assert isinstance(decision, Restart), decision
    return decision


def stopped(decision: Decision) -> Stop:
    assert isinstance(decision, Stop), decision
    return decision


def test_the_first_start_fills_nodes_in_order_and_leaves_spares_alone() -> None:
    decision = restarted(decide(History(), nodes(2, 2, 2), FOUR))
    assert decision.seating.nodes == ("node-0", "node-0", "node-1", "node-1")
    assert decision.why == "first start"


def test_a_failed_worker_of_a_living_node_is_started_in_place_at_once() -> None:
    decision = restarted(decide(after(failed(5)), nodes(2, 2, 2), FOUR))
    assert (decision.why, decision.pause_s) == ("in place", 0.0)


def test_a_lost_node_is_replaced_by_a_spare_and_nobody_else_moves() -> None:
    decision = restarted(decide(after(failed(5, kind="node")), nodes(2, 2, 2, lost=[0]), FOUR))
    assert decision.seating.nodes == ("node-2", "node-2", "node-1", "node-1")
    assert decision.why == "node-2 for node-0"


def test_a_spare_of_another_failure_domain_is_preferred() -> None:
    fleet = nodes(2, 2, 2, 2, lost=[0])
    fleet[2] = Node("node-2", "rack-1", 2)
    assert seat(after().seating, [n for n in fleet if n.alive], 4).nodes[:2] == ("node-3", "node-3")


def test_without_room_it_waits_for_nodes_and_then_shrinks_to_an_allowed_size() -> None:
    history, fleet = after(failed(5, kind="node", node="node-1")), nodes(2, 2, lost=[1])
    patient = Limits(4, (2, 4), 3, replace_s=30)
    waiting = decide(history, fleet, patient, waited_s=10)
    assert isinstance(waiting, Wait) and waiting.seconds == 20 and "lost: node-1" in waiting.why
    decision = restarted(decide(history, fleet, patient, waited_s=30))
    assert decision.seating.nodes == ("node-0", "node-0") and decision.why == "shrink from 4 to 2 workers"
    assert "fewer than 4" in stopped(decide(history, fleet, Limits(4, (4,), 3))).why


def test_it_grows_again_when_there_is_room() -> None:
    history = after(failed(5), seating=Seating(("node-0", "node-0")))
    decision = restarted(decide(history, nodes(2, 2), FOUR))
    assert decision.why == "grow from 2 to 4 workers" and decision.seating.world_size == 4


def test_the_first_start_never_shrinks() -> None:
    assert "room for 2 of 4" in stopped(decide(History(), nodes(2), FOUR)).why


def test_mistakes_that_would_repeat_end_the_run_at_once() -> None:
    assert "again" in stopped(decide(after(failed(5, repeats=True)), nodes(2, 2), FOUR)).why


def test_the_same_step_twice_is_a_crash_loop_with_a_report_but_progress_is_none() -> None:
    limits = Limits(4, (4,), 10, node_failures=10)
    end = stopped(decide(after(failed(5), failed(5)), nodes(2, 2), limits))
    assert end.why.startswith("step 6 failed 2 times") and len(end.report) == 2 and "it broke" in end.report[0]
    assert isinstance(decide(after(failed(5), failed(6), failed(7)), nodes(2, 2), limits), Restart)


def test_falling_back_and_failing_earlier_is_no_progress_either_where_nobody_knows_what_was_restored() -> None:
    assert loop(failed(20), failed(12), failed(19)) == 3
    assert loop(failed(20), failed(12), failed(21)) == 1
    end = stopped(decide(after(failed(20), failed(12)), nodes(2, 2), FOUR))
    assert end.why.startswith("steps 13, 21 failed 2 times without progress")


def test_failing_elsewhere_while_steps_are_done_again_is_no_crash_loop_but_uses_restarts() -> None:
    ever_earlier = [failed(step, restored=0) for step in (900, 300, 200, 100)]
    assert loop(*ever_earlier) == 1
    limits = Limits(4, (4,), 3, node_failures=10)
    assert isinstance(decide(after(*ever_earlier[:3]), nodes(2, 2), limits), Restart)
    assert "max_restarts = 3" in stopped(decide(after(*ever_earlier), nodes(2, 2), limits)).why


def test_the_same_step_failing_again_is_a_crash_loop_also_if_steps_before_it_were_done_again() -> None:
    again = after(failed(300, restored=0), failed(900, restored=0), failed(900, restored=500))
    end = stopped(decide(again, nodes(2, 2), Limits(4, (4,), 10, node_failures=10)))
    assert end.why.startswith("step 901 failed 2 times without progress") and len(end.report) == 2
    assert loop(failed(900, restored=0), failed(300, restored=300)) == 2, "nothing was done since"


def test_what_failed_long_before_the_newest_failure_counts_no_more() -> None:
    day = 86400.0
    history = after(*(failed(step, time=step * day / 2) for step in range(1, 9)))
    limits = Limits(4, (4,), 3, node_failures=4, window_s=day)
    decision = restarted(decide(history, nodes(2, 2, 2), limits))
    assert decision.why == "in place", "three failures of node-0 are left"
    assert "are used up within" in stopped(decide(history, nodes(2, 2), replace(limits, max_restarts=2))).why
    for_ever = replace(limits, window_s=0.0)
    assert "used up" in stopped(decide(history, nodes(2, 2, 2), for_ever)).why
    excluded = restarted(decide(history, nodes(2, 2, 2), replace(for_ever, max_restarts=20)))
    assert "node-0" not in excluded.seating.nodes


def test_lost_nodes_are_no_crash_loop() -> None:
    assert loop(failed(5), failed(5, kind="node"), failed(5, kind="node")) == 1


def test_restarts_without_progress_wait_longer_each_time() -> None:
    limits = Limits(4, (4,), 20, crash_loops=20, node_failures=20)
    pauses = [restarted(decide(after(*[failed(5)] * n), nodes(2, 2), limits)).pause_s for n in (1, 2, 3, 4, 12)]
    assert pauses == [0, 1, 2, 4, 30]


def test_a_node_that_failed_too_often_is_left_out_unless_it_is_the_only_one() -> None:
    twice = (failed(5), failed(6))
    assert "node-0" not in restarted(decide(after(*twice), nodes(2, 2, 2), FOUR)).seating.nodes
    alone = Limits(1, (1,), 5)
    history = History(twice, Seating(("node-0",)))
    assert restarted(decide(history, nodes(1), alone)).seating.nodes == ("node-0",)


def test_errors_that_python_raised_do_not_speak_against_the_machine() -> None:
    history = after(failed(5, code=1), failed(6, code=1), failed(7, code=1))
    assert history.bad_nodes(2) == frozenset()
    assert after(failed(5), failed(6)).bad_nodes(2) == {"node-0"}


def test_a_node_that_will_be_taken_is_left_only_if_there_is_another() -> None:
    assert "node-0" not in restarted(decide(after(), nodes(2, 2, 2, drain=[0]), FOUR)).seating.nodes
    assert "node-0" in restarted(decide(after(), nodes(2, 2, drain=[0]), FOUR)).seating.nodes


NAMES = [f"node-{i}" for i in range(5)]
FLEETS = st.lists(
    st.builds(
        Node,
        name=st.sampled_from(NAMES),
        domain=st.sampled_from(["a", "b"]),
        slots=st.integers(0, 4),
        alive=st.booleans(),
        drain_deadline=st.sampled_from([None, None, 1.0]),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda node: node.name,
)
FAILURES = st.lists(
    st.builds(
        Failed,
        generation=st.integers(1, 9),
        kind=st.sampled_from(["worker", "hang", "node", "start"]),
        step=st.integers(0, 6),
        message=st.just("it broke"),
        node=st.sampled_from(["", *NAMES]),
        rank=st.integers(-1, 3),
        exit_code=st.sampled_from([1, 4, 137]),
        repeats=st.just(False),
        time=st.just(1.0),
        restored=st.one_of(st.none(), st.integers(0, 6)),
    ),
    max_size=6,
)
LIMITS = st.builds(
    Limits,
    workers=st.just(4),
    sizes=st.sampled_from([(4,), (2, 4), (1, 2, 3, 4)]),
    max_restarts=st.integers(0, 5),
    crash_loops=st.integers(1, 4),
    node_failures=st.integers(1, 4),
    replace_s=st.just(0.0),
)
SEATINGS = st.one_of(
    st.none(),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(lambda names: Seating(tuple(sorted(names)))),
)


@given(FAILURES, FLEETS, LIMITS, SEATINGS)
def test_a_restart_sits_on_healthy_nodes_with_room_in_an_allowed_number_within_the_budget(
    failures: list[Failed], fleet: list[Node], limits: Limits, seating: Seating | None
) -> None:
    decision = decide(History(tuple(failures), seating), fleet, limits)
    if not isinstance(decision, Restart):
        assert isinstance(decision, Stop) and decision.why
        return
    by_name = {node.name: node for node in fleet}
    counts = Counter(decision.seating.nodes)
    assert all(by_name[name].alive and count <= by_name[name].slots for name, count in counts.items())
    assert decision.seating.world_size in {limits.workers, *(limits.sizes if seating else ())}
    assert len(failures) <= limits.max_restarts
    if len(fleet) > 1:
        assert not set(counts) & History(tuple(failures)).bad_nodes(limits.node_failures)
    for name in counts:  # ranks of a node are contiguous
        ranks = decision.seating.ranks_of(name)
        assert ranks == tuple(range(ranks[0], ranks[0] + len(ranks)))


@given(FAILURES, FLEETS, LIMITS)
def test_no_smaller_size_is_taken_while_a_larger_allowed_one_fits(
    failures: list[Failed], fleet: list[Node], limits: Limits
) -> None:
    decision = decide(History(tuple(failures), Seating(("node-0",) * 4)), fleet, limits)
    if isinstance(decision, Restart):
        bad = History(tuple(failures)).bad_nodes(limits.node_failures) if len(fleet) > 1 else set()
        room = sum(node.slots for node in fleet if node.alive and node.name not in bad)
        assert decision.seating.world_size == max(size for size in limits.sizes if size <= room)


@settings(max_examples=30, deadline=None)  # each writes a log durably
@given(FAILURES, FLEETS, LIMITS, SEATINGS)
def test_the_decision_after_replaying_the_log_is_the_same(
    failures: list[Failed], fleet: list[Node], limits: Limits, seating: Seating | None
) -> None:
    with TemporaryDirectory() as folder:
        log = ControlLog(Path(folder))
        log.append("launch", workers=4)
        for failure in failures:
            facts = {name: value for name, value in vars(failure).items() if name != "kind"}
            log.append("failure", what=failure.kind, **facts)
        if seating is not None:
            log.append("decision", nodes=list(seating.nodes))
        replayed = History.of(ControlLog(Path(folder)).records)
    history = History(tuple(failures), seating)
    assert replayed == history
    assert decide(replayed, fleet, limits) == decide(history, fleet, limits)


def test_the_user_starting_the_run_anew_begins_a_new_history() -> None:
    records = [
        {"kind": "decision", "nodes": ["node-0"]},
        {"kind": "failure", "what": "worker", "generation": 1, "step": 3},
        {"kind": "lost", "nodes": ["node-0"]},
    ]
    assert History.of(records).failures[0].kind == "node"
    assert History.of([*records, {"kind": "launch"}]) == History()


def test_a_node_that_is_lost_is_no_mistake_whatever_its_worker_said_first(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    log.append("decision", action="restart", nodes=["node-0", "node-1"], why="first start")
    mistake = failed(5, code=4, repeats=True)
    facts = {name: value for name, value in vars(mistake).items() if name != "kind"}
    log.append("failure", what="worker", **facts)
    assert isinstance(decide(History.of(log.records), nodes(1, 1, 1), Limits(2, max_restarts=3)), Stop)
    log.append("lost", nodes=["node-0"])
    decision = decide(History.of(log.records), nodes(1, 1, 1, lost=(0,)), Limits(2, max_restarts=3))
    assert isinstance(decision, Restart) and decision.seating.nodes == ("node-2", "node-1")
