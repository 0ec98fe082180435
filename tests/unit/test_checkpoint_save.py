"""Saving: what lies on disk, what a crash or a full disk leaves, what is kept."""

import errno
import os
import resource
from contextlib import contextmanager

import pytest
import torch

from tests.checkpoint_doubles import FlatSource, blank, even_shards, on_threads, save_shards, some_state
from windlass.checkpoint import save as save_module
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.reader import read_manifest, read_tensor
from windlass.checkpoint.restore import restore
from windlass.checkpoint.save import save
from windlass.checkpoint.store import choose, list_checkpoints, verify
from windlass.dist.box import Box
from windlass.dist.errors import CheckpointError
from windlass.dist.state import Piece
from windlass.dist.trace import Tracer

POINTS = ["prepare", "written", "metadata", "manifest", "rename", "renamed"]


class Crash(BaseException):
    """The process ends here: nothing below catches it, nothing is cleared up."""


@contextmanager
def failing_at(monkeypatch, point, error, rank=0):
    def fault(at, *, rank, step):
        if at == point and rank == wanted:
            raise error

    wanted = rank
    with monkeypatch.context() as patch:
        patch.setattr(save_module, "fault", fault)
        yield


def assert_holds(folder, state):
    assert verify(folder) == []
    for key, tensor in state.items():
        assert torch.equal(read_tensor(folder, key), tensor), key


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_holds_every_tensor_bitwise_and_the_facts(tmp_path):
    state = some_state()
    report = save(tmp_path, 100, FlatSource(state), {"tokens": 5, "list": [1, 2]}, Alone(), keep=3)
    assert report.ok and report.folder == tmp_path / "step-00000100" and report.removed == []
    assert names(report.folder) == [".metadata", "__0_0.distcp", "manifest.json"]
    assert_holds(report.folder, state)
    manifest = read_manifest(report.folder)
    assert (manifest.step, manifest.world_size, manifest.extra) == (100, 1, {"tokens": 5, "list": [1, 2]})
    assert report.num_bytes == sum((report.folder / n).stat().st_size for n in (".metadata", "__0_0.distcp"))
    assert set(report.phases) == {"prepare", "write", "commit"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_every_dtype_is_kept(tmp_path, dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    folder = save_shards(tmp_path, 1, [FlatSource({"model.x": tensor})]).folder
    found = read_tensor(folder, "model.x")
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_raw_bytes_are_aligned_so_that_a_reader_may_map_them(tmp_path):
    folder = save_shards(tmp_path, 1, even_shards(some_state(), 3)).folder
    pieces = [p for tensor in read_manifest(folder).tensors.values() for p in tensor.pieces]
    assert len(pieces) > 6 and all(p.offset % 64 == 0 for p in pieces)


def test_ranks_with_nothing_to_write_leave_no_file(tmp_path):
    state = some_state()
    folder = save_shards(tmp_path, 1, [FlatSource({}), FlatSource(state), FlatSource({})]).folder
    assert names(folder) == [".metadata", "__1_0.distcp", "manifest.json"]
    assert_holds(folder, state)


def test_a_piece_is_saved_without_its_gradient_flag_and_without_the_rest_of_its_buffer(tmp_path):
    weight = torch.nn.Parameter(torch.randn(1000, 4))[10:14]
    source = FlatSource({})
    source.pieces = [Piece("model.w", (4, 4), Box.whole((4, 4)), weight)]
    folder = save_shards(tmp_path, 1, [source]).folder
    assert torch.equal(read_tensor(folder, "model.w"), weight.detach())
    assert (folder / "__0_0.distcp").stat().st_size < 4096


@pytest.mark.parametrize("point", ["checkpoint", *(f"checkpoint.{p}" for p in POINTS)])
def test_a_crash_at_any_point_leaves_the_old_state_or_the_complete_new_one(tmp_path, monkeypatch, point):
    old, new = some_state(0), some_state(1)
    save_shards(tmp_path, 1, [FlatSource(old)], keep=1)
    with failing_at(monkeypatch, point, Crash()), pytest.raises(Crash):
        save(tmp_path, 2, FlatSource(new), {}, Alone(), keep=1)
    choice = choose(tmp_path)
    done = point == "checkpoint.renamed"
    assert choice.skipped == [] and choice.folder == tmp_path / ("step-00000002" if done else "step-00000001")
    assert_holds(choice.folder, new if done else old)
    save_shards(tmp_path, 3, [FlatSource(new)], keep=1)
    assert names(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("point", ["rename", "replace", "renamed"])
def test_a_crash_while_a_step_is_saved_again_leaves_one_of_the_two(tmp_path, monkeypatch, point):
    old, new = some_state(0), some_state(1)
    save_shards(tmp_path, 1, [FlatSource(old)])
    with failing_at(monkeypatch, f"checkpoint.{point}", Crash()), pytest.raises(Crash):
        save(tmp_path, 1, FlatSource(new), {}, Alone(), keep=1)
    assert_holds(choose(tmp_path).folder, new if point == "renamed" else old)
    save_shards(tmp_path, 1, [FlatSource(new)])
    assert names(tmp_path) == ["step-00000001"]
    assert_holds(tmp_path / "step-00000001", new)


@pytest.mark.parametrize(
    ("point", "rank"),
    [("checkpoint", 2), ("checkpoint.prepare", 2), ("checkpoint.written", 2), ("checkpoint", 0)]
    + [(f"checkpoint.{point}", 0) for point in POINTS[:-1]],
)
def test_a_full_disk_on_one_rank_is_reported_by_all_and_costs_no_old_checkpoint(tmp_path, monkeypatch, point, rank):
    old, new = some_state(0), even_shards(some_state(1), 3)
    save_shards(tmp_path, 1, [FlatSource(old)])
    with failing_at(monkeypatch, point, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk"), rank):
        reports = on_threads(3, lambda group: save(tmp_path, 2, new[group.rank], {}, group, keep=1))
    assert [r.ok for r in reports] == [False] * 3 and len({r.reason for r in reports}) == 1
    for part in (f"rank {rank}", "No space left on device", "/full/disk", "step 2", str(tmp_path)):
        assert part in reports[0].reason
    if point != "checkpoint.prepare":
        assert "It needs" in reports[0].reason and "were free" in reports[0].reason
    assert names(tmp_path) == ["step-00000001"]
    assert_holds(tmp_path / "step-00000001", old)
    assert save_shards(tmp_path, 2, new, keep=1).removed == [tmp_path / "step-00000001"]


def test_a_real_short_write_is_reported_with_the_path(tmp_path):
    source = FlatSource({"model.x": torch.randn(100_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        report = save(tmp_path, 1, source, {}, Alone(), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not report.ok and "File too large" in report.reason and "__0_0.distcp" in report.reason
    assert names(tmp_path) == []
    assert save(tmp_path, 1, source, {}, Alone(), keep=1).ok


def test_too_little_free_space_fails_before_anything_is_written(tmp_path, monkeypatch):
    class Disk:
        f_bavail, f_frsize = 3, 1024

    monkeypatch.setattr("os.statvfs", lambda path: Disk)
    monkeypatch.setattr(save_module, "write_pieces", lambda *a: pytest.fail("wrote"))
    report = save(tmp_path, 1, FlatSource(some_state()), {}, Alone(), keep=1)
    assert not report.ok and "not enough free space" in report.reason and "3.0 KiB were free" in report.reason
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    report = save(tmp_path / "file", 1, FlatSource(some_state()), {}, Alone(), keep=1)
    assert not report.ok and str(tmp_path / "file") in report.reason


def test_an_error_that_is_not_of_the_file_system_is_raised_on_every_rank(tmp_path, monkeypatch):
    sources = even_shards(some_state(), 2)
    with failing_at(monkeypatch, "checkpoint", ValueError("broken"), rank=1):
        found = on_threads(2, lambda group: save(tmp_path, 1, sources[group.rank], {}, group, keep=1))
    assert isinstance(found[0], CheckpointError) and "rank 1: ValueError: broken" in str(found[0])
    assert isinstance(found[1], ValueError)
    assert names(tmp_path) == []


def test_a_state_with_an_element_on_two_ranks_or_on_none_is_refused(tmp_path):
    state = some_state()
    with pytest.raises(CheckpointError, match=r"model\.embed\.weight.*held twice"):
        save_shards(tmp_path, 1, [FlatSource(state), FlatSource(state)])
    with pytest.raises(CheckpointError, match="30 of 35 elements"):
        save_shards(tmp_path, 1, [FlatSource({"model.w": torch.ones(7, 5)}, {"model.w": (0, 30)})])
    with pytest.raises(CheckpointError, match=r"model\.w.*float64.*float32"):
        a, b = FlatSource({"model.w": torch.ones(4)}, {"model.w": (0, 2)}), torch.ones(4, dtype=torch.float64)
        save_shards(tmp_path, 1, [a, FlatSource({"model.w": b}, {"model.w": (2, 4)})])
    assert names(tmp_path) == []


def test_the_newest_k_are_kept_and_older_ones_removed_only_after_the_new_one(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        report = save_shards(tmp_path, step, [FlatSource(some_state(step))], keep=2)
    assert report.removed == [tmp_path / "step-00000002"]
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    with failing_at(monkeypatch, "checkpoint.rename", OSError(errno.EIO, "bad disk")):
        assert not save(tmp_path, 5, FlatSource(some_state()), {}, Alone(), keep=1).ok
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_keep_zero_keeps_all(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save_shards(tmp_path, step, [FlatSource({"model.x": torch.ones(1)})], keep=0)
    assert len(names(tmp_path)) == 5


def test_an_incomplete_checkpoint_does_not_count_among_the_kept(tmp_path):
    for step in (1, 2, 3):
        save_shards(tmp_path, step, [FlatSource(some_state())])
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    save_shards(tmp_path, 4, [FlatSource(some_state())], keep=2)
    assert [c.step for c in list_checkpoints(tmp_path) if c.problem is None] == [4, 2]


def test_later_steps_of_a_run_that_was_branched_off_are_left_alone(tmp_path):
    for step in (10, 20, 30):
        save_shards(tmp_path, step, [FlatSource(some_state())])
    save_shards(tmp_path, 15, [FlatSource(some_state())], keep=1)
    assert names(tmp_path) == ["step-00000015", "step-00000020", "step-00000030"]


def test_only_our_own_leftovers_are_removed(tmp_path):
    ours = [".step-00000007.tmp-0123abcd", ".step-00000007.trash-0123abcd"]
    others = [".step-00000007.tmp", "step-7", ".git", "notes.tmp-0123abcd"]
    for name in ours + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    save_shards(tmp_path, 8, [FlatSource(some_state())])
    assert names(tmp_path) == sorted([*others, "step-00000008"])


def test_an_older_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    save_shards(tmp_path, 1, [FlatSource(some_state())])

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        report = save(tmp_path, 2, FlatSource(some_state()), {}, Alone(), keep=1)
    assert report.ok and len(report.warnings) == 1 and "Permission denied" in report.warnings[0]
    assert choose(tmp_path).folder == tmp_path / "step-00000002"


def test_phases_show_in_the_trace(tmp_path):
    tracer = Tracer(enabled=True)
    save(tmp_path, 1, FlatSource(some_state()), {}, Alone(), keep=1, tracer=tracer)
    assert [e.name for e in tracer.events] == ["checkpoint prepare", "checkpoint write", "checkpoint commit"]


def test_large_pieces_pass_the_write_buffer_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("windlass.checkpoint.writer.BUFFER_BYTES", 256)
    state = {"model.a": torch.randn(3, 5), "model.b": torch.randn(40, 40), "model.c": torch.randn(2)}
    folder = save_shards(tmp_path, 1, even_shards(state, 2)).folder
    assert_holds(folder, state)
    target = FlatSource(blank(state))
    restore(folder, target, Alone())
    assert all(torch.equal(target.flat[key], state[key].reshape(-1)) for key in state)
