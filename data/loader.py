"""This rank's micro-batches, prepared ahead by one thread.

The whole state is one integer: how many samples all ranks together have consumed (or passed over, where a run went back
and left some out). Must not know: devices, models, why samples are left out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch

from windlass.data.batch import Batch
from windlass.data.dataset import Row, Samples
from windlass.dist.errors import DataError


class Loader:
    """Gives the batches of each step.

    Step s takes the global samples [consumed, consumed + global_batch). Micro-batch j of rank r takes
    consumed + j * num_ranks * micro_batch + r * micro_batch + [0, micro_batch), so the samples of a step do not depend
    on how many ranks share them. Steps never begin inside a range of `skips`: they go on behind it.
    Blocks: `next_step` until its batches are there; the time is added to `wait_s`.
    Raises: DataError if an epoch has fewer samples than one step takes, or a skipped range is not one of whole steps.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        micro_batch: int,
        num_micro_batches: int,
        rank: int,
        num_ranks: int,
        global_batch: int,
        consumed: int = 0,
        prefetch: int = 2,
        skips: Sequence[tuple[int, int]] = (),
    ) -> None:
        if global_batch != micro_batch * num_micro_batches * num_ranks:
            raise DataError(
                f"train.global_batch = {global_batch} is not train.micro_batch = {micro_batch} x {num_micro_batches} "
                f"micro-batches x {num_ranks} ranks = {micro_batch * num_micro_batches * num_ranks}"
            )
        if dataset.num_samples < global_batch:
            raise DataError(
                f"the data has {dataset.num_samples} rows of {dataset.seq_len} tokens in an epoch, one step takes "
                f"{global_batch}. Prepare more text, or lower train.global_batch, train.micro_batch or train.seq_len."
            )
        for first, stop in skips:
            if stop <= first or (stop - first) % global_batch:
                raise DataError(
                    f"samples [{first}, {stop}) cannot be left out: not whole steps of {global_batch} samples"
                )
        self.wait_s = 0.0
        self._skips = sorted(skips)
        self._dataset = dataset
        self._micro_batch, self._num_micro_batches = micro_batch, num_micro_batches
        self._rank, self._num_ranks, self._global_batch = rank, num_ranks, global_batch
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="windlass-loader") if prefetch else None
        self._ahead: deque[Future[Batch]] = deque()
        self._closed = False
        self.seek(consumed)

    def seek(self, consumed: int) -> None:
        """Go on as if `consumed` samples had been consumed."""
        while self._ahead:
            self._ahead.pop().cancel()
        self.consumed = self._ahead_at = self._behind_skips(consumed)
        self._ahead_number = 0
        self._fill_up()

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step. An error of the thread is raised here."""
        if self._closed:
            raise DataError("the loader is closed: no further step can be read from it")
        started = time.perf_counter()
        batches = [self._next_batch() for _ in range(self._num_micro_batches)]
        self.wait_s += time.perf_counter() - started
        self.consumed = self._behind_skips(self.consumed + self._global_batch)
        return batches

    def _behind_skips(self, sample: int) -> int:
        for first, stop in self._skips:
            if first <= sample < stop:
                sample = stop
        return sample

    def _next_batch(self) -> Batch:
        if self._thread is None:
            return self._build(self._take())
        batch = self._ahead.popleft().result()
        self._fill_up()
        return batch

    def _fill_up(self) -> None:
        while self._thread is not None and len(self._ahead) < self._prefetch:
            self._ahead.append(self._thread.submit(self._build, self._take()))

    def _take(self) -> int:
        first = self._ahead_at + (self._ahead_number * self._num_ranks + self._rank) * self._micro_batch
        self._ahead_number += 1
        if self._ahead_number == self._num_micro_batches:
            self._ahead_at, self._ahead_number = self._behind_skips(self._ahead_at + self._global_batch), 0
        return first

    def _build(self, first: int) -> Batch:
        arrays_4BT = np.empty((4, self._micro_batch, self._dataset.seq_len), np.int64)
        for b in range(self._micro_batch):
            self._dataset.fill(first + b, Row(*arrays_4BT[:, b]))
        tokens_BT, positions_BT, documents_BT, labels_BT = torch.from_numpy(arrays_4BT)
        return Batch(tokens_BT, positions_BT, documents_BT, labels_BT, torch.arange(first, first + self._micro_batch))

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed = True
        self._ahead.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()
