"""Costs of a pipeline that a run measured: what is read out of timelines, and that the stage cut follows it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from windlass.data.prepare import prepare
from windlass.dist.errors import PlanError
from windlass.dist.trace import Event
from windlass.launch import cli
from windlass.parallel.pipeline.costs import Part
from windlass.parallel.pipeline.measured_costs import Recorded, Recording, measured_costs, own_seconds
from windlass.parallel.pipeline.model_costs import ModelCosts
from windlass.parallel.pipeline.plan import PipelinePlan, plan_pipeline
from windlass.parallel.pipeline.policy import PipelineConfig

MODEL = replace(ModelCosts.uniform(8), hidden_bytes=100.0)  # input and weight gradients are alike


class Timeline:
    """Spans one after another, as a rank records them, in one step."""

    def __init__(self, speed: float = 1.0, share: float = 0.0) -> None:
        self.now, self.speed, self.share, self.events = 0.0, speed, share, list[Event]()

    def spend(self, name: str, seconds: float, *, wait: float = 0.0, lane: str = "parts") -> Timeline:
        """Add a span that works for some seconds and waits for peers before, in a wait inside of another."""
        if wait:
            self.events += [Event("X", "wait", "comm", self.now, w, {}) for w in (wait, wait / 2)]
        args = {"action": name} if lane == "compute" else {}
        self.events.append(Event("X", name, lane, self.now, wait + seconds, args))
        self.now += wait + seconds
        return self

    def blocks(self, seconds: Iterable[tuple[int, float]]) -> Timeline:
        """Run blocks forwards, and backwards in twice the seconds."""
        for i, s in seconds:
            self.spend(f"forward blocks.{i}", s).spend(f"backward blocks.{i}", 2 * s)
        return self

    def recording(self) -> Recording:
        return Recording([*self.events, Event("X", "step 5", "step", 0.0, self.now, {})], self.share, self.speed)


def measured(*ranks: Timeline, costs: ModelCosts = MODEL, bytes_per_s: float = 0.0, **how: int) -> ModelCosts:
    recorded = Recorded("RUN", [rank.recording() for rank in ranks], **how)  # type: ignore[arg-type]
    return measured_costs(costs, recorded, bytes_per_s=bytes_per_s)


def planned(costs: ModelCosts, **policy: str) -> PipelinePlan:
    config = PipelineConfig(**{"schedule": "1f1b", "vocab": "off"} | policy)  # type: ignore[arg-type]
    return plan_pipeline(
        config, num_ranks=2, num_micro_batches=8, num_blocks=len(costs.blocks), vocab_size=256, costs=costs
    )


def seconds(part: Part) -> tuple[float, float, float]:
    return part.forward_s, part.input_gradient_s, part.weight_gradient_s


def test_uneven_blocks_move_the_cut_and_the_plan_says_who_measured_them() -> None:
    assert planned(MODEL).blocks == ((0, 4), (4, 8))
    times = [3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    plan = planned(measured(Timeline().blocks(enumerate(times))))
    assert plan.blocks == ((0, 2), (2, 8)) and plan.in_seconds
    assert plan.why == "as asked for, costs measured by 'RUN'"
    assert plan.step_s == pytest.approx((8 + 1) * 18.0, rel=0.05)


def test_a_head_that_takes_longer_than_its_products_moves_the_cut() -> None:
    rank = Timeline().blocks((i, 1.0) for i in range(8)).spend("forward head", 8.5).spend("backward head", 0.5)
    costs = measured(rank)
    assert seconds(costs.head) == pytest.approx((3.0, 3.0, 3.0))
    assert planned(costs).blocks == ((0, 5), (5, 8))


def test_waiting_is_no_work_and_only_training_steps_count() -> None:
    rank = Timeline()
    for s in (1.0, 2.0, 9.0):
        rank.spend("forward blocks.0", s, wait=5.0).spend("backward blocks.0", 2 * s, wait=1.0)
    assert [taken for event, taken in own_seconds(rank.recording().events) if "forward" in event.name] == [1, 2, 9]
    inside = rank.recording()
    after = Event("X", "forward blocks.0", "parts", rank.now + 1, 1000.0, {})  # in a validation, say
    costs = measured_costs(MODEL, Recorded("RUN", [replace(inside, events=[*inside.events, after])]))
    assert seconds(costs.blocks[0]) == pytest.approx((2.0, 2.0, 2.0))


def test_a_whole_backward_is_split_as_modelled_and_a_split_one_is_taken_as_it_is() -> None:
    uneven = replace(MODEL, blocks=(Part(1.0, 3.0, 1.0, 7.0, 5.0),) * 8)
    rank = Timeline().spend("forward blocks.0", 2.0).spend("backward blocks.0", 8.0)
    costs = measured(rank, costs=uneven)
    assert costs.blocks == (Part(2.0, 6.0, 2.0, 7.0, 5.0),) * 8
    for name, s in (("forward", 2.0), ("input gradient", 5.0), ("weight gradient", 1.0)):
        rank = (rank if name != "forward" else Timeline()).spend(f"{name} blocks.0", s)
    assert seconds(measured(rank, costs=uneven).blocks[0]) == (2.0, 5.0, 1.0)


def test_activations_rebuilt_inside_a_backward_are_not_part_of_it() -> None:
    rank = Timeline()
    for i in range(2):
        rank.spend(f"forward blocks.{i}", 1.0).spend(f"backward blocks.{i}", 3.0 if i == 0 else 2.0)
    assert {seconds(part) for part in measured(rank, recompute_every=2).blocks} == {(1.0, 1.0, 1.0)}
    with_actions = Timeline().spend("0R0", 1.0, lane="compute").blocks([(0, 1.0)])
    assert seconds(measured(with_actions, recompute_every=1).blocks[0]) == (1.0, 1.0, 1.0)


def test_what_nobody_recorded_is_estimated_from_what_was() -> None:
    costs = measured(Timeline().blocks([(0, 2.0), (1, 4.0), (2, 6.0)]))
    assert [part.forward_s for part in costs.blocks] == [2.0, 4.0, 6.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    assert seconds(costs.head) == pytest.approx([4 * s for s in seconds(MODEL.head)])
    with pytest.raises(PlanError, match=r"'RUN': no rank recorded a block.*profiler.start_step=5 profiler.all_ranks"):
        measured(Timeline().spend("forward head", 1.0))


def test_noise_leaves_blocks_alike_and_a_slow_rank_counts_at_speed_1() -> None:
    noisy = Timeline().blocks((i, 1.0 + 0.02 * (i % 3)) for i in range(8))
    assert len(set(measured(noisy).blocks)) == 1
    slow = [Timeline(speed).blocks((i, 1 / speed) for i in mine) for speed, mine in ((1.0, range(4)), (0.5, range(8)))]
    assert {seconds(part) for part in measured(*slow).blocks} == {(1.0, 1.0, 1.0)}


@pytest.mark.parametrize(
    ("vocab", "streamed", "scores", "later"), [(1, 0, 1.0, 2.0), (2, 0, 2.0, 1.0), (1, 1, 1.0, 3.0), (2, 1, 2.0, 2.0)]
)
def test_shards_are_scaled_to_the_whole_vocabulary(vocab: int, streamed: int, scores: float, later: float) -> None:
    ranks = []
    for place, share in enumerate((0.75, 0.25)):
        rank = Timeline(share=share).blocks((i, 1.0) for i in range(4 * place, 4 * place + 4))
        for kind, whole in (("S", scores), ("T", later), ("EF", 0.25), ("EB", 0.5)):
            rank.spend(f"{place}{kind}0", share * whole, wait=2.0, lane="compute")
        ranks.append(rank)
    costs = measured(*ranks, vocab=vocab, streamed=streamed)
    assert seconds(costs.head) == pytest.approx((1.0, 1.0, 1.0))
    assert seconds(costs.embedding) == pytest.approx((0.25, 0.0, 0.5))
    alone = measured(*ranks[:1], vocab=vocab, streamed=streamed)
    assert seconds(alone.head) == pytest.approx((1.0, 1.0, 1.0))
    # With three times a block's work, the head is worth cutting.
    assert planned(replace(costs, head=3 * costs.head), vocab="auto").schedule.layout.vocab > 0


def test_messages_are_in_seconds_as_well() -> None:
    rank = Timeline().blocks((i, 0.5) for i in range(8))
    assert measured(rank).bytes_per_s == pytest.approx(100.0 / (0.05 * 0.5))
    known = measured(rank, bytes_per_s=1e9)
    assert known.bytes_per_s == 1e9 and known.latency_s > 0


# -- a run -------------------------------------------------------------------------------------------------------------

JOB = """
model: {vocab_size: 257, hidden_size: 16, num_layers: 4, num_heads: 2, intermediate_size: 32}
train: {steps: 3, seq_len: 16, micro_batch: 2, global_batch: 8, device: cpu, eval_batches: 1}
metrics: {tensorboard: false}
checkpoint: {at_end: false}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that has been run in one process and recorded in RUN beside it."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    prepare([folder / "text.txt"], folder / "tokens", tokenizer="bytes", workers=1)
    path = folder / "job.yaml"
    path.write_text(f"{JOB}data: {{path: {folder}/tokens}}\n")
    record = ["profiler.start_step=2", "profiler.num_steps=2", "profiler.operators=false"]
    assert command("train", str(path), f"train.run_dir={folder}/RUN", *record) == 0
    return path


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


def plan(job: Path, run: str = "RUN", *changes: str) -> Sequence[str]:
    return ["plan", str(job), "parallelism.pp=2", "--world", "2", f"pipeline.measured={job.parent / run}", *changes]


def test_a_recorded_run_is_what_a_pipeline_is_planned_from(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert command(*plan(job), "--json") == 0
    pipeline = json.loads(capsys.readouterr().out)["pipeline"]
    assert f"costs measured by '{job.parent / 'RUN'}'" in pipeline["why"]
    assert command("draw", *plan(job)[1:]) == 0
    assert "forwards of a block" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["train.seq_len=8"], ["train.seq_len = 8", "recorded with 16", "Use train.seq_len=16"]),
        (["train.micro_batch=1"], ["train.micro_batch = 1", "recorded with 2"]),
        (["model.num_layers=5"], ["model.num_layers = 5", "recorded with 4", "pipeline.measured=null"]),
        (["model.mlp=gelu"], ["model.mlp = 'gelu'", "recorded with 'swiglu'"]),
    ],
)
def test_a_run_of_something_else_is_refused_by_key(
    job: Path, changes: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert command(*plan(job, "RUN", *changes)) == 3
    text = " ".join(capsys.readouterr().err.split())
    assert all(part in text for part in parts), text


def test_runs_that_say_nothing_are_refused(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()

    def told(run: str, code: int, *changes: str) -> str:
        assert command(*plan(job, run, *changes)) == code
        return " ".join(capsys.readouterr().err.split())

    assert "no plan.json and config.yaml" in told("nowhere", 3)
    assert "this run writes into that folder" in told("RUN", 2, f"train.run_dir={job.parent / 'RUN'}")
    empty = job.parent / "empty"
    empty.mkdir()
    facts = json.loads((job.parent / "RUN" / "plan.json").read_text())
    (empty / "config.yaml").write_text((job.parent / "RUN" / "config.yaml").read_text())
    (empty / "plan.json").write_text(json.dumps(facts))
    assert "no timeline" in (text := told("empty", 3)) and "profiler.all_ranks=true" in text
    (empty / "plan.json").write_text(json.dumps(facts | {"device": "cuda"}))
    assert "recorded on cuda" in told("empty", 3)
    (empty / "plan.json").write_text(json.dumps(facts))
    (empty / "traces").mkdir()
    (empty / "traces" / "timeline_rank0_step3.json.gz").write_bytes(b"torn")
    assert "cannot be read" in told("empty", 4)
