"""What a run reads: data checked against the model, the size of a step, and this rank's share of both splits.

Everything here fails before a process group exists. Must not know: the engine, checkpoints, the run folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from windlass.data.batch import IGNORE, Batch
from windlass.data.config import DataConfig
from windlass.data.dataset import Row, Samples
from windlass.data.facts import Facts, read_facts
from windlass.data.loader import Loader
from windlass.data.mixture import open_data
from windlass.data.tokenizer import load_tokenizer
from windlass.dist.errors import ConfigError, DataError
from windlass.launch.resume import Identity

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig

CHUNK = 16  # validation micro-batches in memory at a time


class Evaluator(Protocol):
    """What validation needs of the engine."""

    def evaluate(self, batches: list[Batch]) -> tuple[float, int]: ...


@dataclass(frozen=True)
class Inputs:
    """The data of a run as this rank reads it."""

    train: Samples
    validation: Validation | None
    identity: Identity
    micro_batch: int
    num_micro_batches: int
    rank: int
    num_ranks: int
    prefetch: int

    def loader(self, consumed: int, skips: Sequence[tuple[int, int]] = ()) -> Loader:
        """Start reading behind the first `consumed` samples, and leave out the ranges of `skips`."""
        return Loader(
            self.train,
            micro_batch=self.micro_batch,
            num_micro_batches=self.num_micro_batches,
            rank=self.rank,
            num_ranks=self.num_ranks,
            global_batch=self.identity.global_batch,
            consumed=consumed,
            prefetch=self.prefetch,
            skips=skips,
        )


def open_inputs(config: JobConfig, rank: int, num_ranks: int, vocab_size: int) -> Inputs:
    """Open both splits and check them against the model.

    Raises: DataError if a folder is missing or damaged, or its tokens do not fit the model
    """
    train = config.train
    data = open_data(config.data, "train", train.seq_len)
    if data is None:
        raise ConfigError(
            "data.path is not set: give a folder written by `windlass data prepare`, or several in data.mixture."
        )
    facts = data_facts(config.data)
    data.check_vocab(vocab_size)
    if config.model.hf_folder:
        check_tokenizer(facts[0], Path(config.model.hf_folder))
    held_out = open_data(config.data, "validation", train.seq_len)
    validation = None
    if held_out is not None:
        held_out.check_vocab(vocab_size)
        num_samples = min(held_out.num_samples, train.eval_batches * train.micro_batch)
        validation = Validation(held_out, num_samples, train.micro_batch, rank, num_ranks)
    num_micro_batches = train.num_micro_batches(num_ranks)
    identity = Identity(
        global_batch=train.micro_batch * num_ranks * num_micro_batches,
        seq_len=train.seq_len,
        data_seed=config.data.seed,
        shuffle_window=config.data.shuffle_window,
        data_digest=data_digest(config.data, facts),
        tokenizer_digest=facts[0].tokenizer.digest,
        tokenizer_folder=str(facts[0].folder.resolve()),
    )
    return Inputs(
        data, validation, identity, train.micro_batch, num_micro_batches, rank, num_ranks, config.data.prefetch
    )


def data_facts(config: DataConfig) -> list[Facts]:
    """Return the facts of every token folder of a job, in order."""
    return [read_facts(path) for path in [m["path"] for m in config.mixture] or [config.path]]


def data_digest(config: DataConfig, facts: list[Facts]) -> str:
    """Return a short name of the training tokens and their shares, equal wherever the folders lie."""
    weights = [m.get("weight", 1) for m in config.mixture]
    what = [weights, [[f.tokenizer.digest, asdict(f.splits["train"])] for f in facts]]
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_tokenizer(facts: Facts, model_folder: Path) -> None:
    """Raise DataError if the model folder has a tokenizer and the data was prepared with another one."""
    if not (model_folder / "tokenizer.json").is_file():
        return
    theirs = load_tokenizer(model_folder).facts
    ours = facts.tokenizer
    if theirs.digest != ours.digest:
        raise DataError(
            f"{facts.folder}: prepared with tokenizer {ours.digest[:12]} ({ours.vocab_size} ids), but "
            f"model.hf_folder = '{model_folder}' has {theirs.digest[:12]} ({theirs.vocab_size} ids): the same ids mean "
            f"other words. Run `windlass data prepare SOURCE... --tokenizer {model_folder} --out ...`."
        )


@dataclass(frozen=True)
class Validation:
    """The first `num_samples` of the held-out split, shared out over the ranks.

    Which samples are evaluated does not depend on the number of ranks; only the order of the sum does.
    """

    dataset: Samples
    num_samples: int
    micro_batch: int
    rank: int
    num_ranks: int

    @property
    def bytes_per_token(self) -> float:
        return self.dataset.bytes_per_token

    def evaluate(self, engine: Evaluator) -> tuple[float, int]:
        """Return the loss sum in nats and the number of labels over all samples.

        Collective: every rank
        """
        loss_sum, tokens = 0.0, 0
        for chunk in self._chunks():
            more_loss, more_tokens = engine.evaluate(chunk)
            loss_sum, tokens = loss_sum + more_loss, tokens + more_tokens
        return loss_sum, tokens

    def _chunks(self) -> Iterator[list[Batch]]:
        rounds = plan_rounds(self.num_samples, self.micro_batch, self.rank, self.num_ranks)
        for begin in range(0, len(rounds), CHUNK):
            yield [self.batch(samples) for samples in rounds[begin : begin + CHUNK]]

    def batch(self, samples: list[int | None]) -> Batch:
        """Build one micro-batch; a row of padding has no labels and the sample number -1."""
        seq_len = self.dataset.seq_len
        arrays_4BT = np.zeros((4, len(samples), seq_len), np.int64)
        for b, sample in enumerate(samples):
            row = Row(*arrays_4BT[:, b])
            if sample is None:
                row.positions_T[:] = np.arange(seq_len)
                row.labels_T[:] = IGNORE
            else:
                self.dataset.fill(sample, row)
        numbers_B = torch.tensor([-1 if sample is None else sample for sample in samples])
        tokens_BT, positions_BT, documents_BT, labels_BT = torch.from_numpy(arrays_4BT)
        return Batch(tokens_BT, positions_BT, documents_BT, labels_BT, numbers_B)


def plan_rounds(num_samples: int, micro_batch: int, rank: int, num_ranks: int) -> list[list[int | None]]:
    """Return the samples of this rank, a list for each micro-batch; None is a row of padding without labels.

    Invariant: every sample appears on exactly one rank, and every rank has the same number of full micro-batches.
    """
    rounds: list[list[int | None]] = []
    for begin in range(0, num_samples, micro_batch * num_ranks):
        first = begin + rank * micro_batch
        rounds.append([i if i < num_samples else None for i in range(first, first + micro_batch)])
    return rounds
