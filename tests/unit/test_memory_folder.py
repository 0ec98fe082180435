"""The folder of a job on a node: private, replaced as a whole, bounded by what memory there is, collected when left."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from windlass.checkpoint.memory import folder as module
from windlass.checkpoint.memory.folder import NodeFolder, SnapshotProcess, list_jobs
from windlass.checkpoint.memory.garbage import collect_garbage
from windlass.checkpoint.memory.heartbeat import Heartbeat, process_started
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.segment import Segment
from windlass.dist.errors import CheckpointError

JOB = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path) -> NodeFolder:
    return NodeFolder(tmp_path, JOB, "node-0").create("secret")


def dead_process() -> tuple[int, int]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_started(child.pid)
    assert started is not None
    child.communicate(b"\n")
    return child.pid, started


def test_nobody_else_can_read_anything_in_it(folder):
    folder.touch_lease()
    folder.raise_generation(1)
    folder.write_smp(SnapshotProcess(1, 2, "127.0.0.1", 3))
    folder.put_layout(Layout((), 0))
    Heartbeat(folder.beat_path(0), 1)
    Segment.create(folder.segment_path("data", 0, 64, 2, 1), "data", 0, 64, 2, 64, 1).close()
    found = list(folder.path.rglob("*"))
    assert {"token", "lease", "generation", "smp.json", "00000"} <= {p.name for p in found}
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [*found, folder.path, *folder.path.parents[:2]]}
    assert all(mode & 0o077 == 0 for mode in modes.values()), modes


def test_the_token_is_given_or_made_once(tmp_path, folder):
    assert folder.read_token() == "secret"
    assert folder.create().read_token() == "secret" and folder.create("new").read_token() == "new"
    other = NodeFolder(tmp_path, JOB, "node-1")
    with pytest.raises(CheckpointError, match="token is missing"):
        other.read_token()
    made = other.create().read_token()
    assert len(made) == 64 and made != NodeFolder(tmp_path, JOB, "node-2").create().read_token()


def test_a_folder_is_found_by_its_path(folder):
    assert NodeFolder.at(folder.path) == folder and NodeFolder.at(str(folder.path)).node == "node-0"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "x" * 300, "a b"])
def test_names_that_would_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot name a folder"):
        NodeFolder(tmp_path, JOB, name)
    with pytest.raises(CheckpointError, match="cannot name a folder"):
        NodeFolder(tmp_path, name, "node-0")


def test_a_base_that_is_missing_is_named_with_what_would_work(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such folder.*Use /dev/shm"):
        NodeFolder(tmp_path / "nowhere", JOB, "node-0").create()


def test_a_folder_that_others_can_enter_is_refused(tmp_path):
    root = tmp_path / f"windlass-{os.getuid()}"
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    with pytest.raises(CheckpointError, match="mode 0700"):
        NodeFolder(tmp_path, JOB, "node-0").create()


def test_a_link_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "trap").mkdir(mode=0o700)
    (tmp_path / f"windlass-{os.getuid()}").symlink_to(tmp_path / "trap")
    with pytest.raises(CheckpointError, match="must be a folder"):
        NodeFolder(tmp_path, JOB, "node-0").create()
    assert list((tmp_path / "trap").iterdir()) == []


def test_the_generation_never_falls_whoever_raises_it(folder):
    assert folder.read_generation() == 0
    assert [folder.raise_generation(g) for g in (3, 1, 7, 5)] == [3, 3, 7, 7]
    raisers = [threading.Thread(target=folder.raise_generation, args=(g,)) for g in range(100)]
    for thread in raisers:
        thread.start()
    for thread in raisers:
        thread.join()
    assert folder.read_generation() == 99


def test_memberships_are_listed_by_generation(folder):
    for generation in (10, 2, 9):
        folder.replace(folder.membership_path(generation), b"{}")
    assert folder.memberships() == [2, 9, 10]


def test_a_layout_is_kept_under_its_name_and_checked_when_read(folder):
    layout = Layout((), 64, {"a": 1})
    folder.put_layout(layout)
    assert folder.read_layout(layout.digest) == layout
    assert folder.read_layout("0" * 32) is None
    folder.layout_path(layout.digest).write_bytes(Layout((), 128).dump())
    with pytest.raises(CheckpointError, match="damaged"):
        folder.read_layout(layout.digest)
    with pytest.raises(CheckpointError, match="not the digest"):
        folder.layout_path("../../token")


def test_segments_are_listed_with_the_geometry_in_their_names(folder):
    for role, rank, size in (("parity", 12, 640), ("data", 3, 64), ("data", 3, 128)):
        Segment.create(folder.segment_path(role, rank, size, 2, 5), role, rank, size, 2, 64, 5).close()
    (folder.path / "data-00003.seg").write_bytes(b"not one of ours")
    found = [(s.role, s.rank, s.slot_bytes, s.num_slots, s.table_chunks) for s in folder.segments()]
    assert sorted(found) == [("data", 3, 64, 2, 5), ("data", 3, 128, 2, 5), ("parity", 12, 640, 2, 5)]


def test_who_serves_the_folder_is_read_back_or_nothing(folder):
    assert folder.read_smp() is None
    me = SnapshotProcess(os.getpid(), process_started(os.getpid()) or 0, "127.0.0.1", 4711)
    folder.write_smp(me)
    assert folder.read_smp() == me and me.alive
    for damage in (b"{", b"[]", b'{"pid": 1}', b"{}"):
        folder.smp_path.write_bytes(damage)
        assert folder.read_smp() is None


def test_a_replaced_file_leaves_no_other_behind_when_it_fails(folder, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.replace(folder.token_path, b"other")
    assert folder.read_token() == "secret"
    assert not [p for p in folder.path.iterdir() if p.name.startswith(".")]


def test_too_little_room_says_what_is_needed_and_what_is_there(folder, monkeypatch):
    monkeypatch.setattr(module, "_memory_left", lambda: (100 << 20) + module.SPARE_BYTES)
    folder.check_room(100 << 20, "2 snapshots", 2)
    with pytest.raises(CheckpointError, match=r"2 snapshots need 300\.0 MiB, 100\.0 MiB can be had.*200\.0 MiB more"):
        folder.check_room(300 << 20, "2 snapshots", 2)


def test_room_is_the_least_of_file_system_and_memory(folder):
    disk = os.statvfs(folder.base)
    assert 0 < folder.room() <= disk.f_blocks * disk.f_frsize


def test_room_is_bounded_by_the_control_group(folder, monkeypatch):
    monkeypatch.setattr(module.control_group, "memory_left", lambda: 12345)
    assert folder.room() == 12345


def test_jobs_of_the_same_hosts_are_told_apart(tmp_path, folder):
    other = NodeFolder(tmp_path, "fedcba9876543210", "node-0").create()
    assert list_jobs(tmp_path) == [folder, other]
    folder.remove()
    assert list_jobs(tmp_path) == [other] and other.read_token()
    other.remove()
    assert list(tmp_path.iterdir()) == []
    assert list_jobs(tmp_path / "nowhere") == []


def old_lease(folder: NodeFolder) -> None:
    folder.touch_lease()
    os.utime(folder.lease_path, (1, 1))


def test_a_folder_that_nobody_needs_any_more_is_collected(tmp_path, folder):
    pid, started = dead_process()
    folder.write_smp(SnapshotProcess(pid, started, "127.0.0.1", 1))
    old_lease(folder)
    assert list(collect_garbage(tmp_path, lease_s=60.0)) == [(folder, None)]
    assert not folder.path.exists()


def test_a_folder_is_removed_though_somebody_touches_its_lease_all_the_while(tmp_path, folder, monkeypatch):
    remove = os.rmdir

    def touched(*args, **kwargs):
        with contextlib.suppress(OSError):
            folder.touch_lease()
        remove(*args, **kwargs)

    monkeypatch.setattr(os, "rmdir", touched)
    folder.remove()
    assert not folder.path.exists() and list_jobs(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_a_folder_is_made_though_another_job_leaves_and_takes_away_what_is_above_it(tmp_path, folder, monkeypatch):
    other, make = NodeFolder(tmp_path, "fedcba9876543210", "node-0"), Path.mkdir

    def late(path, *args, **kwargs):
        if path == other.path.parent and folder.path.exists():
            folder.remove()
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", late)
    other.create("22" * 32)
    assert not folder.path.exists() and list_jobs(tmp_path) == [other]


def test_what_a_removal_that_was_cut_off_has_left_is_collected(tmp_path, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        folder.remove()
    left = list_jobs(tmp_path)
    assert not folder.path.exists() and len(left) == 1 and left[0].job == folder.job
    os.utime(left[0].lease_path, (0, 0))
    assert list(collect_garbage(tmp_path)) == [(left[0], None)]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_lease_runs_is_kept(tmp_path, folder):
    folder.touch_lease()
    assert list(collect_garbage(tmp_path, lease_s=60.0)) == [] and folder.path.exists()


def test_a_folder_that_a_launch_has_just_taken_up_again_is_kept_though_its_lease_was_over(tmp_path, folder):
    old_lease(folder)
    folder.create()
    assert list(collect_garbage(tmp_path, lease_s=60.0)) == [] and folder.path.exists()


def test_a_folder_that_a_living_process_serves_is_kept_however_old_its_lease(tmp_path, folder):
    folder.write_smp(SnapshotProcess(os.getpid(), process_started(os.getpid()) or 0, "127.0.0.1", 1))
    old_lease(folder)
    assert list(collect_garbage(tmp_path, lease_s=0.0)) == [] and folder.path.exists()


def test_a_folder_in_which_a_rank_still_beats_is_kept(tmp_path, folder):
    Heartbeat(folder.beat_path(5), 1)
    old_lease(folder)
    assert folder.beating() == {5: folder.beat_path(5)}
    assert list(collect_garbage(tmp_path, lease_s=0.0)) == [] and folder.path.exists()


# -- what others may have made under our name, as /dev/shm lets them --------------------------------------------------


def link_to(home: Path, at: Path) -> None:
    shutil.rmtree(at)
    at.symlink_to(home)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("how", ["link", "open", "foreign", "file"])
def test_what_is_not_ours_alone_is_neither_listed_nor_believed_nor_removed(tmp_path, folder, depth, how):
    """`depth`: the root, the job or the node was made by somebody else."""
    at = [folder.path.parents[1], folder.path.parent, folder.path][depth]
    home = tmp_path / "home"
    thesis = home.joinpath(*folder.path.relative_to(at).parts, "thesis")  # where the link has it look like a node
    other = NodeFolder(tmp_path, "fedcba9876543210", "node-0").create() if depth else None
    folder.write_smp(SnapshotProcess(os.getpid() + 1, 1, "127.0.0.1", 1))
    thesis.parent.mkdir(parents=True, mode=0o700)
    thesis.write_text("years of work")
    os.utime(thesis.parent, (1, 1))
    if how == "link":
        link_to(home, at)
    elif how == "open":
        at.chmod(0o710)
    elif how == "foreign":
        if os.getuid() != 0:
            pytest.skip("only root can give folders away")
        os.chown(at, 12345, -1)
    else:
        shutil.rmtree(at)
        at.write_text("no folder")
    said: list[CheckpointError] = []
    found = list(collect_garbage(tmp_path, lease_s=0.0, spared=other, refused=said.append))
    assert found == [] and thesis.exists() and at.exists()
    assert len(said) == 1 and f"{at} must be a folder of user {os.getuid()} that nobody else" in str(said[0])
    assert list_jobs(tmp_path) == ([other] if other else [])
    assert folder.read_smp() is None
    with pytest.raises(CheckpointError, match="must be a folder of user"):
        folder.remove()
    assert thesis.exists() and at.exists()


def test_the_snapshot_process_needs_no_torch():
    names = ("folder", "layout", "header", "segment", "heartbeat")
    code = "import sys\n" + "".join(f"import windlass.checkpoint.memory.{n}\n" for n in names)
    code += "sys.exit(any(m.split('.')[0] == 'torch' for m in sys.modules))"
    root = Path(module.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_layout_that_was_damaged_is_replaced_by_whoever_has_it(folder):
    layout = Layout((), 64, {"a": 1})
    folder.put_layout(layout)
    path = folder.layout_path(layout.digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        folder.read_layout(layout.digest)
    folder.put_layout(layout)
    assert folder.read_layout(layout.digest) == layout
