"""`windlass snapshot ls | verify | show | gc` as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.snapshot_nodes import fleet_of
from tests.waiting import until
from windlass.checkpoint.memory.folder import NodeFolder, SnapshotProcess
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.heartbeat import Heartbeat, Phase, process_started
from windlass.checkpoint.memory.layout import Fragment, Layout
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.segment import Segment, hash_chunks
from windlass.checkpoint.memory.settings import Settings
from windlass.dist.box import Box
from windlass.dist.errors import CheckpointError, ConfigError
from windlass.launch.cli.snapshot import app
from windlass.launch.control_log import job_of
from windlass.launch.run_folder import RunFolder, RunLock
from windlass.launch.snapshot_view import ask_others

CHUNK = 128
SIZE = 1000


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run with two ranks on two nodes, each with steps 4 (committed) and 5 (filled)."""
    run = tmp_path / "run"
    layout = Layout((Fragment("model.w", "uint8", (SIZE,), Box((0,), (SIZE,)), 0, SIZE),), SIZE)
    members = tuple(Member(r, f"node-{r}", f"node-{r}", "127.0.0.1", 1, layout.digest, SIZE) for r in range(2))
    world = Membership(job_of(run), 2, 2, "xor", 1, ((0, 1),), members, False, CHUNK)
    for rank in range(2):
        folder = NodeFolder(tmp_path, job_of(run), f"node-{rank}").create("secret")
        folder.raise_generation(2)
        folder.put_layout(layout)
        folder.replace(folder.membership_path(2), world.dump().encode())
        table = -(-SIZE // CHUNK)
        path = folder.segment_path("data", rank, SIZE, 3, table)
        segment = Segment.create(path, "data", rank, SIZE, 3, CHUNK, table)
        for slot, (step, state) in enumerate(((4, State.COMMITTED), (5, State.FILLED), (6, State.FILLING))):
            segment.slots[slot].data[:SIZE] = np.arange(SIZE) % 251 + step
            hashes = {rank: hash_chunks(segment.slots[slot].data, SIZE, CHUNK)} if state > State.FILLING else {}
            facts = {"extra": {"step": step}}
            segment.slots[slot].write(
                SlotHeader(job_of(run), 2, step, rank, 2, "data", layout.digest, SIZE, CHUNK, state, facts, hashes)
            )
        segment.close()
    return run


def windlass(run: Path, command: str, *arguments: object) -> Result:
    result = CliRunner().invoke(app, [command, *map(str, arguments), "--folder", str(run.parent)])
    if isinstance(result.exception, CheckpointError):
        raise result.exception
    return result


def folders(run: Path) -> list[NodeFolder]:
    return [NodeFolder(run.parent, job_of(run), f"node-{rank}") for rank in range(2)]


def flip(run: Path, rank: int, slot: int) -> None:
    segment = Segment.open(folders(run)[rank].segments()[0].path, writable=True)
    segment.slots[slot].data[200] ^= 1
    segment.close()


def test_ls_shows_every_slot_newest_first_and_who_serves_the_node(run: Path) -> None:
    beat = Heartbeat(folders(run)[0].beat_path(0), 2)
    beat.beat(Phase.STEP, 6)
    lines = windlass(run, "ls", run).output.splitlines()
    assert lines[0].startswith("node-0: generation 2, no snapshot process")
    assert lines[1].startswith("  rank 0: STEP 6,")
    rows = [line.split() for line in lines[4:]]
    assert [(row[0], row[2], row[4]) for row in rows] == [
        (step, rank, state)
        for step, state in (("6", "FILLING"), ("5", "FILLED"), ("4", "COMMITTED"))
        for rank in ("0", "1")
    ]


def test_ls_as_json(run: Path) -> None:
    found: list[dict[str, Any]] = json.loads(windlass(run, "ls", run, "--json").output)
    assert len(found) == 6 and {row["state"] for row in found} == {"COMMITTED", "FILLED", "FILLING"}
    assert found[0]["num_bytes"] == SIZE and found[0]["node"] == "node-0"


def test_nodes_of_other_hosts_are_asked_and_named_where_they_do_not_answer(tmp_path: Path) -> None:
    with fleet_of(tmp_path, 2) as fleet:
        fleet.begin()
        fleet.commit(1)
        until(lambda: set(fleet.nodes[1].states("parity").values()) == {"COMMITTED"})  # after the data
        here = [fleet.nodes[0].folder]
        [(line, rows)] = ask_others(here)
        assert line.startswith("node-1: generation 1, snapshot process") and line.endswith("on another host")
        assert {(row.role, row.step, row.state) for row in rows} == {(r, 1, "COMMITTED") for r in ("data", "parity")}
        assert ask_others([node.folder for node in fleet.nodes]) == []
        fleet.nodes[1].kill()
        [(line, rows)] = ask_others(here)
        assert line.startswith("node-1: does not answer: ") and rows == []


def test_verify_reads_every_byte_and_passes_over_what_is_being_filled(run: Path) -> None:
    result = windlass(run, "verify", run)
    assert result.exit_code == 0
    assert result.output.count("valid") == 4 and result.output.count("filling") == 2


def test_verify_names_damage_and_exits_with_8(run: Path) -> None:
    flip(run, 1, 0)
    result = windlass(run, "verify", run)
    assert result.exit_code == 8
    assert "node-1, data of rank 1, step 4: DAMAGED: chunks 1" in result.output


def test_verify_reports_a_segment_that_is_none(run: Path) -> None:
    path = folders(run)[0].segments()[0].path
    path.write_bytes(b"x" * 8192)
    result = windlass(run, "verify", run)
    assert result.exit_code == 8 and "node-0, data of rank 0: DAMAGED" in result.output


def test_show_has_the_facts_tensors_and_groups_of_the_newest_step(run: Path) -> None:
    shown = json.loads(windlass(run, "show", run).output)
    assert [(part["rank"], part["step"]) for part in shown] == [(0, 5), (1, 5)]
    assert shown[0]["facts"] == {"extra": {"step": 5}}
    assert shown[0]["tensors"][0]["key"] == "model.w" and shown[0]["redundancy"]["groups"] == [[0, 1]]
    assert json.loads(windlass(run, "show", run, "--step", 4).output)[0]["state"] == "COMMITTED"
    with pytest.raises(CheckpointError, match="no snapshot of step 77"):
        windlass(run, "show", run, "--step", 77)


def test_a_run_without_snapshots_here_is_an_error_that_names_the_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this host holds no snapshots of it"):
        windlass(run, "ls", tmp_path / "other")


@pytest.mark.parametrize("command", [["ls", "RUN"], ["verify", "RUN"], ["show", "RUN"], ["gc", "RUN"], ["gc"]])
def test_a_folder_that_is_none_is_refused(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "nosuch"):
        result = CliRunner().invoke(app, [*command, "--folder", str(place)])
        assert isinstance(result.exception, ConfigError), result.output
        assert f"--folder {place}" in str(result.exception) and "/dev/shm" in str(result.exception)


def test_gc_never_removes_what_a_worker_trains_with(run: Path) -> None:
    beat = Heartbeat(folders(run)[1].beat_path(1), 2)
    beat.beat(Phase.STEP, 6)
    with pytest.raises(CheckpointError, match=rf"in use by rank 1 \(process {os.getpid()}\)"):
        windlass(run, "gc", run, "--stop")
    assert all(folder.path.exists() for folder in folders(run))


def test_gc_ends_a_snapshot_process_only_where_that_is_wanted(run: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait(600)"])
    started = process_started(process.pid) or 0
    folders(run)[1].write_smp(SnapshotProcess(process.pid, started, "127.0.0.1", 1))
    with pytest.raises(CheckpointError, match=f"served by snapshot process {process.pid}.*--stop"):
        windlass(run, "gc", run)
    assert windlass(run, "gc", run, "--stop").output.count("removed") == 2
    assert process.wait(60) < 0 and not any(folder.path.exists() for folder in folders(run))


def test_gc_without_a_run_removes_those_whose_own_lease_is_over(run: Path) -> None:
    old = time.time() - 4000
    for folder, lease_s in zip(folders(run), (3000.0, 5000.0), strict=True):
        folder.touch_lease()
        os.utime(folder.lease_path, (old, old))
        Settings(lease_s=lease_s).keep_in(folder)
    assert windlass(run, "gc").output.splitlines() == [f"removed {folders(run)[0].path}"]
    assert folders(run)[1].path.exists()
    assert windlass(run, "gc", "--lease-s", 3500).output.splitlines() == [f"removed {folders(run)[1].path}"]


def test_gc_of_a_run_clears_its_drives_too(run: Path, tmp_path: Path) -> None:
    drive, node = tmp_path / "nvme", folders(run)[1]
    Settings(local_dir=str(drive)).keep_in(node)
    (drive / node.job / node.node / "step-00000004").mkdir(parents=True)
    (drive / "of somebody else").mkdir()
    assert f"removed {drive / node.job / node.node}" in windlass(run, "gc", run).output.splitlines()
    assert os.listdir(drive) == ["of somebody else"]


def left_on_drive(run: Path, drive: Path) -> list[Path]:
    """Return what the nodes of a run have on a drive that only the run's configuration tells of."""
    run.mkdir()
    (run / "config.yaml").write_text(f"checkpoint:\n  local_dir: {drive}\n")
    places = [drive / folder.job / folder.node for folder in folders(run)]
    for place in places:
        (place / "step-00000004").mkdir(parents=True)
    return places


def test_gc_of_a_run_clears_its_drives_when_the_lease_of_its_memory_is_over(run: Path, tmp_path: Path) -> None:
    drive = tmp_path / "nvme"
    places = left_on_drive(run, drive)
    (run / "config.yaml").rename(run / "config-1.yaml")  # of an earlier start
    (run / "config.yaml").write_text("checkpoint:\n  local_dir: ''\n")
    (run / "config-2.yaml").write_text("not a configuration")
    (drive / "of somebody else").mkdir()
    for folder in folders(run):
        folder.remove()
    result = windlass(run, "gc", run, "--stop")
    assert result.stdout.splitlines() == [f"removed {place}" for place in places]
    assert "config-2.yaml does not tell checkpoint.local_dir" in result.stderr
    assert os.listdir(drive) == ["of somebody else"]
    with pytest.raises(CheckpointError, match="this host holds no snapshots of it"):
        windlass(run, "gc", run, "--stop")


def test_gc_leaves_the_drives_of_a_run_that_trains_elsewhere(run: Path, tmp_path: Path) -> None:
    places = left_on_drive(run, tmp_path / "nvme")
    for folder in folders(run):
        folder.remove()
    with RunLock(RunFolder(run)):
        result = windlass(run, "gc", run, "--stop")
    assert isinstance(result.exception, ConfigError) and "in use by another run" in str(result.exception)
    assert all(place.exists() for place in places)


@pytest.mark.parametrize("of_run", [True, False])
def test_gc_says_what_it_passes_over_because_others_may_have_made_it(run: Path, tmp_path: Path, of_run: bool) -> None:
    job, home = folders(run)[0].path.parent, tmp_path / "home"
    job.rename(home)
    job.symlink_to(home)
    for node in home.iterdir():
        os.utime(node, (1, 1))
    if of_run:
        with pytest.raises(CheckpointError, match="this host holds no snapshots of it"):
            windlass(run, "gc", run, "--stop")
    else:
        result = windlass(run, "gc", "--lease-s", 0)
        assert result.stdout == "" and f"passed over: {job} must be a folder of user" in result.stderr
    assert len(list(home.iterdir())) == 2
