"""One task of a lane: the future of its value, what it waits for and who waits for it; names for reports.

Must not know: threads, queues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from windlass.dist.errors import OffloadError

T = TypeVar("T")

WAITING, QUEUED, RUNNING, FINISHED = range(4)


class Task(Future[T]):
    """One piece of work on a lane, and the future of its value; on lane "" it is done by whoever completes the last of
    `after`, and is nothing where it only joins others."""

    def __init__(
        self,
        lane: str = "",
        work: Callable[[], T] | None = None,
        after: Sequence[Future[Any]] = (),
        num_bytes: int = 0,
        label: str = "",
        priority: int = 1,
        number: int = 0,
    ) -> None:
        super().__init__()
        self.lane, self.label, self.num_bytes, self.priority, self.number = lane, label, num_bytes, priority, number
        self.work, self.after = work, after
        self.state = WAITING
        self.error: BaseException | None = None  # why it has no value
        self.missing = 0  # how many of `after` are not done
        self.settled = False  # whether those that come after it have been told
        self.dependants: list[Task[Any]] = []
        self.since = 0.0  # when it was queued, then when it began

    def __str__(self) -> str:
        return f"{self.lane} '{self.label}'" if self.lane else f"'{self.label}'"


def is_over(future: Future[Any]) -> bool:
    """Return whether those that come after a future have been told, or soon will be."""
    return future.settled if isinstance(future, Task) else future.done()


def error_of(future: Future[Any]) -> BaseException | None:
    """Return why a future that is done has no value."""
    if future.cancelled():
        return OffloadError(f"lanes: {name_of(future)} was cancelled before it began")
    return future.exception()


def as_failure(error: BaseException, what: str) -> BaseException:
    """Return an error that can be raised elsewhere: SystemExit would end the process of whoever waits, in silence."""
    if isinstance(error, Exception):
        return error
    failure = OffloadError(f"lanes: {what} with {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def name_of(future: Future[Any], what: str = "") -> str:
    """Return how a future is called in a report."""
    task = str(future) if isinstance(future, Task) else getattr(future, "label", "")
    return f"{what} ({task})" if what and task else what or task or "a future"


def some(names: Sequence[str], most: int = 8) -> str:
    """Return the first names of a list and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
