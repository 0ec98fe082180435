"""Scores text with what a run saved: loss, bits per byte, and the log-probability of every token.

One process, no optimizer state: weights come from the checkpoint's own reader. (During training, validation runs
through the engine on all ranks.) Must not know: the command line, how a checkpoint is laid out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from windlass.checkpoint.reader import CheckpointReader
from windlass.checkpoint.storage import Place
from windlass.checkpoint.store import find_checkpoint
from windlass.data.batch import IGNORE, Batch
from windlass.data.config import DataConfig
from windlass.data.mixture import open_data
from windlass.dist.errors import ConfigError, DataError
from windlass.launch.config import load_job
from windlass.launch.inputs import Validation
from windlass.launch.run_folder import RunFolder
from windlass.launch.trainer import bits_per_byte
from windlass.model.build import build_model, materialise
from windlass.model.config import ModelConfig
from windlass.model.loss import PLAIN, LossConfig, label_log_probs
from windlass.model.protocol import BlockModel

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig

SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("position", pa.int32()),
        ("token", pa.int64()),
        ("label", pa.int64()),
        ("log_prob", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint makes of some text. Units: nats per token, bits per byte (None where bytes are not known)."""

    checkpoint: str
    step: int
    tokens: int
    loss: float
    bits_per_byte: float | None


def load_checkpoint(target: Place, loss: LossConfig = PLAIN) -> tuple[BlockModel, Place, int]:
    """Return the model of a checkpoint (or of the newest of a run) in fp32, the checkpoint's folder and its step.

    Raises: CheckpointError if there is none that is valid
    """
    folder = find_checkpoint(target)
    with CheckpointReader(folder) as reader:
        model = build_model(ModelConfig(**reader.manifest.extra["model"]), loss=loss)

        def fill(name: str, start: int, stop: int, out: torch.Tensor) -> None:
            out.copy_(reader.read(f"model.{name}").flatten()[start:stop])

        materialise(model, fill, torch.float32)
        return model, folder, reader.manifest.step


@torch.no_grad()
def hidden_states(model: BlockModel, batch: Batch) -> torch.Tensor:
    """Return h_BTD behind the last block of a model in this process."""
    context = model.context(batch.positions_BT, batch.documents_BT, torch.float32)
    h_BTD: torch.Tensor = model.embed(batch.tokens_BT, context)
    for block in model.blocks:
        h_BTD = block(h_BTD, context)
    return h_BTD


def job_of(target: Path) -> JobConfig | None:
    """Return the job that wrote a run or checkpoint folder, if its config.yaml is where runs have it."""
    for root in (target, target.parent.parent):
        if RunFolder(root).config.is_file():
            return load_job(str(RunFolder(root).config), []).config
    return None


def evaluate(
    target: Path,
    *,
    data: str = "",
    split: str = "validation",
    samples: int = 0,
    seq_len: int = 0,
    log_probs: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluate a checkpoint on `samples` rows of a split (0: as many as one validation of the run takes).

    With `log_probs` every labelled token becomes a row of that Parquet file, which appears once it is whole.
    Raises: ConfigError if no data is known; DataError or CheckpointError for what cannot be read
    """
    job = job_of(target)
    if job is None and not data:
        raise ConfigError(f"{target}: no config.yaml beside the checkpoint says what data to use. Give --data DIR")
    model, folder, step = load_checkpoint(target, job.loss if job else PLAIN)
    length = seq_len or (job.train.seq_len if job else 1024)
    source = open_data(_data_config(job, data), split, length)
    if source is None:
        raise DataError(f"the data has no documents in the split '{split}'. Give another --split or --data DIR")
    source.check_vocab(next(model.embed.parameters()).shape[0])
    rows = job.train.micro_batch if job else 1
    usual = job.train.eval_batches * rows if job else 64
    reader = Validation(source, min(samples or usual, source.num_samples), rows, 0, 1)
    total, tokens = 0.0, 0
    with _Table(log_probs) as table:
        for begin in range(0, reader.num_samples, rows):
            batch = reader.batch([i if i < reader.num_samples else None for i in range(begin, begin + rows)])
            logp_BT = label_log_probs(model.head, hidden_states(model, batch), batch.labels_BT)
            total -= float(logp_BT.double().sum())
            tokens += batch.num_valid
            table.add(batch, logp_BT)
            progress(min(begin + rows, reader.num_samples), reader.num_samples)
    if not tokens:
        raise DataError(f"the {reader.num_samples} rows of the split '{split}' have no token to predict")
    loss = total / tokens
    return Evaluation(str(folder), step, tokens, loss, bits_per_byte(loss, source.bytes_per_token))


def _data_config(job: JobConfig | None, data: str) -> DataConfig:
    config = job.data if job else DataConfig()
    return replace(config, path=data, mixture=[]) if data else config


class _Table:
    """The Parquet file of log-probabilities, written beside its place and moved there at the end."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._draft = path.with_name(f"{path.name}.tmp-{os.getpid()}") if path else None

    def __enter__(self) -> _Table:
        if self._draft is not None:
            try:
                self._draft.parent.mkdir(parents=True, exist_ok=True)
                self._writer = pq.ParquetWriter(self._draft, SCHEMA)
            except OSError as error:
                raise ConfigError(f"--log-probs {self._path}: {error.strerror}. Give a file you can write") from error
        return self

    def add(self, batch: Batch, logp_BT: torch.Tensor) -> None:
        if self._writer is None:
            return
        valid_BT = batch.labels_BT != IGNORE
        positions_BT = torch.arange(batch.tokens_BT.shape[1]).expand_as(batch.tokens_BT)
        samples_BT = batch.samples_B[:, None].expand_as(batch.tokens_BT)
        columns = [samples_BT, positions_BT.int(), batch.tokens_BT, batch.labels_BT, logp_BT.float()]
        self._writer.write_table(pa.table([pa.array(column[valid_BT].numpy()) for column in columns], schema=SCHEMA))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is None or self._draft is None or self._path is None:
            return
        self._writer.close()
        if kind is None:
            self._draft.replace(self._path)
        else:
            self._draft.unlink()
