"""Schedules from their names: valid for all sizes, as few activations as promised, as little idle time as promised.

`python tests/unit/test_pipeline_builders.py` writes tests/golden/ anew; look at the difference before keeping it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import Action
from windlass.parallel.pipeline.builders import BUILDERS, build, forward_only, one_stage
from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.schedule import Layout, Schedule, load_schedule, write_schedule
from windlass.parallel.pipeline.simulate import simulate
from windlass.parallel.pipeline.timeline import peak_in_flight
from windlass.parallel.pipeline.verify import verify

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
EVERY = [(name, vocab) for name in BUILDERS for vocab in (0, 1, 2)]
LAYOUTS = {(name, vocab): build(name, 8, 1, vocab=vocab).layout for name, vocab in EVERY}
GAP = {0: 0, 1: 2, 2: 1}


def golden() -> dict[str, Schedule]:
    built = {f"{name}-{vocab}.txt": build(name, 4, 6, vocab=vocab) for name, vocab in EVERY}
    vee = Layout(2, (0, 1, 1, 0), 2)
    return {**built, "one-stage.txt": one_stage(3), "forward-only.txt": forward_only(vee, 4)}


def costs(layout: Layout, head: float, latency: float) -> Costs:
    """Return ranks of forward 1 and backward 2, a head of `head` times a rank's work, lookups and scatters of 1 %."""
    share = layout.num_ranks / layout.num_stages
    tiny = (0.01,) * layout.num_ranks
    uniform = Costs.uniform(layout, forward=share, backward=2 * share, head=head / share, latency_s=latency)
    return replace(uniform, lookup_s=tiny, scatter_s=tiny)


@cache
def idle(name: str, vocab: int = 0, head: float = 0.0) -> float:
    """Return the idle share at 8 ranks and 128 micro-batches.

    With vocabulary passes it is that of the lowered schedule, in which every message takes 2 % of a forward.
    """
    facts = costs(LAYOUTS[name, vocab], head, 0.02 if vocab else 0.0)
    schedule = build(name, 8, 128, vocab=vocab, costs=facts)
    return max(simulate(lower(schedule) if vocab else schedule, facts).idle)


@pytest.mark.parametrize(("name", "vocab"), EVERY)
def test_every_builder_makes_valid_schedules_of_all_sizes(name: str, vocab: int) -> None:
    for p in range(1, 9):
        for m in range(1, 33):
            if m <= 2 or (p + m) % 12 == 4 * vocab:
                schedule = build(name, p, m, vocab=vocab)
                verify(schedule)
                assert schedule.limits == tuple(map(peak_in_flight, schedule.ranks))


@pytest.mark.parametrize(("name", "vocab"), EVERY)
def test_lowered_schedules_and_their_evaluations_are_valid(name: str, vocab: int) -> None:
    for p, m in ((1, 2), (2, 1), (2, 5), (3, 7), (4, 3), (4, 8), (7, 9), (8, 4)):
        schedule = build(name, p, m, vocab=vocab)
        evaluation = forward_only(schedule.layout, m)
        for plain, complete in (
            (schedule, lower(schedule, recompute=m % 2 == 0, gather="run", reduce="each")),
            (evaluation, lower(evaluation, gather="step")),
        ):
            verify(complete)
            given = set(itertools.chain(*plain.ranks))
            assert tuple(tuple(a for a in row if a in given) for row in complete.ranks) == plain.ranks, "only inserted"


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_takes_any_number_of_stages_per_rank(chunks: int) -> None:
    for p, m, vocab in ((1, 3, 1), (2, 5, 0), (3, 2, 1), (4, 9, 2), (5, 11, 0)):
        schedule = build("interleaved", p, m, vocab=vocab, chunks=chunks)
        verify(schedule)
        assert schedule.layout.stage_rank == tuple(stage % p for stage in range(p * chunks))


@pytest.mark.parametrize("vocab", [0, 1, 2])
def test_the_activations_in_flight_are_those_that_the_papers_count(vocab: int) -> None:
    gap = GAP[vocab]
    for p in (1, 2, 3, 5, 8):
        for m in (1, 2, p + 1, 20):

            def limits(name: str, p: int = p, m: int = m) -> list[int]:
                return list(build(name, p, m, vocab=vocab).limits or ())

            assert limits("gpipe") == [m] * p
            assert limits("1f1b") == [min(m, p - rank + gap) for rank in range(p)]
            assert max(limits("zb1p")) == min(m, p + gap)
            assert max(limits("zbv")) == min(2 * m, 2 * (p + gap))
            assert max(limits("vhalf")) <= min(2 * m, p + (1 if p % 2 else 2) + 2 * gap)
            whole, larger = divmod(m, max(1, m // p))
            warm_up = [2 * (p - rank - 1) + whole + (larger > 0) + gap for rank in range(p)]
            assert limits("interleaved") == [min(2 * m, count + 1) for count in warm_up]


@pytest.mark.parametrize("num_ranks", [3, 4, 7, 8])
def test_v_half_is_balanced_at_half_of_1f1b_plus_two_or_one_micro_batches(num_ranks: int) -> None:
    plain = num_ranks + (1 if num_ranks % 2 else 2)  # stage activations, half as large as those of 1F1B
    for vocab, more in GAP.items():
        assert build("vhalf", num_ranks, 24, vocab=vocab).limits == (plain + 2 * more,) * num_ranks
        assert build("zbv", num_ranks, 24, vocab=vocab).limits == (2 * (num_ranks + more),) * num_ranks


@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize("head", [0.3, 0.6, 2.4])
def test_a_heavy_head_costs_1f1b_no_more_idle_time_than_the_ideal(algorithm: int, head: float) -> None:
    ideal = 7 / (128 + 7)
    assert idle("1f1b", algorithm, head) < ideal + 0.01


@pytest.mark.parametrize(
    ("name", "share"), [("gpipe", 1.0), ("interleaved", 0.52), ("zb1p", 0.35), ("zbv", 0.18), ("vhalf", 0.43)]
)
def test_idle_time_without_vocabulary_is_a_known_share_of_that_of_1f1b(name: str, share: float) -> None:
    assert idle("1f1b") == pytest.approx(7 / (128 + 7))
    assert idle(name) <= share * idle("1f1b") * (1 + 1e-9)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("algorithm", [1, 2])
def test_vocabulary_passes_take_no_longer_than_their_work(name: str, algorithm: int) -> None:
    for p, m, head in ((2, 3, 0.3), (3, 16, 2.4), (4, 8, 0.3), (8, 16, 2.4)):
        facts = costs(build(name, p, 1, vocab=algorithm).layout, head, 0.0)
        total = simulate(build(name, p, m, vocab=algorithm, costs=facts), facts).total_s
        assert total < 1.02 * ((m + p - 1) * 3 + (m + 1) * 3 * head / p)


def peak(changes: Iterable[tuple[float, float]]) -> float:
    """Return the most that is held, from times and what is added or taken away at them."""
    return max(accumulate(change for _, change in sorted(changes)))


@pytest.mark.parametrize("name", BUILDERS)
def test_the_first_stage_holds_few_lookups_and_few_gradients(name: str) -> None:
    p, m = 8, 16
    schedule = build(name, p, m, vocab=2)
    times = simulate(schedule, costs(schedule.layout, 1.0, 0.0))
    spans = {span.action: span for lanes in times.spans for span in lanes["compute"]}
    looked_up = [(spans[Action(rank, "EF", i)].end_s, 1 / p) for rank in range(p) for i in range(m)]
    embedded = [(spans[Action(0, "F", i)].end_s, -1.0) for i in range(m)]
    filled = spans[Action(0, "F", p)].end_s  # until then late ranks have nothing to do but to look up
    assert peak(looked_up + embedded) < 2 + p / 2
    assert peak((max(at, filled), change) for at, change in looked_up + embedded) <= 3
    gradient = "I" if BUILDERS[name].split else "B"
    made = [(spans[Action(0, gradient, i)].end_s, 1.0) for i in range(m)]
    scattered = [(spans[Action(rank, "EB", i)].start_s, -1 / p) for rank in range(p) for i in range(m)]
    assert peak(made + scattered) < 2


@pytest.mark.parametrize(("name", "vocab"), [("1f1b", 1), ("zbv", 0), ("vhalf", 2)])
def test_a_build_depends_on_nothing_but_the_ratios_of_its_costs(name: str, vocab: int) -> None:
    schedule = build(name, 4, 7, vocab=vocab)
    assert build(name, 4, 7, vocab=vocab) == schedule
    facts = costs(schedule.layout, 1.3, 0.05)
    scaled = replace(
        facts,
        latency_s=facts.latency_s * 1024,
        **{
            field: tuple(value * 1024 for value in getattr(facts, field))
            for field in facts.__dataclass_fields__
            if field.endswith("_s") and isinstance(getattr(facts, field), tuple)
        },
    )
    assert build(name, 4, 7, vocab=vocab, costs=facts) == build(name, 4, 7, vocab=vocab, costs=scaled)


def test_one_stage_runs_one_micro_batch_after_the_other() -> None:
    schedule = one_stage(2)
    assert schedule.to_text().endswith("0: 0F0 0B0 0F1 0B1\n")
    verify(schedule)
    assert schedule.layout == Layout(1, (0,)) and schedule.limits == (1,)


def test_an_evaluation_has_forwards_lookups_and_scores_only() -> None:
    for layout in (Layout(3, (0, 1, 2)), Layout(3, (0, 1, 2, 2, 1, 0), 1), Layout(2, (0, 1, 0, 1, 0, 1), 2)):
        schedule = forward_only(layout, 5)
        verify(schedule)
        kinds = {action.kind for row in schedule.ranks for action in row}
        assert kinds == ({"F", "EF", "S"} if layout.vocab else {"F"})
        assert schedule.forward_only and schedule.limits is None


def test_an_evaluation_leaves_ranks_idle_only_while_the_pipeline_fills_and_drains() -> None:
    for layout in (Layout(4, (0, 1, 2, 3)), Layout(4, (0, 1, 2, 3, 3, 2, 1, 0))):
        stages, width = layout.num_stages, layout.num_stages // 4
        total = simulate(forward_only(layout, 10), Costs.uniform(layout)).total_s
        assert total == 10 * width + stages - width


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: build("1b1f", 2, 2), "there is no schedule '1b1f'. There are gpipe, 1f1b, interleaved, zb1p, zbv"),
        (lambda: build("1f1b", 0, 2), "'1f1b' of 0 pipeline ranks: it needs at least 1"),
        (lambda: build("zbv", 2, 0), "'zbv' of 0 micro-batches: it needs at least 1"),
        (lambda: build("interleaved", 2, 2, chunks=1), "'interleaved' of 1 stages per rank: it needs at least 2"),
        (lambda: build("vhalf", 2, 2, vocab=3), "vocab 3: 0 (off) or the algorithm, 1 or 2"),
    ],
)
def test_what_cannot_be_built_says_what_can(call, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError) as error:
        call()
    assert said in str(error.value)


@pytest.mark.parametrize("file", sorted(golden()))
def test_schedules_are_what_they_were(file: str) -> None:
    schedule = golden()[file]
    assert (GOLDEN / file).read_text() == schedule.to_text()
    assert load_schedule(GOLDEN / file) == schedule


def test_there_is_no_golden_schedule_that_nobody_builds() -> None:
    assert {path.name for path in GOLDEN.glob("*.txt")} == set(golden())


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*.txt"):
        stale.unlink()
    for file, schedule in golden().items():
        write_schedule(schedule, GOLDEN / file)
