"""What a model must offer to be trained: embed -> blocks -> head.

Any model joins by having these three attributes and two methods; `docs/your-own-model.md` shows one in 30 lines.
The trainer runs autograd inside one of the three parts at a time and moves parameters between them, so a part must be
an ordinary `nn.Module` whose forward reads its own parameters only (a tied parameter is the same `nn.Parameter`
object in two parts). Must not know: meshes, ZeRO, devices other than the one its inputs are on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@dataclass(frozen=True)
class Init:
    """How a parameter starts: `kind` is "normal" (mean 0, `std`), "zeros" or "ones"."""

    kind: str
    std: float = 0.0


@runtime_checkable
class BlockModel(Protocol):
    """A causal language model as three parts.

    Parameters are built on the meta device; their names in checkpoints are "embed.<name>", "blocks.<i>.<name>" and
    "head.<name>", a tied one under the first part that holds it. `requires_grad=False` freezes a parameter.
    """

    embed: nn.Module  # forward(tokens_BT, context) -> h_BTD
    blocks: nn.ModuleList  # each: forward(h_BTD, context) -> h_BTD
    head: (
        nn.Module
    )  # forward(h_BTD, labels_BT) -> loss summed over labels != -100, scalar; .logits(h_BTD) -> logits_BTV

    def context(self, positions_BT: torch.Tensor, documents_BT: torch.Tensor, dtype: torch.dtype) -> Any:
        """Return what every block needs besides h (masks, rotary tables), once per micro-batch, no gradients."""

    def init(self, name: str) -> Init:
        """Return how the parameter of that checkpoint name starts."""
