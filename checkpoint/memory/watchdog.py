"""Finds ranks of this node that hang, gets the stacks of all ranks written, and ends them.

In a synchronous step one rank that hangs stops all, so the ranks of a node are judged together: suspect is a rank that
the system has stopped, else the one that is furthest behind. Must not know: torch, collectives, who starts the ranks.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.heartbeat import Beat, Phase, is_alive, read_heartbeat
from windlass.checkpoint.memory.settings import Settings

MEDIANS = 5  # a step may take this many times the usual
STACKS_S = 5.0  # for the ranks to write where they are
KILL_S = 5.0
STARVED_S = 5.0  # between two looks: then this process did not run either, and silence proves nothing


@dataclass(frozen=True)
class Stall:
    """A rank that has shown no sign of life for longer than its phase may take. Units: seconds."""

    rank: int
    beat: Beat
    silent_s: float
    limit_s: float


def limit_of(beat: Beat, settings: Settings) -> float:
    """Return how long a rank may be silent in its phase.

    Units: seconds
    """
    if beat.phase == Phase.DONE:
        return float("inf")
    if beat.phase == Phase.STEP and beat.median_ns:
        return max(MEDIANS * beat.median_ns / 1e9, settings.hang_s)
    return max(settings.start_s, settings.hang_s)  # also a first step, which loads and compiles


def find_stalls(
    beats: Mapping[int, Beat], settings: Settings, now_ns: int, awake_ns: int, early_s: float = 0.0
) -> list[Stall]:
    """Return the ranks that are silent for too long, or will be in `early_s`, the longest first. `awake_ns`: since when
    the watchdog itself runs without a gap; silence before that does not count, because the whole machine may have been
    asleep.
    """
    stalls = []
    for rank, beat in sorted(beats.items()):
        silent_s = (now_ns - max(beat.time_ns, awake_ns)) / 1e9
        if silent_s + early_s > (limit_s := limit_of(beat, settings)):
            stalls.append(Stall(rank, beat, silent_s, limit_s))
    return sorted(stalls, key=lambda stall: -stall.silent_s)


def find_suspects(beats: Mapping[int, Beat], letters: Mapping[int, str]) -> list[int]:
    """Return the ranks that probably hold up the others: stopped ones, else those at the earliest step."""
    stopped = [rank for rank in sorted(beats) if letters.get(rank) == pids.STOPPED]
    first = min((beat.step for beat in beats.values()), default=0)
    return stopped or [rank for rank in sorted(beats) if beats[rank].step == first]


def read_beats(folder: NodeFolder, generation: int) -> dict[int, Beat]:
    """Return the last beats of the living ranks of a generation on this node."""
    beats = {rank: read_heartbeat(path) for rank, path in folder.beating().items()}
    return {r: b for r, b in beats.items() if b and b.generation == generation and is_alive(b.pid, b.started)}


def stacks_path(settings: Settings, generation: int, rank: int) -> Path:
    """Return where a rank's trainer has its stacks written (faulthandler, at SIGUSR1)."""
    return Path(settings.run_folder) / "stacks" / f"gen-{generation}-rank-{rank}.txt"


class Watchdog:
    """Looks at the ranks of one node in one generation. `tell` informs the other nodes of a stall before any rank ends.

    Any thread.
    """

    def __init__(
        self,
        folder: NodeFolder,
        generation: int,
        settings: Settings,
        tell: Callable[[Stall], None],
        log: Callable[[str], None],
    ) -> None:
        self.folder, self.generation, self.settings = folder, generation, settings
        self._tell, self._log = tell, log
        self._awake_ns = self._looked_ns = time.monotonic_ns()
        self._judging = threading.Lock()

    @property
    def pause_s(self) -> float:
        """The seconds between two looks."""
        return min(max(self.settings.hang_s / 10, 0.05), 1.0)

    def look(self, early_s: float = 0.0) -> list[Stall]:
        """Judge the ranks once, `early_s` before their time is over; where one hangs, end all of this node and return
        why.

        Blocks: host, at most STACKS_S + KILL_S and what telling takes when there is a stall
        """
        with self._judging:
            now = time.monotonic_ns()
            if now - self._looked_ns > STARVED_S * 1e9:
                self._awake_ns = now
            self._looked_ns = now
            beats = read_beats(self.folder, self.generation)
            stalls = find_stalls(beats, self.settings, now, self._awake_ns, early_s)
            if stalls:
                self._end(beats, stalls)
                self._looked_ns = time.monotonic_ns()
            return stalls

    def hear(self) -> None:
        """Another node has found a rank that hangs. It may wait for one here, whose time is over at the next look: that
        one's verdict must be there when people ask why the other ended. Else say where the ranks of this node are.

        Blocks: host, as `look`
        """
        if not self.look(early_s=2 * self.pause_s):
            self.dump_stacks()

    def _end(self, beats: dict[int, Beat], stalls: list[Stall]) -> None:
        first = stalls[0]
        self._log(
            f"rank {first.rank} hangs: {first.beat.phase.name} at step {first.beat.step} for {first.silent_s:.1f} s, "
            f"{first.limit_s:.1f} s allowed"
        )
        self._tell(first)
        letters = {rank: pids.letter(beat.pid) for rank, beat in beats.items()}
        self.dump_stacks(beats)
        suspects = find_suspects(beats, letters)
        for rank, beat in beats.items():
            stall = next((s for s in stalls if s.rank == rank), None)
            verdict = {
                "rank": rank,
                "node": self.folder.node,
                "generation": self.generation,
                "pid": beat.pid,
                "phase": beat.phase.name,
                "step": beat.step,
                "state": letters[rank],
                "silent_s": round(stall.silent_s, 3) if stall else None,
                "limit_s": round(stall.limit_s, 3) if stall else None,
                "suspect": rank in suspects,
                "stacks": str(stacks_path(self.settings, self.generation, rank)),
                "when": time.time(),
            }
            try:
                self.folder.replace(self.folder.verdict_path(rank), json.dumps(verdict).encode())
            except OSError as error:  # no room for it: a rank that hangs ends all the same
                self._log(f"the verdict on rank {rank} could not be kept: {error}")
        left = pids.kill([(beat.pid, beat.started) for beat in beats.values()], KILL_S)
        if left:
            self._log(f"processes {left} hang in the kernel and cannot be killed: node {self.folder.node} is lost")

    def dump_stacks(self, beats: Mapping[int, Beat] | None = None) -> None:
        """Have all ranks that can write where they are.

        Blocks: host, at most STACKS_S
        """
        beats = read_beats(self.folder, self.generation) if beats is None else beats
        asked: dict[int, tuple[Path, int]] = {}
        for rank, beat in beats.items():
            # One that does not catch the signal yet would die of it, one that is stopped never writes.
            if pids.catches(beat.pid, signal.SIGUSR1) and pids.letter(beat.pid) != pids.STOPPED:
                path = stacks_path(self.settings, self.generation, rank)
                asked[beat.pid] = path, _size(path)
                pids.send(beat.pid, beat.started, signal.SIGUSR1)
        end, pause = time.monotonic() + STACKS_S, threading.Event()
        # What begins to be written is whole once the handler has returned: ranks are killed right after this.
        while time.monotonic() < end and any(
            _size(path) <= before or pids.is_handling(pid, signal.SIGUSR1) for pid, (path, before) in asked.items()
        ):
            pause.wait(0.01)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
