"""The snapshot process of a node from start to end: one per node, outliving its starter, gone when nobody needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.leftovers import end_all
from tests.snapshot_nodes import JOB, PATIENCE_S, Node
from tests.waiting import until
from windlass.checkpoint.memory import pids, process
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.pids import resident_bytes
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.supervise import MODULE, Supervisor, ensure_snapshot_process
from windlass.dist.errors import CheckpointError

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, "node-0", 1, 1)
    yield node
    node.end()


def test_an_idle_process_stays_below_64_mib_and_never_loads_torch(node: Node) -> None:
    assert node.client.hello()["node"] == "node-0"
    held = resident_bytes(node.served.pid)
    assert sum(held.values()) < 64 * MIB, held
    assert "libtorch" not in Path(f"/proc/{node.served.pid}/maps").read_text()


def test_any_number_of_callers_at_once_start_one_process(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0").create("22" * 32)
    served = []
    threads = [
        threading.Thread(target=lambda: served.append(ensure_snapshot_process(folder, PATIENCE_S))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len({(s.pid, s.port) for s in served}) == 1 and len(served) == 4
    finally:
        end_all(tmp_path)


def test_it_outlives_its_starter_with_all_its_children_and_session(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0").create("22" * 32)
    code = (
        "import sys, time\n"
        "from windlass.checkpoint.memory.folder import NodeFolder\n"
        "from windlass.checkpoint.memory.supervise import ensure_snapshot_process\n"
        "print(ensure_snapshot_process(NodeFolder.at(sys.argv[1])).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    os.killpg(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    served = folder.read_smp()
    assert served is not None and served.pid == pid and served.alive
    assert os.getsid(pid) != starter.pid
    try:
        with SnapshotClient.of(folder, 1) as client:
            assert client.hello()["pid"] == pid
    finally:
        pids.kill([(pid, served.started)], 5.0)


def test_it_ends_when_its_folder_is_gone(node: Node) -> None:
    node.folder.remove()
    until(lambda: not node.served.alive)
    assert not node.folder.path.exists()


def test_one_that_waited_for_the_lock_of_a_folder_that_was_made_anew_does_not_serve_it(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0").create("22" * 32)
    lock = process.hold(folder.path)
    assert lock is not None and process.is_of(lock, folder.path)
    folder.remove()
    assert not process.is_of(lock, folder.path)
    folder.create("22" * 32)
    another = process.hold(folder.path)
    assert another is not None and process.is_of(another, folder.path) and not process.is_of(lock, folder.path)
    os.close(lock)
    os.close(another)


def test_it_removes_what_nobody_needs_any_more_and_ends(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0").create("22" * 32)
    Settings(lease_s=0.2).keep_in(folder)
    # Started by hand: whoever is to find it in its folder may be too late.
    command = [sys.executable, "-m", MODULE, str(folder.path), "--attached"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, cwd=ROOT, timeout=60).returncode == 0
    assert not folder.path.exists()


def test_stopping_it_leaves_the_snapshots_unless_they_are_to_be_removed(node: Node) -> None:
    node.client.stop(remove=False)
    until(lambda: not node.served.alive)
    assert node.folder.path.exists()
    node.respawn()
    with SnapshotClient.of(node.folder) as client:
        client.stop(remove=True)
    until(lambda: not node.served.alive)
    assert not node.folder.path.exists()


def test_a_stopped_process_is_replaced_and_a_healthy_one_is_left_alone(node: Node) -> None:
    supervisor = Supervisor(node.folder)
    assert not supervisor.check()
    os.kill(node.served.pid, signal.SIGSTOP)
    until(lambda: pids.letter(node.served.pid) == pids.STOPPED)
    assert supervisor.check()
    after = node.folder.read_smp()
    assert after is not None and after.pid != node.served.pid and after.port == node.served.port
    assert not node.served.alive, "two writers must never be"


def test_one_that_cannot_start_says_why_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, why = NodeFolder(tmp_path, JOB, "node-0").create("22" * 32), "hang_s = 'soon'"
    (folder.path / "settings.json").write_text('{"hang_s": "soon"}')
    log = folder.path / "smp.log"

    def clock() -> float:
        """Stand still until the process has said why twice: in a line, and at the end of where it happened."""
        return 1e9 if log.exists() and log.read_text().count(why) >= 2 else 0.0

    monkeypatch.setattr("windlass.checkpoint.memory.supervise.time", SimpleNamespace(monotonic=clock))
    with pytest.raises(CheckpointError, match=rf"did not begin to serve(.|\n)*{why}"):
        ensure_snapshot_process(folder, timeout_s=60.0)
