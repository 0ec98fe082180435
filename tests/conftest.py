"""Settings of every test session: tests.harness can be imported, one thread, and reproducible property tests."""

import sys
from pathlib import Path

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process of several (pytest -n): they share what is costly to make. Those that
    start Ray share one process altogether, because whoever looks for a cluster of this machine finds them all.
    """
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder == "ray" else str(item.path)))
