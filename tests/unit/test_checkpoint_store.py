"""Listing, verifying and choosing: the newest valid checkpoint wins, and what was passed over is said."""

import pytest
import torch

from tests.checkpoint_doubles import FlatSource, even_shards, on_threads, save_shards, some_state
from windlass.checkpoint.manifest import Manifest, readable_bytes
from windlass.checkpoint.reader import read_manifest
from windlass.checkpoint.store import choose, find_checkpoint, list_checkpoints, verify
from windlass.dist.errors import CheckpointError


def flip(path, position, bit=1):
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


def three(root):
    return [save_shards(root, step, even_shards(some_state(step), 2)).folder for step in (1, 2, 3)]


def bit_flip(folder):
    piece = read_manifest(folder).tensors["model.embed.weight"].pieces[0]
    flip(folder / piece.file, piece.offset)


def truncation(folder):
    with open(folder / "__1_0.distcp", "rb+") as file:
        file.truncate((folder / "__1_0.distcp").stat().st_size - 1)


DAMAGE = {
    "bit flip": (bit_flip, ["__0_0.distcp", "damaged", "model.embed.weight"]),
    "truncation": (truncation, ["__1_0.distcp", "truncated"]),
    "missing file": (lambda folder: (folder / "__0_0.distcp").unlink(), ["__0_0.distcp", "is missing"]),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), ["has no manifest.json"]),
    "manifest flip": (lambda folder: flip(folder / "manifest.json", 400), ["manifest.json", "damaged"]),
    "metadata flip": (lambda folder: flip(folder / ".metadata", 50), [".metadata", "damaged"]),
    "framing flip": (lambda folder: flip(folder / "__0_0.distcp", 3), ["__0_0.distcp", "damaged"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_reason_told(tmp_path, kind):
    folders = three(tmp_path)
    damage, words = DAMAGE[kind]
    damage(folders[2])
    choice = choose(tmp_path)
    assert choice.folder == folders[1]
    assert [folder for folder, _ in choice.skipped] == [folders[2]]
    assert all(word in choice.skipped[0][1] for word in words), choice.skipped
    assert verify(folders[2]) and not verify(folders[1])


def test_ranks_share_the_verifying_and_agree(tmp_path):
    folders = three(tmp_path)
    bit_flip(folders[2])
    seen = []
    found = on_threads(3, lambda group: choose(tmp_path, group, progress=seen.append))
    assert found[0] == found[1] == found[2] and found[0].folder == folders[1]
    assert len(seen) == 2 * len(read_manifest(folders[1]).files)


def test_without_a_valid_checkpoint_there_is_none_to_resume(tmp_path):
    assert choose(tmp_path / "nowhere").folder is None
    folders = three(tmp_path)
    for folder in folders:
        truncation(folder)
    choice = choose(tmp_path)
    assert choice.folder is None and len(choice.skipped) == 3
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        find_checkpoint(tmp_path)


def test_listing_shows_newest_first_with_what_is_wrong(tmp_path):
    folders = three(tmp_path)
    truncation(folders[1])
    (tmp_path / "step-7").mkdir()
    found = list_checkpoints(tmp_path)
    assert [info.step for info in found] == [3, 2, 1]
    assert found[0].problem is None and found[0].num_tensors == 6 and found[0].world_size == 2
    assert "__1_0.distcp has" in str(found[1].problem)


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path):
    folder = save_shards(tmp_path, 1, [FlatSource({"model.x": torch.ones(2)})], extra={"note": "é"}).folder
    data = (folder / "manifest.json").read_bytes()
    assert Manifest.parse(data, "here").extra == {"note": "é"}
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CheckpointError, match=r"^here "):
            Manifest.parse(bytes(damaged), "here")


def test_a_run_folder_its_checkpoints_or_one_of_them_can_be_named(tmp_path):
    folders = three(tmp_path / "checkpoints")
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == folders[2]
    assert find_checkpoint(folders[0]) == folders[0]
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        find_checkpoint(tmp_path / "elsewhere")


def test_bytes_are_readable():
    assert [readable_bytes(n) for n in (12, 2048, 3 << 20, 5 << 30, 7 << 40)] == [
        "12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB", "7.0 TiB",
    ]  # fmt: skip
