"""Loss of power and full disks at every single operation: the old checkpoint or the new one, never a mixture."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from tests.checkpoint_doubles import FlatSource, save_shards, some_state
from tests.persist_doubles import nodes_with
from tests.power_loss import Disk, Recorder, states_after
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.local_level import LocalLevel
from windlass.checkpoint.manifest import read_manifest
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.segment import Segment
from windlass.checkpoint.memory.segment import verify as damaged_chunks
from windlass.checkpoint.reader import read_tensor
from windlass.checkpoint.save import save
from windlass.checkpoint.store import choose, list_checkpoints
from windlass.dist.errors import CheckpointError

OLD, NEW = ({key: some_state(seed)[key] for key in ("model.embed.weight", "optimizer.step")} for seed in (0, 1))


def step_of_whole_state(root, by_step):
    """Return the step that would be resumed from, having compared every element; None if there is none."""
    choice = choose(root)
    assert choice.skipped == [], choice.skipped
    if choice.folder is None:
        return None
    step = read_manifest(choice.folder).step
    for key, tensor in by_step[step].items():
        assert torch.equal(read_tensor(choice.folder, key), tensor), (step, key)
    return step


def persist_again(memory, root):
    nodes_with(memory / "a", OLD, root, num_ranks=2, keep=2, generation=1).persist(1)
    nodes = nodes_with(memory / "b", NEW, root, num_ranks=2, keep=2, generation=2)
    return lambda: nodes.persist(2)


def persist_same_step_again(memory, root):
    nodes_with(memory / "a", OLD, root, num_ranks=2, generation=1).persist(1)
    nodes = nodes_with(memory / "b", OLD, root, num_ranks=2, generation=2)
    return lambda: nodes.persist(1)


def persist_first(memory, root):
    nodes = nodes_with(memory / "b", NEW, root, num_ranks=2)
    return lambda: nodes.persist(2)


def persist_and_purge(memory, root):
    nodes = nodes_with(memory / "a", OLD, root, num_ranks=1, keep=2)
    for step in (0, 1):
        nodes.persist(step)
    later = nodes_with(memory / "b", NEW, root, num_ranks=1, keep=2)
    return lambda: later.persist(2)


def save_in_trainer(memory, root):
    save_shards(root, 1, [FlatSource(OLD)])
    return lambda: save(root, 2, FlatSource(NEW), {}, Alone(), keep=1)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A folder that costs no time: what is durable is decided by the model of these tests."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        yield Path(folder)


CASES = [persist_again, persist_same_step_again, persist_first, persist_and_purge, save_in_trainer]


@pytest.mark.parametrize("case", CASES)
def test_a_loss_of_power_at_any_moment_leaves_the_old_or_the_new_state(memory, case):
    disk_folder, root = memory / "disk", memory / "disk" / "run" / "checkpoints"
    disk_folder.mkdir()
    act = case(memory, root)
    before, expected = Disk(disk_folder), {0: OLD, 1: OLD, 2: NEW}
    old = step_of_whole_state(root, expected)
    with Recorder(disk_folder).recording() as recorder:
        act()
    new = step_of_whole_state(root, expected)
    assert len(recorder.log) > 15
    where = memory / "after"
    where.mkdir()
    seen = set()
    for done, folder in states_after(before, recorder.log, where, seed=7, draws=3):
        found = step_of_whole_state(folder / "run" / "checkpoints", expected)
        assert found in (old, new), (done, found)
        assert found == new or done < len(recorder.log), "what was reported as saved is gone"
        seen.add(found)
        shutil.rmtree(folder)
    assert seen == {old, new}


def whole_local_steps(level):
    for held in level.complete():
        for path in held.segments().values():
            segment = Segment.open(path)
            header = segment.slots[0].header()
            assert header is not None and header.step == held.step and damaged_chunks(segment.slots[0], header) == []
            if header.layout:
                Layout.parse(held.layout_path(header.layout).read_bytes(), header.layout)
            segment.close()
        assert len(held.segments()) == 2 and held.membership_path.stat().st_size > 0
    return [held.step for held in level.complete()]


def test_a_loss_of_power_leaves_whole_steps_on_the_drive_of_a_node(memory):
    drive = memory / "disk" / "nvme"
    drive.mkdir(parents=True)
    nodes = nodes_with(memory, OLD, "", num_ranks=2, local_dir=str(drive))

    def persist(step):
        nodes.hold(step)
        temporary = nodes.leader.begin("local", step, 1, nodes.membership)
        rows = nodes.leader.prepare("local", step, 1, temporary, nodes.membership, nodes.slots, {})
        nodes.leader.commit("local", step, 1, temporary, {"node-0": rows}, nodes.membership)

    for step in (4, 5):
        persist(step)
    before = Disk(memory / "disk")
    with Recorder(memory / "disk").recording() as recorder:
        persist(6)
    where = memory / "after"
    where.mkdir()
    seen = set()
    for done, folder in states_after(before, recorder.log, where, seed=3, draws=1):
        steps = whole_local_steps(LocalLevel(nodes.folders["node-0"], folder / "nvme"))
        assert len(steps) >= 2 and (steps[0] == 6 or done < len(recorder.log))
        seen.add(tuple(steps))
        shutil.rmtree(folder)
    assert {(5, 4), (6, 5)} <= seen <= {(5, 4), (6, 5, 4), (6, 5)}


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("case", [persist_again, persist_same_step_again, persist_first])
def test_a_disk_that_is_full_at_any_operation_leaves_what_was_there(memory, case, once):
    for number in range(1, 200):
        here = memory / str(number)
        root = here / "disk" / "run" / "checkpoints"
        (here / "disk").mkdir(parents=True)
        act = case(here, root)
        before = step_of_whole_state(root, {1: OLD, 2: NEW})
        shown = [(info.step, info.generation) for info in list_checkpoints(root)]
        recorder = Recorder(here / "disk", full_after=number, once=once)
        with recorder.recording():
            try:
                act()
                problem = None
            except CheckpointError as error:
                problem = str(error)
        if recorder.count < number:
            assert number > 20 and problem is None
            return
        if problem is not None:
            assert "No space left on device" in problem and "Older checkpoints are intact" in problem
            assert step_of_whole_state(root, {1: OLD, 2: NEW}) == before
            assert [(info.step, info.generation) for info in list_checkpoints(root)] == shown
            if once:
                assert list(root.glob(".step-*")) == []
        act()
        assert step_of_whole_state(root, {1: OLD, 2: NEW}) == (1 if case is persist_same_step_again else 2)
        shutil.rmtree(here)
    raise AssertionError("every operation failed")
