"""How training state is handed to whoever persists it: pieces of named global tensors.

The checkpoint layer and the parallel layer never import each other; both speak this. A `StateSource` is the engine
of one rank (or a plain test double). Must not know: files, stages, units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from windlass.dist.box import Box, Shape


@dataclass(frozen=True)
class Piece:
    """One box of one global tensor, in memory of this rank.

    `tensor` has exactly the shape `box.sizes`, is contiguous, and is a view of live memory: reading it captures the
    state, writing it restores the state.
    """

    key: str  # "model.<parameter name>", "optimizer.<state name>.<parameter name>"
    global_shape: Shape
    box: Box
    tensor: torch.Tensor


class StateSource(Protocol):
    """The tensors of a training state, as this rank sees them."""

    def owned(self) -> Sequence[Piece]:
        """Return the pieces this rank must write. Over all ranks every element of every key appears exactly once."""

    def wanted(self) -> Sequence[Piece]:
        """Return the pieces this rank must have filled on restore (replicas included)."""

    def loaded(self) -> None:
        """Called once after every wanted piece was filled: rebuild what is derived (low-precision copies)."""
