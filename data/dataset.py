"""Rows of packed documents out of a token folder, each a pure function of (seed, epoch, position).

An epoch is one long stream: every document once, each followed by the end-of-document token, cut into rows of
`seq_len`. The order is shuffled in two levels: row groups are permuted, windows of consecutive permuted groups form a
pool, and documents are permuted inside the pool. A row therefore needs only its window decoded, wherever it lies.
Must not know: ranks, micro-batches, mixtures.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from windlass.data.batch import IGNORE
from windlass.data.facts import Facts, check_vocab, read_facts
from windlass.data.shards import ShardReader, check_size
from windlass.dist.errors import DataError

_WINDOWS_KEPT = 4
_SHARDS_KEPT = 64
_EPOCHS_KEPT = 2
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Row(NamedTuple):
    """One sample. Shapes: every array is (T,), int64. The meaning is that of `Batch`."""

    tokens_T: np.ndarray
    positions_T: np.ndarray
    documents_T: np.ndarray
    labels_T: np.ndarray


class Samples(Protocol):
    """A source of rows numbered from 0 without end."""

    seq_len: int

    @property
    def num_samples(self) -> int:
        """Rows of one epoch."""

    @property
    def bytes_per_token(self) -> float:
        """Text bytes per labelled token."""

    def fill(self, sample: int, row: Row) -> None:
        """Write sample number `sample` into the arrays of `row`."""

    def check_vocab(self, vocab_size: int) -> None:
        """Raise DataError when a token id does not fit the model."""


def new_row(seq_len: int) -> Row:
    return Row(*np.empty((4, seq_len), np.int64))


def permutation(num: int, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Return a permutation that depends on its arguments only.

    Differs: sorts raw Philox words instead of calling numpy's `permutation`, whose algorithm numpy may change.
    """
    words = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]).random_raw(num)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class _Window:
    stream: np.ndarray  # tokens of all documents of the window in order, each with its end
    ends: np.ndarray  # where each document stops in `stream`, its end included


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # row groups in reading order
    window_stops: np.ndarray  # tokens of the stream up to the end of each window


class TokenDataset:
    """The samples of one split of one token folder. For one thread.

    The train split is shuffled anew in each epoch, the validation split keeps the order of the files. The last row of
    an epoch is filled up with end-of-document tokens that have no label.
    Raises: DataError if the folder or a shard is missing or damaged, or the split does not fill one row.
    """

    def __init__(
        self, folder: str | Path, split: str, seq_len: int, *, seed: int = 0, shuffle_window: int = 16
    ) -> None:
        self.facts: Facts = read_facts(folder)
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self._shuffled = split == "train"
        self._window_groups = shuffle_window
        totals = self.facts.splits[split]
        for shard in totals.shards:
            check_size(self.facts.folder / shard.name, shard.size_bytes)
        self._shards = totals.shards
        self._group_shard = np.repeat(np.arange(len(totals.shards)), [len(s.groups) for s in totals.shards])
        self._group_index = np.concatenate([np.arange(len(s.groups)) for s in totals.shards] or [np.arange(0)])
        groups = np.array([g for s in totals.shards for g in s.groups], np.int64).reshape(-1, 2)
        self._group_sizes = groups.sum(axis=1)  # tokens and one end per document
        self.num_stream_tokens = int(self._group_sizes.sum())
        self.num_samples = -(-self.num_stream_tokens // seq_len)
        if self.num_stream_tokens < seq_len:
            raise DataError(
                f"{self.facts.folder}: the {split} split has {self.num_stream_tokens} tokens, one row needs "
                f"train.seq_len = {seq_len}. Prepare more text"
                + ("." if self._shuffled else f", a larger --validation (now {self.facts.settings['validation']}),")
                + " or lower train.seq_len."
            )
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    @property
    def bytes_per_token(self) -> float:
        return self.facts.bytes_per_token(self.split)

    def check_vocab(self, vocab_size: int) -> None:
        check_vocab(self.facts, vocab_size)

    def sample(self, sample: int) -> Row:
        """Return sample number `sample`; its epoch is `sample // num_samples`."""
        row = new_row(self.seq_len)
        self.fill(sample, row)
        return row

    def fill(self, sample: int, row: Row) -> None:
        epoch, position = divmod(sample, self.num_samples)
        epoch = epoch if self._shuffled else 0
        plan = self._epoch(epoch)
        start = position * self.seq_len
        stop = min(start + self.seq_len, self.num_stream_tokens)
        window_index = int(plan.window_stops.searchsorted(start, side="right"))
        window_start = int(plan.window_stops[window_index - 1]) if window_index else 0
        filled = 0
        ends = []
        while start + filled < stop:
            window = self._window(epoch, window_index)
            begin = start + filled - window_start
            num = min(stop - start - filled, len(window.stream) - begin)
            row.tokens_T[filled : filled + num] = window.stream[begin : begin + num]
            # A window's last token ends a document and has no label, so no label lies in another window.
            following = window.stream[begin + 1 : begin + 1 + num]
            row.labels_T[filled : filled + len(following)] = following
            first, last = window.ends.searchsorted((begin, begin + num), side="right")
            ends.append(window.ends[first:last] + (filled - begin))
            filled += num
            window_start += len(window.stream)
            window_index += 1
        _mark_documents(row, ends[0] if len(ends) == 1 else np.concatenate(ends), filled, self.facts.tokenizer.eos_id)

    def _epoch(self, epoch: int) -> _Epoch:
        def build() -> _Epoch:
            num_groups = len(self._group_sizes)
            order = np.arange(num_groups)
            if self._shuffled:
                order = permutation(num_groups, seed=self.seed, epoch=epoch, stream=0)
            starts = np.arange(0, num_groups, self._window_groups)
            return _Epoch(order, np.cumsum(np.add.reduceat(self._group_sizes[order], starts)))

        return _kept(self._epochs, epoch, build, _EPOCHS_KEPT)

    def _window(self, epoch: int, index: int) -> _Window:
        return _kept(self._windows, (epoch, index), lambda: self._build_window(epoch, index), _WINDOWS_KEPT)

    def _build_window(self, epoch: int, index: int) -> _Window:
        start = index * self._window_groups
        groups = [self._read_group(int(g)) for g in self._epoch(epoch).order[start : start + self._window_groups]]
        tokens = np.concatenate([tokens for tokens, _ in groups])
        lengths = np.concatenate([lengths for _, lengths in groups]).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        if self._shuffled:
            order = permutation(len(lengths), seed=self.seed, epoch=epoch, stream=index + 1)
            starts, lengths = starts[order], lengths[order]
        ends = np.cumsum(lengths + 1)
        source = np.arange(ends[-1], dtype=np.int32)
        source += np.repeat((starts - (ends - lengths - 1)).astype(np.int32), lengths + 1)
        stream = tokens.take(source, mode="clip")
        stream[ends - 1] = self.facts.tokenizer.eos_id
        return _Window(stream, ends)

    def _read_group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        number = int(self._group_shard[group])
        shard = self._shards[number]
        path = self.facts.folder / shard.name
        reader = _kept(self._readers, number, lambda: ShardReader(path, shard.size_bytes), _SHARDS_KEPT)
        index = int(self._group_index[group])
        tokens, lengths = reader.read(index)
        if (len(lengths), len(tokens)) != tuple(shard.groups[index]) or int(tokens.max()) > self.facts.max_token_id:
            raise DataError(
                f"token shard {path}: row group {index} is not what facts.json says ({len(lengths)} documents, "
                f"{len(tokens)} tokens, ids to {int(tokens.max())}). Delete it and run `windlass data prepare` again."
            )
        return tokens, lengths


def _mark_documents(row: Row, ends: np.ndarray, filled: int, eos_id: int) -> None:
    """Number documents and positions within the row, given where documents end in it, and fill up its rest."""
    seq_len = len(row.tokens_T)
    row.tokens_T[filled:] = eos_id
    row.labels_T[filled:] = IGNORE
    row.labels_T[ends - 1] = IGNORE
    bounds = np.empty(len(ends) + 2, np.int64)
    bounds[0], bounds[1:-1], bounds[-1] = 0, ends, seq_len
    if len(ends) and ends[-1] == seq_len:
        bounds = bounds[:-1]
    starts, lengths = bounds[:-1], bounds[1:] - bounds[:-1]
    row.documents_T[:] = np.arange(len(starts)).repeat(lengths)
    np.subtract(np.arange(seq_len), starts.repeat(lengths), out=row.positions_T)


def _kept(cache: OrderedDict[_Key, _Value], key: _Key, build: Callable[[], _Value], limit: int) -> _Value:
    """Return `cache[key]`, building it when missing; the least recently used beyond `limit` go first."""
    value = cache.get(key)
    if value is None:
        while len(cache) >= limit:
            cache.popitem(last=False)
        value = cache[key] = build()
    cache.move_to_end(key)
    return value
