"""Checkpoints written from the memory of nodes, without torch: the same bytes, complete or not there, fenced, kept."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import warnings
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.checkpoint_doubles import blank, even_shards, on_threads, save_shards, some_state
from tests.persist_doubles import (
    CHUNK,
    PLACES,
    Crash,
    assert_holds,
    everything_at,
    failing_at,
    forget_memory,
    nodes_with,
    place_for_checkpoints,
    steps_at,
)
from windlass.checkpoint import persist as persist_module
from windlass.checkpoint.frames import frame_of
from windlass.checkpoint.manifest import read_manifest
from windlass.checkpoint.memory.pace import CATCH_UP_S, Pace
from windlass.checkpoint.reader import read_tensor
from windlass.checkpoint.restore import restore
from windlass.checkpoint.storage import read_file, storage_of
from windlass.checkpoint.store import choose
from windlass.dist.errors import CheckpointError
from windlass.launch.cli.checkpoint import app
from windlass.model.build import build_model, named_parameters
from windlass.model.config import ModelConfig

POINTS = ["open", "write", "fsync", "metadata", "manifest", "rename"]


@pytest.fixture(autouse=True)
def no_drive(monkeypatch):
    """Nothing here depends on drives (test_checkpoint_power_loss.py does)."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(params=PLACES)
def target(request, tmp_path, monkeypatch):
    return place_for_checkpoints(request.param, tmp_path, monkeypatch)


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


PROCESS = """
import sys
from pathlib import Path
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.segment import Segment
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.persist import Persister
folder, world, target, step = sys.argv[1:]
folder, world, step = NodeFolder.at(folder), Membership.parse(Path(world).read_text()), int(step)
one = Persister(folder, "node-0", Settings(storage=target, keep=2), print)
slots = {rank: Segment.open(folder.path / f"data-{rank}-1.seg").slots[0] for rank in (0, 1)}
temporary = one.begin("storage", step, 1, world)
rows = one.prepare("storage", step, 1, temporary, world, slots, {})
print(one.commit("storage", step, 1, temporary, {"node-0": rows}, world))
one.retire(step, 1)
heavy = [name for name in ("torch", "fsspec", "ray") if name in sys.modules]
assert not heavy, heavy
"""


def persist_in_a_process(nodes, step, fault=""):
    """Persist what one node holds in a process that is not the one that filled it, as snapshot processes do."""
    nodes.hold(step)
    world = nodes.root / "membership.json"
    world.write_text(nodes.membership.dump())
    command = [sys.executable, "-c", PROCESS, nodes.folders["node-0"].path, world, nodes.storage, str(step)]
    variables = {**os.environ, "WINDLASS_FAULT": fault}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)


def test_writing_needs_no_torch(tmp_path):
    nodes = nodes_with(tmp_path, some_state(), tmp_path / "c", num_ranks=2)
    done = persist_in_a_process(nodes, 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "c" / "step-00000004")
    assert_holds(done.stdout.strip(), some_state())


@pytest.mark.parametrize("point", [*POINTS, "renamed", "purge"])
def test_a_killed_process_leaves_whole_checkpoints_and_its_successor_goes_on(tmp_path, point):
    root = tmp_path / "c"
    nodes = nodes_with(tmp_path, some_state(), root, num_ranks=2, keep=2)
    for step in (1, 2):
        nodes.persist(step)
    killed = persist_in_a_process(nodes, 3, f"kill:persist.{point}")
    assert killed.returncode == -9, killed.stderr
    done = point in ("renamed", "purge")
    assert [step for _, step in steps_at(root)] == ([3, 2, 1] if done else [2, 1])
    assert_holds(choose(root).folder, some_state())
    after = persist_in_a_process(nodes, 4)
    assert after.returncode == 0, after.stderr
    assert [step for _, step in steps_at(root)] == ([4, 3] if done else [4, 2])
    assert sorted(name for name in os.listdir(root) if name.startswith(".step")) == []


def test_metadata_names_files_beside_it(tmp_path, target):
    place = storage_of(nodes_with(tmp_path, some_state(), target).persist(1))
    metadata = pickle.loads(read_file(place, ".metadata"))
    assert {info.relative_path for info in metadata.storage_data.values()} <= set(place.names())


def windlass_checkpoint(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command_line_lists_and_verifies_what_was_persisted_anywhere(tmp_path, target):
    nodes = nodes_with(tmp_path, some_state(), target)
    places = [nodes.persist(step) for step in (1, 2)]
    listed = json.loads(windlass_checkpoint("ls", target, "--json").output)
    assert [row["step"] for row in listed] == [2, 1] and [row["folder"] for row in listed] == places[::-1]
    assert windlass_checkpoint("verify", target).output.count(": valid") == 2
    storage = storage_of(places[1])
    data = bytearray(read_file(storage, "__1_0.distcp"))
    data[len(data) // 2] ^= 1
    storage.remove("__1_0.distcp")
    storage.create("__1_0.distcp", bytes(data))
    found = windlass_checkpoint("verify", target)
    assert found.exit_code == CheckpointError.exit_code and "__1_0.distcp" in found.output
    assert windlass_checkpoint("verify", places[0]).exit_code == 0


def test_the_command_line_exports_what_was_persisted_to_a_url(tmp_path):
    config = ModelConfig(
        vocab_size=257, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_seq_len=8, norm="rmsnorm"
    )
    state = {f"model.{name}": torch.randn(p.shape) for name, p in named_parameters(build_model(config))}
    forget_memory()
    nodes_with(tmp_path, state, "memory://run").persist(1, {"model": asdict(config)})
    result = windlass_checkpoint("export", "memory://run", "--to", "hf", "--out", tmp_path / "hf")
    assert result.exit_code == 0, result.output
    weights = load_file(next((tmp_path / "hf").glob("*.safetensors")))
    embed = next(value for key, value in state.items() if key.startswith("model.embed"))
    assert any(torch.equal(w, embed) for w in weights.values())


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


@pytest.mark.parametrize("point", POINTS[:3])
def test_a_part_that_a_killed_process_had_begun_is_written_anew_by_its_successor(tmp_path, target, monkeypatch, point):
    state = some_state()
    nodes = nodes_with(tmp_path, state, target)
    nodes.hold(1)
    temporary = nodes.begin(1)
    with monkeypatch.context() as patch:
        failing_at(patch, point, Crash(), rank=3)  # rank 2 of the same node is complete by then
        with pytest.raises(Crash):
            nodes.prepare(1, temporary, "node-1")
    rows = {node: nodes.prepare(1, temporary, node) for node in ("node-1", "node-0")}
    nodes.commit(1, temporary, rows)
    assert steps_at(target) == [(1, 1)]
    assert_holds(choose(target).folder, state)


@pytest.mark.parametrize(("point", "rank"), [(p, r) for r in (0, 3) for p in POINTS[:3]] + [(p, 0) for p in POINTS[3:]])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, target, monkeypatch, point, rank):
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

    def fault(point, *, rank, step, generation):
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


def test_a_folder_that_another_node_does_not_see_is_told_with_what_to_do(tmp_path):
    nodes = nodes_with(tmp_path, some_state(), tmp_path / "c")
    nodes.hold(1)
    temporary = nodes.begin(1)
    (tmp_path / "c" / temporary).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is not there on node node-1: .* all nodes share, or .*checkpoint.url"):
        nodes.prepare(1, temporary, "node-1")


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
        tmp_path, {"model.x": torch.randn(20_000)}, tmp_path / "c", num_ranks=2, bandwidth_bytes_per_s=1e6
    )
    assert nodes.leader._pace.bytes_per_s == 1e6
    waited: list[float] = []
    nodes.leader._pace = Pace(1e6, clock=lambda: sum(waited), sleep=waited.append)
    place = nodes.persist(1)
    written = sum(file.num_bytes for name, file in read_manifest(place).files.items() if name != ".metadata")
    assert sum(waited) == pytest.approx(written / 1e6, abs=CATCH_UP_S) and written > 80_000
