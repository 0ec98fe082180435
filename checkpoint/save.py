"""Saves a training state: all ranks write, rank 0 commits, and a crash at any moment leaves the old or the new state.

    prepare   rank 0 clears leftovers and makes the temporary folder; all compare bytes needed with bytes free
    write     every rank writes its pieces into one file and makes it durable
    commit    rank 0 writes `.metadata`, then the manifest, makes the folder durable, renames it, then retires old ones

Fault points, in order: checkpoint.prepare, checkpoint (before each piece), checkpoint.written, checkpoint.metadata,
checkpoint.manifest, checkpoint.rename, checkpoint.replace (only when the step was saved before), checkpoint.renamed.

Must not know: models, optimizers, ZeRO stages, how the caller reacts to a failed save.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.checkpoint.cover import tiling_problem
from windlass.checkpoint.manifest import (
    MANIFEST_NAME,
    METADATA_NAME,
    Manifest,
    StoredFile,
    StoredPiece,
    StoredTensor,
    dtype_name,
    dtype_of,
    readable_bytes,
)
from windlass.checkpoint.store import aside, remove_leftovers, restore_set_aside, retain, step_folder
from windlass.checkpoint.writer import fsync_folder, write_file, write_pieces
from windlass.dist.box import Box
from windlass.dist.dcp_format import DcpItem, DcpTensor, data_file_name, dcp_metadata
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError
from windlass.dist.state import Piece, StateSource

ARCHIVE_BYTES = 2 << 10  # around each piece: archive headers, alignment, its lines in `.metadata` and manifest


class Spans(Protocol):
    """What is needed of a tracer."""

    def span(self, name: str, lane: str, **args: Any) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class SaveReport:
    """What became of a save, the same on every rank (but for the seconds)."""

    ok: bool
    step: int
    folder: Path | None
    num_bytes: int  # all ranks
    seconds: float
    phases: dict[str, float]
    reason: str = ""  # why not ok: where, what the system said, bytes needed and free
    removed: list[Path] = field(default_factory=list)  # older checkpoints retired
    warnings: list[str] = field(default_factory=list)


def save(
    folder_root: Path,
    step: int,
    source: StateSource,
    extra: dict[str, Any],
    group: Peers,
    *,
    keep: int,
    tracer: Spans | None = None,
) -> SaveReport:
    """Write `source` as `folder_root/step-XXXXXXXX/` and retire all but the newest `keep` checkpoints (0: keep all).

    Collective: every rank of `group`. `extra` (JSON-able) is rank 0's.
    Blocks: host, until the checkpoint is durable.
    Invariant: when any rank meets an OSError (disk full, quota, lost mount), every rank gets a report with ok=False,
        the temporary folder is gone and older checkpoints are untouched.
    Raises: CheckpointError on every rank if the state itself is inconsistent; the failing rank raises its own error.
    """
    return _Save(Path(folder_root), step, source, extra, group, keep, tracer).run()


class _NotSaved(Exception):
    """Every rank gives up this save for a reason outside the state: space, or the file system."""


class _Save:
    """One save under way on this rank."""

    def __init__(
        self,
        root: Path,
        step: int,
        source: StateSource,
        extra: dict[str, Any],
        group: Peers,
        keep: int,
        tracer: Spans | None,
    ) -> None:
        self.root, self.step, self.source, self.extra = root, step, source, extra
        self.group, self.keep, self.tracer = group, keep, tracer
        self.pieces: Sequence[Piece] = ()
        self.temporary: Path | None = None
        self.needed = self.free = 0
        self.num_bytes = 0
        self.phases: dict[str, float] = {}

    def run(self) -> SaveReport:
        started = time.monotonic()
        try:
            with self._phase("prepare"):
                self._check_space(self._together(self._prepare))
            with self._phase("write"):
                written = self._together(self._write)
            with self._phase("commit"):
                told = self._together(lambda: self._commit(written))[0]
        except _NotSaved as error:
            seconds = time.monotonic() - started
            return SaveReport(False, self.step, None, 0, seconds, self.phases, self._reason(str(error)))
        return SaveReport(
            ok=True,
            step=self.step,
            folder=step_folder(self.root, self.step),
            num_bytes=told["bytes"],
            seconds=time.monotonic() - started,
            phases=self.phases,
            removed=[self.root / name for name in told["removed"]],
            warnings=told["warnings"],
        )

    def _prepare(self) -> dict[str, Any]:
        self._fault("checkpoint.prepare")
        self.pieces = self.source.owned()
        # Replicated small tensors and frozen parts may leave a rank nothing to write; empty boxes only name a tensor.
        needed = sum(p.nbytes + ARCHIVE_BYTES for p in self.pieces)
        if self.group.rank > 0:
            return {"needed": needed}
        json.dumps(self.extra)
        self.root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.root)
        disk = os.statvfs(self.root)
        self.temporary = aside(step_folder(self.root, self.step), "tmp")
        self.temporary.mkdir()
        return {"needed": needed, "temporary": self.temporary.name, "free": disk.f_bavail * disk.f_frsize}

    def _check_space(self, values: list[Any]) -> None:
        self.temporary = self.root / values[0]["temporary"]
        self.needed, self.free = sum(v["needed"] for v in values), values[0]["free"]
        if self.needed > self.free:
            self._clear()
            raise _NotSaved("not enough free space")

    def _write(self) -> dict[str, Any]:
        assert self.temporary is not None
        filled = [p for p in self.pieces if p.box.numel > 0]
        name = data_file_name(self.group.rank)
        rows: list[list[Any]] = [
            [p.key, p.global_shape, dtype_name(p.dtype), None] for p in self.pieces if p.box.numel == 0
        ]
        if not filled:
            return {"rows": rows, "file": None}
        if not self.temporary.is_dir():
            raise CheckpointError(
                f"{self.temporary} was made by rank 0 but is not visible to rank {self.group.rank}: "
                "checkpoints must be on a file system that all ranks share"
            )
        written, file = write_pieces(self.temporary / name, filled, lambda: self._fault("checkpoint"))
        self._fault("checkpoint.written")
        for piece, w in zip(filled, written, strict=True):
            place = [w.offset, w.num_bytes, w.xxh3, w.archive_offset, w.archive_bytes]
            boxed = [piece.box.offsets, piece.box.sizes, *place]
            rows.append([piece.key, piece.global_shape, dtype_name(piece.dtype), boxed])
        return {"rows": rows, "file": [name, file.num_bytes, file.xxh3]}

    def _commit(self, written: list[Any]) -> dict[str, Any]:
        if self.group.rank > 0:
            return {}
        assert self.temporary is not None
        final = step_folder(self.root, self.step)
        tensors, archives = _assemble(written)
        files = {w["file"][0]: StoredFile(*w["file"][1:]) for w in written if w["file"] is not None}
        self._fault("checkpoint.metadata")
        files[METADATA_NAME] = write_file(self.temporary / METADATA_NAME, dcp_metadata(archives))
        fsync_folder(self.temporary)
        self._fault("checkpoint.manifest")
        manifest = Manifest(self.step, self.group.size, time.time(), tensors, files, self.extra)
        write_file(self.temporary / MANIFEST_NAME, manifest.dump())
        fsync_folder(self.temporary)
        self._fault("checkpoint.rename")
        old = aside(final, "old") if final.exists() else None
        if old is not None:
            os.rename(final, old)
            self._fault("checkpoint.replace")
        try:
            os.rename(self.temporary, final)
        except OSError:
            restore_set_aside(self.root)
            raise
        fsync_folder(self.root)
        self._fault("checkpoint.renamed")
        removed: list[Path] = []
        warnings: list[str] = []
        try:
            if old is not None:
                shutil.rmtree(old)
            removed = retain(self.root, self.step, self.keep)
        except OSError as error:
            warnings.append(f"checkpoint {final.name} is complete, but an older one could not be removed: {error}")
        return {"removed": [p.name for p in removed], "warnings": warnings, "bytes": manifest.num_bytes}

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        outcome = on_all_ranks(self.group, work)
        if outcome.problem is not None:
            self._clear()
            if outcome.only_io:
                raise _NotSaved(outcome.problem)
        return outcome.check()

    def _clear(self) -> None:
        """Remove the temporary folder; called when no rank writes any more."""
        if self.group.rank == 0 and self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)  # what resists is a leftover for the next save

    def _reason(self, why: str) -> str:
        space = (
            f" It needs {readable_bytes(self.needed)}; {readable_bytes(self.free)} were free." if self.needed else ""
        )
        return (
            f"checkpoint of step {self.step} was not saved in {self.root}: {why}.{space} Older checkpoints are intact. "
            "Free space there, or keep fewer with checkpoint.keep"
        )

    def _fault(self, point: str) -> None:
        fault(point, rank=self.group.rank, step=self.step)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        span = (
            nullcontext()
            if self.tracer is None
            else self.tracer.span(f"checkpoint {name}", "file write", step=self.step)
        )
        with span:
            yield
        self.phases[name] = time.monotonic() - started


def _assemble(written: list[Any]) -> tuple[dict[str, StoredTensor], dict[str, DcpTensor]]:
    """Join the rows of all ranks, by tensor, and check that every element was written exactly once."""
    facts: dict[str, tuple[Any, str]] = {}
    pieces: dict[str, list[StoredPiece]] = {}
    items: dict[str, list[DcpItem]] = {}
    for rank, told in enumerate(written):
        for key, shape, dtype, boxed in told["rows"]:
            mine = (tuple(shape), dtype)
            if facts.setdefault(key, mine) != mine:
                raise CheckpointError(
                    f"tensor '{key}' is {mine} on rank {rank} but {facts[key]} on a lower rank: nothing was saved"
                )
            pieces.setdefault(key, [])
            items.setdefault(key, [])
            if boxed is not None:
                offsets, sizes, offset, num_bytes, xxh3, archive_offset, archive_bytes = boxed
                box, name = Box(tuple(offsets), tuple(sizes)), told["file"][0]
                pieces[key].append(StoredPiece(name, offset, num_bytes, box, xxh3))
                items[key].append(DcpItem(box, name, archive_offset, archive_bytes))
    for key, (shape, _) in facts.items():
        problem = tiling_problem(shape, [p.box for p in pieces[key]])
        if problem is not None and math.prod(shape) > 0:
            raise CheckpointError(f"tensor '{key}' of shape {list(shape)}: {problem}; nothing was saved")
    tensors = {key: StoredTensor(shape, dtype_of(d), tuple(pieces[key])) for key, (shape, d) in facts.items()}
    return tensors, {key: DcpTensor(t.shape, t.dtype, items[key]) for key, t in tensors.items()}
