"""What a run reads: shares of the validation set, and the identity of the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from windlass.data.batch import IGNORE, Batch
from windlass.data.config import DataConfig
from windlass.data.dataset import Row
from windlass.data.facts import Facts, ShardFacts, SplitFacts, TokenizerFacts
from windlass.data.tokenizer import load_tokenizer
from windlass.dist.errors import DataError
from windlass.launch.inputs import CHUNK, Validation, check_tokenizer, data_digest, plan_rounds


@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 6))
def test_every_validation_sample_is_on_one_rank_and_ranks_do_equally_many_micro_batches(
    num_samples: int, micro_batch: int, num_ranks: int
) -> None:
    by_rank = [plan_rounds(num_samples, micro_batch, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(rounds) for rounds in by_rank}) == 1
    assert all(len(samples) == micro_batch for rounds in by_rank for samples in rounds)
    seen = [sample for rounds in by_rank for samples in rounds for sample in samples if sample is not None]
    assert sorted(seen) == list(range(num_samples))
    # Never a whole round of padding: it would cost a forward for nothing.
    assert all(
        any(by_rank[rank][r] != [None] * micro_batch for rank in range(num_ranks)) for r in range(len(by_rank[0]))
    )


class Numbers:
    """Rows that hold their own sample number."""

    seq_len, num_samples, bytes_per_token = 3, 100, 4.0

    def fill(self, sample: int, row: Row) -> None:
        for array in row:
            array[:] = sample

    def check_vocab(self, vocab_size: int) -> None:
        """Everything fits."""


class Summing:
    """An engine whose loss is the sum of sample numbers of rows with labels."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def evaluate(self, batches: list[Batch]) -> tuple[float, int]:
        self.calls.append(len(batches))
        labels = torch.cat([b.labels_BT for b in batches])
        return float(labels[labels != IGNORE].sum()), int((labels != IGNORE).sum())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_the_validation_set_is_the_same_for_every_number_of_ranks(num_ranks: int) -> None:
    engines = [Summing() for _ in range(num_ranks)]
    results = [Validation(Numbers(), 50, 2, rank, num_ranks).evaluate(engine) for rank, engine in enumerate(engines)]
    assert sum(loss for loss, _ in results) == 3 * sum(range(50))
    assert sum(tokens for _, tokens in results) == 3 * 50
    assert len({tuple(engine.calls) for engine in engines}) == 1  # so that their collectives meet
    assert max(engines[0].calls) <= CHUNK


def test_a_row_of_padding_has_positions_but_no_labels() -> None:
    batch = Validation(Numbers(), 3, 2, 1, 2).batch([7, None])
    assert batch.samples_B.tolist() == [7, -1]
    assert batch.labels_BT[1].tolist() == [IGNORE] * 3
    assert batch.positions_BT[1].tolist() == [0, 1, 2]
    assert batch.tokens_BT.dtype == torch.int64
    assert batch.num_valid == 3


def facts(folder: str = "a", digest: str = "t", tokens: int = 10) -> Facts:
    splits = {
        name: SplitFacts(1, tokens, 40, (ShardFacts("s.parquet", 99, ((1, tokens),)),))
        for name in ("train", "validation")
    }
    return Facts(Path(folder), TokenizerFacts(digest, 257, 256, "end"), "uint16", 5, splits, ("x",), {}, {})


def test_the_digest_of_data_follows_tokens_and_weights_but_not_the_place() -> None:
    one = data_digest(DataConfig(path="a"), [facts()])
    assert one == data_digest(DataConfig(path="b"), [replace(facts("b"), sources=("y",))])
    assert one != data_digest(DataConfig(path="a"), [facts(tokens=11)])
    assert one != data_digest(DataConfig(path="a"), [facts(digest="u")])
    two = [facts(), facts("b")]
    equal = DataConfig(mixture=[{"path": "a", "weight": 1}, {"path": "b", "weight": 1}])
    other = DataConfig(mixture=[{"path": "a", "weight": 1}, {"path": "b", "weight": 2}])
    assert data_digest(equal, two) != data_digest(other, two)


def test_data_of_another_tokenizer_than_the_model_folder_is_refused(tmp_path: Path) -> None:
    check_tokenizer(facts(), tmp_path)  # no tokenizer there: nothing to compare
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path)
    check_tokenizer(facts(digest=tokenizer.facts.digest), tmp_path)
    with pytest.raises(DataError, match=r"prepared with tokenizer other.*--tokenizer"):
        check_tokenizer(facts(digest="other"), tmp_path)


def test_rows_of_a_batch_are_what_the_dataset_wrote() -> None:
    batch = Validation(Numbers(), 4, 2, 0, 1).batch([2, 3])
    assert np.array_equal(batch.tokens_BT.numpy(), [[2] * 3, [3] * 3])
