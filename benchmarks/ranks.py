"""Start the processes of one measurement, follow their phases and sample their memory.

A measurement is a set of ranks running the same script. Each reports one JSON object per line through the pipe whose
number it gets as `--events`: `{"phase": NAME}` when a phase begins, `{"result": {...}}` at the end. Memory is the sum
of the proportional set sizes (PSS) of the ranks, so that a page shared by two ranks counts once; it is sampled in every
phase but `timed`, because reading it walks the page tables and would slow the steps that are timed.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_S = 0.1
ROOT = Path(__file__).resolve().parents[1]


class RankFailed(Exception):
    """A rank ended badly or too late; the message holds the end of its output."""


@dataclass
class Measured:
    """What the ranks of one measurement reported, and the peaks of PSS in each phase: of the sum, and rank by rank."""

    results: list[dict[str, Any]]
    peak_bytes: dict[str, int]
    rank_peak_bytes: dict[str, list[int]]
    seconds: float


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    events: int
    log: Path
    phase: str = "start"
    text: bytes = b""
    result: dict[str, Any] | None = None
    open: bool = field(default=True)


def run_ranks(
    script: Path, arguments: Sequence[str], *, num_ranks: int, folder: Path, env: Mapping[str, str], timeout_s: float
) -> Measured:
    """Run `script` once per rank and return what the ranks reported. Ends every process it started.

    Raises: RankFailed
    """
    began = time.perf_counter()
    ranks = [_start(script, arguments, rank, num_ranks, folder, env) for rank in range(num_ranks)]
    peaks: defaultdict[str, int] = defaultdict(int)
    rank_peaks: defaultdict[str, list[int]] = defaultdict(lambda: [0] * num_ranks)
    try:
        with selectors.DefaultSelector() as selector:
            for rank in ranks:
                selector.register(rank.events, selectors.EVENT_READ, rank)
            while any(rank.open for rank in ranks):
                for key, _ in selector.select(SAMPLE_S):
                    if not _read(key.data):
                        selector.unregister(key.fd)
                phases = {rank.phase for rank in ranks}
                if "timed" not in phases and all(rank.open for rank in ranks):
                    # Ranks change phase together to within a barrier; the earlier phase gets the credit.
                    phase, held = ranks[0].phase, [pss_bytes(r.process.pid) for r in ranks]
                    peaks[phase] = max(peaks[phase], sum(held))
                    rank_peaks[phase] = list(map(max, rank_peaks[phase], held))
                if time.perf_counter() - began > timeout_s:
                    raise RankFailed(f"not done after {timeout_s:.0f} s, in phases {sorted(phases)}: {_tail(ranks)}")
        for rank in ranks:
            if rank.process.wait(timeout=60) != 0 or rank.result is None:
                raise RankFailed(f"exit code {rank.process.returncode}: {_tail([rank])}")
    except subprocess.TimeoutExpired:
        raise RankFailed(f"a rank does not end: {_tail(ranks)}") from None
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.kill()
                rank.process.wait()
            os.close(rank.events)
    results = [r.result for r in ranks if r.result is not None]
    return Measured(results, dict(peaks), dict(rank_peaks), time.perf_counter() - began)


def _start(
    script: Path, arguments: Sequence[str], rank: int, num_ranks: int, folder: Path, env: Mapping[str, str]
) -> _Rank:
    reader, writer = os.pipe()
    log = folder / f"rank{rank}.log"
    identity = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",  # unused: ranks meet in a file
        "WINDLASS_RENDEZVOUS": f"file://{folder.absolute() / 'meet'}",
        "WINDLASS_LAUNCHER": "local",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments, f"--events={writer}"],
            env={**os.environ, "PYTHONPATH": python_path(), **env, **identity},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
        )
    os.close(writer)
    return _Rank(process, reader, log)


def python_path() -> str:
    """Return a PYTHONPATH on which this checkout is found, installed or not."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def _read(rank: _Rank) -> bool:
    data = os.read(rank.events, 1 << 16)
    rank.text += data
    *lines, rank.text = rank.text.split(b"\n")
    for line in lines:
        event = json.loads(line)
        rank.phase = event.get("phase", rank.phase)
        rank.result = event.get("result", rank.result)
    rank.open = bool(data)
    return rank.open


def _tail(ranks: Sequence[_Rank], num_lines: int = 12) -> str:
    parts = []
    for rank in ranks:
        lines = [line for line in rank.log.read_text(errors="replace").splitlines() if line.strip()]
        parts.append(f"{rank.log.name} ends\n    " + "\n    ".join(lines[-num_lines:]))
    return "\n  ".join(parts)


def pss_bytes(pid: int) -> int:
    """Return the proportional set size of a process, 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it ended between two looks
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)


class Reporter:
    """The rank's end of the pipe."""

    def __init__(self, events: int) -> None:
        self._events = events

    def phase(self, name: str) -> None:
        self._send({"phase": name})

    def result(self, **values: Any) -> None:
        self._send({"result": values})

    def _send(self, event: dict[str, Any]) -> None:
        os.write(self._events, json.dumps(event).encode() + b"\n")
