"""Fills a training state from a checkpoint, whatever world size, ZeRO stage or mesh wrote it.

Names, shapes and dtypes are checked on all ranks before the first byte is read, so a checkpoint of another model
changes nothing. Must not know: models, optimizers, ZeRO stages, which checkpoint to take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.checkpoint.manifest import Manifest, read_manifest
from windlass.checkpoint.reader import CheckpointReader, dtype_name, dtype_of
from windlass.checkpoint.retention import being_read
from windlass.checkpoint.storage import Files, Place, files_of
from windlass.dist.errors import CheckpointError
from windlass.dist.state import Piece, StateSource


def restore(
    checkpoint: Place | Files,
    source: StateSource,
    group: Peers,
    *,
    verify: bool = True,
    manifest: Manifest | None = None,
    remedy: str = "",
) -> dict[str, Any]:
    """Fill every wanted piece of `source` from the checkpoint, and return the facts saved with it.

    Values are converted between floating-point dtypes; any other difference is an error. A family of keys (the name
    up to the first dot: model, optimizer) that no rank wants at all is left unread. `manifest` is given where it does
    not lie among the files, `remedy` where it can be said what to do about one of another model. While it is read, the
    checkpoint is not removed by retention.

    Collective: every rank of `group`.
    Invariant: an error in names, shapes or dtypes leaves the state as it was; damage found while reading does not.
    Raises: CheckpointError on every rank, naming the first tensor that differs or is damaged.
    """
    files = files_of(checkpoint)
    with being_read(files) if group.rank == 0 else nullcontext():
        return _restore(files, source, group, verify, manifest, remedy)


def _restore(
    files: Files, source: StateSource, group: Peers, verify: bool, given: Manifest | None, remedy: str
) -> dict[str, Any]:
    pieces: Sequence[Piece] = ()
    manifest: Manifest | None = given

    def check() -> list[str]:
        nonlocal pieces, manifest
        manifest = read_manifest(files) if given is None else given
        pieces = source.wanted()
        with _advising(remedy):
            check_wanted(files.place, manifest, pieces)
        return list(dict.fromkeys(p.key for p in pieces))

    wanted = {key for keys in on_all_ranks(group, check).check() for key in keys}
    assert manifest is not None
    with _advising(remedy):
        check_unused(files.place, manifest, wanted)

    def fill() -> int:
        with CheckpointReader(files, manifest, verify=verify) as reader:
            return reader.fill(pieces)

    on_all_ranks(group, fill).check()
    source.loaded()
    return manifest.extra


@contextmanager
def _advising(remedy: str) -> Iterator[None]:
    """Add to an error what to do about it."""
    try:
        yield
    except CheckpointError as error:
        if not remedy:
            raise
        raise CheckpointError(f"{error}. {remedy}") from error


def check_wanted(place: str, manifest: Manifest, pieces: Iterable[Piece]) -> None:
    """Raise CheckpointError naming the first piece whose tensor is absent or of another shape or kind."""
    for piece in pieces:
        stored = manifest.tensors.get(piece.key)
        if stored is None:
            raise CheckpointError(
                f"checkpoint {place} has no tensor '{piece.key}' (here of shape {list(piece.global_shape)}): "
                "it was written by another model or optimizer"
            )
        if stored.shape != tuple(piece.global_shape):
            raise CheckpointError(
                f"checkpoint {place} is of another model: tensor '{piece.key}' has shape {list(stored.shape)} in the "
                f"checkpoint and {list(piece.global_shape)} here"
            )
        here, there = piece.dtype, dtype_of(stored.dtype)
        if there != here and not (there.is_floating_point and here.is_floating_point):
            raise CheckpointError(
                f"checkpoint {place}: tensor '{piece.key}' is {stored.dtype} in the checkpoint and "
                f"{dtype_name(here)} here; only floating-point dtypes are converted"
            )


def check_unused(place: str, manifest: Manifest, wanted: set[str]) -> None:
    """Raise CheckpointError if a stored tensor is not wanted although others of its family are."""
    families = {_family(key) for key in wanted}
    for key, stored in manifest.tensors.items():
        if key not in wanted and _family(key) in families:
            raise CheckpointError(
                f"checkpoint {place} is of another model or optimizer: it holds tensor '{key}' of shape "
                f"{list(stored.shape)}, which this job does not have"
            )


def _family(key: str) -> str:
    return key.split(".", 1)[0]
