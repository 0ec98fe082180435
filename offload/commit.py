"""Records of what is whole in a state file: which slots hold a step, and the written bytes of those slots.

A record is a file sealed with a hash. It appears and vanishes whole (rename, unlink), so after a crash the newest one
that is there counts. Must not know: engines, tensors, where slots lie.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from windlass.dist.errors import OffloadError
from windlass.offload.claim import sync_folder
from windlass.offload.ranges import Ranges

_RECORD = re.compile(r"commit-\d{8,}\.(json|tmp)")
_VERSION = 1


@dataclass(frozen=True)
class Commit:
    """A step that is whole on the drive: the slot of every key that belongs to it, and what the caller added."""

    step: int
    slots: Mapping[str, int]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A commit with the layout of its file and the written bytes of its slots."""

    commit: Commit
    layout: str
    written: dict[str, Ranges]


class CommitLog:
    """The commits of one folder, from several threads. Methods raise OSError if the drive fails."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.folder, self._layout = folder, layout
        self.records: list[Record] = []  # newest first, two at most
        # Records that may or may not be on the drive, because it failed when they were written or removed.
        self._doubtful: list[Record] = []
        self._lock = threading.RLock()

    def load(self) -> None:
        """Read the newest two undamaged records of this layout; if there are any, delete all others."""
        found = []
        for path in self.folder.glob("commit-*.json"):
            if (record := _read(path)) is not None and record.layout == self._layout:
                found.append(record)
        self.records = sorted(found, key=lambda record: -record.commit.step)[:2]
        if not self.records:
            return
        kept = {_record_path(self.folder, record.commit.step).name for record in self.records}
        for path in self.folder.iterdir():
            if _RECORD.fullmatch(path.name) and path.name not in kept:
                path.unlink()
        sync_folder(self.folder)

    def add(self, commit: Commit, written: dict[str, Ranges]) -> None:
        """Make a commit the newest, durably. Of the earlier ones one stays."""
        record = Record(commit, self._layout, written)
        body = _encode(record)
        with self._lock:
            self._doubtful.append(record)
            _write(_record_path(self.folder, commit.step), body)
            self._doubtful = [r for r in self._doubtful if r.commit.step != commit.step] + self.records[1:]
            self.records = [record, *self.records[:1]]
            self.end([old.commit.step for old in self._doubtful])

    def end_relying(self, key: str, slot: int) -> None:
        """End the commits that rely on a slot, durably: afterwards it may be written."""
        with self._lock:
            everything = [*self.records, *self._doubtful]
            self.end([r.commit.step for r in everything if r.commit.slots.get(key) == slot])

    def end(self, steps: list[int]) -> None:
        """Delete records, durably: no later write may reach the drive while one of them is still there."""
        if not steps:
            return
        with self._lock:
            ended = [r for r in (*self.records, *self._doubtful) if r.commit.step in steps]
            self.records = [r for r in self.records if r.commit.step not in steps]
            self._doubtful += [r for r in ended if r not in self._doubtful]
            for step in steps:
                _record_path(self.folder, step).unlink(missing_ok=True)
            sync_folder(self.folder)
            self._doubtful = [r for r in self._doubtful if r.commit.step not in steps]


def newest_commit(folder: Path) -> Commit | None:
    """Return the newest undamaged commit in a folder, whatever the layout of the file beside it."""
    records = [record for path in folder.glob("commit-*.json") if (record := _read(path)) is not None]
    return max((record.commit for record in records), key=lambda commit: commit.step, default=None)


def _record_path(folder: Path, step: int) -> Path:
    return folder / f"commit-{step:08d}.json"


def _encode(record: Record) -> bytes:
    commit = record.commit
    content = {
        "version": _VERSION,
        "layout": record.layout,
        "step": commit.step,
        "slots": dict(commit.slots),
        "extra": commit.extra,
        "written": {key: ranges.as_lists() for key, ranges in record.written.items()},
    }
    try:
        return json.dumps(content, sort_keys=True).encode()
    except TypeError as error:
        raise OffloadError(
            f"commit of step {commit.step}: {error}. Give plain numbers, texts, lists and maps"
        ) from error


def _write(path: Path, body: bytes) -> None:
    """Write a record, durably and whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        file.write(xxhash.xxh3_64_hexdigest(body).encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync_folder(path.parent)


def _read(path: Path) -> Record | None:
    seal, _, body = path.read_bytes().partition(b"\n")
    if xxhash.xxh3_64_hexdigest(body).encode() != seal:
        return None
    content = json.loads(body)
    if content["version"] != _VERSION:
        return None
    written = {key: Ranges.from_lists(rows) for key, rows in content["written"].items()}
    return Record(Commit(content["step"], content["slots"], content["extra"]), content["layout"], written)
