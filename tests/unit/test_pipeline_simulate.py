"""The simulator: exact times of known schedules, lanes and messages, memory, and the gains that a paper measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.published import FOUR_NODES, ONE_NODE, Published, simulated_gain
from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.builders import BUILDERS, build
from windlass.parallel.pipeline.costs import Costs, Part, transformer_parts
from windlass.parallel.pipeline.graph import dependencies
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.schedule import Layout, Schedule
from windlass.parallel.pipeline.simulate import simulate
from windlass.parallel.pipeline.timeline import Span, Timeline

TWO_RANKS = """
# stage_rank: 0 1
# micro_batches: 1
0: 0F0 0SEND_F0 0RECV_B0 0B0 0REDUCE0
1: 1RECV_F0 1F0 1B0 1SEND_B0 1REDUCE0
"""


def at(timeline: Timeline) -> dict[str, tuple[float, float]]:
    """Return start and end by action."""
    return {str(a): (s, e) for lanes in timeline.spans for row in lanes.values() for a, s, e in row}


def with_bytes(costs: Costs, **sizes: float) -> Costs:
    """Give every action of a kind a message size, and the other kinds none."""
    longest = max(len(costs.forward_s), len(costs.scores_s))
    return replace(costs, message_bytes={kind: (size,) * longest for kind, size in sizes.items()})


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 5), (4, 4), (4, 2), (8, 32)])
def test_the_bubble_of_even_stages_is_exactly_what_the_formula_says(name: str, p: int, m: int) -> None:
    schedule = lower(build(name, p, m))
    timeline = simulate(schedule, Costs.uniform(schedule.layout))
    assert timeline.total_s == pytest.approx(3 * (m + p - 1), rel=1e-12)
    assert timeline.idle == pytest.approx([(p - 1) / (m + p - 1)] * p, rel=1e-9, abs=1e-12)
    held = [m] * p if name == "gpipe" else [min(p - rank, m) for rank in range(p)]
    assert list(timeline.peak_in_flight) == held


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(BUILDERS)),
    p=st.integers(1, 4),
    m=st.integers(1, 6),
    vocab=st.integers(0, 2),
    head=st.floats(0.1, 3),
    latency=st.sampled_from([0.0, 0.25]),
    lowered=st.booleans(),
)
def test_every_compute_action_starts_as_soon_as_its_rank_and_its_data_are_ready(
    name: str, p: int, m: int, vocab: int, head: float, latency: float, lowered: bool
) -> None:
    schedule = build(name, p, m, vocab=vocab)
    schedule = lower(schedule) if lowered else schedule
    timeline = simulate(schedule, Costs.uniform(schedule.layout, head=head, embedding=0.1, latency_s=latency))
    ends = {s.action: s.end_s for lanes in timeline.spans for row in lanes.values() for s in row}
    needs = dependencies(schedule)
    assert set(ends) == set(needs)
    for row in schedule.ranks:
        starts = {s.action: s.start_s for s in timeline.spans[schedule.layout.rank_of(row[0])]["compute"]}
        clock = 0.0
        for action in row:
            if KINDS[action.kind].lane == "compute":
                assert starts[action] == max([clock, *(ends[need] for need in needs[action])])
                clock = ends[action]
            else:
                assert ends[action] >= max([clock, *(ends[need] for need in needs[action])])


def test_a_message_takes_latency_and_bytes_over_bandwidth_and_holds_up_only_its_receiver() -> None:
    schedule = Schedule.from_text(TWO_RANKS)
    costs = replace(Costs.uniform(schedule.layout, latency_s=0.5), bytes_per_s=4.0)
    times = at(simulate(schedule, with_bytes(costs, SEND_F=2.0)))
    assert times["0F0"] == (0, 1) and times["0SEND_F0"] == (1, 2) and times["1RECV_F0"] == (1, 2)
    assert times["1F0"] == (2, 3) and times["1B0"] == (3, 5)
    assert times["1SEND_B0"] == (5, 5) and times["0B0"] == (5, 7), "a message of no bytes takes no time"


def test_a_receive_is_complete_when_it_is_posted_and_its_data_is_there() -> None:
    schedule = Schedule.from_text(TWO_RANKS)
    assert at(simulate(schedule, Costs.uniform(schedule.layout, latency_s=0.5)))["1RECV_F0"] == (1, 1.5)
    busy = Schedule.from_text(
        "# stage_rank: 0 1 1\n# micro_batches: 2\n# forward_only: true\n"
        "0: 0F0 0SEND_F0 0F1 0SEND_F1\n1: 1RECV_F0 1F0 2F0 1RECV_F1 1F1 2F1\n"
    )
    times = at(simulate(busy, Costs.uniform(busy.layout, latency_s=0.5)))
    assert times["0SEND_F1"] == (2, 2.5) and times["1RECV_F1"] == (3.5, 3.5), "it was under way before it was posted"


def test_messages_of_one_kind_share_a_channel_and_its_latency_overlaps() -> None:
    schedule = Schedule.from_text(
        "# stage_rank: 0 1\n# micro_batches: 2\n# forward_only: true\n"
        "0: 0F0 0SEND_F0 0F1 0SEND_F1\n1: 1RECV_F0 1RECV_F1 1F0 1F1\n"
    )
    costs = replace(Costs.uniform(schedule.layout, latency_s=10.0), bytes_per_s=1.0)
    times = at(simulate(schedule, with_bytes(costs, SEND_F=3.0)))
    assert times["0SEND_F0"] == (1, 14) and times["0SEND_F1"] == (4, 17)


def test_a_gather_delays_the_first_use_and_a_reduction_only_the_end() -> None:
    schedule = lower(build("1f1b", 1, 2), gather="step")
    costs = with_bytes(replace(Costs.uniform(schedule.layout), bytes_per_s=1.0), GATHER=4.0, REDUCE=5.0)
    timeline = simulate(schedule, costs)
    times = at(timeline)
    assert times["0GATHER0"] == (0, 4) and times["0F0"] == (4, 5)
    assert times["0B1"][1] == 10 and times["0REDUCE0"] == (10, 15) == (10, timeline.total_s)
    assert timeline.idle == (pytest.approx(1 - 6 / 15),)


@pytest.mark.parametrize("algorithm", [1, 2])
def test_vocabulary_messages_hold_up_those_that_need_them(algorithm: int) -> None:
    schedule = lower(build("1f1b", 2, 1, vocab=algorithm))
    costs = Costs.uniform(schedule.layout, head=1.0, embedding=1.0)
    times = at(simulate(schedule, replace(with_bytes(costs, X=1, STATS=1, DX=1, ROWS=1, DROWS=1), latency_s=10.0)))
    assert times["1ROWS0"][1] == times["1EF0"][1] + 10 == times["0F0"][0]
    assert times["1S0"][0] == times["1F0"][1] and times["0S0"][0] == times["1F0"][1] + 10
    assert times["1T0"][0] >= times["0S0"][1] + 10
    carrier = "0S0" if algorithm == 2 else "0T0"
    assert times["1B0"][0] == times[carrier][1] + 10
    assert times["1EB0"][0] == times["0B0"][1] + 10


def test_a_pipeline_of_one_sends_nothing() -> None:
    schedule = lower(build("1f1b", 1, 3, vocab=2))
    costs = replace(Costs.uniform(schedule.layout, head=1.0, latency_s=7.0), bytes_per_s=0.1)
    assert simulate(schedule, with_bytes(costs, X=1, STATS=1, DX=1, ROWS=1, DROWS=1)).total_s == pytest.approx(18)


def test_a_circle_of_waiting_is_an_error_with_the_picture_so_far() -> None:
    schedule = Schedule.from_text("# stage_rank: 0 1\n# micro_batches: 1\n0: 0B0 0F0\n1: 1F0 1B0\n")
    with pytest.raises(
        PlanError, match=r"rank 0 waits in 0B0 for 0F0 of rank 0. 0F0, with what it needs, must come before 0B0"
    ):
        simulate(schedule, Costs.uniform(schedule.layout))


# -- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [0, 1, 2])
def test_the_head_weighs_the_same_wherever_it_is(vocab: int) -> None:
    schedule = build("1f1b", 4, 3, vocab=vocab)
    costs = Costs.uniform(schedule.layout, forward=2, backward=4, head=1.5, embedding=0.5)
    seconds = [costs.seconds(action) for row in schedule.ranks for action in row]
    assert sum(seconds) == pytest.approx(3 * 6 * (4 + 1.5 + 0.5))


def test_algorithm_2_moves_the_input_gradient_into_the_scores() -> None:
    one, two = (Costs.uniform(Layout(2, (0, 1), n), head=1.0) for n in (1, 2))
    assert one.scores_s == (0.5, 0.5) and one.transposed_s == (1.0, 1.0)
    assert two.scores_s == (1.0, 1.0) and two.transposed_s == (0.5, 0.5)


def test_speeds_and_shares_stretch_what_a_rank_does() -> None:
    part = Part(1, 1, 1, activation_bytes=8, parameter_bytes=10)
    costs = Costs.from_parts(
        Layout(2, (0, 1), 2),
        [2 * part, part + part],
        head=part,
        embedding=part,
        hidden_bytes=4,
        speeds=(1.0, 0.5),
        shares=(0.75, 0.25),
        recompute=True,
        stream_scores=True,
        num_shards=4,
    )
    assert costs.forward_s == (2, 4) and costs.seconds(Action(1, "B", 0)) == 8
    assert costs.scores_s == (1.5, 1.0) and costs.transposed_s == (1.5, 1.0), "logits twice, on a rank of half speed"
    assert costs.activation_bytes == (4, 4) and costs.recomputed_bytes == (16, 16) and costs.scores_bytes == (0, 0)
    assert costs.num_bytes(Action(0, "GATHER", 0)) == 15 and costs.num_bytes(Action(1, "VREDUCE", 0)) == 3.75
    with pytest.raises(PlanError, match="costs of 1 speeds for a pipeline of 2: give 2"):
        Costs.from_parts(Layout(2, (0, 1)), [part, part], head=part, embedding=part, hidden_bytes=1, speeds=(1.0,))


def test_a_transformer_costs_what_the_papers_table_says() -> None:
    b, s, h, v = 2, 16, 8, 100
    block, head, embedding = transformer_parts(hidden=h, sequence=s, vocab=v, flops_per_s=1.0, micro_batch=b)
    totals = [part.forward_s + part.input_gradient_s + part.weight_gradient_s for part in (block, head, embedding)]
    assert totals == [b * s * h * (72 * h + 12 * s), 6 * b * s * h * v, 3 * b * s * h]
    assert (block.parameter_bytes, head.parameter_bytes) == (24 * h * h, 2 * h * v)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_activations_are_held_from_forward_to_backward() -> None:
    schedule = build("1f1b", 4, 8)
    costs = replace(Costs.uniform(schedule.layout), resident_bytes=(100.0,) * 4)
    assert simulate(schedule, costs).peak_bytes == (104, 103, 102, 101)


def test_the_input_gradient_frees_its_share_and_the_weight_gradient_the_rest() -> None:
    text = "# stage_rank: 0\n# micro_batches: 2\n0: 0F0 0I0 0F1 0W0 0I1 0W1\n"
    schedule = Schedule.from_text(text)
    costs = Costs.uniform(schedule.layout)
    assert simulate(schedule, replace(costs, freed_by_input_gradient=0.25)).peak_bytes == (1.75,)
    assert simulate(schedule, replace(costs, freed_by_input_gradient=1.0)).peak_bytes == (1.0,)


def test_recomputation_holds_inputs_and_one_rebuilt_stage() -> None:
    schedule = lower(build("gpipe", 1, 4), recompute=True)
    stage, nothing = Part(1, 1, 1, activation_bytes=10), Part(0, 0, 0)
    costs = Costs.from_parts(schedule.layout, [stage], head=nothing, embedding=nothing, hidden_bytes=1, recompute=True)
    assert simulate(schedule, costs).peak_bytes == (14,)


def test_received_messages_and_gathered_parameters_take_memory_until_they_are_used() -> None:
    schedule = Schedule.from_text(TWO_RANKS)
    costs = replace(with_bytes(Costs.uniform(schedule.layout), SEND_F=10.0, SEND_B=100.0), bytes_per_s=1e9)
    assert simulate(schedule, costs).peak_bytes == (101, 11)
    gathered = lower(build("1f1b", 1, 1), gather="step")
    costs = replace(with_bytes(Costs.uniform(gathered.layout)), gathered_bytes=(7.0,))
    assert simulate(gathered, costs).peak_bytes == (8,)


def test_vocabulary_passes_hold_scores_hidden_states_and_partial_gradients() -> None:
    schedule = lower(build("1f1b", 2, 1, vocab=2))
    costs = replace(Costs.uniform(schedule.layout), scores_bytes=(5.0, 5.0), activation_bytes=(0.0, 0.0))
    head, other = simulate(schedule, with_bytes(costs, X=1.0, DX=10.0)).peak_bytes[::-1]
    assert other == 5 + 1, "scores and the hidden states, until T"
    assert head == 5 + 1 + 20, "and on the head rank what the ranks send back, until B"


# -- figures of a timeline -------------------------------------------------------------------------------------------


def test_a_timeline_sorts_spans_into_lanes_and_counts_idle_time() -> None:
    spans = [
        Span(Action(0, "B", 0), 2.0, 4.0),
        Span(Action(0, "F", 0), 0.0, 1.0),
        Span(Action(0, "SEND_F", 0), 1.0, 5.0),
    ]
    timeline = Timeline.of("x", [spans, []])
    assert [s.action.kind for s in timeline.spans[0]["compute"]] == ["F", "B"]
    assert timeline.total_s == 5 and timeline.idle == (pytest.approx(0.4), 1.0) and timeline.peak_in_flight == (1, 0)


# -- published -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "vocab", "algorithm", "measured"),
    [(ONE_NODE, *case) for case in ONE_NODE.cases() if case[0] in (32_000, 256_000)]
    + [(FOUR_NODES, *case) for case in FOUR_NODES.cases() if case[:2] == (256_000, 2)],
    ids=lambda value: f"{value.num_ranks} ranks" if isinstance(value, Published) else f"{value:g}",
)
def test_gains_of_vocabulary_parallelism_are_those_of_the_paper(
    case: Published, vocab: int, algorithm: int, measured: float
) -> None:
    gain = simulated_gain(case, vocab, algorithm)
    assert gain > 1 and measured > 1
    assert gain == pytest.approx(measured, rel=0.15)
