"""What one micro-batch is: token ids with their positions, document ids and labels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

IGNORE = -100  # label of a position that has nothing to predict (end of a document, padding)


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    Shapes: every tensor is (B, T), int64; weights are floating point. `documents_BT` numbers the documents within a row
    from 0; attention never crosses them. `positions_BT` restarts at 0 with each document fragment. `labels_BT[t]` is
    the next token of the same document, or `IGNORE`. `samples_B` are the global sample numbers of the rows.
    `weights_BT` multiplies the loss of each token (None: all 1); means are over valid tokens all the same.
    """

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    documents_BT: torch.Tensor
    labels_BT: torch.Tensor
    samples_B: torch.Tensor
    weights_BT: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens_BT.numel()

    @property
    def num_valid(self) -> int:
        """Tokens that have a label."""
        return int((self.labels_BT != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})
