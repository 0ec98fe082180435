"""A snapshot process that runs but cannot be reached where it is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leftovers import end_all
from tests.snapshot_nodes import PATIENCE_S
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.supervise import ensure_snapshot_process


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[NodeFolder]:
    folder = NodeFolder(tmp_path, "0123456789abcdef", "node-0").create("22" * 32)
    folder.raise_generation(1)
    yield folder
    end_all(tmp_path)


def test_one_that_listens_elsewhere_than_is_asked_for_is_replaced(folder: NodeFolder) -> None:
    first = ensure_snapshot_process(folder)
    assert first.host == "127.0.0.1" and ensure_snapshot_process(folder) == first
    second = ensure_snapshot_process(folder, host="127.0.0.2")
    assert second.host == "127.0.0.2" and not first.alive
    assert ensure_snapshot_process(folder) == second == ensure_snapshot_process(folder, host="127.0.0.2")
    with SnapshotClient.of(folder, 1) as client:
        assert client.hello()["pid"] == second.pid


def test_callers_at_once_that_ask_for_another_address_end_with_one_process(folder: NodeFolder) -> None:
    first, served = ensure_snapshot_process(folder), []
    threads = [
        threading.Thread(target=lambda: served.append(ensure_snapshot_process(folder, PATIENCE_S, "127.0.0.2")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not first.alive and len(served) == 3
    assert {(s.pid, s.host) for s in served} == {(served[0].pid, "127.0.0.2")}
