"""Going on from a checkpoint: what must be equal, what may differ, and how it is said."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from windlass.checkpoint.agree import Alone
from windlass.dist.errors import CheckpointError, ConfigError, PlanError
from windlass.launch.job import JobConfig
from windlass.launch.resume import Identity, changes, check_model_settings, check_order, checkpoint_extra
from windlass.launch.start import check_same, first_difference

IDENTITY = Identity(8, 128, 0, 16, "d1", "t1", "/data")
JOB = JobConfig()


def saved(config: JobConfig = JOB) -> dict[str, Any]:
    extra = checkpoint_extra(config, IDENTITY, 2, step=5, consumed=40, tokens=5000, optimizer_steps=4)
    return json.loads(json.dumps(extra))


def test_what_a_checkpoint_carries_survives_json_and_fits_its_own_run() -> None:
    extra = saved()
    assert (extra["step"], extra["consumed"], extra["tokens"], extra["optimizer_steps"]) == (5, 40, 5000, 4)
    assert extra["tokenizer"] == {"digest": "t1", "folder": "/data"}
    assert "torch" in extra["versions"]
    check_order(extra, IDENTITY, "c")
    check_model_settings(extra, JOB, "c")
    assert changes(extra, JOB, 2) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 16}, r"train.global_batch = 16.*written with 8.*train.global_batch=8"),
        ({"seq_len": 64}, r"train.seq_len = 64.*written with 128.*train.seq_len=128"),
        ({"data_seed": 3}, r"data.seed = 3.*written with 0"),
        ({"shuffle_window": 4}, r"data.shuffle_window = 4.*written with 16"),
        ({"data_digest": "d2"}, r"data digest = d2.*written with d1.*other tokens"),
    ],
)
def test_what_would_change_the_order_of_samples_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_order(saved(), replace(IDENTITY, **change), "c")


def test_the_place_of_the_tokenizer_may_change() -> None:
    check_order(saved(), replace(IDENTITY, tokenizer_folder="/elsewhere"), "c")


def test_a_setting_that_makes_another_model_of_the_same_shapes_is_refused() -> None:
    other = replace(JOB, model=replace(JOB.model, rope_theta=500000.0))
    with pytest.raises(ConfigError, match=r"model.rope_theta = 500000.0.*written with 10000.0"):
        check_model_settings(saved(), other, "c")
    check_model_settings(saved(), replace(JOB, model=replace(JOB.model, loss_chunk_tokens=7, preset="x")), "c")


def test_harmless_differences_are_told() -> None:
    other = replace(JOB, zero=replace(JOB.zero, stage=3), train=replace(JOB.train, steps=77))
    assert changes(saved(), other, 4) == [
        "world size was 2, is 4",
        "zero.stage was 0, is 3",
        f"train.steps was {JOB.train.steps}, is 77",
    ]


def test_a_checkpoint_without_a_step_to_go_on_from_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has no step, consumed, tokens, optimizer_steps, order, model"):
        check_order({}, IDENTITY, "c")


def test_the_first_differing_path_is_found() -> None:
    a = {"config": {"optimizer": {"betas": [0.9, 0.95], "lr": 1.0}}, "plan": 1}
    b = {"config": {"optimizer": {"betas": [0.9, 0.99], "lr": 2.0}}, "plan": 1}
    assert first_difference(a, b) == ("config.optimizer.betas[1]", 0.95, 0.99)
    assert first_difference({"a": 1}, {}) == ("a", 1, None)
    assert first_difference([1], [1, 2]) == ("", [1], [1, 2])


class TwoRanks(Alone):
    """Hears a second rank that has `other`."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def gather_objects(self, obj: Any) -> list[Any]:
        return [obj, json.dumps(self.other, sort_keys=True)]


def test_ranks_started_with_different_jobs_are_told_the_key() -> None:
    check_same(TwoRanks({"lr": 1}), {"lr": 1})
    with pytest.raises(
        PlanError, match="ranks 0 and 1 were started with different jobs: lr is 1 on rank 0 and 2 on rank 1"
    ):
        check_same(TwoRanks({"lr": 2}), {"lr": 1})
