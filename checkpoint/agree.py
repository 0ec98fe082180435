"""Work that every rank does and that succeeds or fails on all ranks together.

A save or restore on which one rank gives up while the others wait would hang the job, so each phase ends with an
exchange of outcomes. Must not know: files, tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from windlass.dist.errors import CheckpointError, WindlassError


class Peers(Protocol):
    """The two facts and one collective needed of a process group (`windlass.dist.comm.Group` has them)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather_objects(self, obj: Any) -> list[Any]: ...


class Alone:
    """A group of one, for commands and tests that have no peers."""

    rank = 0
    size = 1

    def gather_objects(self, obj: Any) -> list[Any]:
        return [obj]


@dataclass(frozen=True)
class Outcome:
    """What came of one phase: `values` by rank, or the `problem` of the first rank that failed."""

    values: list[Any]
    problem: str | None
    only_io: bool  # every failure was an OSError: the state in memory is sound
    own: Exception | None  # what this rank raised

    def check(self) -> list[Any]:
        """Return the values, or raise on every rank: its own error where it failed, else the first problem."""
        if self.problem is None:
            return self.values
        if self.own is not None and not isinstance(self.own, OSError):
            raise self.own
        raise CheckpointError(self.problem) from self.own


def on_all_ranks(group: Peers, work: Callable[[], Any]) -> Outcome:
    """Do `work` here and exchange results.

    Collective: every rank of the group; what `work` returns must be JSON-able.
    """
    own: Exception | None = None
    value: Any = None
    try:
        value = work()
    except Exception as error:
        own = error
    told = {"value": value, "problem": None if own is None else _describe(own), "io": isinstance(own, OSError)}
    heard = group.gather_objects(told)
    failed = [(rank, h) for rank, h in enumerate(heard) if h["problem"] is not None]
    problem = None
    if failed:
        rank, first = failed[0]
        problem = first["problem"] if group.size == 1 else f"rank {rank}: {first['problem']}"
    return Outcome([h["value"] for h in heard], problem, all(h["io"] for _, h in failed), own)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) if isinstance(error, WindlassError) else f"{type(error).__name__}: {error}"
