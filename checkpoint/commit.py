"""Turns the files that many writers made durable into one checkpoint: joins what they tell, checks it, publishes it.

A writer tells of its file: {"rows": [[key, shape, dtype, place or None], ...], "file": [name, bytes, xxh3] or None},
with place = [offsets, sizes, offset, bytes, xxh3, archive offset, archive bytes] of one box; all of it JSON.
Must not know: torch, who the writers are, how they wrote.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from windlass.checkpoint.cover import tiling_problem
from windlass.checkpoint.manifest import METADATA_NAME, Manifest, StoredFile, StoredPiece, StoredTensor
from windlass.checkpoint.storage import Storage, write_new
from windlass.checkpoint.store import publish
from windlass.dist.box import Box
from windlass.dist.dcp_format import DcpItem, DcpTensor, dcp_metadata
from windlass.dist.errors import CheckpointError

ARCHIVE_BYTES = 2 << 10  # around each piece: archive headers, alignment, its lines in `.metadata` and manifest


def commit(
    storage: Storage,
    staged: str,
    step: int,
    written: Sequence[dict[str, Any]],
    extra: dict[str, Any],
    fault: Callable[[str], None],
) -> tuple[Manifest, str, str | None]:
    """Publish what was written under a staging name, `written` by rank; return its manifest and names as `publish`.

    `fault` is called with "metadata" and the points of `publish`.

    Raises: CheckpointError if what was written is not one whole state; OSError. Then nothing is visible.
    """
    tensors, archives = _assemble(written)
    files = {w["file"][0]: StoredFile(*w["file"][1:]) for w in written if w["file"] is not None}
    fault("metadata")
    metadata = dcp_metadata(archives)
    write_new(storage, f"{staged}/{METADATA_NAME}", metadata)
    files[METADATA_NAME] = StoredFile(len(metadata), xxhash.xxh3_64_hexdigest(metadata))
    manifest = Manifest(step, len(written), time.time(), tensors, files, extra)
    name, replaced = publish(storage, staged, manifest, fault)
    return manifest, name, replaced


def _assemble(written: Sequence[dict[str, Any]]) -> tuple[dict[str, StoredTensor], dict[str, DcpTensor]]:
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
    tensors = {key: StoredTensor(shape, dtype, tuple(pieces[key])) for key, (shape, dtype) in facts.items()}
    return tensors, {key: DcpTensor(t.shape, t.dtype, items[key]) for key, t in tensors.items()}
