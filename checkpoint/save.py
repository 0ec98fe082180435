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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.checkpoint.commit import ARCHIVE_BYTES, commit
from windlass.checkpoint.fence import read_fence
from windlass.checkpoint.manifest import readable_bytes
from windlass.checkpoint.reader import dtype_name
from windlass.checkpoint.retention import remove_replaced, retain, sweep
from windlass.checkpoint.storage import LocalStorage, Place
from windlass.checkpoint.store import SAVE, staging_name, step_name
from windlass.checkpoint.writer import write_pieces
from windlass.dist.dcp_format import data_file_name
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError
from windlass.dist.state import Piece, StateSource
from windlass.dist.trace import Tracer


@dataclass(frozen=True)
class SaveReport:
    """What became of a save, the same on every rank (but for the seconds)."""

    ok: bool
    step: int
    folder: Place | None
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
    tracer: Tracer | None = None,
) -> SaveReport:
    """Write `source` as `folder_root/step-XXXXXXXX/` and retire all but the newest `keep` checkpoints (0: keep all).

    Collective: every rank of `group`. `extra` (JSON-able) is rank 0's; "generation" in it says which start of the
        workers this is (0 or absent: the newest that is known at the folder).
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
        tracer: Tracer | None,
    ) -> None:
        self.storage = LocalStorage(root)
        self.root, self.step, self.source, self.extra = root, step, source, dict(extra)
        self.group, self.keep, self.tracer = group, keep, tracer
        self.pieces: Sequence[Piece] = ()
        self.temporary = ""
        self.generation = 0
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
            folder=self.root / step_name(self.step),
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
        self.storage.make_folder()
        fence = read_fence(self.storage)
        self.generation = self.extra.get("generation") or fence.generation
        fence.check(self.generation, str(self.root))
        if self.generation:
            self.extra["generation"] = self.generation
        sweep(self.storage, self.generation, SAVE)  # snapshot processes may be writing there at this moment
        free = self.storage.free_bytes()
        self.temporary = staging_name(self.storage, self.step, self.generation, SAVE)
        self.storage.make_folder(self.temporary)
        return {"needed": needed, "temporary": self.temporary, "free": free}

    def _check_space(self, values: list[Any]) -> None:
        self.temporary = values[0]["temporary"]
        self.needed, self.free = sum(v["needed"] for v in values), values[0]["free"]
        if self.needed > self.free:
            self._clear()
            raise _NotSaved("not enough free space")

    def _write(self) -> dict[str, Any]:
        folder = self.root / self.temporary
        filled = [p for p in self.pieces if p.box.numel > 0]
        name = data_file_name(self.group.rank)
        rows: list[list[Any]] = [
            [p.key, p.global_shape, dtype_name(p.dtype), None] for p in self.pieces if p.box.numel == 0
        ]
        if not filled:
            return {"rows": rows, "file": None}
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} was made by rank 0 but is not visible to rank {self.group.rank}: "
                "checkpoints must be on a file system that all ranks share"
            )
        written, file = write_pieces(
            self.storage, f"{self.temporary}/{name}", filled, lambda: self._fault("checkpoint")
        )
        self._fault("checkpoint.written")
        for piece, w in zip(filled, written, strict=True):
            place = [w.offset, w.num_bytes, w.xxh3, w.archive_offset, w.archive_bytes]
            boxed = [piece.box.offsets, piece.box.sizes, *place]
            rows.append([piece.key, piece.global_shape, dtype_name(piece.dtype), boxed])
        return {"rows": rows, "file": [name, file.num_bytes, file.xxh3]}

    def _commit(self, written: list[Any]) -> dict[str, Any]:
        if self.group.rank > 0:
            return {}
        manifest, name, replaced = commit(
            self.storage,
            self.temporary,
            self.step,
            written,
            self.extra,
            lambda point: self._fault(f"checkpoint.{point}"),
        )
        removed: list[str] = []
        warnings: list[str] = []
        try:
            if replaced is not None:
                remove_replaced(self.storage)
            removed = retain(self.storage, self.generation, self.step, self.keep)
        except OSError as error:
            warnings.append(f"checkpoint {name} is complete, but an older one could not be removed: {error}")
        return {"removed": removed, "warnings": warnings, "bytes": manifest.num_bytes}

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        outcome = on_all_ranks(self.group, work)
        if outcome.problem is not None:
            self._clear()
            if outcome.only_io:
                raise _NotSaved(outcome.problem)
        return outcome.check()

    def _clear(self) -> None:
        """Remove the temporary folder; called when no rank writes any more."""
        if self.group.rank == 0 and self.temporary:
            with suppress(OSError):  # what resists is a leftover for the next save
                self.storage.remove(self.temporary)

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
