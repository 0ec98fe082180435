"""The folder of a run: where everything a run writes has its place, and who may write.

    RUN/
      config.yaml          the resolved configuration of the latest start (earlier ones: config-1.yaml, ...)
      plan.json            what was planned from it
      metrics.jsonl        one JSON object per event, every start of the run appended
      log.txt              the lines that rank 0 printed
      tensorboard/         the same numbers as scalars
      checkpoints/         step-00000100/ ...
      traces/              Chrome traces of the profiler window
      history.md           failures and recoveries, for people; history.jsonl: the same for programs
      stacks/              where every thread of a rank was when the run hung
      timeline             names the succession of starts whose state the drives hold
      control/             what a launcher notes and needs (control_log.py); workers: held by all of its workers
      lock                 held by the process of rank 0, or by the launcher that starts it again, while it runs

Must not know: what the files say. The layout is explained in docs/run-folder.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import final

from windlass.dist.errors import ConfigError
from windlass.launch.control_log import control_folder

LEAVE_S = 10.0  # the kernel ends workers with their launcher; one that it must tear off a GPU or a disk takes seconds
LOOK_S = 0.05


@dataclass(frozen=True)
class RunFolder:
    """The paths inside one run folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def timeline(self) -> Path:
        return self.root / "timeline"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def traces(self) -> Path:
        return self.root / "traces"

    @property
    def control(self) -> Path:
        return control_folder(self.root)

    @property
    def workers(self) -> Path:
        return self.control / "workers"

    def create(self, *, controlled: bool = False) -> None:
        """Make the folder and its sub-folders; `controlled`: also what a launcher that starts workers again needs.

        Raises: ConfigError if the path cannot be a writable folder.
        """
        try:
            for folder in (self.root, self.checkpoints, self.traces, *[self.control] * controlled):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"{error.strerror} ({error.filename})"
            raise ConfigError(f"train.run_dir = '{self.root}': {what}. Give a folder that can be written.") from error

    def write_config(self, text: str) -> None:
        """Write config.yaml; a different earlier one is kept under the next free number."""
        if self.config.exists() and self.config.read_bytes() != _encoded(text):
            number = next(n for n in range(1, 10**9) if not (self.root / f"config-{n}.yaml").exists())
            self.config.rename(self.root / f"config-{number}.yaml")
        write_atomically(self.config, text)

    def write_plan(self, text: str) -> None:
        write_atomically(self.plan, text)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new text, never half of it.

    Raises: OSError; the old text is still there then
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(_encoded(text))
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def _encoded(text: str) -> bytes:
    """Return text as it is written here: what a worker said may hold a file name that is no text."""
    return text.encode("utf-8", "backslashreplace")


def recorded_timelines(folder: RunFolder) -> list[Path]:
    """Return the newest timelines of the profiler, one of every pipeline rank: of its first data-parallel rank.

    Raises: ConfigError if the folder is not one of a run, or not every rank was recorded
    """
    try:
        mesh = json.loads(folder.plan.read_text(encoding="utf-8"))["mesh"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"'{folder.root}': no plan.json that can be read. Give the folder of a run.") from error
    beside = mesh["dp_replicate"] * mesh["dp_shard"]
    paths = []
    for rank in range(0, mesh["pp"] * beside, beside):
        found = list(folder.traces.glob(f"timeline_rank{rank}_step*.json.gz"))
        if not found:
            raise ConfigError(
                f"'{folder.traces}': no timeline of rank {rank}. Record one: train with profiler.start_step=5 and "
                "profiler.all_ranks=true."
            )
        paths.append(max(found, key=lambda path: int(path.name.split("_step")[1].split(".")[0])))
    return paths


@final
class RunLock:
    """The right to write into a run folder, held until `release`, the end of the block or of the process.

    The kernel drops the lock with the process, however it ends, so a killed run never blocks the next one.

    Raises: ConfigError if another process holds it, naming the process, its host and since when.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.root / "lock"
        self._fd = _open(self.path, folder)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._fd, 4096, 0).decode(errors="replace")
            os.close(self._fd)
            if not isinstance(error, BlockingIOError):
                raise ConfigError(
                    f"train.run_dir = '{folder.root}': this file system does not lock files ({error.strerror}). "
                    "Give a folder on another one."
                ) from error
            raise ConfigError(
                f"train.run_dir = '{folder.root}': in use by {_describe(owner)}. "
                "Wait for it, stop it, or give another train.run_dir."
            ) from None
        owner = json.dumps(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
        )
        os.ftruncate(self._fd, 0)
        with contextlib.suppress(OSError):  # on a full disk it is locked all the same, without a name
            os.pwrite(self._fd, owner.encode(), 0)

    def release(self) -> None:
        """Let others write; calling it again does nothing."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # for forked children too, which share the open file
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextmanager
def alone_in(folder: RunFolder) -> Iterator[None]:
    """Hold the lock of a run folder in which nobody writes any more, also no worker of a launcher that was killed.

    Blocks:      host, at most LEAVE_S, for those workers
    Raises:      ConfigError if a run is going on here, or they do not end
    """
    until = time.monotonic() + LEAVE_S
    while True:
        with RunLock(folder):  # left between two looks: a controller of theirs that Ray starts again needs it
            if not _at_work(folder):
                yield
                return
        if time.monotonic() > until:
            raise ConfigError(
                f"train.run_dir = '{folder.root}': workers of an earlier launch still run, without their launcher. End "
                f"them (`fuser {folder.workers}` tells which), or give another train.run_dir."
            )
        time.sleep(LOOK_S)


@contextmanager
def at_work(folder: RunFolder) -> Iterator[None]:
    """Show that a worker writes here whose launcher has locked the folder: it may outlive the launcher for a moment.

    Raises:      ConfigError if that cannot be shown
    """
    fd = _open(folder.workers, folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # beside the other workers; whoever looks for them holds it for microseconds
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _at_work(folder: RunFolder) -> bool:
    try:
        fd = os.open(folder.workers, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _open(path: Path, folder: RunFolder) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"train.run_dir = '{folder.root}': {error.strerror} ({path}). Give a folder that can be written."
        ) from error


def _describe(owner: str) -> str:
    try:
        facts = json.loads(owner)
        return f"another run (process {facts['pid']} on {facts['host']}, since {facts['since']})"
    except (ValueError, KeyError, TypeError):  # the owner has the lock but has not written its name yet
        return "another run that is just starting"
