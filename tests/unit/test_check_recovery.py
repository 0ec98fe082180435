"""Snapshots, background checkpoints and recovery: what cannot work is refused before any process starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.dist.cluster import ClusterConfig
from windlass.dist.errors import ConfigError, WindlassError
from windlass.launch.check import check_job
from windlass.launch.config import load_job
from windlass.launch.plan import make_plan
from windlass.launch.plan_snapshots import PROCESS_BYTES, plan_snapshots

SNAPSHOTS = ["snapshot.every=1"]
LAZY = ["checkpoint.mode=lazy"]


def told(tmp_path: Path, *overrides: str, world: int = 4) -> str:
    path = tmp_path / "job.yaml"
    path.write_text("train: {steps: 100}\n")
    with pytest.raises(WindlassError) as caught:
        check_job(load_job(path, overrides), world, to_run=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["snapshot.slots=3"], ["snapshot.slots = 3", "without snapshots"]),
        (["snapshot.redundancy=xor"], ["snapshot.redundancy = 'xor'", "without snapshots"]),
        ([*SNAPSHOTS, "snapshot.group=2"], ["snapshot.group = 2", "snapshot.redundancy = 'none'"]),
        ([*SNAPSHOTS, "snapshot.redundancy=xor", "snapshot.parity=2"], ["snapshot.parity = 2", "one parity block"]),
        (["snapshot.every=200"], ["snapshot.every = 200", "train.steps = 100"]),
        (
            [*SNAPSHOTS, "snapshot.redundancy=reed_solomon", "snapshot.parity=2", "snapshot.group=3"],
            ["snapshot.group = 3", "groups of 4"],
        ),
        (
            [*SNAPSHOTS, "snapshot.redundancy=replica", "snapshot.parity=2", "snapshot.group=4"],
            ["snapshot.group = 4", "Use snapshot.group=0"],
        ),
        ([*SNAPSHOTS, "snapshot.redundancy=replica", "snapshot.parity=4"], ["at least 5 workers", "there are 4"]),
        ([*SNAPSHOTS, "snapshot.chunk_bytes=100000"], ["snapshot.chunk_bytes = 100000", "Use 1048576"]),
        (["checkpoint.url=s3://bucket/run"], ["checkpoint.url", "checkpoint.mode = 'sync'", "Use lazy"]),
        ([*LAZY, "checkpoint.url=bucket/run"], ["checkpoint.url = 'bucket/run'", "file:///"]),
        ([*LAZY, "checkpoint.local_every=5"], ["checkpoint.local_dir", "give both"]),
        ([*LAZY, "snapshot.every=3", "checkpoint.every=10"], ["checkpoint.every = 10", "snapshot.every = 3", "Use 9"]),
        (
            [*LAZY, "checkpoint.local_every=4", "checkpoint.local_dir=/x", "checkpoint.every=10"],
            ["checkpoint.every = 10", "checkpoint.local_every = 4", "Use 8"],
        ),
        (["recovery.min_workers=2"], ["recovery.min_workers = 2", "recovery.max_restarts = 0"]),
        (["recovery.max_restarts=3", "recovery.min_workers=8"], ["recovery.min_workers = 8", "only 4 workers"]),
        (["recovery.max_restarts=3", "recovery.grow_s=5"], ["recovery.grow_s", "recovery.min_workers = 0"]),
        (["recovery.spike_window=9"], ["recovery.spike_window = 9", "recovery.spike_factor = 0"]),
        (["recovery.spike_factor=0.5", "checkpoint.every=10"], ["recovery.spike_factor = 0.5", "greater than 1"]),
        (["recovery.spike_factor=3"], ["recovery.spike_factor = 3", "nothing to go back to", "checkpoint.every=50"]),
    ],
)
def test_what_cannot_work_names_the_key_and_a_value_that_does(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    message = told(tmp_path, *overrides)
    assert [part for part in parts if part not in message] == [], message


def test_a_folder_that_is_missing_or_closed_is_refused(tmp_path: Path) -> None:
    from windlass.dist.mesh import plan_mesh
    from windlass.launch.check_recovery import check_recovery

    path = tmp_path / "job.yaml"
    path.write_text("train: {steps: 100}\n")
    loaded = load_job(path, [*SNAPSHOTS, f"snapshot.folder={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match=r"snapshot\.folder = .*none'.*is no folder\. Use /dev/shm"):
        check_recovery(loaded, plan_mesh(loaded.config.parallelism, 1), to_run=True)


def test_the_plan_says_what_snapshots_take_and_survive(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: {preset: nano}\nzero: {stage: 2}\nlaunch: {workers: 4, nodes: 4}\n")

    def summary(*overrides: str) -> object:
        config = load_job(path, list(overrides)).config
        plan = make_plan(config, 4, config.cluster, "cpu", activations=False)
        return plan, plan_snapshots(config, plan, ClusterConfig(host_bytes=1 << 30))

    assert summary()[1] is None  # type: ignore[index]
    plan, plain = summary("snapshot.every=1")  # type: ignore[misc]
    state = sum(u.shard_numel for u in plan.units) * 4 * 3
    assert (plain.rank_bytes, plain.survives, plain.exchanged) == (state, 0, 0)
    assert plain.node_bytes == 2 * state + PROCESS_BYTES
    _, parity = summary("snapshot.every=1", "snapshot.redundancy=xor", "snapshot.slots=3")  # type: ignore[misc]
    assert (parity.group, parity.survives) == (4, 1)
    assert parity.node_bytes == pytest.approx(3 * state * 4 / 3 + PROCESS_BYTES, abs=4)
    assert parity.exchanged == pytest.approx(state, abs=4)
    _, local = summary("snapshot.every=1", "snapshot.redundancy=xor", "zero.stage=0")  # type: ignore[misc]
    assert local.exchanged == 0
    assert local.copied == pytest.approx(local.rank_bytes * 4 / 3, abs=4)
