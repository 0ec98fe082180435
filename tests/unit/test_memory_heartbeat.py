"""Heartbeats: written by a trainer, read by whoever watches it, in shared memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.waiting import until
from windlass.checkpoint.memory.heartbeat import Heartbeat, Phase, is_alive, process_started, read_heartbeat


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when told to."""
    now = [10**9]
    monkeypatch.setattr("windlass.checkpoint.memory.heartbeat.time.monotonic_ns", lambda: now[0])
    return now


def test_a_beat_tells_who_what_and_when(tmp_path, clock):
    beat = Heartbeat(tmp_path / "00003", generation=4)
    first = read_heartbeat(tmp_path / "00003")
    assert first is not None and (first.phase, first.generation, first.count) == (Phase.START, 4, 0)
    assert (first.pid, first.started) == (os.getpid(), process_started(os.getpid()))
    clock[0] += 2 * 10**9
    beat.beat(Phase.EVAL, 17)
    second = read_heartbeat(tmp_path / "00003")
    assert second is not None and second == beat.read()
    assert (second.phase, second.step, second.time_ns, second.count) == (Phase.EVAL, 17, 3 * 10**9, 1)
    clock[0] += 5 * 10**9
    assert second.silent_s == 5.0


def test_the_median_step_is_of_steps_only(tmp_path, clock):
    beat = Heartbeat(tmp_path / "0", generation=1)
    for step, seconds in enumerate((1, 3, 1, 100, 1), 1):
        beat.beat(Phase.STEP, step)
        clock[0] += seconds * 10**9
    beat.beat(Phase.EVAL, 5)
    clock[0] += 1000 * 10**9
    beat.beat(Phase.STEP, 6)  # what lay before it was no step
    assert beat.read().median_ns == 2 * 10**9  # of 1, 3, 1 and 100 seconds
    beat.beat(Phase.STEP, 9)  # nor is a jump
    assert beat.read().median_ns == 2 * 10**9


def test_a_beat_that_is_repeated_within_a_step_does_not_shorten_it(tmp_path, clock):
    beat = Heartbeat(tmp_path / "0", generation=1)
    beat.beat(Phase.STEP, 1)
    clock[0] += 10**9
    beat.beat(Phase.STEP, 1)
    clock[0] += 10**9
    beat.beat(Phase.STEP, 2)
    assert beat.read().median_ns == 2 * 10**9


def test_a_process_of_an_older_generation_is_no_longer_heard(tmp_path):
    path = tmp_path / "00000"
    zombie = Heartbeat(path, generation=1)
    Heartbeat(path, generation=2).beat(Phase.STEP, 5)
    zombie.beat(Phase.DONE, 999)
    heard = read_heartbeat(path)
    assert heard is not None and (heard.generation, heard.phase, heard.step) == (2, Phase.STEP, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["00000"]


@pytest.mark.parametrize("data", [b"", b"short", bytes(72), b"WLBEAT01" + b"\xff" * 64])
def test_what_is_no_heartbeat_is_none(tmp_path, data):
    (tmp_path / "0").write_bytes(data)
    assert read_heartbeat(tmp_path / "0") is None
    assert read_heartbeat(tmp_path / "missing") is None


def test_a_number_of_a_process_is_told_from_the_process():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_started(child.pid)
    assert started is not None and is_alive(child.pid, started)
    assert not is_alive(child.pid, started + 1) and not is_alive(0, 0)
    child.kill()
    until(lambda: not is_alive(child.pid, started))  # dead, and not yet waited for
    child.communicate()
    assert process_started(child.pid) is None
