"""What is kept in the folder of checkpoints: the newest ones, what somebody reads, and nothing that is unfinished.

    step-00000100/.reading-<nonce>    somebody reads it, until the time stated inside

Must not know: what a checkpoint holds, torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from windlass.checkpoint.fence import read_fence
from windlass.checkpoint.manifest import MANIFEST_NAME
from windlass.checkpoint.storage import Files, Storage, read_file
from windlass.checkpoint.store import CheckpointInfo, aside, leftovers, list_checkpoints, restore_set_aside

READING_S = 3600.0  # a reader that dies blocks the removal of one checkpoint for this long
_READING = re.compile(r"\.reading-[0-9a-f]{8}")


@contextmanager
def being_read(checkpoint: Files, seconds: float = READING_S) -> Iterator[None]:
    """Keep retention away from a checkpoint. Where nothing can be written, it is read without this protection."""
    if not isinstance(checkpoint, Storage):
        yield
        return
    name = f".reading-{secrets.token_hex(4)}"
    with contextlib.suppress(OSError):  # a read-only place: nobody removes anything there either
        checkpoint.create(name, json.dumps({"until": time.time() + seconds}).encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            checkpoint.remove(name)


def is_being_read(checkpoint: Storage) -> bool:
    """Tell whether somebody reads a checkpoint now."""
    for name in checkpoint.names():
        if _READING.fullmatch(name):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # gone meanwhile, or not ours
                if json.loads(read_file(checkpoint, name))["until"] > time.time():
                    return True
    return False


def sweep(root: Storage, generation: int, writer: str = "") -> list[str]:
    """Remove what saves and deletions of generations before this one left behind, and what `writer` did in this one;
    return the names.

    Nothing goes but names of our own pattern, and nothing of a newer generation, or that another writer of this one
    may be at work on, or that is being read. Not to be called while `writer` is.
    """
    restore_set_aside(root)
    found = [
        left.name
        for left in leftovers(root)
        if left.generation < generation or (writer and left.generation == generation and left.writer in ("", writer))
    ]
    found += [info.name for info in list_checkpoints(root) if info.hidden and info.generation < generation]
    gone = []
    for name in found:
        if not is_being_read(root.inside(name)):
            try:
                discard(root, name)
                gone.append(name)
            except OSError as error:
                # Whoever was given up in the middle of it has put another file there: it goes with a later one.
                if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                    raise
    return gone


def remove_replaced(root: Storage) -> None:
    """Remove what one of the same step has replaced, unless somebody reads it: then it goes with a later one."""
    for left in leftovers(root):
        if left.kind == "old" and left.checkpoint in root.names() and not is_being_read(root.inside(left.name)):
            root.remove(left.name)


def retain(
    root: Storage,
    generation: int,
    saved_step: int,
    keep: int,
    *,
    is_valid: Callable[[CheckpointInfo], bool] = lambda info: True,
    least: int = 0,
    fault: Callable[[str], None] = lambda point: None,
) -> list[str]:
    """Delete all but the newest `keep` complete checkpoints up to the one just saved; return the names deleted.

    Older ones go only where `least` of the newer ones are valid and a rollback does not need them (`_within_reach`).
    Later steps of the same generation are left alone: they belong to a run that this one has branched off from.
    `keep` 0 keeps all.

    Invariant: a checkpoint that is being read stays
    Raises: OSError; CheckpointError if a newer generation has begun
    """
    if keep == 0:
        return []
    here = [i for i in list_checkpoints(root) if i.order <= (generation, saved_step) or i.generation < generation]
    if any(info.unreadable for info in here):
        return []  # how far back a rollback may reach is known only by reading all
    complete = [info for info in here if info.problem is None]
    keep = max(keep, _within_reach(complete))
    if len(complete) <= keep:
        return []  # at once: whether one is valid costs reading it
    kept = valid = 0
    for info in complete:
        if kept >= keep and valid >= least:
            break
        kept += 1
        valid += is_valid(info) if valid < least else 0
    if kept == len(complete):
        return []
    last = complete[kept - 1].order
    gone = [info.name for info in here if info.order < last]
    return [name for name in gone if _retire(root, name, generation, fault)]


def _within_reach(newest_first: Sequence[CheckpointInfo]) -> int:
    """Return how many checkpoints a run may still have to go back to; 0 where it never does.

    The newest one says how many steps that can be (`back`), and each at which step its generation `began`: what older
    generations hold beyond that is of a history that was left, and nothing to go back to.
    """
    newest = newest_first[0] if newest_first else None
    if newest is None or not newest.extra.get("rollback"):
        return 0
    generation, began = newest.generation, newest.step
    for number, info in enumerate(newest_first, 1):
        if info.generation < generation and info.step > began:
            continue
        generation, began = info.generation, info.extra.get("rollback", {}).get("began", info.step)
        if info.step <= newest.step - newest.extra["rollback"]["back"]:
            return number
    return len(newest_first)


def _retire(root: Storage, name: str, generation: int, fault: Callable[[str], None]) -> bool:
    """Delete one checkpoint so that it is complete or gone at every instant; False if it is in use."""
    fault("purge")
    read_fence(root).check(generation, root.place)
    if is_being_read(root.inside(name)):
        return False
    if not root.renames:
        discard(root, name)
        return True
    trash = aside(name, "trash")
    root.rename(name, trash)
    # Again, now that nobody else can begin: whoever began before keeps it.
    if is_being_read(root.inside(trash)) or read_fence(root).generation > generation:
        root.rename(trash, name)
        return False
    root.remove(trash)
    return True


def discard(root: Storage, name: str) -> None:
    """Remove a checkpoint, complete or not; a reader never takes what is left for complete."""
    root.remove(f"{name}/{MANIFEST_NAME}")  # first, where there is no name to take away
    root.remove(name)
