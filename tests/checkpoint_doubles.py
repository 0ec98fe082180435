"""Test doubles of the checkpoint tests: a state cut into flat shards, and ranks that are threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.agree import Alone, Peers
from windlass.checkpoint.save import SaveReport, save
from windlass.dist.box import Box, boxes_of_range
from windlass.dist.state import Piece


class FlatSource:
    """Elements `[low, high)` of each tensor in one flat buffer, as ZeRO shards are; every piece is a view of it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], bounds: Mapping[str, tuple[int, int]] | None = None):
        self.flat: dict[str, torch.Tensor] = {}
        self.pieces: list[Piece] = []
        self.num_loaded = 0
        for key, whole in tensors.items():
            low, high = bounds[key] if bounds is not None else (0, whole.numel())
            self.flat[key] = whole.reshape(-1)[low:high].clone()
            shape, start = tuple(whole.shape), 0
            boxes = boxes_of_range(shape, low, high) if whole.numel() else [Box.whole(shape)]
            for box in boxes:
                view = self.flat[key][start : start + box.numel].view(box.sizes)
                self.pieces.append(Piece(key, shape, box, view))
                start += box.numel

    def owned(self) -> Sequence[Piece]:
        return self.pieces

    def wanted(self) -> Sequence[Piece]:
        return self.pieces

    def loaded(self) -> None:
        self.num_loaded += 1


def shards(tensors: Mapping[str, torch.Tensor], cuts: Mapping[str, Sequence[int]], num_ranks: int) -> list[FlatSource]:
    """Cut every tensor at the given positions: rank r holds what lies between cut r-1 and cut r."""
    edges = {key: [0, *sorted(cuts[key]), tensor.numel()] for key, tensor in tensors.items()}
    return [FlatSource(tensors, {key: (e[r], e[r + 1]) for key, e in edges.items()}) for r in range(num_ranks)]


def even_shards(tensors: Mapping[str, torch.Tensor], num_ranks: int) -> list[FlatSource]:
    cuts = {key: [t.numel() * r // num_ranks for r in range(1, num_ranks)] for key, t in tensors.items()}
    return shards(tensors, cuts, num_ranks)


def blank(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}


@dataclass
class _Meeting:
    size: int
    told: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)


class ThreadGroup:
    """One rank of a group whose ranks are threads; what is exchanged goes through JSON, as between processes."""

    def __init__(self, rank: int, meeting: _Meeting):
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    def gather_objects(self, obj: Any) -> list[Any]:
        self._meeting.told[self.rank] = json.loads(json.dumps(obj))
        self._meeting.barrier.wait()
        heard = [self._meeting.told[rank] for rank in range(self.size)]
        self._meeting.barrier.wait()
        return heard


def on_threads(num_ranks: int, work: Callable[[Peers], Any]) -> list[Any]:
    """Call `work(group)` on every rank; a rank that raises gives its exception as the result."""
    meeting = _Meeting(num_ranks)

    def one(rank: int) -> Any:
        try:
            return work(ThreadGroup(rank, meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(one, range(num_ranks)))


def save_shards(
    root: Path, step: int, sources: Sequence[FlatSource], *, keep: int = 0, extra: Any = None
) -> SaveReport:
    """Save with as many ranks as there are sources, and return the report of rank 0 (which must be ok)."""
    extra = extra or {}
    if len(sources) == 1:
        report = save(root, step, sources[0], extra, Alone(), keep=keep)
    else:
        found = on_threads(len(sources), lambda group: save(root, step, sources[group.rank], extra, group, keep=keep))
        errors = [f for f in found if isinstance(f, Exception)]
        if errors:
            raise errors[0]
        report = found[0]
    assert report.ok, report.reason
    return report


def some_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A little of everything: matrices, a scalar, a step count, low precision, nothing."""
    g = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(7, 5, generator=g),
        "model.blocks.0.weight": torch.randn(3, 4, 5, generator=g),
        "model.blocks.0.bias": torch.randn(5, generator=g).bfloat16(),
        "model.none": torch.empty(0, 3),
        "optimizer.exp_avg.embed.weight": torch.randn(7, 5, generator=g),
        "optimizer.step": torch.tensor(17 + seed),
    }
