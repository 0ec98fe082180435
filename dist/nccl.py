"""Channels between CUDA ranks over NCCL. Sums are in NCCL's order.

Torch gives every pair of ranks of a process group one communicator and one stream for its messages, which carries both
directions in the order in which they were started, and is formed by its first message, while both ranks wait for it.
So groups that send have process groups of their own, one per direction, and `connect` forms what will be used.
Must not know: units, ZeRO, meshes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from windlass.dist.errors import CommError
from windlass.dist.transport import Buffer, Call, Finish, box_of, nothing


class NcclChannel:
    """CUDA tensors between the ranks of one NCCL process group; messages use `lanes`, one more group per direction."""

    kind = "nccl"

    def __init__(
        self, name: str, ranks: tuple[int, ...], rank: int, pg: Any, lanes: tuple[Any, Any] | None, device: torch.device
    ) -> None:
        self.name, self.ranks, self.rank, self.pg, self.lanes, self.device = name, ranks, rank, pg, lanes, device

    def allocate(self, call: Call, numel: int, dtype: torch.dtype, *, full: bool) -> Buffer:
        tensor = torch.zeros(numel, dtype=dtype, device=self.device)
        return Buffer(tensor, box_of(tensor, self.rank, len(self.ranks)) if full else tensor, full)

    def all_gather(self, call: Call, buffer: Buffer) -> Finish:
        return _waiting(dist.all_gather_into_tensor(buffer.tensor, buffer.mine, group=self.pg, async_op=True))

    def gather_into(self, call: Call, buffer: Buffer, out: torch.Tensor) -> Finish:
        return _waiting(dist.all_gather_into_tensor(out, buffer.tensor, group=self.pg, async_op=True))

    def reduce_scatter(self, call: Call, buffer: Buffer, out: torch.Tensor, accumulate: bool) -> Finish:
        direct = not accumulate and out.dtype == buffer.tensor.dtype
        landing = out if direct else torch.empty_like(buffer.mine)
        work = dist.reduce_scatter_tensor(landing, buffer.tensor, group=self.pg, async_op=True)

        def finish() -> None:
            work.wait()
            if accumulate:
                out.add_(landing)
            elif not direct:
                out.copy_(landing)

        return finish

    def all_reduce(self, call: Call, tensor: torch.Tensor, op: str) -> Finish:
        kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        return _waiting(dist.all_reduce(tensor, op=kinds[op], group=self.pg, async_op=True))

    def broadcast(self, call: Call, tensor: torch.Tensor, src: int) -> Finish:
        return _waiting(dist.broadcast(tensor, group=self.pg, async_op=True, group_src=src))

    def exchange(self, call: Call, payload: bytes) -> Callable[[], list[bytes]]:
        raise CommError(f"group '{self.name}': {call}: bytes travel on the host's channel, not on NCCL")

    def wait_free(self, buffer: Buffer) -> None:
        """Later work of the current stream is ordered behind the collectives by their `wait`."""

    def send(self, call: Call, tensor: torch.Tensor, to: Sequence[int]) -> Finish:
        """Send from where the tensor lies: it must not be written until `wait`.

        Differs: nothing is compared with the receiver's call; a size or format that differs is undefined
        """
        lanes = {i: self._lane(call, self.rank, i) for i in to}
        if tensor.numel() == 0:
            return nothing
        works = [dist.isend(tensor.detach(), group=lane, group_dst=i) for i, lane in lanes.items()]
        return _waiting(*works)

    def receive(self, call: Call, out: torch.Tensor, source: int) -> Finish:
        lane = self._lane(call, source, self.rank)
        if out.numel() == 0:
            return nothing
        return _waiting(dist.irecv(out.detach(), group=lane, group_src=source))

    def connect(self, edges: Sequence[tuple[int, int]]) -> None:
        """Send one element along every edge, one edge after the other in the same order on all ranks."""
        call = Call(0, "connect", self.name)
        for source, to in sorted(set(edges)):
            token = torch.zeros(1, device=self.device)
            if self.rank == source:
                self.send(call, token, [to])()
            elif self.rank == to:
                self.receive(call, token, source)()

    def _lane(self, call: Call, source: int, to: int) -> Any:
        if self.lanes is None:
            raise CommError(
                f"group '{self.name}': {call}: messages on NCCL need communicators of their own, or they wait for "
                "those of other groups. Make the group with private=True"
            )
        return self.lanes[source < to]


def _waiting(*works: Any) -> Finish:
    def finish() -> None:
        for work in works:
            work.wait()

    return finish
