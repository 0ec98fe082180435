"""The only door for bytes between ranks: one `Comm` per process, a `Group` per set of ranks, named operations.

Every entry checks contiguity (gloo silently returns wrong sums for strided views), format, size and device, counts
into the ledger, and records a span on the lane "comm". A start only announces; the bytes may move as late as `wait()`.
All ranks of a group start the same operations in the same order; they may wait for them in any order. Messages from
one rank to others (`send`, `receive`) are outside that order.
Must not know: units, ZeRO, meshes, why something is sent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from windlass.dist.device import Device
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CommError
from windlass.dist.ledger import Key, Ledger
from windlass.dist.trace import Tracer
from windlass.dist.transport import Buffer, Call, Channel, SelfChannel
from windlass.dist.world import World

T = TypeVar("T")
TRANSPORTS = ("auto", "shm", "group")


class Pending(Generic[T]):
    """Something under way. `wait()` exactly once: returns its value, or raises what went wrong."""

    def __init__(self, finish: Callable[[], T], name: str = "operation") -> None:
        self.name = name
        self._finish: Callable[[], T] | None = finish

    def wait(self) -> T:
        """Complete it.

        Blocks: host
        """
        if self._finish is None:
            raise CommError(f"{self.name}: wait() was called twice")
        finish, self._finish = self._finish, None
        return finish()


@dataclass(frozen=True)
class LastOp:
    """What this rank did last at the comm door, for reports of a hang."""

    group: str
    call: Call
    state: str  # "started" | "waiting" | "done"

    def __str__(self) -> str:
        return f"{self.call} of group '{self.group}': {self.state}"


class Comm:
    """This process among its peers. Start it once; it owns every group and all memory shared with peers."""

    def __init__(self, env: ProcessEnv, device: Device, world: World, tracer: Tracer) -> None:
        self.env, self.device, self.tracer = env, device, tracer
        self.rank, self.size = env.rank, env.world_size
        self.ledger = Ledger()
        self.last_op: LastOp | None = None
        self._world = world
        self._num_groups = 0
        self.world = Group(self, "world", *self._channels("world", tuple(range(self.size)), 0))

    @staticmethod
    def start(
        env: ProcessEnv,
        device: Device,
        *,
        transport: str = "auto",
        timeout_s: float = 600.0,
        tracer: Tracer | None = None,
    ) -> Comm:
        """Meet the other ranks.

        Collective: every rank of the job, once per process
        Blocks: host, at most `timeout_s`
        Raises: CommError naming the address, the missing ranks and the seconds waited.
        """
        if transport not in TRANSPORTS:
            raise CommError(f"parallelism.transport = {transport!r}: must be one of {', '.join(TRANSPORTS)}")
        return Comm(env, device, World.form(env, device, transport, timeout_s), tracer or Tracer())

    def group(self, ranks: Sequence[int], name: str, *, private: bool = False) -> Group:
        """Make a group of world ranks that contains this one; different ranks may name disjoint groups in one call.

        A `private` group can send and receive on CUDA: it has communicators that no other group uses.

        Collective: every rank of the world, in the same order
        """
        mine = tuple(ranks)
        # Rising, because torch sorts the ranks of a process group.
        if self.rank not in mine or sorted(set(mine)) != list(mine) or not set(mine) <= set(range(self.size)):
            raise CommError(
                f"group '{name}': {list(mine)} must be distinct ranks below {self.size}, in rising order, that "
                f"include this one, {self.rank}"
            )
        label = f"group {name}" + " (private)" * private
        asked = [tuple(a) for a in self.world.gather_objects(list(mine), label=label)]
        for rank, theirs in enumerate(asked):
            if theirs != mine and set(theirs) & set(mine):
                raise CommError(
                    f"group '{name}': rank {rank} asked for ranks {list(theirs)}, rank {self.rank} for {list(mine)}"
                )
        self._num_groups += 1
        distinct = sorted(set(asked))
        self._world.new_process_groups(distinct)
        lanes = self._world.new_lanes(distinct) if private else None
        return Group(self, name, *self._channels(name, mine, self._num_groups, lanes))

    def _channels(
        self, name: str, ranks: tuple[int, ...], number: int, lanes: tuple[Any, Any] | None = None
    ) -> tuple[Channel, Channel]:
        if len(ranks) == 1:
            return SelfChannel(self.rank, torch.device("cpu")), SelfChannel(self.rank, self.device.torch_device)
        return self._world.channels(name, ranks, number, lanes)

    @property
    def waited_s(self) -> float:
        """Seconds so far in which this rank was blocked for peers (over process groups: or for the bytes)."""
        return self._world.stall.seconds

    def close(self) -> None:
        """Say good-bye to the peers and release sockets and process groups. Pending operations are dropped."""
        self._world.close()

    def __enter__(self) -> Comm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Group:
    """Some ranks of the world. `rank` is this process's index inside, `ranks` the members' world ranks."""

    def __init__(self, comm: Comm, name: str, host: Channel, device: Channel) -> None:
        self.comm, self.name = comm, name
        self.ranks, self.rank, self.size = host.ranks, host.rank, len(host.ranks)
        self._host, self._device = host, device
        self._seq = 0
        self._num_sent = 0
        self._num_received: Counter[int] = Counter()

    @property
    def transport(self) -> str:
        """What carries the bytes of this group: self, shm, gloo or nccl."""
        return self._device.kind

    def symmetric(self, numel_per_rank: int, dtype: torch.dtype, *, full: bool, name: str) -> Symmetric:
        """Allocate a zeroed buffer of the same size on every rank, which peers may read.

        Collective: every rank of the group
        Blocks: host
        """
        if numel_per_rank < 0:
            raise CommError(f"symmetric buffer '{name}': numel_per_rank = {numel_per_rank} must not be negative")
        numel = numel_per_rank * self.size if full else numel_per_rank
        call = self._call("symmetric", name, numel, dtype, "full" if full else "shard")
        with self.comm.tracer.span(f"symmetric {name}", "comm"):
            buffer = self._device.allocate(call, numel, dtype, full=full)
        return Symmetric(self, name, numel_per_rank, buffer)

    def all_reduce(self, tensor: torch.Tensor, *, op: str = "sum", tag: str = "", label: str = "") -> Pending[None]:
        """Combine a tensor over the ranks in place; sums run from rank 0 to the last and are bitwise equal everywhere.

        Collective: every rank of the group
        Blocks: no (returns Pending)
        Invariant: the tensor must not be touched until `wait()`
        """
        if op not in ("sum", "max", "min"):
            raise CommError(f"all_reduce '{label}': op = {op!r} must be one of sum, max, min")
        call = self._call("all_reduce", label, tensor.numel(), tensor.dtype, op)
        channel = self._channel_of(tensor, call)
        self._count(call, tag, 2 * tensor.numel(), tensor, 2 * (self.size - 1) * -(-tensor.numel() // self.size))
        return self.pending(call, self._started(call, lambda: channel.all_reduce(call, tensor, op)))

    def broadcast(self, tensor: torch.Tensor, src: int, *, tag: str = "", label: str = "") -> Pending[None]:
        """Copy a tensor from the rank with index `src` inside the group to all others.

        Collective: every rank of the group
        Blocks: no (returns Pending)
        """
        if not 0 <= src < self.size:
            raise CommError(
                f"broadcast '{label}': src = {src} must be an index below {self.size} inside group '{self.name}'"
            )
        call = self._call("broadcast", label, tensor.numel(), tensor.dtype, f"from {src}")
        channel = self._channel_of(tensor, call)
        self._count(call, tag, tensor.numel(), tensor, tensor.numel() if src != self.rank else 0)
        return self.pending(call, self._started(call, lambda: channel.broadcast(call, tensor, src)))

    def send(self, tensor: torch.Tensor, to: Sequence[int], *, tag: str = "", label: str = "") -> Pending[None]:
        """Send a tensor to the ranks with the indices `to` inside the group, each of which must receive it.

        What one rank sends to another arrives in order; different pairs of ranks and different groups are independent.
        On a CPU the tensor is copied here and arrives whatever this rank does next; `wait()` may be left out.

        Blocks: no (returns Pending)
        Invariant: on CUDA the tensor must not be written until `wait()`
        """
        self._num_sent += 1
        call = self._message(self._num_sent, "send", label, tensor, f"to {', '.join(map(str, to))}")
        self._check_others(call, to)
        channel = self._channel_of(tensor, call)
        self._count(call, tag, tensor.numel() * len(to), tensor, 0)
        return self.pending(call, self._started(call, lambda: channel.send(call, tensor, to)))

    def receive(self, out: torch.Tensor, source: int, *, tag: str = "", label: str = "") -> Pending[None]:
        """Receive into `out` what the rank with index `source` inside the group sends next to this one.

        Label, number of elements and format must be those of the sender.

        Blocks: no (returns Pending)
        Invariant: `out` must not be touched until `wait()`
        """
        self._num_received[source] += 1
        call = self._message(self._num_received[source], "receive", label, out, f"from {source}")
        self._check_others(call, [source])
        channel = self._channel_of(out, call)
        self._count(call, tag, out.numel(), out, out.numel())
        return self.pending(call, self._started(call, lambda: channel.receive(call, out, source)))

    def connect(self, edges: Sequence[tuple[int, int]]) -> None:
        """Prepare for messages along these edges (source, destination): on NCCL the first one would block both ranks.

        Collective: every rank of the group, with the same edges
        Blocks: host
        """
        self._device.connect(edges)

    def barrier(self, label: str = "") -> None:
        """Wait until every rank of the group is here.

        Collective: every rank of the group
        Blocks: host
        """
        call = self._call("barrier", label)
        finish = self._started(call, lambda: self._host.exchange(call, b""))
        self.pending(call, finish).wait()

    def gather_objects(self, obj: Any, *, label: str = "objects") -> list[Any]:
        """Give every rank the JSON-able objects of all ranks, in rank order.

        Collective: every rank of the group
        Blocks: host
        """
        call = self._call("gather_objects", label)
        payload = json.dumps(obj).encode()
        finish = self._started(call, lambda: self._host.exchange(call, payload))
        return [json.loads(text) for text in self.pending(call, finish).wait()]

    def pending(self, call: Call, finish: Callable[[], T]) -> Pending[T]:
        """Wrap a channel's finish with the trace span and the record of the last operation."""
        comm = self.comm

        def traced() -> T:
            comm.last_op = LastOp(self.name, call, "waiting")
            with comm.tracer.span(f"{call.kind} {call.label}", "comm", group=self.name, op=call.seq):
                value = finish()
            comm.last_op = LastOp(self.name, call, "done")
            return value

        return Pending(traced, f"{call} of group '{self.name}'")

    def _started(self, call: Call, start: Callable[[], T]) -> T:
        self.comm.last_op = LastOp(self.name, call, "started")
        with self.comm.tracer.span(f"start {call.kind} {call.label}", "comm", group=self.name, op=call.seq):
            return start()

    def _call(self, kind: str, label: str, numel: int = 0, dtype: torch.dtype | None = None, detail: str = "") -> Call:
        self._seq += 1
        return Call(self._seq, kind, label, numel, "" if dtype is None else str(dtype).removeprefix("torch."), detail)

    def _message(self, number: int, kind: str, label: str, tensor: torch.Tensor, detail: str) -> Call:
        return Call(number, kind, label, tensor.numel(), str(tensor.dtype).removeprefix("torch."), detail)

    def _check_others(self, call: Call, indices: Sequence[int]) -> None:
        wrong = [i for i in indices if not 0 <= i < self.size or (i == self.rank and self.size > 1)]
        if wrong or not indices or len(set(indices)) != len(indices):
            raise CommError(
                f"{call}: {list(indices)} must be distinct indices below {self.size} of other ranks inside group "
                f"'{self.name}', this rank is {self.rank}"
            )

    def _count(self, call: Call, tag: str, elements: int, tensor: torch.Tensor, wire_elements: int) -> None:
        if self.size > 1:
            width = tensor.element_size()
            key = Key(self.name, call.kind, tag)
            self.comm.ledger.add(key, elements=elements, element_bytes=width, wire_bytes=wire_elements * width)

    def _channel_of(self, tensor: torch.Tensor, call: Call) -> Channel:
        if not tensor.is_contiguous():
            raise CommError(f"{call}: the tensor of shape {list(tensor.shape)} is not contiguous. Pass .contiguous()")
        if tensor.device.type == "cpu":
            return self._host
        if tensor.device != self.comm.device.torch_device:
            raise CommError(f"{call}: the tensor is on {tensor.device}, this rank uses {self.comm.device.torch_device}")
        return self._device


class Symmetric:
    """A buffer of the same size on every rank of a group.

    `full` buffers hold one box per rank, of which `mine` is this rank's; shard buffers are all `mine`.
    One operation at a time on a full buffer. Call `wait_free()` before writing to it again.
    """

    def __init__(self, group: Group, name: str, numel_per_rank: int, buffer: Buffer) -> None:
        self.group, self.name, self.numel_per_rank = group, name, numel_per_rank
        self.full, self.tensor, self.mine = buffer.full, buffer.tensor, buffer.mine
        self._buffer = buffer
        self._in_flight = 0

    def all_gather(self, *, tag: str = "", label: str = "") -> Pending[None]:
        """Fill this full buffer with every rank's own box.

        Collective: every rank of the group
        Blocks: no (returns Pending)
        Invariant: `mine` must not be written from here until `wait_free()`
        """
        call = self._call("all_gather", label)
        channel = self._check(call, full=True)
        return self._start(call, tag, lambda: channel.all_gather(call, self._buffer))

    def gather_into(self, out: torch.Tensor, *, tag: str = "", label: str = "") -> Pending[None]:
        """Fill `out` with the shards of all ranks, in rank order; several may be under way at once.

        Shapes: shard n, out size * n
        Collective: every rank of the group
        Blocks: no (returns Pending)
        """
        call = self._call("gather_into", label)
        channel = self._check(call, full=False)
        self._check_out(call, out, self.numel_per_rank * self.group.size)
        if out.dtype != self.tensor.dtype:
            raise CommError(f"{call}: out is {out.dtype}, the shards are {self.tensor.dtype}")
        return self._start(call, tag, lambda: channel.gather_into(call, self._buffer, out))

    def reduce_scatter(
        self, out: torch.Tensor, *, accumulate: bool = False, tag: str = "", label: str = ""
    ) -> Pending[None]:
        """Write (or add) the sum over ranks of their copies of this rank's box into `out`, which may be `mine`.

        The sum runs from rank 0 to the last in fp32 (fp64 for fp64) and is rounded once to the format of `out`.

        Shapes: buffer size * n, out n
        Collective: every rank of the group
        Blocks: no (returns Pending)
        Invariant: the buffer must not be written until `wait()` and `wait_free()`
        Differs: on CUDA, NCCL sums in its own order and in the buffer's format
        """
        call = self._call("reduce_scatter", label)
        channel = self._check(call, full=True)
        self._check_out(call, out, self.numel_per_rank)
        return self._start(call, tag, lambda: channel.reduce_scatter(call, self._buffer, out, accumulate))

    def wait_free(self) -> None:
        """Wait until no peer reads this buffer any more.

        Blocks: host
        """
        with self.group.comm.tracer.span(f"wait_free {self.name}", "comm"):
            self.group._device.wait_free(self._buffer)

    def _call(self, kind: str, label: str) -> Call:
        numel = self.numel_per_rank * self.group.size
        return self.group._call(kind, label or self.name, numel, self.tensor.dtype)

    def _check(self, call: Call, *, full: bool) -> Channel:
        if self.full != full:
            wanted, is_ = ("full", "shard") if full else ("shard", "full")
            raise CommError(f"{call}: needs a {wanted} buffer, '{self.name}' is a {is_} buffer")
        if self._in_flight and full:
            raise CommError(f"{call}: buffer '{self.name}' has an operation under way: wait() for it first")
        return self.group._device

    def _check_out(self, call: Call, out: torch.Tensor, numel: int) -> None:
        if not out.is_contiguous() or out.dim() != 1:
            raise CommError(f"{call}: out of shape {list(out.shape)} must be one-dimensional and contiguous")
        if out.numel() != numel:
            raise CommError(f"{call}: out has {out.numel()} elements, needs {numel}")
        if out.device != self.tensor.device:
            raise CommError(f"{call}: out is on {out.device}, the buffer on {self.tensor.device}")

    def _start(self, call: Call, tag: str, start: Callable[[], Callable[[], None]]) -> Pending[None]:
        self.group._count(call, tag, call.numel, self.tensor, self.numel_per_rank * (self.group.size - 1))
        finish = self.group._started(call, start)
        self._in_flight += 1

        def finished() -> None:
            finish()
            self._in_flight -= 1

        return self.group.pending(call, finished)
