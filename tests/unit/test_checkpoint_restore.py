"""Restoring: any partition into any other, conversions, other models, damage."""

import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint_doubles import FlatSource, blank, even_shards, on_threads, save_shards, shards, some_state
from windlass.checkpoint import reader as reader_module
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.reader import CheckpointReader, read_manifest, read_tensor
from windlass.checkpoint.restore import restore
from windlass.dist.errors import CheckpointError

WORDS = "[a-z]"


def restore_shards(folder, targets, **options):
    found = on_threads(len(targets), lambda group: restore(folder, targets[group.rank], group, **options))
    errors = [f for f in found if isinstance(f, Exception)]
    if errors:
        raise errors[0]
    return found


def assert_equal(targets, state):
    for key, whole in state.items():
        assert torch.equal(torch.cat([t.flat[key] for t in targets]), whole.reshape(-1)), key


def flip(path, position, bit=1):
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


@st.composite
def partitions(draw):
    shapes = draw(st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=3))
    tensors = {f"model.{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    sides = []
    for _ in range(2):
        num_ranks = draw(st.integers(1, 4))
        cut = {
            key: draw(st.lists(st.integers(0, math.prod(t.shape)), min_size=num_ranks - 1, max_size=num_ranks - 1))
            for key, t in tensors.items()
        }
        sides.append(shards(tensors, cut, num_ranks))
    return tensors, *sides


@settings(max_examples=40)
@given(partitions(), st.sampled_from([8, 64, 1 << 20]), st.booleans())
def test_what_any_partition_saved_any_other_loads_bitwise(case, buffer_bytes, check_bytes):
    tensors, sources, targets = case
    for target in targets:
        for flat in target.flat.values():
            flat.zero_()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        patch.setattr(reader_module, "BUFFER_BYTES", buffer_bytes)
        report = save_shards(Path(folder), 1, sources)
        restore_shards(report.folder, targets, verify=check_bytes)
    assert_equal(targets, tensors)
    assert [t.num_loaded for t in targets] == [1] * len(targets)


def test_replicas_are_filled_on_every_rank(tmp_path):
    state = some_state()
    folder = save_shards(tmp_path, 1, even_shards(state, 3), extra={"tokens": 9}).folder
    targets = [FlatSource(blank(state)) for _ in range(2)]
    assert restore_shards(folder, targets) == [{"tokens": 9}] * 2
    for target in targets:
        assert_equal([target], state)


def test_blocks_that_are_not_flat_ranges_load_too(tmp_path):
    state = {"model.w": torch.randn(6, 7)}
    folder = save_shards(tmp_path, 1, even_shards(state, 3)).folder
    target = FlatSource({})
    out = torch.zeros(4, 3)
    from windlass.dist.box import Box
    from windlass.dist.state import Piece

    target.pieces = [Piece("model.w", (6, 7), Box((1, 2), (4, 3)), out)]
    restore(folder, target, Alone())
    assert torch.equal(out, state["model.w"][1:5, 2:5])


@pytest.mark.parametrize("buffer_bytes", [64, 1 << 20])
def test_floating_point_dtypes_are_converted(tmp_path, monkeypatch, buffer_bytes):
    monkeypatch.setattr(reader_module, "BUFFER_BYTES", buffer_bytes)
    state = {"model.a": torch.randn(50), "model.b": torch.randn(50).bfloat16(), "model.c": torch.randn(3).double()}
    folder = save_shards(tmp_path, 1, even_shards(state, 2)).folder
    wanted = {"model.a": torch.bfloat16, "model.b": torch.float32, "model.c": torch.float32}
    target = FlatSource({key: torch.zeros(t.shape, dtype=wanted[key]) for key, t in state.items()})
    restore(folder, target, Alone(), verify=False)
    assert all(torch.equal(target.flat[key], state[key].to(dtype)) for key, dtype in wanted.items())


def test_integers_are_not_converted(tmp_path):
    folder = save_shards(tmp_path, 1, [FlatSource({"optimizer.step": torch.tensor(3)})]).folder
    with pytest.raises(CheckpointError, match=r"optimizer\.step.*int64 in the checkpoint and float32 here"):
        restore(folder, FlatSource({"optimizer.step": torch.tensor(0.0)}), Alone())


def test_a_checkpoint_of_another_model_names_the_first_differing_tensor_and_changes_nothing(tmp_path):
    state = some_state()
    folder = save_shards(tmp_path, 1, even_shards(state, 2)).folder
    other = {**blank(state), "model.blocks.0.weight": torch.zeros(3, 4, 6), "model.blocks.0.bias": torch.zeros(6)}
    targets = even_shards(other, 2)
    with pytest.raises(
        CheckpointError, match=r"model\.blocks\.0\.weight' has shape \[3, 4, 5\] in the checkpoint and \[3, 4, 6\] here"
    ):
        restore_shards(folder, targets)
    assert all(not flat.any() for target in targets for flat in target.flat.values())
    assert [t.num_loaded for t in targets] == [0, 0]


def test_a_tensor_that_only_one_rank_misses_fails_on_every_rank(tmp_path):
    state = {"model.a": torch.ones(4)}
    folder = save_shards(tmp_path, 1, [FlatSource(state)]).folder
    targets = [FlatSource(state), FlatSource({**state, "model.b": torch.ones(2)})]
    found = on_threads(2, lambda group: restore(folder, targets[group.rank], group))
    assert all(isinstance(f, CheckpointError) and "has no tensor 'model.b'" in str(f) for f in found)
    assert str(found[0]).startswith("rank 1: ")


def test_a_tensor_that_nobody_wants_is_an_error_unless_its_whole_family_is_unwanted(tmp_path):
    state = some_state()
    folder = save_shards(tmp_path, 1, [FlatSource(state)]).folder
    fewer = {key: t for key, t in blank(state).items() if key != "optimizer.step"}
    with pytest.raises(CheckpointError, match=r"holds tensor 'optimizer\.step'"):
        restore(folder, FlatSource(fewer), Alone())
    only_model = {key: t for key, t in blank(state).items() if key.startswith("model.")}
    target = FlatSource(only_model)
    restore(folder, target, Alone())
    assert_equal([target], {key: state[key] for key in only_model})


def test_damaged_bytes_are_named_by_file_and_tensor(tmp_path):
    state = some_state()
    folder = save_shards(tmp_path, 1, even_shards(state, 2)).folder
    piece = read_manifest(folder).tensors["model.embed.weight"].pieces[-1]
    flip(folder / piece.file, piece.offset + 5)
    with pytest.raises(CheckpointError, match=rf"{piece.file} is damaged.*model\.embed\.weight"):
        restore_shards(folder, even_shards(blank(state), 2))
    with pytest.raises(CheckpointError, match=r"model\.embed\.weight"):
        read_tensor(folder, "model.embed.weight")
    assert torch.equal(read_tensor(folder, "optimizer.step"), state["optimizer.step"])
    restore(folder, FlatSource(blank(state)), Alone(), verify=False)


def test_damage_in_a_part_that_this_rank_does_not_need_is_still_seen_when_verifying(tmp_path):
    state = {"model.w": torch.randn(100)}
    folder = save_shards(tmp_path, 1, [FlatSource(state)]).folder
    piece = read_manifest(folder).tensors["model.w"].pieces[0]
    flip(folder / piece.file, piece.offset + 399)
    head = FlatSource(blank(state), {"model.w": (0, 10)})
    with pytest.raises(CheckpointError, match="damaged"):
        restore(folder, head, Alone())
    restore(folder, head, Alone(), verify=False)
    assert torch.equal(head.flat["model.w"], state["model.w"][:10])


def test_a_truncated_or_missing_file_is_named(tmp_path):
    state = some_state()
    folder = save_shards(tmp_path, 1, even_shards(state, 2)).folder
    with open(folder / "__1_0.distcp", "rb+") as file:
        file.truncate(300)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is truncated"):
        restore(folder, FlatSource(blank(state)), Alone())
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp cannot be opened: No such file"):
        restore(folder, FlatSource(blank(state)), Alone())


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint: it has no manifest\.json"):
        restore(tmp_path, FlatSource(some_state()), Alone())


def test_neighbouring_pieces_are_read_in_one_call(tmp_path, monkeypatch):
    state = {f"model.{i:03d}": torch.randn(16) for i in range(200)}
    folder = save_shards(tmp_path, 1, [FlatSource(state)]).folder
    calls, manifest = [], read_manifest(folder)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args) or preadv(*args))
    target = FlatSource(blank(state))
    restore(folder, target, Alone(), manifest=manifest)
    assert_equal([target], state)
    assert len(calls) == 1


def test_a_reader_refuses_a_name_it_does_not_have(tmp_path):
    folder = save_shards(tmp_path, 1, [FlatSource({"model.x": torch.ones(2)})]).folder
    with CheckpointReader(folder) as reader, pytest.raises(CheckpointError, match=r"no tensor 'model\.y'"):
        reader.read("model.y")
