"""Settings of every test session: tests.harness can be imported, one thread, and reproducible property tests."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

ROOT = str(Path(__file__).resolve().parent.parent)
TESTS = str(Path(__file__).resolve().parent)
sys.path[:0] = [p for p in (ROOT,) if p not in sys.path]
sys.path += [p for p in (TESTS,) if p not in sys.path]

torch.set_num_threads(1)
hypothesis.settings.register_profile("windlass", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("windlass")


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """Give back what a command changes that expects its process to end: signals it blocks, which whatever is started
    next inherits, and the number of threads.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process of several (--dist loadfile): they share what is costly to make. Those
    that start Ray share one process altogether, because whoever looks for a cluster of this machine finds them all.
    """
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/ray" if nodeid.startswith("tests/ray/") else super()._split_scope(nodeid)

    return Files(config, log) if config.getoption("dist") == "loadfile" else None
