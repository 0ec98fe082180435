"""Which signals workers get when they are asked to save, and when somebody asks to stop meanwhile."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection

import pytest

from windlass.launch.failure import Exit
from windlass.launch.supervisor import StopRequests, supervise


class Group:
    """One worker that ends once it was looked at so often; `look` is called with every look."""

    num_workers = 1

    def __init__(self, looks: int, look: Callable[[int], object]) -> None:
        self.sent: list[int] = []
        self._looks, self._look, self._seen = looks, look, 0

    def wait(self, timeout_s: float) -> list[Exit]:
        self._seen += 1
        self._look(self._seen)
        return [Exit(0, 0, 0.0, None, stopped=False)] if self._seen > self._looks else []

    def send(self, ranks: Collection[int], signum: int) -> None:
        self.sent.append(signum)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize(("asked", "sent"), [(1, [signal.SIGTERM]), (2, [signal.SIGTERM, signal.SIGKILL])])
def test_workers_that_save_already_are_not_asked_again(moving: bool, asked: int, sent: list[int]) -> None:
    stop = StopRequests()

    def ask(look: int) -> None:
        stop.count = min(max(look - 2, 0), asked)

    group = Group(8, ask)
    supervise(group, 0.0, stop, tend=lambda whole: moving)
    assert group.sent == sent


def test_workers_that_move_are_killed_at_the_deadline_of_a_stop() -> None:
    stop = StopRequests()
    group = Group(40, lambda look: setattr(stop, "count", int(look > 2)))
    supervise(group, 0.0, stop, deadline_s=0.0, tend=lambda whole: True)
    assert group.sent[:2] == [signal.SIGTERM, signal.SIGKILL]
