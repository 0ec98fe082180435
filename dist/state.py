"""How training state is handed to whoever persists it: pieces of named global tensors.

The checkpoint layer and the parallel layer never import each other; both speak this. A `StateSource` is the engine
of one rank (or a plain test double). Must not know: files, stages, units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from windlass.dist.box import Box, Shape


@dataclass(frozen=True)
class Loan:
    """State that does not rest in memory: `open()` brings it there, until the piece of another record is opened.

    `open` returns the piece's elements; writing them restores the state.
    """

    dtype: torch.dtype
    open: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """One box of one global tensor of this rank, in memory or to be brought there.

    `tensor` has exactly the shape `box.sizes`, is contiguous, and is a view of live state: reading it captures the
    state, writing it restores the state. Of state on loan it is good only until another piece's is asked for, so go
    through pieces in the order in which they come.
    """

    key: str  # "model.<parameter name>", "optimizer.<state name>.<parameter name>"
    global_shape: Shape
    box: Box
    source: torch.Tensor | Loan

    @property
    def tensor(self) -> torch.Tensor:
        return self.source if isinstance(self.source, torch.Tensor) else self.source.open().view(self.box.sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.source.dtype.itemsize


class StateSource(Protocol):
    """The tensors of a training state, as this rank sees them."""

    def owned(self) -> Sequence[Piece]:
        """Return the pieces this rank must write. Over all ranks every element of every key appears exactly once."""

    def wanted(self) -> Sequence[Piece]:
        """Return the pieces this rank must have filled on restore (replicas included)."""

    def loaded(self) -> None:
        """Called once after every wanted piece was filled: rebuild what is derived (low-precision copies)."""
