"""What a worker says when it fails, and how a launcher finds the cause among what all workers said.

A worker writes one JSON file in the form torchrun reads (torch.distributed.elastic.multiprocessing.errors), so the
same report serves torchrun, the local launcher and Ray. Losing a peer is never a cause while another reason exists.
Must not know how workers are started.
"""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from windlass.dist.env import ProcessEnv, get
from windlass.dist.errors import CommError, WindlassError
from windlass.launch import lines

ERROR_FILE = "WINDLASS_ERROR_FILE"
# torchrun compares whole seconds and dates a killed worker by when it noticed (it looks every 0.1 s).
TORCHRUN_TICK_S = 2


@dataclass(frozen=True)
class Failure:
    """Why one rank ended. `secondary`: it only noticed that something else broke, such as a lost peer. `kind`: what
    failed, when it was not the worker's own doing: hang or node. `sure`: it did not just wait for another one.
    """

    rank: int
    when: float
    message: str
    traceback: str
    exit_code: int
    secondary: bool
    kind: str = ""
    sure: bool = True


@dataclass(frozen=True)
class Exit:
    """A worker process that ended. `code` as in subprocess (-n: killed by signal n); `stopped`: we had asked it to."""

    rank: int
    code: int
    when: float
    failure: Failure | None
    stopped: bool


def describe_exception(exc: BaseException, rank: int) -> Failure:
    """Turn an exception into a report: errors raised on purpose carry no traceback, they say what to do."""
    meant = isinstance(exc, WindlassError) and get("WINDLASS_TRACEBACK") in ("", "0")
    trace = exc.__traceback__ and (exc.__traceback__.tb_next or exc.__traceback__)  # without the frame of `guarded`
    return Failure(
        rank=rank,
        when=time.time(),
        message=f"{type(exc).__name__}: {exc}",
        traceback="" if meant else "".join(traceback.format_exception(type(exc), exc, trace)),
        exit_code=exc.exit_code if isinstance(exc, WindlassError) else 1,
        secondary=isinstance(exc, CommError),
    )


def report_failure(exc: BaseException, env: ProcessEnv) -> int:
    """Tell the launcher why this rank fails and return its exit code.

    With an error file (local launcher, Ray, torchrun) the launcher prints it; otherwise, or where it cannot be written,
    it goes to stderr.
    """
    failure = describe_exception(exc, env.rank)
    ours, torchrun = get(ERROR_FILE), get("TORCHELASTIC_ERROR_FILE")
    file = ours or torchrun
    if not file or not _write_report(Path(file), failure, delay_s=0 if ours else TORCHRUN_TICK_S):
        where = f"[rank {env.rank}] " if env.world_size > 1 else ""
        lines.say(where + (failure.traceback or f"error: {exc}"))
    if failure.secondary and torchrun and not ours:
        time.sleep(TORCHRUN_TICK_S)  # torchrun stops all at the first exit: let the cause be first
    return failure.exit_code


def _write_report(path: Path, failure: Failure, *, delay_s: int) -> bool:
    """Write the file that torchrun reads plus our own fields, whole or not at all; return whether that worked."""
    when = int(failure.when) + (delay_s if failure.secondary else 0)
    stack = failure.traceback or failure.message
    report = {
        "message": {"message": failure.message, "extraInfo": {"py_callstack": stack, "timestamp": str(when)}},
        "windlass": asdict(failure),
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)  # days after the start somebody may have tidied up /tmp
        temporary.write_text(json.dumps(report), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return False
    return True


def read_failure(path: Path) -> Failure | None:
    """Read a worker's report, or None when it left none."""
    if not path.exists():
        return None
    return Failure(**json.loads(path.read_text(encoding="utf-8"))["windlass"])


def speak_in_lines() -> None:
    """Write every line at once and as a whole, into a pipe too, where several ranks and the launcher may write."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def guarded(run: Callable[[], int], env: ProcessEnv) -> int:
    """Run a worker's body; report what it raises and return the exit code."""
    speak_in_lines()
    try:
        return run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as exc:
        return report_failure(exc, env)


def failure_of(ended: Exit) -> Failure | None:
    """Return why a worker ended, also when it could not say so itself; None for a clean or requested end."""
    if ended.failure is not None:
        return ended.failure
    if ended.code == 0 or ended.stopped:
        return None
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        hint = " (the kernel does this when memory runs out: see dmesg)" if name == "SIGKILL" else ""
        return Failure(ended.rank, ended.when, f"killed by {name}{hint}", "", 128 - ended.code, False)
    message = f"ended with exit code {ended.code} without a report"
    return Failure(ended.rank, ended.when, message, "", ended.code, False)


def order_failures(exits: Sequence[Exit]) -> list[Failure]:
    """Sort the failures of a run: the first real cause first, lost peers last."""
    failures = [failure for ended in exits if (failure := failure_of(ended)) is not None]
    return sorted(failures, key=lambda failure: (failure.secondary, not failure.sure, failure.when, failure.rank))


def format_ranks(ranks: Sequence[int]) -> str:
    """Write ranks as `rank 3` or `ranks 0-2, 5`."""
    ordered = sorted(ranks)
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ordered) > 1 else ''} {text}"


def format_failures(exits: Sequence[Exit]) -> str:
    """Write what happened: the first cause in full and once, equal errors grouped by ranks, then who was stopped."""
    groups: dict[str, list[Failure]] = {}
    for failure in order_failures(exits):
        groups.setdefault(_same_error(failure), []).append(failure)
    lines = []
    for place, members in enumerate(groups.values()):
        first = members[0]
        who = format_ranks([failure.rank for failure in members])
        lines.append(f"windlass: {who} {'failed first' if place == 0 else 'then failed'}: {first.message}")
        if first.traceback and not first.secondary:
            lines += ["  " + line for line in first.traceback.rstrip().splitlines()]
    stopped = [ended.rank for ended in exits if ended.stopped and ended.failure is None]
    if stopped:
        lines.append(f"windlass: {format_ranks(stopped)} stopped by the launcher")
    return "\n".join(lines)


def _same_error(failure: Failure) -> str:
    """Return a key under which errors of different ranks count as the same: numbers may differ."""
    if not failure.traceback:
        return re.sub(r"\d+", "N", failure.message)
    frames = re.findall(r'File "[^"]*", line \d+', failure.traceback)
    return re.sub(r"\d+", "N", failure.message) + "".join(frames)
