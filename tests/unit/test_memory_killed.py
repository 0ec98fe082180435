"""What is left in the memory of a node when a process is killed while it takes a snapshot: the one before, whole."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.harness import outcomes
from tests.snapshot_state import HeldState, capturer, hashed, mixed_tensors, slots, whole_steps
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.segment import State
from windlass.dist.env import ProcessEnv

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
        "snapshot.eager": [[State.FILLING]],
        "snapshot.chunk": [[State.FILLING]],
        "snapshot.filled": [[State.FILLING]],
        "gate.wait": [[State.COPIED]] if movable else [[State.FILLING], [State.COPIED]],  # the thread goes on
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
            header = slot.header()
            if header is not None and header.state == State.COPIED:
                hashed(slot)
            elif header is not None and header.step < step:
                slot.free(header)
        if step == 2:
            signal.setitimer(signal.ITIMER_REAL, after_s)


@pytest.mark.parametrize("after_s", [0.0301, 0.0333, 0.0377])
def test_a_process_killed_at_any_instant_leaves_a_whole_snapshot(tmp_path, after_s):
    died = outcomes(1, snapshots_until_killed, str(tmp_path), after_s, with_env=True)
    assert "SIGALRM" in died[0].text, died
    found = whole_steps(NodeFolder(tmp_path, "0123456789abcdef", "node-0"))
    assert found and all(t["model.w"].unique().tolist() == [step] for step, t in found.items())
