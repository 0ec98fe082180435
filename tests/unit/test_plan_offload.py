"""The offload part of a plan: 175 billion parameters on one machine, budgets, tables, what is chosen, how it reads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from windlass.dist.cluster import ClusterConfig
from windlass.dist.errors import PlanError
from windlass.launch import cli
from windlass.launch.config import load_job
from windlass.launch.job import JobConfig
from windlass.launch.plan import DOES_NOT_FIT, FITS, Plan, make_plan
from windlass.model.config import ModelConfig
from windlass.offload.policy import OffloadConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.zero import ZeroConfig

SMALL = ModelConfig(vocab_size=512, hidden_size=64, num_layers=4, num_heads=2, loss_chunk_tokens=64)
FAST = ClusterConfig(
    nodes=1,
    devices_per_node=1,
    device_flops=1e12,
    h2d_bytes_per_s=1e9,
    nvme_paths=["/mnt/drive"],
    nvme_read_bytes_per_s=1e8,
    nvme_write_bytes_per_s=1e8,
    nvme_endurance_bytes=10**15,
    cpu_update_per_s=1e8,
    device_update_per_s=1e9,
)


def small_job(cluster: ClusterConfig = FAST, **offload: object) -> JobConfig:
    job = JobConfig(model=SMALL, cluster=cluster, zero=ZeroConfig(3), precision=PrecisionConfig("bf16"))
    return replace(
        job,
        train=replace(job.train, seq_len=64, micro_batch=2, device="cuda"),
        offload=OffloadConfig(**{"policy": "zero-infinity", "chunk": 8192, **offload}),  # type: ignore[arg-type]
    )


def planned(job: JobConfig, ranks: int = 1) -> Plan:
    return make_plan(job, ranks, job.cluster, activations=False)


def test_175_billion_parameters_are_planned_as_fuyou_measured_them() -> None:
    whole = ["offload.tile=0", "offload.lookahead=[3,1,1]", "train.micro_batch=8", "cluster.device_bytes=80GB"]
    config = load_job("offload-175b", whole).config
    plan = make_plan(config, 1, config.cluster)
    offload = plan.offload
    assert offload is not None and offload.seconds is not None
    assert offload.seconds["total"] == pytest.approx(163, rel=0.1)
    assert offload.bound in ("file read", "file write")
    params = plan.num_parameters
    assert plan.bytes["nvme"]["param"] == pytest.approx(2 * params, rel=1e-3)
    assert plan.bytes["nvme"]["optimizer"] == pytest.approx(2 * 12 * params, rel=1e-3), "and its shadow"
    assert sum(plan.bytes["host"].values()) < 30e9
    assert offload.moved["file read"] + offload.moved["file write"] == pytest.approx(30 * params, rel=0.02)
    assert offload.wear is not None and offload.wear.bytes_per_step == pytest.approx(14 * params, rel=0.01)
    assert offload.wear.steps == pytest.approx(34_000, rel=0.02), "12 drives of 7 PB"
    assert plan.verdict == FITS


def test_in_tiles_175_billion_parameters_fit_24_gigabytes_for_one_more_fetch_of_each() -> None:
    config = load_job("offload-175b").config
    assert config.cluster.device_bytes == 24 * 10**9
    plan = make_plan(config, 1, config.cluster)
    assert plan.verdict == FITS and plan.offload is not None and plan.offload.seconds is not None
    floor = (3 * 2 + 12 + 14) * plan.num_parameters / config.cluster.nvme_mixed_bytes_per_s
    assert plan.offload.seconds["total"] == pytest.approx(floor, rel=0.1)


def test_the_command_prints_tiers_lanes_seconds_and_wear(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["offload.policy=zero-infinity", "offload.chunk=8192", "zero.stage=3", "train.device=cpu"]
    rates = ["cluster.device_flops=1e11", "cluster.h2d_bytes_per_s=1e9", "cluster.nvme_read_bytes_per_s=1e8"]
    rates += ["cluster.cpu_update_per_s=1e8", "cluster.nvme_endurance_bytes=100TB"]
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", "quickstart", "--world", "1", *overrides, *rates])
    out = capsys.readouterr().out
    assert not left.value.code
    for text in (
        "Offloading: zero-infinity",
        "file read",
        "bounds the step",
        "Predicted step",
        "rated endurance lasts",
    ):
        assert text in out
    assert "records of master weights and moments" in out and "nvme" in out


def test_a_plan_without_rates_says_which_are_missing() -> None:
    plan = planned(small_job(ClusterConfig(nodes=1, devices_per_node=1)))
    assert plan.offload is not None and plan.offload.seconds is None and plan.offload.moved
    note = next(note for note in plan.notes if "seconds of a step" in note)
    assert "cluster.device_flops" in note and "cluster.nvme_read_bytes_per_s" in note and "bench tiers" in note


def test_a_job_that_offloads_nothing_has_no_part_of_it() -> None:
    plan = planned(small_job(policy="none"))
    assert plan.offload is None and plan.offload_of(0) is None and not plan.bytes["nvme"]


def test_state_leaves_the_device_for_the_tiers_of_the_policy() -> None:
    alone = planned(small_job(policy="none")).bytes["device"]
    plan = planned(small_job(policy="zero-offload"))
    states = sum(alone[name] for name in ("master", "exp_avg", "exp_avg_sq"))
    assert plan.bytes["host"]["optimizer"] == pytest.approx(states, rel=0.2), "with padding to pages"
    assert plan.bytes["device"]["param"] == alone["param"]
    assert {"master", "exp_avg"}.isdisjoint(plan.bytes["device"])


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_a_budget_that_is_too_small_is_no_fit(tier: str) -> None:
    plan = planned(small_job(policy="mlp-offload", cache=0, **{f"{tier}_bytes": 100_000}))
    assert plan.verdict == DOES_NOT_FIT
    assert plan.offload is not None and set(plan.offload.over) == {tier}


def test_what_the_host_has_left_keeps_records() -> None:
    plan = planned(small_job(policy="mlp-offload", host_bytes=2_000_000))
    placement = plan.offload_of(0)
    assert placement is not None and plan.offload is not None
    assert placement.cache > 0 and plan.offload.chosen == {"cache": placement.cache}
    assert sum(plan.offload.bytes["host"].values()) <= 2_000_000


def test_the_policy_is_chosen_by_time_among_those_that_fit() -> None:
    roomy = planned(small_job(policy="auto"))
    assert roomy.offload is None, "nothing has to leave"
    tight = planned(small_job(policy="auto", device_bytes=4_000_000))
    assert tight.offload is not None and tight.offload.policy != "none"
    assert any("offload.policy=auto" in note for note in tight.notes)
    assert not any(c.tier == "nvme" for u in tight.placements[0].units for c in u.chunks)  # type: ignore[union-attr]
    with pytest.raises(PlanError, match=r"no policy fits.*device: at least .*The largest unit.*offload.device_bytes"):
        planned(small_job(policy="auto", device_bytes=1000))


def test_nothing_is_put_on_drives_that_are_not_there() -> None:
    crowded = {"policy": "auto", "device_bytes": 3_600_000, "host_bytes": 2_000_000}
    plan = planned(small_job(**crowded))
    assert plan.offload is not None and plan.offload.bytes["nvme"]
    without = replace(FAST, nvme_paths=[])
    with pytest.raises(PlanError, match=r"no policy fits.*cluster\.nvme_paths"):
        planned(small_job(without, **crowded))


def test_every_rank_plans_the_same() -> None:
    job = small_job(policy="auto", device_bytes=4_000_000)
    assert planned(job, 2).digest() == planned(job, 2).digest()
    assert planned(job, 2).digest() != planned(small_job(policy="zero-offload"), 2).digest()


def test_a_table_may_name_units_of_any_pipeline_rank() -> None:
    job = small_job(policy="zero-offload", table=[{"units": "blocks.3", "optimizer": "nvme"}])
    job = replace(job, parallelism=replace(job.parallelism, pp=2), zero=ZeroConfig(1))
    plan = planned(job, 2)
    first, last = plan.placements
    assert first is not None and last is not None
    tiers = {u.name: {c.tier for c in u.chunks} for placement in (first, last) for u in placement.units}
    assert tiers.pop("blocks.3") == {"nvme"} and all(found == {"host"} for found in tiers.values())
    with pytest.raises(PlanError, match=r"no unit is called 'blocks\.9'"):
        planned(replace(job, offload=replace(job.offload, table=[{"units": "blocks.9", "param": "host"}])), 2)


def test_the_plan_is_plain_data_with_records_that_are_alike_in_one_entry() -> None:
    plan = planned(small_job(policy="zero-infinity"))
    plain = json.loads(json.dumps(plan.as_json()))
    assert plain["offload"]["moved"]["file write"] > 0
    block = next(row for row in plain["placements"][0]["units"] if row["name"] == "blocks.0")
    assert block["records"] == [["nvme", "cpu", len(plan.placements[0].unit("blocks.0").chunks)]]  # type: ignore[union-attr]
