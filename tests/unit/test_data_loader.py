"""Rows, mixtures and the loader: every token once, any restart, any number of ranks, exact shares."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.data.batch import IGNORE
from windlass.data.config import DataConfig
from windlass.data.dataset import Row, TokenDataset, new_row, permutation
from windlass.data.loader import Loader
from windlass.data.mixture import BLOCK, Mixture, check_data_config, open_data
from windlass.data.prepare import prepare
from windlass.data.shards import check_size
from windlass.dist.errors import ConfigError, DataError

EOS = 256


def texts_of(num: int, *, salt: str = "") -> list[str]:
    rng = np.random.default_rng(len(salt))
    return [f"{salt}{i}:" + "x" * int(length) for i, length in enumerate(rng.integers(0, 40, num))]


ROOT: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> None:
    ROOT.append(tmp_path_factory.mktemp("folders"))


@lru_cache(maxsize=8)
def folder_of(num: int, salt: str) -> Path:
    """Prepare a folder once per session: tiny row groups, several shards."""
    folder = ROOT[-1] / f"{num}{salt}"
    folder.mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts_of(num, salt=salt))
    (folder / "rows.jsonl").write_text(rows)
    prepare([folder / "rows.jsonl"], folder / "out", workers=1, validation=0.2, group_tokens=100, unit_bytes=1000)
    return folder / "out"


def dataset_of(seq_len: int, *, split: str = "train", num: int = 100, salt: str = "", **more: Any) -> TokenDataset:
    return TokenDataset(folder_of(num, salt), split, seq_len, shuffle_window=3, **more)


def stream_of(dataset: TokenDataset, epoch: int) -> np.ndarray:
    first = epoch * dataset.num_samples
    rows = [dataset.sample(first + i).tokens_T for i in range(dataset.num_samples)]
    return np.concatenate(rows)


def documents_of(stream: np.ndarray) -> list[str]:
    """Split a stream at document ends; padding gives no text."""
    ends = np.flatnonzero(stream == EOS)
    return [text for part in np.split(stream, ends) if (text := bytes(part[part != EOS].tolist()).decode())]


@given(seq_len=st.integers(8, 300), epoch=st.integers(0, 3), seed=st.integers(0, 2**63))
@settings(max_examples=12)
def test_an_epoch_holds_every_token_of_every_document_exactly_once(seq_len: int, epoch: int, seed: int) -> None:
    dataset = dataset_of(seq_len, seed=seed)
    held_out = dataset_of(17, split="validation")
    seen = documents_of(stream_of(dataset, epoch)) + documents_of(stream_of(held_out, 0))
    assert sorted(seen) == sorted(texts_of(100))


@given(seq_len=st.integers(2, 120), epoch=st.integers(0, 2))
@settings(max_examples=10)
def test_positions_documents_and_labels_follow_from_the_stream(seq_len: int, epoch: int) -> None:
    dataset = dataset_of(seq_len)
    stream = stream_of(dataset, epoch)
    num_labels = 0
    for i in range(dataset.num_samples):
        row = dataset.sample(epoch * dataset.num_samples + i)
        position = document = 0
        for t in range(seq_len):
            at = i * seq_len + t
            if t and row.tokens_T[t - 1] == EOS and at <= dataset.num_stream_tokens:
                position, document = 0, document + 1
            assert (row.positions_T[t], row.documents_T[t]) == (position, document)
            has_label = stream[at] != EOS
            assert row.labels_T[t] == (stream[at + 1] if has_label else IGNORE)
            num_labels += has_label
            position += 1
    assert num_labels == dataset.facts.splits["train"].tokens


@given(order=st.lists(st.integers(0, 200), min_size=1, max_size=12), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_a_row_is_the_same_whatever_was_read_before(order: list[int], seed: int) -> None:
    used = dataset_of(64, seed=seed)
    for sample in order:
        fresh = dataset_of(64, seed=seed)
        for mine, theirs in zip(used.sample(sample), fresh.sample(sample), strict=True):
            assert np.array_equal(mine, theirs)


def test_epochs_and_seeds_have_different_orders_and_validation_has_one(tmp_path: Path) -> None:
    first, second = (stream_of(dataset_of(64), epoch) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, stream_of(dataset_of(64, seed=1), 0))
    held_out = dataset_of(64, split="validation")
    assert np.array_equal(stream_of(held_out, 0), stream_of(held_out, 5))


def test_the_order_never_changes_between_versions() -> None:
    assert permutation(8, seed=1, epoch=2, stream=3).tolist() == [0, 6, 2, 3, 1, 4, 7, 5]


def test_few_windows_and_files_stay_in_memory() -> None:
    dataset = dataset_of(64)
    stream_of(dataset, 0)
    assert len(dataset._epoch(0).window_stops) > 4
    assert len(dataset._windows) == 4


layouts = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]))


@given(layout=layouts, start=st.integers(0, 40), prefetch=st.integers(0, 3))
@settings(max_examples=20)
def test_any_ranks_and_micro_batches_share_out_the_same_samples_from_any_start(
    layout: tuple[int, int, int], start: int, prefetch: int
) -> None:
    micro_batch, num_micro_batches, num_ranks = layout
    dataset, step = dataset_of(32), micro_batch * num_micro_batches * num_ranks
    seen: list[list[int]] = [[], []]
    for rank in range(num_ranks):
        with Loader(
            dataset_of(32),
            micro_batch=micro_batch,
            num_micro_batches=num_micro_batches,
            rank=rank,
            num_ranks=num_ranks,
            global_batch=step,
            consumed=start,
            prefetch=prefetch,
        ) as loader:
            for taken in seen:
                batches = loader.next_step()
                assert [b.tokens_BT.shape for b in batches] == [(micro_batch, 32)] * num_micro_batches
                for batch in batches:
                    for b, sample in enumerate(batch.samples_B.tolist()):
                        expected = torch.from_numpy(np.stack(dataset.sample(sample)))
                        got = (batch.tokens_BT, batch.positions_BT, batch.documents_BT, batch.labels_BT)
                        assert torch.equal(torch.stack([t[b] for t in got]), expected)
                    taken += batch.samples_B.tolist()
            assert loader.consumed == start + 2 * step
    for number, taken in enumerate(seen):
        assert sorted(taken) == list(range(start + number * step, start + (number + 1) * step))


def loader_of(dataset: Any, **changes: Any) -> Loader:
    alone = {"micro_batch": 2, "num_micro_batches": 1, "rank": 0, "num_ranks": 1, "global_batch": 2}
    return Loader(dataset, **(alone | changes))


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranges_that_a_run_leaves_out_are_passed_over_wherever_it_starts(num_ranks: int, prefetch: int) -> None:
    skips = [(8, 16), (16, 20), (28, 32)]
    wanted = [[0, 1, 2, 3], [4, 5, 6, 7], [20, 21, 22, 23], [24, 25, 26, 27], [32, 33, 34, 35]]
    for start, expected in ((0, wanted), (8, wanted[2:]), (12, wanted[2:]), (28, wanted[4:])):
        taken: list[list[int]] = [[] for _ in expected]
        for rank in range(num_ranks):
            shape = {"micro_batch": 1, "num_micro_batches": 4 // num_ranks, "rank": rank, "num_ranks": num_ranks}
            changes = {**shape, "global_batch": 4, "consumed": start, "prefetch": prefetch, "skips": skips}
            with loader_of(dataset_of(32), **changes) as loader:
                for step in taken:
                    step += [int(b.samples_B[0]) for b in loader.next_step()]
                assert loader.consumed == 36
        assert [sorted(step) for step in taken] == expected
    with pytest.raises(DataError, match="not whole steps of 4"):
        loader_of(dataset_of(32), global_batch=4, num_micro_batches=2, skips=[(0, 6)])


def test_a_loader_can_be_moved() -> None:
    with loader_of(dataset_of(32)) as loader:
        first = loader.next_step()[0]
        loader.next_step()
        loader.seek(0)
        assert torch.equal(loader.next_step()[0].tokens_BT, first.tokens_BT)
        assert loader.consumed == 2
        assert loader.wait_s > 0


class Broken:
    """Samples whose third row cannot be read."""

    seq_len, num_samples, bytes_per_token = 4, 100, 1.0

    def fill(self, sample: int, row: Row) -> None:
        if sample == 2:
            raise DataError("row 2 is gone")

    def check_vocab(self, vocab_size: int) -> None:
        """Every id fits."""


def test_an_error_of_the_thread_is_raised_where_the_batch_is_wanted() -> None:
    with loader_of(Broken(), prefetch=3) as loader:
        loader.next_step()
        with pytest.raises(DataError, match="row 2 is gone"):
            loader.next_step()
    with pytest.raises(DataError, match="closed"):
        loader.next_step()


def test_a_step_larger_than_an_epoch_or_than_its_parts_is_an_error() -> None:
    with pytest.raises(DataError, match=r"rows of 64 tokens in an epoch, one step takes 200"):
        loader_of(dataset_of(64), micro_batch=200, global_batch=200)
    with pytest.raises(DataError, match=r"global_batch = 3 is not train.micro_batch = 2 x 1 .* = 2"):
        loader_of(dataset_of(64), global_batch=3)


@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=4), start=st.integers(0, 10**12))
@settings(max_examples=40)
def test_a_mixture_keeps_its_shares_and_each_member_in_order(weights: list[int], start: int) -> None:
    mixture = Mixture([(Broken(), weight / 10) for weight in weights])
    total = sum(weights)
    counts = mixture.counts(start * total)
    assert counts == [start * weight for weight in weights]
    begin = start // BLOCK * BLOCK
    before, after = mixture.counts(begin), mixture.counts(begin + BLOCK)
    drawn = sorted(mixture.locate(begin + i) for i in range(BLOCK))
    assert drawn == [(k, number) for k in range(len(weights)) for number in range(before[k], after[k])]
    for count, weight in zip(mixture.counts(start + 17), weights, strict=True):
        assert abs(count - (start + 17) * weight / total) < len(weights)


def test_a_mixture_serves_rows_of_its_members(tmp_path: Path) -> None:
    a, b = folder_of(100, ""), folder_of(50, "salt")
    config = DataConfig(mixture=[{"path": str(a), "weight": 3}, {"path": str(b), "weight": 1}], shuffle_window=3)
    mixture = open_data(config, "train", 32)
    assert isinstance(mixture, Mixture)
    located = [mixture.locate(i) for i in range(400)]
    assert sum(member == 1 for member, _ in located[: BLOCK * 6]) == BLOCK * 6 // 4
    row = new_row(32)
    for sample, (member, number) in enumerate(located[:20]):
        mixture.members[member].fill(number, row)
        assert np.array_equal(mixture.sample(sample).tokens_T, row.tokens_T)
    assert mixture.num_samples == sum(member.num_samples for member in mixture.members)
    assert mixture.bytes_per_token == 1.0
    with pytest.raises(DataError, match="vocab_size"):
        mixture.check_vocab(100)


def test_no_data_and_no_held_out_documents_open_as_nothing(tmp_path: Path) -> None:
    assert open_data(DataConfig(), "train", 8) is None
    (tmp_path / "a.txt").write_text("some text without a twin")
    prepare([tmp_path / "a.txt"], tmp_path / "out", workers=1, validation=0.0)
    config = DataConfig(path=str(tmp_path / "out"))
    assert open_data(config, "validation", 8) is None
    assert isinstance(open_data(config, "train", 8), TokenDataset)


def test_a_split_smaller_than_a_row_is_an_error() -> None:
    with pytest.raises(DataError, match=r"the validation split has \d+ tokens.*train.seq_len = 9999.*--validation"):
        dataset_of(9999, split="validation")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DataConfig(path="a", mixture=[{"path": "b", "weight": 1}]), "data.path and data.mixture are both set"),
        (DataConfig(mixture=[{"path": "b", "wieght": 1}]), r"data.mixture\[0\].wieght: unknown key"),
        (DataConfig(mixture=[{"weight": 1}]), r"data.mixture\[0\].path"),
        (DataConfig(mixture=[{"path": "b", "weight": 0}]), r"data.mixture\[0\].weight = 0"),
    ],
)
def test_a_data_section_that_cannot_work_names_its_key(config: DataConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_data_config(config)


def test_truncated_and_damaged_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words. " * 50)
    facts = prepare([tmp_path / "a.txt"], tmp_path / "out", workers=1, validation=0.0)
    shard = tmp_path / "out" / "train-00000.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(DataError, match=r"train-00000.parquet: \d+ bytes, \d+ were written: truncated"):
        TokenDataset(tmp_path / "out", "train", 8)
    shard.write_bytes(content[:100] + bytes([content[100] ^ 4]) + content[101:])
    with pytest.raises(DataError, match=r"train-00000.parquet: row group 0"):
        TokenDataset(tmp_path / "out", "train", 8).sample(0)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000.parquet: No such file"):
        check_size(shard, facts.splits["train"].shards[0].size_bytes)
