"""Snapshots on a drive of this node: its slots as segment files, each step in a folder that appears complete.

    <local_dir>/<job>/<node>/step-00000100/   complete.json (last), membership.json, layouts/<digest>.json,
                                              data-00003.seg, parity-00003.seg (one slot each)

A step is worth as much as those of the other nodes: they are put together as snapshots in memory are. It outlives its
run folder, whose path names the job, so it tells by a digest of the job's token of which run it is: one of a run that
was deleted and begun anew in the same place does not count, and is removed. The drive may be everybody's: folders of a
job or node that others made, or can change, are neither believed nor touched.
Must not know: torch, other nodes, which steps are due.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from windlass.checkpoint.archives import BATCH_BYTES, Checked
from windlass.checkpoint.memory.folder import NodeFolder, is_name, is_own
from windlass.checkpoint.memory.header import SlotHeader
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.memory.segment import Segment, Slot
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.retention import sweep
from windlass.checkpoint.storage import LocalStorage, write_new
from windlass.checkpoint.store import PERSIST, staging_name, step_name, take_name
from windlass.dist.errors import CheckpointError

COMPLETE = "complete.json"
KEEP = 2  # steps: the newest may turn out damaged on another node
_STEP = re.compile(r"step-(\d{8,})")
_SEGMENT = re.compile(r"(data|parity)-(\d{5,})\.seg")


@dataclass(frozen=True)
class LocalStep:
    """One complete step on this node's drive."""

    folder: Path
    step: int
    generation: int

    @property
    def membership_path(self) -> Path:
        return self.folder / "membership.json"

    def layout_path(self, digest: str) -> Path:
        """Return where a layout of this step lies."""
        return self.folder / "layouts" / f"{digest}.json"

    def segments(self) -> dict[tuple[str, int], Path]:
        """Return the segment files by role and rank; slot 0 of each holds this step."""
        found = ((path, _SEGMENT.fullmatch(path.name)) for path in sorted(self.folder.iterdir()))
        return {(match[1], int(match[2])): path for path, match in found if match}


class LocalLevel:
    """The steps of one run that a node has on its drive; `node` is the folder that it has in memory."""

    def __init__(self, node: NodeFolder, local_dir: Path | str) -> None:
        self.node, self.folder = node, Path(local_dir) / node.job / node.node
        self.root = LocalStorage(self.folder)

    @property
    def run(self) -> str:
        """Return what tells this run from another one in the same place."""
        return hashlib.sha256(self.node.read_token().encode()).hexdigest()[:32]

    @property
    def _folders(self) -> tuple[Path, Path]:
        return self.folder.parent, self.folder

    def is_ours(self) -> bool:
        """Tell whether the folders of the job and of the node are there, and nobody else can have changed them."""
        try:
            return all(map(_is_private, self._folders))
        except OSError:
            return False

    def _make(self) -> None:
        LocalStorage(self.folder.parents[1]).make_folder()
        for folder in self._folders:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                LocalStorage(folder.parent).sync()
            if not _is_private(folder):
                raise CheckpointError(
                    f"{folder} must be a folder of user {os.getuid()}, no link, that nobody else can write to (mode "
                    "0700). Remove it, or use another checkpoint.local_dir"
                )

    def complete(self) -> list[LocalStep]:
        """Return the steps that are complete, newest first."""
        names = self.root.names() if self.is_ours() else []
        own = self.run if names else ""
        found = [step for name in names if (step := self._read(name, own)) is not None]
        return sorted(found, key=lambda held: (held.generation, held.step), reverse=True)

    def _read(self, name: str, own: str) -> LocalStep | None:
        match = _STEP.fullmatch(name)
        if match is None:
            return None
        try:
            body = json.loads((self.folder / name / COMPLETE).read_bytes())
            sizes = {file: (self.folder / name / file).stat().st_size for file in body["files"]}
            if body["xxh3"] != _seal(body) or sizes != body["files"] or body["step"] != int(match[1]):
                return None
            return LocalStep(self.folder / name, body["step"], body["generation"]) if body["run"] == own else None
        except (OSError, ValueError, KeyError, TypeError):  # damaged: other nodes, or other levels, have to do
            return None

    def _is_of_another_run(self, name: str, own: str) -> bool:
        try:
            body = json.loads((self.folder / name / COMPLETE).read_bytes())
            return bool(body["xxh3"] == _seal(body) and body["run"] != own)
        except (OSError, ValueError, KeyError, TypeError):
            return False  # damaged: nobody can tell

    def begin(self, step: int, generation: int, needed: int) -> str:
        """Make the folder that a step is written into; return its name.

        Raises: OSError; CheckpointError if there is no room, or a folder there is not ours alone
        """
        self._make()
        self.sweep(generation, PERSIST)
        free = self.root.free_bytes()
        if free is not None and free < needed:
            raise CheckpointError(f"it needs {needed} bytes, {free} are free on {self.folder}")
        temporary = staging_name(self.root, step, generation, PERSIST)
        (self.folder / temporary).mkdir(mode=0o700)
        (self.folder / temporary / "layouts").mkdir(mode=0o700)
        return temporary

    def prepare(
        self,
        temporary: str,
        slots: Sequence[tuple[Slot, SlotHeader]],
        membership: str,
        layouts: Mapping[str, bytes],
        pace: Pace,
        fault: Callable[[str, int, int], None],
    ) -> int:
        """Write slots and what explains them, durably; return the bytes.

        Raises: OSError; CheckpointError if memory is damaged or there is no room
        """
        storage = LocalStorage(self.folder / temporary)
        for slot, header in slots:
            fault("open", header.rank, header.step)
            _copy(storage.folder / f"{header.role}-{header.rank:05d}.seg", slot, header, pace, fault)
        write_new(storage, "membership.json", membership.encode())
        for digest, text in layouts.items():
            write_new(storage, f"layouts/{digest}.json", text)
        storage.sync("layouts")
        storage.sync()
        return sum(header.num_bytes for _, header in slots)

    def commit(self, temporary: str, step: int, generation: int, fault: Callable[[str, int, int], None]) -> str:
        """Make a step count, and remove all but the newest ones; return where it is."""
        storage = LocalStorage(self.folder / temporary)
        fault("manifest", 0, step)
        files = [p for p in sorted(storage.folder.rglob("*")) if p.is_file()]
        body = {
            "step": step,
            "generation": generation,
            "run": self.run,
            "files": {str(p.relative_to(storage.folder)): p.stat().st_size for p in files},
        }
        write_new(storage, COMPLETE, json.dumps(body | {"xxh3": _seal(body)}, indent=1).encode())
        storage.sync()
        fault("rename", 0, step)
        final = step_name(step)
        replaced = take_name(self.root, temporary, final, lambda: None, lambda point: fault(point, 0, step))
        for name in [replaced] if replaced else []:
            self.root.remove(name)
        for old in self.complete()[KEEP:]:
            fault("purge", 0, step)
            self._discard(old.folder.name)
        return str(self.folder / final)

    def sweep(self, generation: int, writer: str = "") -> None:
        """Remove what older generations left unfinished, and `writer` in this one, and the steps of another run."""
        if not self.is_ours():
            return
        sweep(self.root, generation, writer)
        own = self.run
        for name in self.root.names():
            if _STEP.fullmatch(name) and self._is_of_another_run(name, own):
                self._discard(name)

    def remove(self) -> None:
        """Remove all that is here, of whatever run, and the job's folder if nothing else is there."""
        if not self.is_ours():
            return
        for name in self.root.names():
            if _STEP.fullmatch(name):
                self._discard(name)
        self.root.remove("")
        with contextlib.suppress(OSError):  # other nodes
            self.folder.parent.rmdir()

    def _discard(self, name: str) -> None:
        (self.folder / name / COMPLETE).unlink(missing_ok=True)  # first: what is left then counts for nobody
        self.root.remove(name)


def list_local_levels(base: Path, job: str, local_dir: Path | str) -> list[LocalLevel]:
    """Return what the nodes of a job have on a drive of this machine, also those with no folder in memory any more."""
    folder = Path(local_dir) / job
    names = LocalStorage(folder).names() if is_own(folder) else []
    levels = [LocalLevel(NodeFolder(base, job, name), local_dir) for name in names if is_name(name)]
    return [level for level in levels if level.is_ours()]


def remove_local_level(node: NodeFolder) -> Path | None:
    """Remove what a node keeps on its drive of a run that needs it no more; return the folder, None if there is none.

    To be called before the folder in memory is removed, which knows where the drive is.
    """
    local_dir = Settings.read_from(node).local_dir
    level = LocalLevel(node, local_dir) if local_dir else None
    if level is None or not level.is_ours():
        return None
    level.remove()
    return level.folder


def _is_private(folder: Path) -> bool:
    """Tell whether a folder is this user's, not a link to one, and nobody else can put anything into it."""
    return is_own(folder) and not stat.S_IMODE(folder.lstat().st_mode) & 0o022


def _copy(path: Path, slot: Slot, header: SlotHeader, pace: Pace, fault: Callable[[str, int, int], None]) -> None:
    """Write one slot as a segment of its own."""
    what = f"{header.role} of step {header.step} of rank {header.rank} in memory"
    table = [int(word) for word in header.hashes[header.own_key]]
    source = Checked(what, slot.data, header.num_bytes, header.chunk_bytes, table)
    with _made(path, header) as segment:
        copy = segment.slots[0]
        for low in range(0, header.num_bytes, BATCH_BYTES):
            high = min(low + BATCH_BYTES, header.num_bytes)
            fault("write", header.rank, header.step)
            pace.spend(high - low)
            at = low
            for part in source.take(low, high):
                copy.data[at : at + len(part)] = np.frombuffer(part, np.uint8)
                at += len(part)
        source.finish()
        now = slot.header()
        if now is None or (now.generation, now.step) != (header.generation, header.step):
            raise CheckpointError(f"the {what} was replaced while it was written")
        copy.write(replace(header, sequence=-1))
        fault("fsync", header.rank, header.step)
        os.fsync(segment.fd)  # the mapped pages too


@contextmanager
def _made(path: Path, header: SlotHeader) -> Iterator[Segment]:
    segment = Segment.create(
        path,
        role=header.role,
        rank=header.rank,
        slot_bytes=header.num_bytes,
        num_slots=1,
        chunk_bytes=header.chunk_bytes,
        table_chunks=sum(len(table) for table in header.hashes.values()),
    )
    try:
        yield segment
    finally:
        segment.close()


def _seal(body: Mapping[str, object]) -> str:
    text = json.dumps([body["step"], body["generation"], body["run"], body["files"]], sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())
