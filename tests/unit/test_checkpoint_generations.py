"""Several starts of the workers at one place: what an older one can still do, and what is kept."""

import errno
import json

import pytest

from tests.checkpoint_doubles import FlatSource, blank, save_shards, some_state
from tests.persist_doubles import (
    PLACES,
    assert_holds,
    failing_at,
    nodes_with,
    place_for_checkpoints,
    steps_at,
)
from windlass.checkpoint import persist as persist_module
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.fence import Fence, raise_fence, read_fence
from windlass.checkpoint.manifest import read_manifest
from windlass.checkpoint.restore import restore
from windlass.checkpoint.retention import being_read
from windlass.checkpoint.storage import LocalStorage, read_file, storage_of
from windlass.checkpoint.store import begin_generation, choose, find_checkpoint, list_checkpoints, verify
from windlass.dist.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_drive(monkeypatch):
    """Nothing here depends on drives (test_checkpoint_power_loss.py does)."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(params=PLACES)
def target(request, tmp_path, monkeypatch):
    return place_for_checkpoints(request.param, tmp_path, monkeypatch)


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
    assert {(info.step, info.hidden) for info in found} == {(1, False), (5, True)}
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
    assert read_manifest(find_checkpoint(target)).step == 11


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


def test_a_mark_that_is_replaced_while_it_is_looked_for_is_looked_for_again(target, monkeypatch):
    storage = storage_of(target)
    raise_fence(storage, 1, dict)
    names, later = type(storage).names, [2, 3]

    def slow(self, folder=""):
        """Return what was there before a new generation began."""
        found = names(self, folder)
        if later:
            with monkeypatch.context() as patch:
                patch.setattr(type(storage), "names", names)
                raise_fence(storage_of(target), later.pop(0), lambda: {"step-00000001": "seal"})
        return found

    monkeypatch.setattr(type(storage), "names", slow)
    assert read_fence(storage) == Fence(3, {"step-00000001": "seal"}) and later == []


def test_a_mark_that_is_listed_but_never_there_is_not_looked_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalStorage, "names", lambda self, folder="": [".generation-00000007.json"])
    with pytest.raises(CheckpointError, match=r"lists \.generation-00000007\.json, which is not there"):
        read_fence(LocalStorage(tmp_path))


def test_leftovers_of_older_generations_are_swept_and_newer_ones_left_alone(tmp_path, target):
    old = nodes_with(tmp_path / "a", some_state(), target, generation=1)
    old.hold(2)
    old.prepare(2, old.begin(2), "node-0")
    new = nodes_with(tmp_path / "b", some_state(), target, generation=3)
    storage = storage_of(target)
    newer = ".step-00000009.tmp-4-persist-01234567" if storage.renames else "step-00000009-g4-01234567"
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


def test_a_save_and_a_flush_of_one_generation_at_the_same_time_both_count(tmp_path, monkeypatch):
    nodes = nodes_with(tmp_path, some_state(0), tmp_path / "c", generation=2)
    nodes.leader.fence(2)
    nodes.hold(5)
    temporary = nodes.begin(5)
    rows = {node: nodes.prepare(5, temporary, node) for node in nodes.folders}
    save_shards(tmp_path / "c", 6, [FlatSource(some_state(1))], extra={"generation": 2})
    nodes.commit(5, temporary, rows)
    assert steps_at(tmp_path / "c") == [(2, 6), (2, 5)]

    def begin_meanwhile(point, *, rank, step):
        if point == "checkpoint.written":
            nodes.hold(7)
            nodes.begin(7)

    monkeypatch.setattr("windlass.checkpoint.save.fault", begin_meanwhile)
    save_shards(tmp_path / "c", 8, [FlatSource(some_state(1))], extra={"generation": 2})
    assert steps_at(tmp_path / "c") == [(2, 8), (2, 6), (2, 5)]
    assert len(list((tmp_path / "c").glob(".step-00000007.tmp-2-persist-*"))) == 1
    monkeypatch.undo()
    nodes.persist(9)  # what its writer left goes with its next one
    assert list((tmp_path / "c").glob(".step-*")) == []


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_never_less_than_two(tmp_path, target):
    nodes = nodes_with(tmp_path, some_state(), target, keep=1)
    for step in (1, 2, 3, 4):
        nodes.persist(step)
    assert steps_at(target) == [(1, 4), (1, 3)]


def test_with_synchronous_checkpoints_a_flush_keeps_what_a_save_would(tmp_path, target):
    nodes = nodes_with(tmp_path, some_state(), target, keep=1, mode="sync")
    for step in (1, 2, 3):
        nodes.persist(step)
    assert steps_at(target) == [(1, 3)]


def test_keep_zero_keeps_all(tmp_path, target):
    nodes = nodes_with(tmp_path, some_state(), target, keep=0)
    for step in (1, 2, 3, 4):
        nodes.persist(step)
    assert len(steps_at(target)) == 4


def damage(target, step):
    storage = storage_of(target)
    name = next(info.name for info in list_checkpoints(target) if info.step == step)
    data = bytearray(read_file(storage, f"{name}/__1_0.distcp"))
    data[len(data) // 2] ^= 1
    storage.remove(f"{name}/__1_0.distcp")
    storage.create(f"{name}/__1_0.distcp", bytes(data))


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

    def fault(point, *, rank, step, generation):
        if point == "persist.purge":
            begin_generation(target, 2)

    monkeypatch.setattr(persist_module, "fault", fault)
    nodes.persist(3)
    assert steps_at(target) == [(1, 3), (1, 2), (1, 1)]
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


# -- storage that does not answer just now ---------------------------------------------------------------------------


def failing_reads(monkeypatch, times):
    """Let each manifest be unreadable so many times."""
    left = {}

    def read(files, name):
        left[files.place] = left.get(files.place, times) - 1
        if left[files.place] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle", f"{files.place}/{name}")
        return read_file(files, name)

    monkeypatch.setattr("windlass.checkpoint.manifest.read_file", read)


def test_a_manifest_that_could_not_be_read_once_when_a_generation_began_still_counts(tmp_path, target, monkeypatch):
    old = nodes_with(tmp_path, some_state(), target, generation=1)
    for step in (10, 20):
        old.persist(step)
    failing_reads(monkeypatch, times=1)
    begin_generation(target, 2)
    assert steps_at(target) == [(1, 20), (1, 10)]
    old.leader.sweep(3)
    assert steps_at(target) == [(1, 20), (1, 10)] and old.log == []


def test_a_generation_does_not_begin_where_a_manifest_cannot_be_read(tmp_path, target, monkeypatch):
    old = nodes_with(tmp_path, some_state(), target, generation=1)
    for step in (10, 20):
        old.persist(step)
    with monkeypatch.context() as patch:
        failing_reads(patch, times=1000)
        with pytest.raises(
            CheckpointError, match=r"manifest\.json cannot be read: Stale file handle.*Start again when"
        ):
            choose(target, generation=2)
        old.leader.sweep(3)  # and nothing is taken for what may be removed
    assert read_fence(storage_of(target)).generation == 1
    begin_generation(target, 2)
    assert steps_at(target) == [(1, 20), (1, 10)]


def test_once_a_generation_has_begun_an_older_manifest_that_cannot_be_read_stops_nothing(tmp_path, target, monkeypatch):
    nodes = nodes_with(tmp_path, some_state(), target, keep=1)
    nodes.persist(10)
    with monkeypatch.context() as patch:
        failing_reads(patch, times=1000)
        nodes.persist(20)
    assert steps_at(target) == [(1, 20), (1, 10)] and nodes.log == []


def test_a_damaged_manifest_does_not_keep_a_generation_from_beginning(tmp_path):
    nodes_with(tmp_path / "a", some_state(), tmp_path / "c", generation=1).persist(10)
    manifest = tmp_path / "c" / "step-00000010" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    begin_generation(tmp_path / "c", 2)
    assert [info.hidden for info in list_checkpoints(tmp_path / "c")] == [False]
