"""Doubles of what Ray gives a run: actors whose calls are their own answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.ray.wishes import Wishes

JOB, TOKEN = "0123456789abcdef", "22" * 32
NODES = ("node-0", "node-1")


class Actor:
    """An actor that answers what it is told to; what it was asked is counted by method."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.asked.append((name, arguments))
            return self.answers.get(name)

        return SimpleNamespace(remote=remote)

    def count(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.asked)


def wishes(base: Path, **facts: Any) -> Wishes:
    given = {"job": JOB, "token": TOKEN, "command": WorkerCommand(("-c", "pass")), "config": LaunchConfig(workers=2)}
    return Wishes(**{**given, "base": str(base), **facts})


def answer(call: Any, timeout: float | None = None) -> Any:
    if isinstance(call, Exception):
        raise call
    return call
