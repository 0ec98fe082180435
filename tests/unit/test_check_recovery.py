"""Snapshots, background checkpoints and recovery: what cannot work is refused before any process starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.checkpoint.memory.folder import SPARE_BYTES, NodeFolder
from windlass.checkpoint.memory.groups import cross_units, memory_factor, num_parity, plan_groups
from windlass.checkpoint.policy import SnapshotConfig
from windlass.dist.cluster import ClusterConfig
from windlass.dist.errors import ConfigError, PlanError, WindlassError
from windlass.dist.mesh import ParallelismConfig, plan_mesh
from windlass.launch.check import check_job
from windlass.launch.check_recovery import (
    check_controlled,
    check_emulated,
    check_shared_devices,
    check_without_controller,
)
from windlass.launch.config import load_job
from windlass.launch.job import JobConfig
from windlass.launch.local import LaunchConfig
from windlass.launch.plan import make_plan
from windlass.launch.plan_snapshots import PROCESS_BYTES, plan_snapshots
from windlass.parallel.zero import ZeroConfig

SNAPSHOTS = ["snapshot.every=1"]
LAZY = ["checkpoint.mode=lazy"]
SPIKES = ["recovery.spike_factor=3"]
LOCAL = ["checkpoint.local_dir=/x"]


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
        (["recovery.hang_s=9"], ["recovery.hang_s = 9", "without a snapshot process"]),
        (["recovery.max_restarts=3", "recovery.start_s=9"], ["recovery.start_s = 9", "without a snapshot process"]),
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
        (
            [*SPIKES, "checkpoint.every=1", "checkpoint.keep=3", "recovery.spike_back=4"],
            ["checkpoint.keep = 3", "goes back 2 steps", "Use checkpoint.keep=5, or recovery.spike_back=2"],
        ),
        ([*SPIKES, "checkpoint.every=50", "checkpoint.keep=1"], ["checkpoint.keep = 1", "Use checkpoint.keep=2."]),
        (
            [*SPIKES, *LAZY, "checkpoint.every=10", "checkpoint.keep=1", "recovery.spike_back=11"],
            ["checkpoint.keep = 1", "goes back 10 steps", "Use checkpoint.keep=3"],
        ),
        (
            [*SPIKES, *LAZY, *LOCAL, "snapshot.every=2", "checkpoint.local_every=2", "recovery.spike_back=3"],
            ["checkpoint.local_every = 2", "Use checkpoint.local_every=4"],
        ),
    ],
)
def test_what_cannot_work_names_the_key_and_a_value_that_does(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    message = told(tmp_path, *overrides)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "overrides",
    [
        ["checkpoint.every=1", "checkpoint.keep=5"],
        ["checkpoint.every=1", "checkpoint.keep=0"],
        ["checkpoint.every=2", "checkpoint.keep=3"],
        [*LAZY, "checkpoint.every=4", "checkpoint.keep=1"],  # two stay whatever it says
        [*LAZY, *LOCAL, "checkpoint.local_every=4"],
    ],
)
def test_what_keeps_a_checkpoint_to_go_back_to_is_accepted(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train: {steps: 100}\n")
    check_job(load_job(path, [*SPIKES, "recovery.spike_back=4", *overrides]), 4, to_run=False)


def test_a_folder_that_is_missing_or_closed_is_refused(tmp_path: Path) -> None:
    from windlass.launch.check_recovery import check_recovery

    path = tmp_path / "job.yaml"
    path.write_text("train: {steps: 100}\n")
    loaded = load_job(path, [*SNAPSHOTS, f"snapshot.folder={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match=r"snapshot\.folder = .*none'.*is no folder\. Use /dev/shm"):
        check_recovery(loaded, plan_mesh(loaded.config.parallelism, 1), to_run=True)


def test_what_the_snapshot_process_looks_for_may_be_set_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train: {steps: 100}\n")
    for runs in (SNAPSHOTS, LAZY):
        check_job(load_job(path, [*runs, "recovery.hang_s=9", "recovery.start_s=9"]), 4, to_run=False)


def test_emulated_nodes_have_equally_many_workers(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train: {steps: 100}\n")
    for nodes in (0, 1, 2, 3, 6):
        check_emulated(load_job(path, ["launch.workers=6", f"launch.nodes={nodes}"]))
    with pytest.raises(
        ConfigError, match=r"launch\.nodes = 4: launch\.workers = 6 .* 4 nodes\. Use one of 1, 2, 3, 6;"
    ):
        check_emulated(load_job(path, ["launch.workers=6", "launch.nodes=4"]))


def test_nodes_that_nobody_emulates_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train: {steps: 100}\n")
    check_without_controller(load_job(path, ["launch.nodes=1"]), ray=False)
    check_without_controller(load_job(path, ["launch.nodes=2"]), ray=True)
    with pytest.raises(ConfigError, match=r"launch\.nodes = 2: has no effect without a controller .*one node then"):
        check_without_controller(load_job(path, ["launch.nodes=2"]), ray=False)
    for ray in (False, True):
        with pytest.raises(ConfigError, match=r"launch\.spares = 1: has no effect without a controller"):
            check_without_controller(load_job(path, ["launch.spares=1"]), ray=ray)


def test_what_is_missing_is_said_with_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = NodeFolder(tmp_path, "0123456789abcdef", "node-0")
    monkeypatch.setattr(NodeFolder, "room", lambda self: SPARE_BYTES + (100 << 20))
    assert folder.shortage(100 << 20, "3 snapshots", 3) == ""
    problem = folder.shortage(300 << 20, "3 snapshots of ranks 0-1", 3)
    assert "3 snapshots of ranks 0-1 need 300.0 MiB, 100.0 MiB can be had" in problem
    assert "Give it 200.0 MiB more" in problem and "snapshot.slots=2" in problem
    assert "snapshot.slots" not in folder.shortage(300 << 20, "2 snapshots", 2), "fewer do not work"


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


@settings(max_examples=200, deadline=None)
@given(
    nodes=st.integers(1, 16),
    per_node=st.integers(1, 2),
    pp=st.sampled_from([1, 2, 4]),
    replicate=st.sampled_from([1, 2, 4]),
    stage=st.integers(0, 3),
    scheme=st.sampled_from(["none", "replica", "xor", "reed_solomon"]),
    group=st.integers(0, 8),
    parity=st.integers(1, 2),
)
def test_the_plan_has_the_groups_that_the_run_will_have(
    nodes: int, per_node: int, pp: int, replicate: int, stage: int, scheme: str, group: int, parity: int
) -> None:
    world = nodes * per_node
    if world % (pp * replicate):
        return
    config = JobConfig(
        launch=LaunchConfig(workers=world, nodes=nodes),
        parallelism=ParallelismConfig(pp=pp, dp_replicate=replicate),
        snapshot=SnapshotConfig(every=1, redundancy=scheme, group=group, parity=parity),
        zero=ZeroConfig(stage=stage),
    )
    mesh = plan_mesh(config.parallelism, world)
    # As `Snapshots.protect` has it: where the ranks are, and the replicas that each engine names.
    where = [f"host-{rank // per_node}" for rank in range(world)]
    axes = ("dp_replicate", "dp_shard") if stage == 0 else ("dp_replicate",)
    sets = sorted({mesh.ranks_along(axes, rank) for rank in range(world)})
    local = scheme == "xor" and cross_units(sets, where, {})
    plan = SimpleNamespace(
        mesh=mesh.sizes,
        world_size=world,
        ranks=range(pp),
        units=[SimpleNamespace(pipeline_rank=0, shard_numel=1200, trainable=True)],
    )
    try:
        groups = plan_groups(where, {}, scheme, group, parity, within=sets if local else None)
    except PlanError as error:
        with pytest.raises(PlanError) as refused:
            plan_snapshots(config, plan, ClusterConfig())  # type: ignore[arg-type]
        assert str(refused.value) == str(error)
        return
    summary = plan_snapshots(config, plan, ClusterConfig())  # type: ignore[arg-type]
    assert summary is not None
    sizes = [len(group) for group in groups]
    assert (summary.group, summary.survives) == (min(sizes), num_parity(scheme, parity, min(sizes)))
    state = summary.rank_bytes * summary.slots * per_node
    factor = max(memory_factor(scheme, parity, size) for size in sizes)
    assert summary.node_bytes - PROCESS_BYTES == pytest.approx(state * factor, abs=1)
    assert summary.exchanged == (0 if local else summary.rank_bytes * max(num_parity(scheme, parity, n) for n in sizes))


@pytest.mark.parametrize(
    ("overrides", "group", "factor", "exchanged"),
    [
        (["launch.nodes=8", "parallelism.dp_replicate=4", "zero.stage=2"], 4, 4 / 3, 0),
        (["launch.nodes=10", "zero.stage=2"], 5, 5 / 4, 1),
        (["launch.nodes=4", "parallelism.pp=2", "zero.stage=0"], 2, 2, 0),
    ],
)
def test_groups_are_balanced_and_never_cross_replicas(
    overrides: list[str], group: int, factor: float, exchanged: int, tmp_path: Path
) -> None:
    nodes = int(overrides[0].partition("=")[2])
    parity = ["snapshot.redundancy=xor", f"launch.workers={nodes}"]
    path = tmp_path / "job.yaml"
    path.write_text("model: {preset: nano, num_layers: 4}\n")
    config = load_job(path, [*SNAPSHOTS, *parity, *overrides]).config
    plan = make_plan(config, nodes, config.cluster, "cpu", activations=False)
    summary = plan_snapshots(config, plan, ClusterConfig())
    assert summary is not None and (summary.group, summary.survives) == (group, 1)
    assert summary.node_bytes - PROCESS_BYTES == pytest.approx(2 * summary.rank_bytes * factor, abs=2)
    assert summary.exchanged == exchanged * summary.rank_bytes


def test_a_group_that_the_nodes_cannot_form_is_refused_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("launch: {workers: 8, nodes: 4}\nsnapshot: {every: 1, redundancy: xor, group: 8}\n")
    loaded = load_job(path, [])
    for check in (check_emulated, lambda loaded: check_controlled(loaded, 4, emulated=False)):
        with pytest.raises(PlanError, match=r"groups of 8 failure domains, but there are 4\. Use snapshot\.group = 4"):
            check(loaded)
    check_controlled(loaded, 8, emulated=False)
    check_controlled(loaded, 0, emulated=False)


def test_emulated_nodes_do_not_share_the_gpus_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.launch.check_recovery.num_accelerators", lambda: 4)
    path = tmp_path / "job.yaml"
    path.write_text("launch: {workers: 4, nodes: 4}\n")
    for device in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=rf"train\.device = '{device}': 4 emulated nodes .*Use train\.device=cpu"):
            check_emulated(load_job(path, [f"train.device={device}"]))
    check_emulated(load_job(path, ["train.device=cpu"]))
    check_emulated(load_job(path, ["launch.nodes=1"]))
    check_emulated(load_job("resilient", []))
    with pytest.raises(ConfigError, match="2 emulated nodes"):
        check_shared_devices(load_job(path, []), 2)
    check_controlled(load_job(path, []), 2, emulated=False)
    monkeypatch.setattr("windlass.launch.check_recovery.num_accelerators", lambda: 0)
    check_emulated(load_job(path, []))


def test_what_nobody_waits_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("launch: {workers: 4, nodes: 4}\nrecovery: {max_restarts: 3, min_workers: 2}\n")
    for key, value in (("recovery.replace_s", 60), ("recovery.grow_s", 5), ("launch.grace_s", 1)):
        with pytest.raises(ConfigError, match=f"{key} = {value}.* has no effect"):
            check_emulated(load_job(path, [f"{key}={value}"]))
    check_controlled(load_job(path, ["recovery.replace_s=60", "recovery.grow_s=5"]), 4, emulated=True)
    check_emulated(load_job(path, ["recovery.replace_s=0"]))
    path.write_text("{}")
    check_without_controller(load_job(path, ["launch.grace_s=1"]), ray=True)
    with pytest.raises(ConfigError, match=r"recovery\.grace_s = 9.0: has no effect without a controller"):
        check_without_controller(load_job(path, ["recovery.grace_s=9"]), ray=False)


def test_a_job_for_emulated_nodes_works_with_and_without_ray() -> None:
    loaded = load_job("resilient", [])
    check_emulated(loaded)
    check_controlled(loaded, loaded.config.launch.nodes, emulated=True)
