"""The ways that tensors of a pipeline travel: one group per kind of message, so that kinds do not order each other.

Must not know: the order of messages, what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from windlass.dist.comm import Comm, Group, Pending
from windlass.parallel.pipeline.schedule import Layout


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

    def __init__(self, comm: Comm, ranks: Sequence[int], layout: Layout, device: torch.device) -> None:
        self._device = device
        self._groups: dict[str, Group] = {}
        self._sent: list[Pending[None]] = []
        if len(ranks) > 1:
            for kind, edges in edges_of(layout).items():
                self._groups[kind] = comm.group(ranks, f"pp {kind}", private=True)
                self._groups[kind].connect(edges)

    def send(self, kind: str, tensor: torch.Tensor, to: Sequence[int], label: str) -> None:
        """Send a tensor to other pipeline ranks."""
        if to:
            sent = self._groups[kind].send(tensor.contiguous(), to, tag=f"pipeline {kind}", label=label)
            self._sent.append(sent)

    def settle(self) -> None:
        """Let go of what was sent, once it is on its way.

        Blocks: host, on process groups until peers have taken it
        """
        for sent in self._sent:
            sent.wait()
        self._sent.clear()

    def receive(self, kind: str, shape: Sequence[int], dtype: torch.dtype, source: int, label: str) -> Arriving:
        """Post the receive of a tensor.

        Blocks: no
        """
        out = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        return Arriving(out, self._groups[kind].receive(out, source, tag=f"pipeline {kind}", label=label))


def edges_of(layout: Layout) -> dict[str, list[tuple[int, int]]]:
    """Return for every kind of message who sends to whom."""
    stages = list(pairwise(layout.stage_rank))
    edges = {"F": {(a, b) for a, b in stages if a != b}, "B": {(b, a) for a, b in stages if a != b}}
    if layout.vocab:
        everyone = range(layout.num_ranks)
        out_of = {home: {(home, r) for r in everyone if r != home} for home in (layout.head_rank, layout.embed_rank)}
        edges |= {
            "X": out_of[layout.head_rank],
            "STATS": {(a, b) for a in everyone for b in everyone if a != b},
            "DX": {(b, a) for a, b in out_of[layout.head_rank]},
            "ROWS": {(b, a) for a, b in out_of[layout.embed_rank]},
            "DROWS": out_of[layout.embed_rank],
        }
    return {kind: sorted(found) for kind, found in edges.items()}
