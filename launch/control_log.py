"""The memory of a run's control: an append-only log that decisions are replayed from, and the workers' phase reports.

    RUN/control/
      log.jsonl            one record per line, each with the checksum of the rest
      phases-<g>.jsonl     when each rank of generation g began, met the others, loaded, finished its first step
      token                what processes of this job prove to each other; readable by the user alone

A record is durable before anything is done about it. Must not know: what is decided, who runs the workers, torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, final

import xxhash

from windlass.dist.errors import CheckpointError, WorkerError

Kind = Literal[
    "launch",  # a user started the run: budgets begin anew
    "generation",  # a new generation; everything before it is fenced off
    "decision",  # who sits where, or why the run ends
    "start",  # workers were started
    "failure",  # workers failed
    "lost",  # and it turned out that these nodes are gone
    "planned",  # workers were asked to end so that they can go on elsewhere
    "recovered",  # the first step after a restart is done, with what it took
    "struck",  # a drill is about to break something on purpose
    "blow",  # and this is what it did
    "notice",  # something that did not stop training, such as a snapshot process that was replaced
    "rollback",  # training goes back to an earlier step on its own, and on without the samples [first, last)
    "complete",  # the newest state is durable: nobody needs the snapshots any more
    "end",
]
Record = dict[str, Any]
Phase = Literal["began", "imported", "met", "found", "loaded", "first_step"]


def control_folder(run: Path) -> Path:
    """Return where the control of a run writes."""
    return run / "control"


def job_of(run: Path | str) -> str:
    """Name a job by its run folder: whoever starts in it again finds its snapshots."""
    return hashlib.sha256(str(Path(run).resolve()).encode()).hexdigest()[:16]


def job_token(run: Path) -> str:
    """Return the secret of a run, made at its first use.

    Raises:      CheckpointError if it can be neither read nor made, or others could have made it or read it
    """
    path = control_folder(run) / "token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".token.{os.getpid()}.{secrets.token_hex(4)}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # the first one wins, and is whole when it appears
            os.link(draft, path)
        draft.unlink()
        return _read_own(path)
    except OSError as error:
        raise CheckpointError(
            f"'{path}': {error.strerror}. The run folder must be writable and support hard links"
        ) from error


def _read_own(path: Path) -> str:
    """Read a file that this user alone can have written and read: whoever knows a token is believed.

    Raises:      CheckpointError if it is another one; OSError
    """
    why = "is a symbolic link"
    if not path.is_symlink():
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), encoding="ascii") as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid == os.geteuid() and not facts.st_mode & 0o077:
                return file.read().strip()
            why = f"is not this user's alone (user {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):o})"
    raise CheckpointError(f"'{path}' {why}, so others could act as this run. Remove it, and it is made anew")


def encode(record: Mapping[str, Any]) -> bytes:
    """Write a record as one line that carries its own checksum."""
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    return f'{{"xxh3":"{xxhash.xxh3_64_hexdigest(text.encode())}","record":{text}}}\n'.encode()


def decode(line: bytes) -> Record | None:
    """Read a line back, or return None if it is not whole."""
    try:
        record = json.loads(line)["record"]
    except (ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) and encode(record) == line else None


@final
class ControlLog:
    """The records of one run, also those that other processes of it append. Workers say their `generation`.

    Invariant:   `append` returns only when the record is durable. A line that a crash cut off was never acted upon and
                 is removed by the next append.
    Raises:      CheckpointError if the log cannot be read, or a line before the last one is damaged
    """

    def __init__(self, run: Path, generation: int = 0) -> None:
        self.path = control_folder(run) / "log.jsonl"
        self.records: list[Record] = []
        self._end = 0  # bytes of whole records
        self.floor = 0  # generations that others than this log have heard of
        self._mine = generation  # that this process began or works for; 0: it does not matter
        self.refresh()

    @property
    def generation(self) -> int:
        """The newest generation, 0 before the first."""
        return max((r["generation"] for r in self.records if r["kind"] == "generation"), default=0)

    def refresh(self) -> list[Record]:
        """Read what others appended and return it."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._end)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"'{self.path}': {error.strerror}. It must be readable to go on") from error
        found = []
        for place, line in enumerate(lines):
            record = decode(line)
            if record is None:
                if place < len(lines) - 1:
                    raise CheckpointError(
                        f"'{self.path}': line {len(self.records) + 1} is damaged and others follow it. Move the file "
                        "away to begin a new history of this run; checkpoints and snapshots stay usable"
                    )
                break
            self._end += len(line)
            self.records.append(record)
            found.append(record)
        return found

    def append(self, kind: Kind, **facts: Any) -> Record:
        """Add a record durably and return it.

        Raises:      WorkerError if another process has begun a newer generation since ours: we are fenced off
        """
        with self._locked() as fd:
            self.check_owner()
            return self._write(fd, {"kind": kind, "time": time.time(), "generation": self.generation, **facts})

    def check_owner(self) -> None:
        """Read what others appended.

        Raises:      WorkerError if another process has begun a newer generation since ours: we are fenced off
        """
        self.refresh()
        if self._mine and self.generation > self._mine:
            raise WorkerError(
                f"generation {self._mine} is over: another process began generation {self.generation} of this run "
                f"('{self.path}'). This one ends"
            )

    def bump(self, *, at_least: int = 1, by: str = "", agents: Sequence[str] = ()) -> int:
        """Begin a new generation durably and return its number. Call before anything else of a recovery.

        `agents`: who has started its workers, where that is no controller; see `begun_by`
        """
        with self._locked() as fd:
            self.refresh()
            self._mine = max(self.generation + 1, self.floor + 1, at_least)
            facts = {"by": by, "agents": list(agents)} if agents else {"by": by}
            self._write(fd, {"kind": "generation", "time": time.time(), "generation": self._mine, **facts})
            return self._mine

    def adopt(self) -> None:
        """Go on as the owner of the newest generation, for a process that is gone."""
        self.refresh()
        self._mine = self.generation

    def _write(self, fd: int, record: Record) -> Record:
        line = encode(record)
        os.ftruncate(fd, self._end)
        try:
            if os.pwrite(fd, line, self._end) != len(line):
                raise OSError(28, "not enough space for a whole record")
            os.fsync(fd)
        except OSError as error:
            os.ftruncate(fd, self._end)
            raise CheckpointError(
                f"'{self.path}': {error.strerror}. Free some space: control must be durable"
            ) from None
        self._end += len(line)
        self.records.append(record)
        return record

    @contextmanager
    def _locked(self) -> Iterator[int]:
        new = not self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"'{self.path}': {error.strerror}. Give a run folder that can be written") from error
        try:
            if new:
                _sync_folder(self.path.parent)
            fcntl.flock(fd, fcntl.LOCK_EX)  # held for one append; the kernel drops it with its process
            yield fd
        finally:
            os.close(fd)

    def skips(self) -> list[tuple[int, int]]:
        """Return the samples that are left out, as ranges [first, last) of the undisturbed order."""
        # Runs that are older than this have these facts in records of their own kind, "skip".
        return [(r["first"], r["last"]) for r in self.records if r["kind"] in ("rollback", "skip") and "first" in r]

    def left(self) -> dict[int, int]:
        """Return, for every generation that ended by going back, to which step that was.

        Steps above it of that and older generations belong to a history that nobody goes on from.
        """
        return {r["generation"]: r["step"] for r in self.records if r["kind"] == "rollback"}

    def complete(self, generation: int) -> bool:
        """Tell whether workers of a generation have said that their newest state is durable."""
        return any(r["kind"] == "complete" and r["generation"] == generation for r in self.records)

    def left_work(self) -> bool:
        """Tell whether earlier launches may have left steps in memory that are nowhere else."""
        left = False
        for record in self.records[: len(self.records) - len(self.since_launch())]:
            safe = record["kind"] == "complete" or (record["kind"] == "end" and record["code"] == 0)
            left = not safe and (left or record["kind"] == "start")
        return left

    def since_launch(self) -> list[Record]:
        """Return the records since a user started the run, all of them where no launcher writes such a record."""
        starts = [place for place, record in enumerate(self.records) if record["kind"] == "launch"]
        return self.records[starts[-1] :] if starts else list(self.records)

    def restarted(self) -> bool:
        """Tell whether the newest generation is not the first one since the run was started."""
        return sum(record["kind"] == "generation" for record in self.since_launch()) > 1

    def begun_by(self, agents: Iterable[str]) -> bool:
        """Tell whether one of these agents has begun a generation since the run was started."""
        mine = set(agents) - {""}
        return any(mine & set(record.get("agents", ())) for record in self.since_launch())

    def first_since_launch(self) -> int:
        """Return the first generation since the run was started."""
        return min((r["generation"] for r in self.since_launch() if r["kind"] == "generation"), default=1)

    def num_rollbacks(self) -> int:
        """Return how often the run has gone back since it was started."""
        return sum(record["kind"] == "rollback" for record in self.since_launch())


def _sync_folder(folder: Path) -> None:
    for path in (folder, folder.parent):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@final
class PhaseLog:
    """How far this rank has come in its start, for whoever measures recoveries. Where nobody counts generations, nobody
    does, and nothing is written.

    Invariant:   never raises: reports must not stop a run
    """

    def __init__(self, run: Path, generation: int, rank: int) -> None:
        self.path = phases_path(run, generation)
        self._who = {"generation": generation, "rank": rank}

    def mark(self, phase: Phase, when: float | None = None, **facts: Any) -> None:
        """Report a phase as done now or at `when` (Unix seconds), with facts such as step and tier."""
        if not self._who["generation"]:
            return
        line = json.dumps({"phase": phase, "time": time.time() if when is None else when, **self._who, **facts}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(fd, line.encode())  # one write: lines of several ranks do not mix
            finally:
                os.close(fd)
        except OSError:
            return


def phases_path(run: Path, generation: int) -> Path:
    return control_folder(run) / f"phases-{generation}.jsonl"


def read_phases(run: Path, generation: int) -> list[Record]:
    """Return the reports of all ranks of a generation in the order of writing, whole lines only."""
    try:
        lines = phases_path(run, generation).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict) and report.get("generation") == generation and "phase" in report:
            found.append(report)
    return found
