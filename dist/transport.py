"""How the bytes of one group of ranks travel: the protocol behind the comm door, and the group of one.

A `Channel` belongs to one group. It moves, sums and checks nothing else: contiguity, ledger and trace are `comm.py`.
Every start returns a `Finish`, which is called once and completes the operation. A channel may complete operations
earlier than their `Finish` is called, but only after every rank of the group has started them.
Must not know: units, ZeRO, meshes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from windlass.dist.errors import CommError

Finish = Callable[[], None]

SUM_CHUNK_BYTES = 1 << 20  # partial sums of this size stay in cache between two additions


class Stall:
    """Adds up the seconds in which this rank was blocked for its peers."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


@dataclass(frozen=True)
class Call:
    """What one rank says it is doing: the number of the operation in its group, and everything that must agree."""

    seq: int
    kind: str
    label: str
    numel: int = 0
    dtype: str = ""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} '{self.label}' (op {self.seq})"

    @property
    def signature(self) -> str:
        """Everything that must agree between the ranks, as text."""
        return f"{self.seq}|{self.kind}|{self.label}|{self.numel}|{self.dtype}|{self.detail}"

    @property
    def content(self) -> str:
        """Everything that must agree between the sender and the receiver of a message, as text."""
        return f"{self.label}|{self.numel}|{self.dtype}"

    @staticmethod
    def parse(signature: str) -> Call:
        seq, kind, rest = signature.split("|", 2)
        label, numel, dtype, detail = rest.rsplit("|", 3)
        return Call(int(seq), kind, label, int(numel), dtype, detail)


def mismatch(group: str, mine: Call, my_rank: int, theirs: Call, their_rank: int) -> CommError:
    """Build the error that names both sides of two different operations."""
    what = f"group '{group}': ranks disagree: rank {their_rank} is in {theirs}, rank {my_rank} in {mine}"
    if (mine.kind, mine.label, mine.seq) == (theirs.kind, theirs.label, theirs.seq):
        sides = (f"{c.numel} x {c.dtype} {c.detail}".strip() for c in (theirs, mine))
        what += f", with {' there and '.join(sides)} here"
    return CommError(f"{what}. Every rank of a group must start the same operations in the same order")


def misdelivered(group: str, sent: str, sender: int, wanted: str, receiver: int) -> CommError:
    """Build the error for a message that is not the one its receiver wants, from the contents of both sides' calls."""

    def side(content: str) -> str:
        label, numel, dtype = content.rsplit("|", 2)
        return f"'{label}' ({numel} x {dtype})"

    return CommError(
        f"group '{group}': rank {sender} sent {side(sent)}, rank {receiver} wants {side(wanted)} next. What one rank "
        "sends to another must be received in the same order, with the same label, size and format"
    )


@dataclass
class Buffer:
    """Memory of a symmetric buffer on this rank, with whatever its channel keeps beside it."""

    tensor: torch.Tensor
    mine: torch.Tensor
    full: bool
    kept: Any = None
    sends: list[Any] = field(default_factory=list)


class Channel(Protocol):
    """One group's way to move bytes. Ranks are indices inside the group; `ranks` are their numbers in the world.

    Collective: every rank of the group starts the same calls in the same order, apart from `send` and `receive`
    """

    kind: str
    ranks: tuple[int, ...]
    rank: int

    def allocate(self, call: Call, numel: int, dtype: torch.dtype, *, full: bool) -> Buffer:
        """Allocate `numel` zeroed elements on every rank. Blocks: host."""

    def all_gather(self, call: Call, buffer: Buffer) -> Finish: ...

    def gather_into(self, call: Call, buffer: Buffer, out: torch.Tensor) -> Finish: ...

    def reduce_scatter(self, call: Call, buffer: Buffer, out: torch.Tensor, accumulate: bool) -> Finish: ...

    def all_reduce(self, call: Call, tensor: torch.Tensor, op: str) -> Finish: ...

    def broadcast(self, call: Call, tensor: torch.Tensor, src: int) -> Finish: ...

    def exchange(self, call: Call, payload: bytes) -> Callable[[], list[bytes]]:
        """Give every rank the bytes of every rank."""

    def wait_free(self, buffer: Buffer) -> None:
        """Block until no peer reads this buffer any more."""

    def send(self, call: Call, tensor: torch.Tensor, to: Sequence[int]) -> Finish:
        """Send to one or more ranks; matches their receives from this rank in order. Blocks: no."""

    def receive(self, call: Call, out: torch.Tensor, source: int) -> Finish: ...

    def connect(self, edges: Sequence[tuple[int, int]]) -> None:
        """Do now what the first message from source to destination would have to wait for."""


def box_of(tensor: torch.Tensor, index: int, size: int) -> torch.Tensor:
    """Return box `index` of a flat tensor cut into `size` boxes of ceil(numel / size); the last ones may be short."""
    width = -(-tensor.numel() // size)
    return tensor[min(index * width, tensor.numel()) : min((index + 1) * width, tensor.numel())]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the format in which values of `dtype` are summed: fp64 and integers their own, other floats fp32."""
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else dtype


def sum_in_rank_order(parts: Sequence[torch.Tensor], out: torch.Tensor, *, accumulate: bool = False) -> None:
    """Write (or add) the sum of flat `parts`, formed from first to last, into `out`, rounded once.

    Both transports sum through here, so their results are bitwise equal. `out` may be one of the parts.
    """
    dtype = parts[0].dtype
    if len(parts) == 2 and out.dtype == dtype and not accumulate:
        torch.add(parts[0], parts[1], out=out)  # 16-bit formats are added in fp32 and rounded once here, too
        return
    acc_dtype = accumulator_dtype(dtype)
    step = SUM_CHUNK_BYTES // acc_dtype.itemsize
    scratch = torch.empty(min(step, out.numel()), dtype=acc_dtype, device=out.device)
    for low in range(0, out.numel(), step):
        window = out[low : low + step]
        acc = scratch[: window.numel()]
        first, *rest = (p[low : low + step] for p in parts)
        last = rest.pop() if rest and not accumulate else None
        if rest and dtype == acc_dtype:
            torch.add(first, rest.pop(0), out=acc)
        else:
            acc.copy_(first)
        for chunk in rest:
            acc.add_(chunk)
        if accumulate:
            window.add_(acc)
        elif last is not None:
            torch.add(acc, last, out=window)
        else:
            window.copy_(acc)


def combine(parts: Sequence[torch.Tensor], out: torch.Tensor, op: str) -> None:
    """Combine flat `parts` in rank order into `out` with `sum`, `max` or `min`."""
    if op == "sum":
        sum_in_rank_order(parts, out)
        return
    function = torch.maximum if op == "max" else torch.minimum
    acc = parts[0].clone()
    for part in parts[1:]:
        function(acc, part, out=acc)
    out.copy_(acc)


class SelfChannel:
    """The group of one rank: nothing moves between ranks, everything else happens as in any group."""

    kind = "self"

    def __init__(self, rank: int, device: torch.device) -> None:
        self.ranks: tuple[int, ...] = (rank,)
        self.rank = 0
        self.device = device

    def allocate(self, call: Call, numel: int, dtype: torch.dtype, *, full: bool) -> Buffer:
        tensor = torch.zeros(numel, dtype=dtype, device=self.device)
        return Buffer(tensor, tensor, full)

    def all_gather(self, call: Call, buffer: Buffer) -> Finish:
        return nothing

    def gather_into(self, call: Call, buffer: Buffer, out: torch.Tensor) -> Finish:
        return lambda: void(out.copy_(buffer.tensor))

    def reduce_scatter(self, call: Call, buffer: Buffer, out: torch.Tensor, accumulate: bool) -> Finish:
        if out.data_ptr() == buffer.mine.data_ptr() and not accumulate:
            return nothing  # the sum of one, already in its place
        return lambda: sum_in_rank_order([buffer.mine], out, accumulate=accumulate)

    def all_reduce(self, call: Call, tensor: torch.Tensor, op: str) -> Finish:
        return nothing

    def broadcast(self, call: Call, tensor: torch.Tensor, src: int) -> Finish:
        return nothing

    def exchange(self, call: Call, payload: bytes) -> Callable[[], list[bytes]]:
        return lambda: [payload]

    def wait_free(self, buffer: Buffer) -> None:
        """Nobody else reads."""

    def send(self, call: Call, tensor: torch.Tensor, to: Sequence[int]) -> Finish:
        raise CommError(f"{call}: rank {self.ranks[0]} is alone in its group: it has nobody to send to")

    def receive(self, call: Call, out: torch.Tensor, source: int) -> Finish:
        raise CommError(f"{call}: rank {self.ranks[0]} is alone in its group: nobody sends to it")

    def connect(self, edges: Sequence[tuple[int, int]]) -> None:
        """There is nobody to connect to."""


def void(_: object) -> None:
    """Drop a value."""


def nothing() -> None:
    """Finish an operation that moves nothing."""
