"""The folder of a run's checkpoints: names, listing, leftovers of interrupted work, retention, and which one to resume.

    step-00000100/                 a complete checkpoint
    .step-00000100.tmp-<nonce>/    being written, or left by a save that died
    .step-00000100.old-<nonce>/    set aside while a newer save of the same step takes its name
    .step-00000100.trash-<nonce>/  being deleted

Everything happens by renaming whole folders, so a reader sees a checkpoint complete or not at all. Must not know:
tensors in memory, models.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windlass.checkpoint.agree import Alone, Peers, on_all_ranks
from windlass.checkpoint.manifest import MANIFEST_NAME, Manifest, readable_bytes
from windlass.checkpoint.reader import damaged_tensors, file_hash, read_manifest
from windlass.dist.errors import CheckpointError

_COMPLETE = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(tmp|old|trash)-[0-9a-f]{8}")


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
    """One checkpoint folder as far as its manifest and file sizes tell (contents are not hashed)."""

    folder: Path
    step: int
    problem: str | None
    num_bytes: int = 0
    num_tensors: int = 0
    world_size: int = 0
    saved_at: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The checkpoint to resume from, and the newer ones that were passed over with the reason."""

    folder: Path | None
    skipped: list[tuple[Path, str]]


def step_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def aside(folder: Path, kind: str) -> Path:
    """Return a fresh hidden name beside a checkpoint folder; `kind` is tmp, old or trash."""
    return folder.with_name(f".{folder.name}.{kind}-{secrets.token_hex(4)}")


def list_checkpoints(root: Path) -> list[CheckpointInfo]:
    """Return the checkpoints of a folder, newest step first, complete or not."""
    return [_info(folder, step) for step, folder in _step_folders(root)]


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that a user means: itself, or the newest valid one of a run.

    Raises: CheckpointError if there is none, or none that is valid.
    """
    if is_checkpoint(path):
        return path
    root = checkpoints_root(path)
    choice = choose(root, recover=False)
    if choice.folder is not None:
        return choice.folder
    if choice.skipped:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in choice.skipped)
        raise CheckpointError(f"{root} has no valid checkpoint ({reasons})")
    raise CheckpointError(f"{path} is neither a checkpoint (step-XXXXXXXX/) nor a run folder with checkpoints/")


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path means one checkpoint, damaged or not, rather than a folder of them."""
    return (path / MANIFEST_NAME).is_file() or _COMPLETE.fullmatch(path.name) is not None


def checkpoints_root(path: Path) -> Path:
    """Return the folder of checkpoints that a user means: a run's `checkpoints/`, or the folder itself."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def verify(
    folder: Path, *, part: tuple[int, int] = (0, 1), progress: Callable[[str], None] | None = None
) -> list[Problem]:
    """Read every file of a checkpoint and return what is damaged; empty means valid.

    `part` = (i, n) reads only every n-th file from the i-th on, so that n ranks share the work.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [Problem(MANIFEST_NAME, None, str(error))]
    problems: list[Problem] = []
    for name in sorted(manifest.files)[part[0] :: part[1]]:
        if progress is not None:
            progress(f"verifying {folder.name}/{name} ({readable_bytes(manifest.files[name].num_bytes)})")
        try:
            problems += _file_problems(folder, manifest, name)
        except OSError as error:
            problems.append(Problem(name, None, f"cannot be read: {error.strerror}"))
    return problems


def choose(
    root: Path,
    group: Peers | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    recover: bool = True,
) -> Choice:
    """Return the newest checkpoint whose every byte matches its checksum, and the newer ones skipped with the reason.

    `recover` first gives a checkpoint back its name if a save died while replacing it.

    Collective: every rank of `group`; the files of a candidate are divided over the ranks.
    """
    group = group if group is not None else Alone()

    def candidates() -> list[str]:
        if group.rank > 0:
            return []
        if recover:
            restore_set_aside(root)
        return [folder.name for _, folder in _step_folders(root)]

    skipped: list[tuple[Path, str]] = []
    for name in on_all_ranks(group, candidates).check()[0]:
        folder = root / name

        def damage(folder: Path = folder) -> list[str]:
            return [str(p) for p in verify(folder, part=(group.rank, group.size), progress=progress)]

        problems = list(dict.fromkeys(p for found in on_all_ranks(group, damage).check() for p in found))
        if not problems:
            return Choice(folder, skipped)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        skipped.append((folder, problems[0] + more))
    return Choice(None, skipped)


def restore_set_aside(root: Path) -> None:
    """Give a checkpoint back its name if a save died between setting it aside and renaming its successor."""
    for path, name, kind in _leftovers(root):
        if kind == "old" and not (root / name).exists():
            os.rename(path, root / name)


def remove_leftovers(root: Path) -> None:
    """Delete what interrupted saves and deletions left behind; nothing but names of this module's pattern."""
    restore_set_aside(root)
    for path, _, _ in _leftovers(root):
        shutil.rmtree(path)


def retain(root: Path, saved_step: int, keep: int) -> list[Path]:
    """Delete all but the newest `keep` complete checkpoints up to `saved_step`, and return what was deleted.

    Later steps are left alone: they belong to a run that this one has branched off from. `keep` 0 keeps all.
    """
    if keep == 0:
        return []
    older = [_info(folder, step) for step, folder in _step_folders(root) if step <= saved_step]
    complete = [info.step for info in older if info.problem is None]
    if len(complete) <= keep:
        return []
    gone = [info.folder for info in older if info.step < complete[keep - 1]]
    for folder in gone:
        trash = aside(folder, "trash")
        os.rename(folder, trash)
        shutil.rmtree(trash)
    return gone


def _step_folders(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    found = [(match, path) for path in root.iterdir() if (match := _COMPLETE.fullmatch(path.name)) and path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def _leftovers(root: Path) -> list[tuple[Path, str, str]]:
    if not root.is_dir():
        return []
    found = [(path, _LEFTOVER.fullmatch(path.name)) for path in sorted(root.iterdir())]
    return [(path, match[1], match[2]) for path, match in found if match and path.is_dir()]


def _info(folder: Path, step: int) -> CheckpointInfo:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return CheckpointInfo(folder, step, str(error))
    problem = next((text for name in sorted(manifest.files) if (text := _size_problem(folder, manifest, name))), None)
    return CheckpointInfo(
        folder,
        step,
        problem,
        manifest.num_bytes,
        len(manifest.tensors),
        manifest.world_size,
        manifest.saved_at,
        manifest.extra,
    )


def _size_problem(folder: Path, manifest: Manifest, name: str) -> str | None:
    try:
        found = (folder / name).stat().st_size
    except OSError as error:
        return f"{name}: {error.strerror}"
    stated = manifest.files[name].num_bytes
    return None if found == stated else f"{name} has {found} bytes, the manifest says {stated}"


def _file_problems(folder: Path, manifest: Manifest, name: str) -> list[Problem]:
    stated = manifest.files[name]
    if not (folder / name).exists():
        return [Problem(name, None, "is missing")]
    size = (folder / name).stat().st_size
    if size == stated.num_bytes:
        found = file_hash(folder / name)
        if found == stated.xxh3:
            return []
        detail = f"is damaged: xxh3 is {found}, the manifest says {stated.xxh3}"
    else:
        kind = "is truncated" if size < stated.num_bytes else "has grown"
        detail = f"{kind}: {size} bytes, the manifest says {stated.num_bytes}"
    tensors = damaged_tensors(folder, manifest, name)
    return [Problem(name, key, detail) for key in tensors] or [Problem(name, None, detail)]
