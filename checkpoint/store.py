"""The folder of a run's checkpoints: names, listing, publishing, and which one to resume.

In a file system, everything happens by renaming whole folders, so a reader sees a checkpoint complete or not at all:

    step-00000100/                           a complete checkpoint
    .step-00000100.tmp-<generation>-<writer>-<nonce>/ being written, or left by a save that died
    .step-00000100.old-<nonce>/              set aside while a newer save of the same step takes its name
    .step-00000100.trash-<nonce>/            being deleted

At a URL nothing is renamed; a checkpoint is complete once its manifest is there, which is created on condition that it
is not:

    step-00000100-g<generation>-<nonce>/

Must not know: tensors in memory, models, torch.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from windlass.checkpoint.agree import Alone, Peers, on_all_ranks
from windlass.checkpoint.fence import Fence, raise_fence, read_fence
from windlass.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    load_manifest,
    read_manifest,
    readable_bytes,
    unreadable,
)
from windlass.checkpoint.storage import (
    READ_BYTES,
    Files,
    Place,
    RandomAccess,
    Storage,
    exists,
    file_hash,
    files_of,
    opened,
    storage_of,
)
from windlass.dist.errors import CheckpointError

_COMPLETE = re.compile(r"step-(\d{8,})(?:-g(\d+)-[0-9a-f]{8})?")
_LEFTOVER = re.compile(
    r"\.(step-\d{8,}(?:-g\d+-[0-9a-f]{8})?)\.(tmp|old|trash)-(?:(\d+)-)?(?:(save|persist)-)?[0-9a-f]{8}"
)
LOOKS = 2  # at checkpoints whose manifest cannot be read: network file systems fail once and then answer
SAVE, PERSIST = "save", "persist"  # who writes: the trainers together, or the snapshot processes; both may at one time


@dataclass(frozen=True)
class Problem:
    """One damage: in which file, to which tensor if a single one is known, and what."""

    file: str
    tensor: str | None
    detail: str

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}" + (f" (tensor '{self.tensor}')" if self.tensor else "")


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint as far as its manifest and file sizes tell (contents are not hashed)."""

    folder: Place
    name: str
    step: int
    generation: int  # which start of the workers wrote it; the newest there is, where that cannot be read
    problem: str | None
    num_bytes: int = 0
    num_tensors: int = 0
    world_size: int = 0
    saved_at: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    seal: str = ""
    hidden: bool = False  # published by a generation that had been given up
    unreadable: bool = False  # its manifest is there but cannot be read now, so nobody knows what it is

    @property
    def order(self) -> tuple[int, int]:
        """Newer is larger: a job that went back to an earlier step has left what it had done before."""
        return self.generation, self.step


@dataclass(frozen=True)
class Choice:
    """The checkpoint to resume from, and the newer ones that were passed over with the reason."""

    folder: Place | None
    skipped: list[tuple[Place, str]]


def step_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def staging_name(storage: Storage, step: int, generation: int, writer: str) -> str:
    """Return a fresh name under which a checkpoint is written by SAVE or PERSIST (only the latter writes to URLs)."""
    nonce = secrets.token_hex(4)
    if storage.renames:
        return f".{step_name(step)}.tmp-{generation}-{writer}-{nonce}"
    return f"{step_name(step)}-g{generation}-{nonce}"


def aside(name: str, kind: str) -> str:
    """Return a fresh hidden name for a checkpoint; `kind` is old or trash."""
    return f".{name}.{kind}-{secrets.token_hex(4)}"


def list_checkpoints(root: Place | Storage) -> list[CheckpointInfo]:
    """Return the checkpoints of a folder, newest first, complete or not."""
    storage = storage_of(root)
    fence = read_fence(storage)
    found = [_info(storage, fence, name, int(m[1])) for name in storage.names() if (m := _COMPLETE.fullmatch(name))]
    return sorted((info for info in found if info is not None), key=lambda info: info.order, reverse=True)


def find_checkpoint(path: Place) -> Place:
    """Return the checkpoint that a user means: itself, or the newest valid one of a run.

    Raises: CheckpointError if there is none, or none that is valid.
    """
    if is_checkpoint(path):
        return path
    root = checkpoints_root(path)
    choice = choose(root, recover=False)
    if choice.folder is not None:
        return choice.folder
    if choice.skipped:
        reasons = "; ".join(f"{_last(folder)}: {reason}" for folder, reason in choice.skipped)
        raise CheckpointError(f"{root} has no valid checkpoint ({reasons})")
    raise CheckpointError(f"{path} is neither a checkpoint (step-XXXXXXXX/) nor a run folder with checkpoints/")


def is_checkpoint(path: Place) -> bool:
    """Tell whether a path means one checkpoint, damaged or not, rather than a folder of them."""
    return _COMPLETE.fullmatch(_last(path)) is not None or exists(storage_of(path), MANIFEST_NAME)


def checkpoints_root(path: Place) -> Place:
    """Return the folder of checkpoints that a user means: a run's `checkpoints/`, or the folder itself."""
    storage = storage_of(path)
    return storage.inside("checkpoints").address if "checkpoints" in storage.names() else path


def verify(
    checkpoint: Place | Files, *, part: tuple[int, int] = (0, 1), progress: Callable[[str], None] | None = None
) -> list[Problem]:
    """Read every file of a checkpoint and return what is damaged; empty means valid.

    `part` = (i, n) reads only every n-th file from the i-th on, so that n ranks share the work.
    """
    files = files_of(checkpoint)
    try:
        manifest = read_manifest(files)
    except CheckpointError as error:
        return [Problem(MANIFEST_NAME, None, str(error))]
    problems: list[Problem] = []
    for name in sorted(manifest.files)[part[0] :: part[1]]:
        if progress is not None:
            size = readable_bytes(manifest.files[name].num_bytes)
            progress(f"verifying {_last(files.place)}/{name} ({size})")
        try:
            problems += _file_problems(files, manifest, name)
        except OSError as error:
            problems.append(Problem(name, None, f"cannot be read: {error.strerror}"))
    return problems


def choose(
    root: Place | Storage,
    group: Peers | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    recover: bool = True,
    generation: int = 0,
) -> Choice:
    """Return the newest checkpoint whose every byte matches its checksum, and the newer ones skipped with the reason.

    `recover` first gives a checkpoint back its name if a save died while replacing it. `generation` > 0 marks that
    this start of the workers has begun: what older ones publish from now on does not count.

    Collective: every rank of `group`; the files of a candidate are divided over the ranks.
    """
    storage = storage_of(root)
    group = group if group is not None else Alone()

    def candidates() -> list[list[str]]:
        if group.rank > 0:
            return []
        if generation > 0:
            begin_generation(storage, generation)
        elif recover:
            restore_set_aside(storage)
        found = list_checkpoints(storage)
        return [[info.name, str(info.problem) if info.hidden else ""] for info in found]

    skipped: list[tuple[Place, str]] = []
    for name, hidden in on_all_ranks(group, candidates).check()[0]:
        folder = storage.inside(name)
        problem = hidden or damage(folder, group, progress=progress)
        if not problem:
            return Choice(folder.address, skipped)
        skipped.append((folder.address, problem))
    return Choice(None, skipped)


def damage(folder: Place | Storage, group: Peers, *, progress: Callable[[str], None] | None = None) -> str:
    """Read a checkpoint together, each rank a part of its files, and return what is wrong with it; empty if nothing.

    Collective: every rank of `group`
    """

    def look() -> list[str]:
        return [str(p) for p in verify(folder, part=(group.rank, group.size), progress=progress)]

    problems = _distinct(on_all_ranks(group, look).check())
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more if problems else ""


def begin_generation(root: Place | Storage, generation: int) -> None:
    """Mark durably that a new start of the workers has begun, before it chooses where to go on.

    Invariant: from now on an older generation can publish or remove nothing that a reader would notice
    Raises: CheckpointError if a newer one has begun, or what is there cannot be read; OSError
    """
    storage = storage_of(root)
    restore_set_aside(storage)
    raise_fence(storage, generation, lambda: _seals(storage))


def _seals(storage: Storage) -> dict[str, str]:
    """Return the seals of the checkpoints that count, by name. One that is damaged has none.

    Raises: CheckpointError if one is there that cannot be read now: left out, it would be hidden, and then removed
    """
    for _ in range(LOOKS):
        found = list_checkpoints(storage)
        unread = next((info for info in found if info.unreadable), None)
        if unread is None:
            return {info.name: info.seal for info in found if info.seal and not info.hidden}
    assert unread is not None
    raise CheckpointError(
        f"{unread.problem}. Nothing was changed: a new start has to know which checkpoints there are. Start again when "
        f"it can be read, or remove {unread.name} if it is lost"
    )


def publish(storage: Storage, staged: str, manifest: Manifest, fault: Callable[[str], None]) -> tuple[str, str | None]:
    """Make a checkpoint visible whose files are durable under a staging name; return its name, and that of one of the
    same step that it replaced (which is to be removed).

    `fault` is called with "manifest", "rename", "replace" and "renamed" on the way.

    Raises: CheckpointError if a newer generation has begun; OSError. Then nothing is visible that was not before.
    """

    def check() -> None:
        read_fence(storage).check(manifest.generation, storage.place)

    fault("manifest")
    check()
    storage.create(f"{staged}/{MANIFEST_NAME}", manifest.dump())
    fault("rename")
    if not storage.renames:
        return staged, None
    final = step_name(manifest.step)
    return final, take_name(storage, staged, final, check, fault)


def take_name(
    storage: Storage, staged: str, final: str, check: Callable[[], None], fault: Callable[[str], None]
) -> str | None:
    """Rename a folder durably, setting aside one that has the name; return the name which that one has now.

    `check` raises if this may not be, at a moment when whoever could forbid it sees all there is.
    """
    old = aside(final, "old") if final in storage.names() else None
    try:
        if old is not None:
            storage.rename(final, old)
            fault("replace")
        check()
        storage.rename(staged, final)
        try:
            storage.sync()
        except OSError:  # it may not outlive a loss of power, so it must not be seen
            storage.rename(final, staged)
            raise
    except (OSError, CheckpointError):
        restore_set_aside(storage)
        raise
    fault("renamed")
    return old


def restore_set_aside(root: Storage) -> None:
    """Give a checkpoint back its name if a save died between setting it aside and renaming its successor."""
    for left in leftovers(root):
        if left.kind == "old" and left.checkpoint not in root.names():
            root.rename(left.name, left.checkpoint)


class Leftover(NamedTuple):
    """What is not a checkpoint, or not any more. `kind`: tmp, old or trash. Only of "tmp" it is known who wrote it."""

    name: str
    checkpoint: str
    kind: str
    generation: int = 0
    writer: str = ""


def leftovers(root: Storage) -> list[Leftover]:
    """Return what is not a checkpoint, or not any more, and what is being written."""
    names = root.names()
    found = [
        Leftover(n, m[1], m[2], int(m[3] or 0), m[4] or "") for n in names if (m := _LEFTOVER.fullmatch(n)) is not None
    ]
    attempts = [Leftover(n, n, "tmp", int(m[2])) for n in names if (m := _COMPLETE.fullmatch(n)) and m[2]]
    return found + [a for a in attempts if not root.renames and not exists(root, f"{a.name}/{MANIFEST_NAME}")]


def _info(root: Storage, fence: Fence, name: str, step: int) -> CheckpointInfo | None:
    storage = root.inside(name)
    base = CheckpointInfo(storage.address, name, step, fence.generation, None)
    try:
        if not root.renames and not exists(storage, MANIFEST_NAME):
            return None  # being written
        manifest = load_manifest(storage)
    except CheckpointError as error:
        return replace(base, problem=str(error)) if root.renames or exists(storage, MANIFEST_NAME) else None
    except OSError as error:
        return replace(base, problem=unreadable(storage, error), unreadable=True)
    hidden = fence.hides(name, manifest.generation, manifest.seal)
    problem = (
        f"published by generation {manifest.generation} after generation {fence.generation} had begun"
        if hidden
        else _size_problem(storage.sizes(), manifest)
    )
    return replace(
        base,
        generation=manifest.generation,
        problem=problem,
        num_bytes=manifest.num_bytes,
        num_tensors=len(manifest.tensors),
        world_size=manifest.world_size,
        saved_at=manifest.saved_at,
        extra=manifest.extra,
        seal=manifest.seal,
        hidden=hidden,
    )


def _size_problem(found: Mapping[str, int], manifest: Manifest) -> str | None:
    """Return what is wrong with the first file that is missing or of another size."""
    for name, stated in sorted(manifest.files.items()):
        if name not in found:
            return f"{name} is missing"
        if found[name] != stated.num_bytes:
            return f"{name} has {found[name]} bytes, the manifest says {stated.num_bytes}"
    return None


def _file_problems(files: Files, manifest: Manifest, name: str) -> list[Problem]:
    stated = manifest.files[name]
    if not exists(files, name):
        return [Problem(name, None, "is missing")]
    size = files.size(name)
    if size == stated.num_bytes:
        found = file_hash(files, name)
        if found == stated.xxh3:
            return []
        detail = f"is damaged: xxh3 is {found}, the manifest says {stated.xxh3}"
    else:
        kind = "is truncated" if size < stated.num_bytes else "has grown"
        detail = f"{kind}: {size} bytes, the manifest says {stated.num_bytes}"
    tensors = _damaged_tensors(files, manifest, name)
    return [Problem(name, key, detail) for key in tensors] or [Problem(name, None, detail)]


def _damaged_tensors(files: Files, manifest: Manifest, name: str) -> list[str]:
    """Return the keys whose bytes in one file do not have their xxh3 (or are past its end)."""
    damaged: list[str] = []
    with opened(files, name) as file:
        for key, piece in manifest.pieces_of_file(name):
            if key not in damaged and _range_hash(file, piece.offset, piece.num_bytes) != piece.xxh3:
                damaged.append(key)
    return damaged


def _range_hash(file: RandomAccess, offset: int, num_bytes: int) -> str:
    hasher = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(num_bytes, READ_BYTES)))
    while num_bytes > 0 and (count := file.read_into(buffer[:num_bytes], offset)):
        hasher.update(buffer[:count])
        offset, num_bytes = offset + count, num_bytes - count
    return hasher.hexdigest()


def _distinct(found: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(text for texts in found for text in texts))


def _last(place: Place) -> str:
    return place.name if isinstance(place, Path) else place.rstrip("/").rsplit("/", 1)[-1]
