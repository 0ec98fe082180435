"""What is left in the memory of a node when a process is killed while it takes a snapshot: the one before, whole.
Killed while it makes room for snapshots, it leaves nothing.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.harness import outcomes
from tests.snapshot_state import HeldState, capturer, hashed, mixed_tensors, slots, whole_steps
from tests.waiting import until
from windlass.checkpoint.memory import pids, segment
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.heartbeat import process_started
from windlass.checkpoint.memory.segment import State
from windlass.checkpoint.memory.slots import NodeSlots
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
JOB = "0123456789abcdef"
POINTS = ["snapshot.begin", "snapshot.eager", "snapshot.chunk", "snapshot.filled", "gate.wait"]


def two_snapshots(env: ProcessEnv, base: str, movable: bool, parity: bool) -> None:
    """Take snapshot 1, which is then hashed, and be killed within snapshot 2, where WINDLASS_FAULT says."""
    source = HeldState(mixed_tensors(1), replicas=(0, 1) if parity else (0,), movable=movable)
    taker = capturer(Path(base), source, parity=parity)
    for step in (1, 2):
        for slot in slots(taker.folder) + (slots(taker.folder, "parity") if parity else []):
            if (header := slot.header()) is not None and header.state == State.COPIED:
                hashed(slot)
        for tensor in source.tensors.values():
            tensor.fill_(step)
        assert taker.snapshot(step, {"step": step})
        taker.gate()
    taker.close()


@pytest.mark.parametrize(
    ("point", "movable"), [*((point, False) for point in POINTS), ("snapshot.chunk", True), ("gate.wait", True)]
)
def test_a_process_killed_in_a_snapshot_leaves_the_one_before_it_whole(tmp_path, point, movable):
    env = {"WINDLASS_FAULT": f"kill:{point}:step=2"}
    died = outcomes(1, two_snapshots, str(tmp_path), movable, False, env=env, with_env=True)
    assert "SIGKILL" in died[0].text, died
    folder = NodeFolder(tmp_path, "0123456789abcdef", "node-0")
    found = whole_steps(folder)
    assert found.keys() == {1}
    assert all(torch.equal(t, torch.ones_like(t)) for t in found[1].values())
    later = [h.state for h in (slot.header() for slot in slots(folder)) if h is not None and h.step == 2]
    possible = {
        "snapshot.begin": [[]],
        "snapshot.eager": [[]],
        "snapshot.chunk": [[State.FILLING]],
        "snapshot.filled": [[State.FILLING]],
        "gate.wait": [[State.COPIED]] if movable else [[], [State.FILLING], [State.COPIED]],  # the thread goes on
    }
    assert later in possible[point]
    again = capturer(tmp_path, HeldState(mixed_tensors(2)), generation=2)
    assert again.ready() == (later != [State.COPIED])
    if again.ready():
        assert again.snapshot(3, {}) and again.gate() >= 0
    assert whole_steps(folder).keys() == {1}
    again.close()


def test_a_process_killed_while_it_makes_parity_leaves_data_and_parity_of_the_step_before(tmp_path):
    env = {"WINDLASS_FAULT": "kill:snapshot.filled:step=2"}
    died = outcomes(1, two_snapshots, str(tmp_path), False, True, env=env, with_env=True)
    assert "SIGKILL" in died[0].text
    folder = NodeFolder(tmp_path, "0123456789abcdef", "node-0")
    for role in ("data", "parity"):
        states = [(h.step, h.state) for h in (slot.header() for slot in slots(folder, role)) if h is not None]
        assert states == [(1, State.FILLED), (2, State.FILLING)]
    assert whole_steps(folder).keys() == {1}


ZOMBIE = """
import sys
from pathlib import Path
import torch
from tests.snapshot_state import HeldState, capturer
source = HeldState({"model.w": torch.full((1 << 16,), 7.0)})
taker = capturer(Path(sys.argv[1]), source)
print("ready", flush=True)
taker.snapshot(1, {})
taker.gate()
"""


@pytest.mark.parametrize("freed", [False, True])
def test_a_slot_in_which_an_older_process_may_still_write_is_left_alone_until_it_is_dead(tmp_path, freed):
    env = {**os.environ, "WINDLASS_FAULT": "hang:snapshot.filled:step=1"}
    zombie = subprocess.Popen([sys.executable, "-c", ZOMBIE, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, env=env)
    try:
        assert zombie.stdout is not None and zombie.stdout.readline() == b"ready\n"
        folder = NodeFolder(tmp_path, JOB, "node-0")
        until(lambda: slots(folder)[0].progress > 0)
        zombie.send_signal(signal.SIGSTOP)
        until(lambda: pids.letter(zombie.pid) == pids.STOPPED)
        if freed:  # what it left half filled is freed as the new generation begins, which does not end its writing
            NodeSlots(folder, print).begin(2, None)
        again = capturer(tmp_path, HeldState({"model.w": torch.full((1 << 16,), 9.0)}), generation=2)
        assert again.snapshot(1, {}) and again.gate() >= 0  # in the other slot
        first, second = slots(folder)
        assert first.claimed and not second.claimed
        assert hashed(second).generation == 2
        assert not again.ready() and not again.snapshot(2, {})
        zombie.kill()
        zombie.wait()
        assert again.ready() and again.snapshot(3, {}) and again.gate() >= 0
        assert hashed(first).step == 3
        assert {step: t["model.w"].unique().tolist() for step, t in whole_steps(folder).items()} == {1: [9], 3: [9]}
        again.close()
    finally:
        zombie.kill()
        zombie.communicate()


def snapshots_until_killed(env: ProcessEnv, base: str, after_s: float) -> None:
    """Take snapshots, hash them and free those before the last, until the kernel ends this process."""
    source = HeldState({"model.w": torch.zeros(1 << 16)})
    taker = capturer(Path(base), source)
    mine = slots(taker.folder)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for step in range(1, 1 << 30):
        source.tensors["model.w"].fill_(step)
        if taker.snapshot(step, {"step": step}):
            taker.gate()
        for slot in mine:
            if (header := slot.header()) is not None and header.state == State.COPIED:
                hashed(slot)
        for slot in mine:  # only now that a newer one vouches for itself
            if (header := slot.header()) is not None and header.step < step:
                slot.free(header)
        if step == 2:
            signal.setitimer(signal.ITIMER_REAL, after_s)


@pytest.mark.parametrize("after_s", [0.0301, 0.0333, 0.0377])
def test_a_process_killed_at_any_instant_leaves_a_whole_snapshot(tmp_path, after_s):
    died = outcomes(1, snapshots_until_killed, str(tmp_path), after_s, with_env=True)
    assert "SIGALRM" in died[0].text, died
    found = whole_steps(NodeFolder(tmp_path, "0123456789abcdef", "node-0"))
    assert found and all(t["model.w"].unique().tolist() == [step] for step, t in found.items())


def made_at(path: Path) -> segment.Segment:
    return segment.Segment.create(path, "data", 3, 1000, 2, 64, 64)


def killed_while_making(path: Path, *, unnamed: bool) -> None:
    """Have a process be killed when its segment has all its memory, but not its name yet."""
    pid = os.fork()
    if pid == 0:
        if not unnamed:
            segment.os.open = without_unnamed
        segment.os.link = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        made_at(path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


OPEN = os.open


def without_unnamed(path: Path, flags: int, *args: int) -> int:
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return OPEN(path, flags, *args)


def test_a_process_killed_while_it_makes_a_segment_leaves_nothing_of_it(tmp_path):
    killed_while_making(tmp_path / "a.seg", unnamed=True)
    assert os.listdir(tmp_path) == []
    made_at(tmp_path / "a.seg").close()
    assert os.listdir(tmp_path) == ["a.seg"] and stat.S_IMODE((tmp_path / "a.seg").stat().st_mode) == 0o600


def test_where_files_need_names_the_next_segment_made_removes_what_a_kill_left(tmp_path, monkeypatch):
    killed_while_making(tmp_path / "a.seg", unnamed=False)
    assert len(os.listdir(tmp_path)) == 1
    living = f".c.seg.{os.getpid()}-{process_started(os.getpid())}.making"
    (tmp_path / living).write_bytes(b"of one that is being made")
    monkeypatch.setattr(segment.os, "open", without_unnamed)
    made = made_at(tmp_path / "b.seg")
    made.close()
    with pytest.raises(CheckpointError, match="File exists"):
        made_at(tmp_path / "b.seg")
    assert sorted(os.listdir(tmp_path)) == [living, "b.seg"]
