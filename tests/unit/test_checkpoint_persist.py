"""Checkpoints written from the memory of nodes, without torch: the same bytes, complete or not there, fenced, kept."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from tests.checkpoint_doubles import FlatSource, blank, even_shards, on_threads, save_shards, some_state
from tests.persist_doubles import CHUNK, JOB, nodes_with, parity_header
from windlass.checkpoint import persist as persist_module
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.frames import frame_of
from windlass.checkpoint.local_level import LocalLevel
from windlass.checkpoint.manifest import read_manifest
from windlass.checkpoint.memory.segment import Segment
from windlass.checkpoint.memory.segment import verify as damaged_chunks
from windlass.checkpoint.reader import read_tensor
from windlass.checkpoint.restore import restore
from windlass.checkpoint.retention import being_read
from windlass.checkpoint.storage import LocalStorage, storage_of
from windlass.checkpoint.store import begin_generation, choose, find_checkpoint, list_checkpoints, verify
from windlass.dist.errors import CheckpointError

POINTS = ["open", "write", "fsync", "metadata", "manifest", "rename"]


class Crash(BaseException):
    """The process ends here: nothing below catches it, nothing is cleared up."""


@pytest.fixture(autouse=True)
def no_drive(monkeypatch):
    """Nothing here depends on drives (test_checkpoint_power_loss.py does)."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(params=["folder", "memory://", "file by fsspec"])
def target(request, tmp_path, monkeypatch):
    """A place for checkpoints: a folder, and the two kinds of URL that need no server."""
    if request.param == "folder":
        return tmp_path / "run" / "checkpoints"
    if request.param == "memory://":
        forget_memory()
        return "memory://run/checkpoints"
    from windlass.checkpoint import storage

    monkeypatch.setattr(storage, "LocalStorage", lambda folder: storage.FsspecStorage(f"local://{folder}"))
    return f"file://{tmp_path}/run/checkpoints"


def forget_memory():
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def failing_at(monkeypatch, wanted, error, rank=0):
    def fault(point, *, rank, step):
        if point == f"persist.{wanted}" and rank == of:
            raise error

    of = rank
    monkeypatch.setattr(persist_module, "fault", fault)


def assert_holds(place, state):
    assert verify(place) == []
    for key, tensor in state.items():
        found = read_tensor(place, key)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), key


def steps_at(target):
    return [(info.generation, info.step) for info in list_checkpoints(target) if info.problem is None]


def everything_at(target):
    storage, found = storage_of(target), []
    for name in storage.names():
        found += [f"{name}/{inner}" for inner in storage.names(name)] or [name]
    return found


# -- the same bytes --------------------------------------------------------------------------------------------------


def test_files_are_those_that_save_writes_byte_for_byte(tmp_path):
    state = some_state()
    saved = save_shards(tmp_path / "sync", 5, even_shards(state, 4)).folder
    place = nodes_with(tmp_path, state, tmp_path / "lazy").persist(5)
    files = sorted(p.name for p in saved.iterdir())
    assert sorted(os.listdir(place)) == files and ".metadata" in files and "__3_0.distcp" in files
    for name in files:
        if name != "manifest.json":
            assert (saved / name).read_bytes() == (tmp_path / "lazy" / "step-00000005" / name).read_bytes(), name
    a, b = read_manifest(saved), read_manifest(place)
    assert (a.tensors, a.files, a.world_size, a.step) == (b.tensors, b.files, b.world_size, b.step)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_every_dtype_is_kept(tmp_path, dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    place = nodes_with(tmp_path, {"model.x": tensor}, tmp_path / "c", num_ranks=2).persist(1)
    found = read_tensor(place, "model.x")
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_a_frame_fits_tensors_of_any_size(tmp_path):
    before, after = frame_of(torch.float32, (5 << 28,))  # 5 GiB: the archive needs its 64-bit form
    path = tmp_path / "large.pt"
    with open(path, "wb") as file:
        file.write(before)
        file.seek(len(before) + (5 << 30))  # a hole reads as zeros and takes no room
        file.write(after)
    found = torch.load(path, mmap=True, weights_only=True)
    assert found.shape == (5 << 28,) and found[-1] == 0


def test_plain_torch_loads_it_in_one_process(tmp_path):
    import torch.distributed.checkpoint as dcp

    state = some_state()
    place = nodes_with(tmp_path, state, tmp_path / "c").persist(3)
    found = blank(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, storage_reader=dcp.FileSystemReader(place))
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_plain_torch_loads_it_from_a_url(tmp_path):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        forget_memory()
        state = some_state()
        place = nodes_with(tmp_path, state, "memory://dcp").persist(3)
        found = blank(state)
        dcp.load(found, storage_reader=FsspecReader(place))
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_facts_and_generation_come_with_it_and_any_world_restores_it(tmp_path, target):
    state = some_state()
    place = nodes_with(tmp_path, state, target, generation=3).persist(7, {"tokens": 9})
    assert read_manifest(place).extra == {"step": 7, "tokens": 9, "generation": 3}
    targets = even_shards(blank(state), 3)
    found = on_threads(3, lambda group: restore(place, targets[group.rank], group))
    assert found == [{"step": 7, "tokens": 9, "generation": 3}] * 3
    for key, whole in state.items():
        assert torch.equal(torch.cat([t.flat[key] for t in targets]), whole.reshape(-1)), key


def test_writing_needs_no_torch(tmp_path):
    nodes = nodes_with(tmp_path, some_state(), tmp_path / "c", num_ranks=2)
    nodes.hold(4)
    (tmp_path / "membership").write_text(nodes.membership.dump())
    folder = nodes.folders["node-0"].path
    code = f"""
import sys
from pathlib import Path
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.segment import Segment
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.persist import Persister
folder = NodeFolder.at({str(folder)!r})
world = Membership.parse(Path({str(tmp_path / "membership")!r}).read_text())
one = Persister(folder, "node-0", {JOB!r}, Settings(storage={str(tmp_path / "c")!r}), print)
slots = {{rank: Segment.open(folder.path / f"data-{{rank}}-1.seg").slots[0] for rank in (0, 1)}}
temporary = one.begin("storage", 4, 1, world)
rows = one.prepare("storage", 4, 1, temporary, world, slots, {{}})
print(one.commit("storage", 4, 1, temporary, {{"node-0": rows}}, world))
heavy = [name for name in ("torch", "fsspec", "ray") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert_holds(done.stdout.strip(), some_state())


# -- complete or not there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_any_point_leaves_the_old_one_and_the_next_save_clears_up(tmp_path, target, monkeypatch, point):
    old, new = some_state(0), some_state(1)
    nodes_with(tmp_path / "a", old, target).persist(1)
    nodes = nodes_with(tmp_path / "b", new, target)
    is_folder = storage_of(target).renames
    with monkeypatch.context() as patch:
        failing_at(patch, point, Crash())
        with pytest.raises(Crash):
            nodes.persist(2)
    choice = choose(target)
    done = point == "rename" and not is_folder  # the manifest is there, and at a URL that is what counts
    assert choice.skipped == [] and steps_at(target) == [(1, 2), (1, 1)][not done :]
    assert_holds(choice.folder, new if done else old)
    nodes.persist(3)
    assert steps_at(target) == [(1, 3), (1, 2), (1, 1)] if done else [(1, 3), (1, 1)]
    assert len(storage_of(target).names()) == len(steps_at(target)) + 1


@pytest.mark.parametrize(("point", "rank"), [(p, r) for r in (0, 3) for p in POINTS[:3]] + [(p, 0) for p in POINTS[3:]])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, target, monkeypatch, point, rank):
    if point == "rename" and not storage_of(target).renames:
        pytest.skip("nothing is renamed at a URL: then the checkpoint is complete")
    nodes = nodes_with(tmp_path, some_state(0), target)
    nodes.persist(1)
    before = everything_at(target)
    with monkeypatch.context() as patch:
        failing_at(patch, point, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk"), rank)
        with pytest.raises(CheckpointError) as found:
            nodes.persist(2)
    for part in (
        "step 2",
        "No space left on device",
        "/full/disk",
        str(target).removeprefix("file://"),
        "training goes on",
    ):
        assert part in str(found.value)
    assert everything_at(target) == before
    nodes.persist(2)
    assert steps_at(target) == [(1, 2), (1, 1)]


def test_a_real_short_write_is_reported_with_the_file(tmp_path):
    nodes = nodes_with(tmp_path, {"model.x": torch.randn(100_000)}, tmp_path / "c", num_ranks=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    nodes.hold(1)
    temporary = nodes.begin(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large: .*__0_0\.distcp"):
            nodes.prepare(1, temporary, "node-0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "c" / temporary) == []
    nodes.leader.abandon("storage", temporary)
    assert nodes.persist(1) and steps_at(tmp_path / "c") == [(1, 1)]


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    class Disk:
        f_bavail, f_frsize = 3, 1024

    nodes = nodes_with(tmp_path, some_state(), tmp_path / "c")
    monkeypatch.setattr("os.statvfs", lambda path: Disk)
    with pytest.raises(CheckpointError, match=r"not enough free space.*It needs .* KiB; 3\.0 KiB are free"):
        nodes.persist(1)
    assert all(name.startswith(".generation") for name in os.listdir(tmp_path / "c"))


def test_a_place_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step 1 was not saved in .*file"):
        nodes_with(tmp_path, some_state(), tmp_path / "file").persist(1)


def test_memory_that_was_damaged_is_never_written(tmp_path):
    nodes = nodes_with(tmp_path, some_state(), tmp_path / "c")
    nodes.hold(1)
    nodes.slots[2].data[CHUNK // 2] ^= 1
    temporary = nodes.begin(1)
    with pytest.raises(CheckpointError, match=r"rank 2 in memory of node node-1: bytes 0 on .* damaged"):
        nodes.prepare(1, temporary, "node-1")
    assert os.listdir(tmp_path / "c" / temporary) == []


def test_a_slot_that_is_replaced_while_it_is_written_is_noticed(tmp_path, monkeypatch):
    nodes = nodes_with(tmp_path, some_state(), tmp_path / "c")
    nodes.hold(1)
    temporary = nodes.begin(1)

    def fault(point, *, rank, step):
        if point == "persist.fsync" and rank == 1:
            nodes.hold(2)

    monkeypatch.setattr(persist_module, "fault", fault)
    with pytest.raises(CheckpointError, match=r"rank 1 .* was replaced while it was written"):
        nodes.prepare(1, temporary, "node-0")
    with pytest.raises(CheckpointError, match="rank 2 of node node-1 does not hold step 1"):
        nodes.prepare(1, temporary, "node-1")


def test_a_step_that_a_rank_did_not_write_is_not_published(tmp_path):
    nodes = nodes_with(tmp_path, some_state(), tmp_path / "c")
    nodes.hold(1)
    temporary = nodes.begin(1)
    rows = {"node-0": nodes.prepare(1, temporary, "node-0")}
    with pytest.raises(CheckpointError, match="rank 2 on node-1, rank 3 on node-1"):
        nodes.commit(1, temporary, rows)
    assert not (tmp_path / "c" / temporary).exists() and steps_at(tmp_path / "c") == []


def test_rows_pass_through_json(tmp_path):
    nodes = nodes_with(tmp_path, some_state(), tmp_path / "c")
    nodes.hold(1)
    temporary = nodes.begin(1)
    rows = json.loads(json.dumps({node: nodes.prepare(1, temporary, node) for node in nodes.folders}))
    assert_holds(nodes.commit(1, temporary, rows), some_state())
    assert sum(row["num_bytes"] for row in rows.values()) > 1000


def test_a_step_saved_again_replaces_what_was_there(tmp_path, target):
    nodes_with(tmp_path / "a", some_state(0), target, generation=1).persist(4)
    later = nodes_with(tmp_path / "b", some_state(1), target, generation=2)
    place = later.persist(4)
    assert choose(target).folder == storage_of(target).inside(place.rsplit("/", 1)[-1]).address
    assert_holds(choose(target).folder, some_state(1))


def test_bandwidth_is_limited(tmp_path):
    nodes = nodes_with(
        tmp_path, {"model.x": torch.randn(20_000)}, tmp_path / "c", num_ranks=2, bandwidth_bytes_per_s=1_000_000.0
    )
    waited = []
    nodes.leader._pace._sleep = waited.append
    nodes.persist(1)
    assert 0.06 < max(waited) < 0.2  # 80 KB and their frames; nobody sleeps, so what is to be waited for adds up


# -- generations -----------------------------------------------------------------------------------------------------


def test_an_older_generation_publishes_nothing_once_a_newer_one_has_begun(tmp_path, target):
    old = nodes_with(tmp_path / "a", some_state(0), target, generation=1)
    old.persist(1)
    old.hold(2)
    temporary = old.begin(2)
    rows = {node: old.prepare(2, temporary, node) for node in old.folders}
    new = nodes_with(tmp_path / "b", some_state(1), target, generation=2)
    new.leader.fence(2)
    with pytest.raises(CheckpointError, match=r"generation 1 .* generation 2 has begun"):
        old.commit(2, temporary, rows)
    with pytest.raises(CheckpointError, match="generation 2 has begun"):
        old.begin(3)
    assert steps_at(target) == [(1, 1)]
    new.persist(2)
    assert steps_at(target) == [(2, 2), (1, 1)]


def test_what_a_stopped_process_publishes_after_its_last_check_stays_invisible(tmp_path, target, monkeypatch):
    old = nodes_with(tmp_path / "a", some_state(0), target, generation=1)
    old.persist(1)
    new = nodes_with(tmp_path / "b", some_state(1), target, generation=2)
    from windlass.checkpoint import store

    read, blind = store.read_fence, []

    def late(root):
        """The old process asks, is stopped, and goes on when the new generation has begun."""
        found = read(root)
        if blind:
            blind.pop()
            new.leader.fence(2)
        return found

    monkeypatch.setattr(store, "read_fence", late)
    old.hold(5)
    temporary = old.begin(5)
    rows = {node: old.prepare(5, temporary, node) for node in old.folders}
    is_folder = storage_of(target).renames
    if is_folder:
        rename = LocalStorage.rename
        monkeypatch.setattr(LocalStorage, "rename", lambda *a: (monkeypatch.undo(), new.leader.fence(2), rename(*a)))
    else:
        blind.append(True)
    old.commit(5, temporary, rows)
    found = list_checkpoints(target)
    assert [(i.step, i.hidden) for i in found] == [(1, False), (5, True)] or [(i.step, i.hidden) for i in found] == [
        (5, True),
        (1, False),
    ]
    choice = choose(target)
    assert_holds(choice.folder, some_state(0))
    assert read_manifest(choice.folder).step == 1
    assert any("after generation 2 had begun" in why for _, why in choice.skipped)
    new.persist(3)
    assert steps_at(target) == [(2, 3), (1, 1)] and all(info.step != 5 for info in list_checkpoints(target))


def test_a_lower_step_of_a_newer_generation_is_newer(tmp_path, target):
    for generation, step in [(1, 10), (1, 20), (2, 11)]:
        nodes_with(tmp_path / f"{generation}-{step}", some_state(step), target, generation=generation).persist(step)
    assert steps_at(target) == [(2, 11), (1, 20), (1, 10)]
    assert read_manifest(choose(target).folder).step == 11
    assert read_manifest(choose(target, at_most=10).folder).step == 10
    assert read_manifest(find_checkpoint(target, at_most=10)).step == 10


def test_choosing_for_a_new_generation_marks_that_it_has_begun(tmp_path, target):
    old = nodes_with(tmp_path, some_state(), target, generation=1)
    old.persist(1)
    assert read_manifest(choose(target, generation=2).folder).step == 1
    with pytest.raises(CheckpointError, match="generation 2 has begun"):
        old.persist(2)
    with pytest.raises(CheckpointError, match="generation 2 has begun"):
        choose(target, generation=1)


def test_a_damaged_mark_still_refuses_older_generations_and_hides_nothing(tmp_path):
    old = nodes_with(tmp_path, some_state(), tmp_path / "c", generation=1)
    old.persist(1)
    begin_generation(tmp_path / "c", 2)
    mark = tmp_path / "c" / ".generation-00000002.json"
    mark.write_bytes(mark.read_bytes()[:-9])
    assert steps_at(tmp_path / "c") == [(1, 1)]
    with pytest.raises(CheckpointError, match="generation 2 has begun"):
        old.begin(2)


def test_leftovers_of_older_generations_are_swept_and_newer_ones_left_alone(tmp_path, target):
    old = nodes_with(tmp_path / "a", some_state(), target, generation=1)
    old.hold(2)
    old.prepare(2, old.begin(2), "node-0")
    new = nodes_with(tmp_path / "b", some_state(), target, generation=3)
    storage = storage_of(target)
    newer = ".step-00000009.tmp-4-01234567" if storage.renames else "step-00000009-g4-01234567"
    storage.make_folder(newer)
    storage.create(f"{newer}/__0_0.distcp", b"x")
    new.leader.sweep(3)
    assert [name for name in storage.names() if "step" in name] == [newer]
    new.persist(4)
    assert newer in storage.names() and steps_at(target) == [(3, 4)]


def test_a_synchronous_save_counts_as_of_the_newest_generation(tmp_path):
    nodes_with(tmp_path, some_state(), tmp_path / "c", generation=2).persist(1)
    save_shards(tmp_path / "c", 2, [FlatSource(some_state())])
    assert steps_at(tmp_path / "c") == [(2, 2), (2, 1)]
    with pytest.raises(CheckpointError, match="generation 2 has begun"):
        save_shards(tmp_path / "c", 3, [FlatSource(some_state())], extra={"generation": 1})


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_never_less_than_two(tmp_path, target):
    nodes = nodes_with(tmp_path, some_state(), target, keep=1)
    for step in (1, 2, 3, 4):
        nodes.persist(step)
    assert steps_at(target) == [(1, 4), (1, 3)]
    assert nodes.leader.steps("storage") == [4, 3] and nodes.leader.newest("storage") == 4


def test_keep_zero_keeps_all(tmp_path, target):
    nodes = nodes_with(tmp_path, some_state(), target, keep=0)
    for step in (1, 2, 3, 4):
        nodes.persist(step)
    assert len(steps_at(target)) == 4


def damage(target, step):
    storage = storage_of(target)
    name = next(info.name for info in list_checkpoints(target) if info.step == step)
    data = bytearray(b"".join([storage_file(storage, f"{name}/__1_0.distcp")]))
    data[len(data) // 2] ^= 1
    storage.remove(f"{name}/__1_0.distcp")
    storage.create(f"{name}/__1_0.distcp", bytes(data))


def storage_file(storage, name):
    buffer = memoryview(bytearray(storage.size(name)))
    file = storage.open(name)
    file.read_into(buffer, 0)
    file.close()
    return bytes(buffer)


def test_damaged_and_incomplete_ones_do_not_count_among_the_kept(tmp_path, target):
    first = nodes_with(tmp_path / "a", some_state(), target, keep=0)
    for step in (1, 2, 3, 4):
        first.persist(step)
    damage(target, 4)
    storage = storage_of(target)
    name = next(info.name for info in list_checkpoints(target) if info.step == 3)
    storage.remove(f"{name}/__2_0.distcp")
    nodes_with(tmp_path / "b", some_state(), target, keep=2).persist(5)
    assert steps_at(target) == [(1, 5), (1, 4), (1, 2)]
    assert [info.step for info in list_checkpoints(target) if not verify(info.folder)] == [5, 2]


def test_one_that_is_being_read_is_kept(tmp_path, target):
    nodes = nodes_with(tmp_path, some_state(), target, keep=2)
    place = storage_of(nodes.persist(1))
    with being_read(place):
        for step in (2, 3, 4):
            nodes.persist(step)
        assert steps_at(target) == [(1, 4), (1, 3), (1, 1)]
        assert_holds(place, some_state())
    nodes.persist(5)
    assert steps_at(target) == [(1, 5), (1, 4)]


def test_a_reader_that_died_does_not_keep_it_for_ever(tmp_path, target):
    nodes = nodes_with(tmp_path, some_state(), target, keep=2)
    place = storage_of(nodes.persist(1))
    place.create(".reading-01234567", json.dumps({"until": 1.0}).encode())
    for step in (2, 3):
        nodes.persist(step)
    assert steps_at(target) == [(1, 3), (1, 2)]


def test_restoring_holds_the_checkpoint_while_it_reads(tmp_path, target):
    state = some_state()
    place = nodes_with(tmp_path, state, target).persist(1)
    seen = []

    class Looking(FlatSource):
        def wanted(self):
            seen.extend(name for name in storage_of(place).names() if name.startswith(".reading-"))
            return self.pieces

    restore(place, Looking(blank(state)), Alone())
    assert len(seen) == 1 and not any(name.startswith(".reading-") for name in storage_of(place).names())


def test_an_older_generation_deletes_nothing(tmp_path, target, monkeypatch):
    nodes = nodes_with(tmp_path, some_state(), target, keep=2)
    for step in (1, 2):
        nodes.persist(step)

    def fault(point, *, rank, step):
        if point == "persist.purge":
            begin_generation(target, 2)

    monkeypatch.setattr(persist_module, "fault", fault)
    nodes.persist(3)
    assert steps_at(target) == [(1, 3), (1, 2), (1, 1)] or steps_at(target) == [(1, 3), (1, 2), (1, 1)]
    assert any("generation 2 has begun" in line for line in nodes.log)


def test_a_purge_that_fails_is_told_and_the_new_one_counts(tmp_path, target, monkeypatch):
    nodes = nodes_with(tmp_path, some_state(), target, keep=2)
    for step in (1, 2):
        nodes.persist(step)
    with monkeypatch.context() as patch:
        failing_at(patch, "purge", OSError(errno.EIO, "bad disk"))
        nodes.persist(3)
    assert any("could not be removed" in line and "bad disk" in line for line in nodes.log)
    assert steps_at(target) == [(1, 3), (1, 2), (1, 1)]
    nodes.persist(4)
    assert steps_at(target) == [(1, 4), (1, 3)]


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
    return nodes, LocalLevel(tmp_path / "nvme" / JOB / "node-0")


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
    assert nodes.leader.steps("local") == [8, 7]
    (level.folder / "step-00000008" / "data-00001.seg").unlink()
    assert nodes.leader.newest("local") == 7
    mark = level.folder / "step-00000007" / "complete.json"
    mark.write_bytes(mark.read_bytes().replace(b'"step": 7', b'"step": 9'))
    assert nodes.leader.newest("local") is None


def test_metadata_names_files_beside_it(tmp_path, target):
    place = storage_of(nodes_with(tmp_path, some_state(), target).persist(1))
    metadata = pickle.loads(storage_file(place, ".metadata"))
    assert {info.relative_path for info in metadata.storage_data.values()} <= set(place.names())


def test_a_place_without_write_permission_is_reported_before_training(tmp_path, target):
    from windlass.checkpoint.storage import check_url
    from windlass.dist.errors import ConfigError

    check_url(str(target))
    assert storage_of(target).names() == []
    (tmp_path / "blocked").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_url(f"file://{tmp_path}/blocked/run")
    with pytest.raises(ConfigError, match="nosuch"):
        check_url("nosuch://bucket/run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
