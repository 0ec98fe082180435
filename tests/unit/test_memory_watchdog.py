"""The watchdog: who is too silent, who is suspect, and what becomes of a node whose ranks hang."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import until
from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory import watchdog as watchdog_module
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.heartbeat import Beat, Phase, process_started, read_heartbeat
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.watchdog import Stall, Watchdog, find_stalls, find_suspects, limit_of

ROOT = Path(__file__).resolve().parents[2]
S = 1_000_000_000
WISHES = Settings(hang_s=10, start_s=100)


def beat(phase: Phase, at_s: float, *, step: int = 5, median_s: float = 1.0) -> Beat:
    return Beat(1, 1, 1, phase, step, int(at_s * S), int(median_s * S), 1)


@pytest.mark.parametrize(
    ("phase", "median_s", "limit_s"),
    [
        (Phase.STEP, 1.0, 10),
        (Phase.STEP, 4.0, 20),
        (Phase.STEP, 0.0, 100),  # the first step loads and compiles
        (Phase.START, 1.0, 100),
        (Phase.EVAL, 1.0, 100),
        (Phase.SAVE, 1.0, 100),
        (Phase.DONE, 1.0, float("inf")),
    ],
)
def test_every_phase_has_its_own_patience(phase: Phase, median_s: float, limit_s: float) -> None:
    assert limit_of(beat(phase, 0, median_s=median_s), WISHES) == limit_s


def test_only_ranks_that_are_silent_for_too_long_are_found_the_longest_first() -> None:
    beats = {0: beat(Phase.STEP, 85), 1: beat(Phase.STEP, 80), 2: beat(Phase.STEP, 95), 3: beat(Phase.EVAL, 50)}
    found = find_stalls(beats, WISHES, 100 * S, 0)
    assert [(stall.rank, stall.silent_s, stall.limit_s) for stall in found] == [(1, 20.0, 10.0), (0, 15.0, 10.0)]


def test_silence_while_the_watchdog_itself_did_not_run_proves_nothing() -> None:
    beats = {0: beat(Phase.STEP, 10)}
    assert find_stalls(beats, WISHES, 100 * S, 95 * S) == []
    assert find_stalls(beats, WISHES, 106 * S, 95 * S) != []


def test_stopped_ranks_are_suspect_else_those_that_are_behind() -> None:
    beats = {0: beat(Phase.STEP, 0, step=7), 1: beat(Phase.STEP, 0, step=6), 2: beat(Phase.STEP, 0, step=7)}
    assert find_suspects(beats, {0: "S", 1: "S", 2: "T"}) == [2]
    assert find_suspects(beats, {0: "S", 1: "S", 2: "D"}) == [1]


# -- with processes --------------------------------------------------------------------------------------------------

RANK = """
import faulthandler, signal, sys, time
from pathlib import Path
from windlass.checkpoint.memory.heartbeat import Heartbeat, Phase
beats = Heartbeat(Path(sys.argv[1]), int(sys.argv[2]))
if sys.argv[3] != "-":
    faulthandler.register(signal.SIGUSR1, file=open(sys.argv[3], "w"), all_threads=True)
def stuck_in_a_collective():
    beats.beat(Phase.STEP, 3)
    beats.beat(Phase.STEP, 4)
    print("on", flush=True)
    time.sleep(600)
stuck_in_a_collective()
"""


class Ranks:
    def __init__(self, folder: NodeFolder, run: Path) -> None:
        self.folder, self.run = folder, run
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, rank: int, generation: int = 1, *, stacks: bool = True) -> subprocess.Popen[bytes]:
        path = self.run / "stacks" / f"gen-{generation}-rank-{rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments = [str(self.folder.beat_path(rank)), str(generation), str(path) if stacks else "-"]
        process = subprocess.Popen([sys.executable, "-c", RANK, *arguments], stdout=subprocess.PIPE, cwd=ROOT)
        self.started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        return process

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(NodeFolder(tmp_path, "0123456789abcdef", "node-0").create(), tmp_path / "run")
    yield ranks
    ranks.end()


def watch(ranks: Ranks, told: list[Stall], hang_s: float) -> Watchdog:
    wishes = Settings(hang_s=hang_s, start_s=60, run_folder=str(ranks.run))
    return Watchdog(ranks.folder, 1, wishes, told.append, lambda line: None)


def test_a_hang_gets_the_stacks_written_and_all_ranks_of_the_node_killed_with_the_stopped_one_named(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, stopped = ranks.start(0), ranks.start(1)
    os.kill(stopped.pid, signal.SIGSTOP)
    until(lambda: pids.letter(stopped.pid) == pids.STOPPED)
    told: list[Stall] = []
    monkeypatch.setattr(watchdog_module, "STACKS_S", 60.0)
    monkeypatch.setattr(watchdog_module, "MEDIANS", 0)  # or a rank whose one step was slow would be given longer
    watchdog = watch(ranks, told, hang_s=0.2)
    until(lambda: bool(watchdog.look()), 60.0)
    assert [process.wait(60) for process in (hanging, stopped)] == [-signal.SIGKILL, -signal.SIGKILL]
    assert "stuck_in_a_collective" in (ranks.run / "stacks" / "gen-1-rank-0.txt").read_text()
    verdicts = [json.loads(ranks.folder.verdict_path(rank).read_text()) for rank in (0, 1)]
    assert [v["suspect"] for v in verdicts] == [False, True] and verdicts[1]["state"] == "T"
    assert verdicts[0]["phase"] == "STEP" and verdicts[0]["step"] == 4 and verdicts[0]["silent_s"] >= 0.2
    assert len(told) == 1, "the other nodes are told once"
    assert watchdog.look() == [], "the dead do not hang"


def test_ranks_that_beat_and_ranks_of_another_generation_are_left_alone(ranks: Ranks) -> None:
    older = ranks.start(0, generation=2)
    watchdog = watch(ranks, [], hang_s=0.05)
    seen = read_heartbeat(ranks.folder.beat_path(0))
    assert seen is not None
    until(lambda: seen.silent_s > 0.1)
    assert watchdog.look() == []
    assert older.poll() is None


def test_a_rank_that_does_not_catch_the_signal_is_not_killed_by_asking_for_its_stacks(ranks: Ranks) -> None:
    early = ranks.start(0, stacks=False)
    assert not pids.catches(early.pid, signal.SIGUSR1)
    watch(ranks, [], hang_s=60).dump_stacks()
    assert early.poll() is None


def test_stacks_are_waited_for_as_long_as_they_are_being_written(ranks: Ranks) -> None:
    path = ranks.run / "stacks" / "gen-1-rank-0.txt"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    reader, writer = os.open(path, os.O_RDONLY | os.O_NONBLOCK), os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    process = ranks.start(0)
    os.kill(process.pid, signal.SIGUSR1)
    until(lambda: pids.is_handling(process.pid, signal.SIGUSR1))
    os.set_blocking(reader, True)
    text = b""
    while b"stuck_in_a_collective" not in text:
        text += os.read(reader, 1 << 20).lstrip(b"x")
    until(lambda: not pids.is_handling(process.pid, signal.SIGUSR1))
    os.close(reader)
    os.close(writer)


def test_a_number_that_means_another_process_now_is_never_signalled(ranks: Ranks) -> None:
    process = ranks.start(0)
    started = process_started(process.pid)
    assert started is not None
    assert not pids.send(process.pid, started + 1, signal.SIGKILL)
    assert pids.kill([(process.pid, started + 1)], 1.0) == [] and process.poll() is None
    assert pids.kill([(process.pid, started)], 60.0) == [] and process.wait(60) == -signal.SIGKILL


def test_a_rank_that_hangs_ends_though_there_is_no_room_for_the_verdict(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: NodeFolder, path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hanging = ranks.start(0)
    watchdog = watch(ranks, [], hang_s=0.2)
    monkeypatch.setattr(NodeFolder, "replace", full)
    until(lambda: bool(watchdog.look()))
    assert hanging.wait(60) == -signal.SIGKILL


def test_what_another_node_has_found_is_judged_a_little_early_and_else_only_answered_with_stacks(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "STACKS_S", 60.0)
    waiting = ranks.start(0)
    watch(ranks, [], hang_s=600).hear()
    assert waiting.poll() is None
    assert "stuck_in_a_collective" in (ranks.run / "stacks" / "gen-1-rank-0.txt").read_text()
    beats = {0: beat(Phase.STEP, 0)}
    assert find_stalls(beats, WISHES, 9 * S, 0) == []
    [stall] = find_stalls(beats, WISHES, 9 * S, 0, early_s=1.5)
    assert (stall.silent_s, stall.limit_s) == (9, 10)
