"""The snapshot memory of a node in the hands of a launcher, with a real snapshot process."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import until
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.fencing import fence
from windlass.checkpoint.memory.folder import NodeFolder, SnapshotProcess
from windlass.checkpoint.memory.heartbeat import Heartbeat, Phase, process_started
from windlass.checkpoint.memory.service import KEPT_S, Service
from windlass.checkpoint.memory.settings import Settings
from windlass.dist.errors import CheckpointError
from windlass.launch.keeper import Keeper
from windlass.launch.node_memory import NodeMemory, forget_another_run, stop_process
from windlass.launch.snapshot_watch import SnapshotWatch

JOB = "0123456789abcdef"
TRAINER = """
import sys, threading
from pathlib import Path
from windlass.checkpoint.memory.heartbeat import Heartbeat
Heartbeat(Path(sys.argv[1]), int(sys.argv[2]))
print("beating", flush=True)
threading.Event().wait(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[NodeFolder]:
    folder = NodeFolder(tmp_path, JOB, "node-0")
    yield folder
    stop_process(folder)


def test_fencing_raises_the_generation_ends_older_workers_and_has_the_node_served(folder: NodeFolder) -> None:
    memory = NodeMemory(folder, "secret")
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(folder.beat_path(0)), "1"], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None and "beating" in trainer.stdout.readline()
    memory.fence(2)
    assert trainer.wait(60) == -signal.SIGKILL
    served = folder.read_smp()
    assert folder.read_generation() == 2 and served is not None and served.alive
    memory.release(ok=True)
    assert not served.alive and not folder.path.exists()


def test_a_killed_snapshot_process_is_replaced_and_that_is_news_once(folder: NodeFolder) -> None:
    memory = NodeMemory(folder, "secret")
    memory.fence(1)
    first = memory.kill()
    news: list[str] = []
    until(lambda: bool(news.extend(memory.tend()) or news), 60)
    served = folder.read_smp()
    assert served is not None and served.alive and served.pid != first
    assert len(news) == 1 and "snapshot process of node-0 replaced" in news[0]
    memory.release(ok=True)


class Failing:
    """Supervises a process that cannot be started the first few times."""

    def __init__(self, folder: NodeFolder, failures: int) -> None:
        self.folder, self.failures, self.asked = folder, failures, 0

    def check(self) -> bool:
        self.asked += 1
        if self.asked <= self.failures:
            raise CheckpointError(f"no memory, attempt {self.asked}")
        return self.asked == self.failures + 1


def test_a_process_that_cannot_be_started_is_tried_again_ever_more_rarely_and_said_once(
    folder: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("windlass.launch.keeper.time.monotonic", lambda: now[0])
    failing = Failing(folder, 8)
    keeper, said, asked_at = Keeper(failing), [], []  # type: ignore[arg-type]
    while failing.asked < 10:
        before = failing.asked
        said += [news] if (news := keeper.look()) else []
        asked_at += [now[0]] if failing.asked > before else []
        now[0] += 0.25
    assert len(said) == 2 and "cannot be replaced" in said[0] and "attempt 1" in said[0]
    assert "snapshot process of node-0 replaced" in said[1]
    pauses = [later - sooner for sooner, later in itertools.pairwise(asked_at)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 0.25]


def test_the_keeper_of_a_node_goes_on_after_a_start_that_failed(
    folder: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = NodeMemory(folder, "secret")
    memory.fence(1)
    failing = Failing(folder, 1)
    monkeypatch.setattr(memory._supervisor, "check", failing.check)
    news: list[str] = []
    until(lambda: bool(news.extend(memory.tend()) or len(news) == 2), 60)
    assert "cannot be replaced" in news[0] and "replaced in" in news[1]
    memory.release(ok=True)


def test_a_watch_that_cannot_start_a_process_says_so_once(folder: NodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.create("secret")
    failing = Failing(folder, 1 << 30)
    monkeypatch.setattr("windlass.launch.snapshot_watch.Supervisor", lambda folder: failing)
    monkeypatch.setattr("windlass.launch.keeper.FIRST_PAUSE_S", 0.0)
    client = SnapshotClient("127.0.0.1", 1, JOB, "secret", 0.1, generation=1)
    watch = SnapshotWatch(folder, client, supervise=True, first=True)
    for _ in range(3):
        watch.look()
    assert failing.asked == 3
    assert len(watch.problems) == 1 and "cannot be replaced" in watch.problems[0]


def test_fencing_leaves_its_caller_alone_and_refuses_a_generation_that_is_over(folder: NodeFolder) -> None:
    folder.create("secret")
    Heartbeat(folder.beat_path(0), 1).beat(Phase.STEP, 7)
    assert fence(folder, 2) == [] and folder.read_generation() == 2
    with pytest.raises(CheckpointError, match="node node-0 is at generation 2: 1 is over"):
        fence(folder, 1)
    with pytest.raises(CheckpointError, match="is at generation 2: 1 is over"):
        NodeMemory(folder, "secret").fence(1)
    assert folder.read_smp() is None


def test_a_node_that_lost_everything_stays_lost(folder: NodeFolder) -> None:
    memory, drive = NodeMemory(folder, "secret"), folder.base / "nvme"
    place, other = on_drive(folder, drive), drive / JOB / "node-1"
    other.mkdir()
    memory.fence(1)
    memory.lose(drive)
    assert memory.tend() == [] and not folder.path.exists()
    assert not place.exists() and other.exists()
    assert memory.flush(0.1) is None


def test_what_is_left_of_a_run_whose_folder_was_deleted_is_removed(folder: NodeFolder) -> None:
    folder.create("old")
    (folder.path / "data").write_text("of the old run")
    assert not forget_another_run(folder, "old")
    assert forget_another_run(folder, "new") and not folder.path.exists()
    assert not forget_another_run(folder, "new")


@pytest.mark.parametrize("depth", [0, 1])
def test_what_others_made_under_our_name_is_neither_removed_nor_has_it_anybody_killed(
    folder: NodeFolder, tmp_path: Path, depth: int
) -> None:
    """`depth`: the node, or the job, is a link into the user's home, put where /dev/shm lets anybody."""
    home, link = tmp_path / "home", [folder.path, folder.path.parent][depth]
    there = home if depth == 0 else home / folder.node
    there.mkdir(parents=True, mode=0o700)
    (there / "token").write_text("old")
    process = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait(600)"])
    served = SnapshotProcess(process.pid, process_started(process.pid) or 0, "127.0.0.1", 1)
    (there / "smp.json").write_text(json.dumps(vars(served)))
    link.parent.mkdir(parents=True, mode=0o700)
    folder.path.parents[1].chmod(0o700)
    link.symlink_to(home)
    try:
        with pytest.raises(CheckpointError, match=f"{link} must be a folder of user"):
            NodeMemory(folder, "new")
        assert stop_process(folder) == 0 and process.poll() is None and (there / "token").exists()
    finally:
        process.kill()
        process.wait()


def on_drive(folder: NodeFolder, drive: Path) -> Path:
    """Return what a node has on its drive, which it is told of."""
    Settings(local_dir=str(drive)).keep_in(folder)
    place = drive / folder.job / folder.node
    (place / "step-00000004").mkdir(parents=True)
    return place


@pytest.mark.parametrize("remembered", [True, False])
def test_a_good_end_clears_the_drives_of_nodes_of_earlier_launches_too(
    folder: NodeFolder, tmp_path: Path, remembered: bool
) -> None:
    memory, other = NodeMemory(folder, "secret"), NodeFolder(tmp_path, JOB, "node-1").create("secret")
    places = [on_drive(node, tmp_path / "nvme") for node in (folder, other)]
    if not remembered:
        other.remove()  # its lease was over
    memory.release(ok=True)
    memory.release_others()
    assert not any(place.exists() for place in places) and os.listdir(tmp_path / "nvme") == []
    assert not other.path.exists() and not folder.path.exists()


def test_a_bad_end_leaves_the_drive_even_where_memory_holds_nothing(folder: NodeFolder, tmp_path: Path) -> None:
    memory = NodeMemory(folder, "secret")
    place = on_drive(folder, tmp_path / "nvme")
    memory.release(ok=False)
    assert place.exists() and not folder.path.exists()


def test_a_deleted_run_that_still_trains_is_not_disturbed(folder: NodeFolder) -> None:
    folder.create("old")
    Heartbeat(folder.beat_path(3), 1).beat(Phase.STEP, 7)
    with pytest.raises(CheckpointError, match=f"in use by rank 3 .process {os.getpid()}. of an earlier run"):
        forget_another_run(folder, "new")
    assert folder.path.exists()


@pytest.mark.parametrize("suspect", [True, False])
def test_the_verdict_of_the_watchdog_tells_who_hung_and_who_only_waited(suspect: bool, folder: NodeFolder) -> None:
    memory = NodeMemory(folder, "secret")
    verdict = {
        "generation": 4,
        "phase": "STEP",
        "step": 12,
        "silent_s": 31.5,
        "limit_s": 30.0,
        "state": "T",
        "suspect": suspect,
        "stacks": "/run/stacks/gen-4-rank-1.txt",
        "when": 5.0,
    }
    folder.verdict_path(1).write_text(json.dumps(verdict))
    failure = memory.verdict(1, 4)
    assert failure is not None and failure.kind == "hang" and failure.secondary is not suspect
    said = "hung in STEP at step 12 for 31.5 s, 30.0 s allowed (stopped by a signal)" if suspect else "waited in STEP"
    assert failure.message.startswith(said)
    assert memory.verdict(1, 5) is None and memory.verdict(0, 4) is None
    folder.verdict_path(1).write_text("{")
    assert memory.verdict(1, 4) is None


def test_snapshots_of_a_node_that_a_launcher_looks_after_are_needed_though_nobody_trains(folder: NodeFolder) -> None:
    memory = NodeMemory(folder, "secret")
    memory.fence(1)
    until(lambda: folder.kept_age_s() < KEPT_S)
    memory.release(ok=True)
    service = Service(folder.create("secret").path, "127.0.0.1", 0)
    for age_s, needed in ((0.0, True), (2 * KEPT_S, False)):
        folder.keep()
        then = time.time() - age_s
        os.utime(folder.kept_path, (then, then))
        service._seen = -1.0
        service._touch()
        assert (service._seen > 0) == needed
    service._server.close()


def test_garbage_that_takes_long_to_remove_does_not_keep_a_process_from_living(
    folder: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    removing, done = threading.Event(), threading.Event()

    def collect(*arguments: object, **options: object) -> list[object]:
        removing.set()
        assert done.wait(60)
        return []

    monkeypatch.setattr("windlass.checkpoint.memory.service.collect_garbage", collect)
    monkeypatch.setattr("windlass.checkpoint.memory.service.signal.signal", lambda *arguments: None)
    monkeypatch.setattr("windlass.checkpoint.memory.service.TOUCH_S", 0.1)
    service = Service(folder.create("secret").path, "127.0.0.1", 0)
    running = threading.Thread(target=service.run)
    running.start()
    assert removing.wait(60)
    os.utime(folder.lease_path, (1, 1))
    until(lambda: folder.lease_age_s() < 60)
    done.set()
    service.stop()
    running.join(60)
    assert not running.is_alive()
    folder.smp_path.unlink()  # it names this process, which is not to be ended as one left behind
