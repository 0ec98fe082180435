"""Snapshots on the drive of a node: whole steps, or none."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.checkpoint_doubles import some_state
from tests.persist_doubles import (
    CHUNK,
    JOB,
    Crash,
    failing_at,
    nodes_with,
    parity_header,
)
from windlass.checkpoint.local_level import LocalLevel, list_local_levels, remove_local_level
from windlass.checkpoint.memory.drive import Drive
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.segment import Segment
from windlass.checkpoint.memory.segment import verify as damaged_chunks
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.verbs import Verbs
from windlass.dist.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_drive(monkeypatch):
    """Nothing here depends on drives (test_checkpoint_power_loss.py does)."""
    monkeypatch.setattr("os.fsync", lambda file: None)


# -- the drive of a node ---------------------------------------------------------------------------------------------


def local_step(nodes, step, node="node-0", parity=None):
    persister = nodes.persisters[node]
    temporary = persister.begin("local", step, nodes.generation, nodes.membership)
    data = {m.rank: nodes.slots[m.rank] for m in nodes.membership.by_node[node]}
    rows = persister.prepare("local", step, nodes.generation, temporary, nodes.membership, data, parity or {})
    return persister.commit("local", step, nodes.generation, temporary, {node: rows}, nodes.membership)


@pytest.fixture
def drive(tmp_path):
    nodes = nodes_with(tmp_path, some_state(), "", local_dir=str(tmp_path / "nvme"))
    nodes.hold(6)
    return nodes, LocalLevel(nodes.folders["node-0"], tmp_path / "nvme")


def test_the_local_level_holds_slots_as_they_are_with_what_explains_them(drive, tmp_path):
    nodes, level = drive
    segment = Segment.create(tmp_path / "p.seg", "parity", 0, 1000, 1, CHUNK, 8)
    segment.slots[0].data[:] = np.arange(1000) % 251
    assert segment.slots[0].write(parity_header(JOB, 1, 6, 0, segment.slots[0].data))
    place = local_step(nodes, 6, parity={0: segment.slots[0]})
    assert place == str(tmp_path / "nvme" / JOB / "node-0" / "step-00000006")
    (found,) = level.complete()
    assert (found.step, found.generation) == (6, 1)
    assert found.membership_path.read_text() == nodes.membership.dump()
    assert sorted(found.segments()) == [("data", 0), ("data", 1), ("parity", 0)]
    originals = {("data", 0): nodes.slots[0], ("data", 1): nodes.slots[1], ("parity", 0): segment.slots[0]}
    for key, path in found.segments().items():
        slot, original = Segment.open(path).slots[0], originals[key]
        header = slot.header()
        assert header == original.header() and damaged_chunks(slot, header) == []
        assert np.array_equal(slot.data[: header.num_bytes], original.data[: header.num_bytes])
        if header.layout:
            assert (
                found.layout_path(header.layout).read_bytes()
                == nodes.folders["node-0"].read_layout(header.layout).dump()
            )


@pytest.mark.parametrize("point", ["open", "write", "fsync", "manifest", "rename"])
def test_a_local_step_that_fails_leaves_the_old_one_and_nothing_else(drive, monkeypatch, point):
    nodes, level = drive
    local_step(nodes, 6)
    nodes.hold(7)
    with monkeypatch.context() as patch:
        failing_at(patch, point, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk"))
        with pytest.raises(
            CheckpointError, match=r"step 7 was not saved in .*nvme: No space left on device: /full/disk"
        ):
            local_step(nodes, 7)
    assert os.listdir(level.folder) == ["step-00000006"]
    with monkeypatch.context() as patch:
        failing_at(patch, point, Crash())
        with pytest.raises(Crash):
            local_step(nodes, 7)
    assert [held.step for held in level.complete()] == [6]
    local_step(nodes, 7)
    assert sorted(os.listdir(level.folder)) == ["step-00000006", "step-00000007"]


def test_two_local_steps_are_kept_and_damaged_ones_do_not_count(drive):
    nodes, level = drive
    for step in (6, 7, 8):
        nodes.hold(step)
        local_step(nodes, step)
    assert steps_of(level) == [8, 7]
    (level.folder / "step-00000008" / "data-00001.seg").unlink()
    assert steps_of(level) == [7]
    mark = level.folder / "step-00000007" / "complete.json"
    mark.write_bytes(mark.read_bytes().replace(b'"step": 7', b'"step": 9'))
    assert steps_of(level) == []


def steps_of(level):
    return [held.step for held in level.complete()]


def held_open(place):
    """Return the files below a folder that this process has open or mapped."""
    files = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    maps = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    return [name for name in files + maps if name.startswith(str(place))]


def test_a_step_that_is_removed_gives_its_room_back_whoever_had_read_it(drive, tmp_path):
    nodes, level = drive
    local_step(nodes, 6)
    reader = Drive(nodes.folders["node-0"], str(tmp_path / "nvme"))
    assert len(reader.inventory()) == 2 and held_open(level.folder) == []
    slot, header = reader.find("data", 0, 6, 1)
    assert damaged_chunks(slot, header) == [] and held_open(level.folder) != []  # as long as its bytes are sent
    del slot
    assert held_open(level.folder) == []
    nodes.hold(6)
    local_step(nodes, 6)  # anew, under the same name
    found = reader.find("data", 0, 6, 1)
    assert found is not None
    del found
    assert held_open(level.folder) == []


# -- whose it is -----------------------------------------------------------------------------------------------------


def inventory(folder, local_dir):
    return [header.step for header in Drive(folder, str(local_dir)).inventory()]


def test_steps_of_a_run_that_was_deleted_and_begun_anew_do_not_count_and_are_removed(drive, tmp_path):
    nodes, level = drive
    for step in (7, 9):
        nodes.hold(step)
        local_step(nodes, step)
    folder = nodes.folders["node-0"]
    assert inventory(folder, tmp_path / "nvme") == [9, 9, 7, 7]
    token = folder.read_token()
    folder.create("the token of another run in the same place")
    assert level.complete() == []
    assert inventory(folder, tmp_path / "nvme") == []
    nodes.hold(1)
    local_step(nodes, 1)
    assert os.listdir(level.folder) == ["step-00000001"] and steps_of(level) == [1]
    folder.create(token)
    nodes.leader.sweep(1)
    assert os.listdir(level.folder) == []


def test_steps_outlive_the_memory_of_their_node(drive):
    nodes, level = drive
    local_step(nodes, 6)
    folder, token = nodes.folders["node-0"], nodes.folders["node-0"].read_token()
    folder.remove()
    folder.create(token)
    assert [held.step for held in level.complete()] == [6]


def test_the_drive_of_a_run_that_is_over_is_cleared(drive, tmp_path):
    nodes, level = drive
    local_step(nodes, 6)
    folder = nodes.folders["node-0"]
    assert remove_local_level(folder) is None and level.folder.exists()  # nobody has told where it is
    Settings(local_dir=str(tmp_path / "nvme")).keep_in(folder)
    assert remove_local_level(folder) == level.folder
    assert os.listdir(tmp_path / "nvme") == [] and remove_local_level(folder) is None


def test_steps_are_found_without_the_memory_of_their_nodes(drive, tmp_path):
    nodes, level = drive
    local_step(nodes, 6)
    nodes.folders["node-0"].remove()
    found = list_local_levels(tmp_path / "shm", JOB, tmp_path / "nvme")
    assert [held.folder for held in found] == [level.folder]
    for held in found:
        held.remove()
    assert os.listdir(tmp_path / "nvme") == []
    assert list_local_levels(tmp_path / "shm", JOB, tmp_path / "nvme") == []


@pytest.mark.parametrize("depth", [1, 2])
def test_a_link_on_the_drive_is_not_followed_to_what_is_not_ours(drive, tmp_path, depth):
    nodes, _ = drive
    folder, home = nodes.folders["node-0"], tmp_path / "home"
    Settings(local_dir=str(tmp_path / "nvme")).keep_in(folder)
    link = tmp_path / "nvme" / JOB / "node-0" if depth == 2 else tmp_path / "nvme" / JOB
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(home)
    thesis = home / "thesis" if depth == 2 else home / "node-0" / "thesis"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    assert remove_local_level(folder) is None and list_local_levels(folder.base, JOB, tmp_path / "nvme") == []
    assert thesis.exists()


def another_job(tmp_path, job="fedcba9876543210"):
    """Return what a job that has not begun yet will have on the drive."""
    return LocalLevel(NodeFolder(tmp_path / "shm", job, "node-0").create(), tmp_path / "nvme")


@pytest.mark.parametrize("depth", [1, 2])
def test_a_link_to_another_run_on_the_drive_is_neither_followed_nor_swept(drive, tmp_path, depth):
    nodes, level = drive
    local_step(nodes, 6)
    other = another_job(tmp_path)
    link, target = (other.folder, level.folder) if depth == 2 else (other.folder.parent, level.folder.parent)
    link.parent.mkdir(mode=0o700, exist_ok=True)
    link.symlink_to(target)
    other.sweep(9)
    with pytest.raises(CheckpointError, match=f"{link} must be a folder of user .* no link"):
        other.begin(1, 9, 0)
    other.remove()
    assert other.complete() == [] and [held.step for held in level.complete()] == [6]


@pytest.mark.parametrize("which", ["job", "node"])
def test_a_folder_on_the_drive_that_others_can_write_to_is_not_used(drive, tmp_path, which):
    nodes, level = drive
    local_step(nodes, 6)
    (level.folder if which == "node" else level.folder.parent).chmod(0o777)
    assert level.complete() == []
    with pytest.raises(CheckpointError, match=r"nobody else can write to \(mode 0700\)"):
        level.begin(7, 1, 0)


def test_the_folders_of_a_job_on_a_drive_of_all_users_are_its_own(tmp_path):
    (tmp_path / "shm").mkdir()
    (tmp_path / "nvme").mkdir()
    (tmp_path / "nvme").chmod(0o1777)
    level = another_job(tmp_path)
    level.begin(1, 1, 0)
    assert [folder.stat().st_mode & 0o777 for folder in (level.folder.parent, level.folder)] == [0o700, 0o700]


def flip(path):
    """Spoil a file without changing its size."""
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def test_what_explains_a_step_is_taken_from_an_older_one_where_it_is_damaged(drive, tmp_path):
    nodes, level = drive
    for step in (6, 7):
        nodes.hold(step)
        local_step(nodes, step)
    newest, folder, digest = level.complete()[0], nodes.folders["node-0"], nodes.membership.members[0].layout
    layout = folder.read_layout(digest)
    flip(newest.membership_path)
    flip(newest.layout_path(digest))
    reader = Drive(folder, str(tmp_path / "nvme"))
    assert reader.read_membership(1) == nodes.membership.dump().encode() and reader.read_membership(2) is None
    assert reader.read_layout(digest) == layout
    verbs = Verbs(SimpleNamespace(folder=folder, slots=None, drive=reader))
    flip(folder.layout_path(digest))
    assert verbs.do_layout({"digest": digest}, memoryview(b"")) == ({}, layout.dump())
    flip(level.complete()[1].layout_path(digest))
    with pytest.raises(CheckpointError, match=f"has the layout {digest} only damaged"):
        verbs.do_layout({"digest": digest}, memoryview(b""))
