"""The ways that tensors of a pipeline travel: one group per kind of message, so that kinds do not order each other.

Must not know: schedules, what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from windlass.dist.comm import Comm, Group, Pending

KINDS = ("F", "B", "X", "STATS", "DX", "ROWS", "DROWS")


@dataclass(frozen=True)
class Arriving:
    """A tensor that a peer sends."""

    tensor: torch.Tensor
    pending: Pending[None]

    def wait(self) -> torch.Tensor:
        """Return it once it is here.

        Blocks: host
        """
        self.pending.wait()
        return self.tensor


class Channels:
    """Groups of one pipeline column by kind of message; ranks are pipeline ranks.

    Collective:  construction, every rank of the world
    """

    def __init__(self, comm: Comm, ranks: Sequence[int], vocab: bool, device: torch.device) -> None:
        self.size = len(ranks)
        self._device = device
        kinds = KINDS if vocab else KINDS[:2]
        self._groups: dict[str, Group] = {}
        if self.size > 1:
            self._groups = {kind: comm.group(ranks, f"pp {kind}", private=True) for kind in kinds}

    def send(self, kind: str, tensor: torch.Tensor, to: Sequence[int], label: str) -> None:
        """Send a tensor to other pipeline ranks. It is copied out or kept alive by the transport."""
        if to:
            self._groups[kind].send(tensor.contiguous(), to, tag=f"pipeline {kind}", label=label)

    def receive(self, kind: str, shape: Sequence[int], dtype: torch.dtype, source: int, label: str) -> Arriving:
        """Post the receive of a tensor.

        Blocks: no
        """
        out = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        return Arriving(out, self._groups[kind].receive(out, source, tag=f"pipeline {kind}", label=label))
