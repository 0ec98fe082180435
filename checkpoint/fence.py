"""Which checkpoints count once the job's workers have been started anew: marks in the folder of checkpoints.

    .generation-00000004.json    generation 4 has begun; these checkpoints were there

A process of an older generation may still run on a node that was given up, and may finish a checkpoint at any moment.
No check before its last step can exclude that, so readers do: of older generations only what the mark names counts.
Must not know: what a checkpoint holds, how it is written.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import xxhash

from windlass.checkpoint.storage import Storage, read_file
from windlass.dist.errors import CheckpointError

_NAME = re.compile(r"\.generation-(\d{8,})\.json")
LOOKS = 10  # for the newest mark: each that fails means that a newer generation has begun meanwhile


@dataclass(frozen=True)
class Fence:
    """The newest generation that has begun, and the seals of the checkpoints it found, by name.

    `known` None: the mark is damaged; then nothing is hidden, but older generations are still refused.
    """

    generation: int = 0
    known: Mapping[str, str] | None = None

    def hides(self, name: str, generation: int, seal: str) -> bool:
        """Tell whether a checkpoint was published by an older generation after this one had begun."""
        return generation < self.generation and self.known is not None and self.known.get(name) != seal

    def check(self, generation: int, place: str) -> None:
        """Raise CheckpointError if a newer generation than this has begun."""
        if generation < self.generation:
            raise CheckpointError(
                f"generation {generation} of the workers may not change {place} any more: generation "
                f"{self.generation} has begun there. Nothing was changed"
            )


def read_fence(root: Storage) -> Fence:
    """Return the newest mark.

    Raises: CheckpointError if one is listed that is not there; OSError
    """
    name = ""
    for _ in range(LOOKS):
        found = [(int(match[1]), name) for name in root.names() if (match := _NAME.fullmatch(name))]
        if not found:
            return Fence()
        generation, name = max(found)
        with contextlib.suppress(FileNotFoundError):  # a newer one has taken its place
            return Fence(generation, _known(generation, read_file(root, name)))
    raise CheckpointError(f"{root.place} lists {name}, which is not there. Start again, or remove it by its name")


def _known(generation: int, text: bytes) -> Mapping[str, str] | None:
    """Return the checkpoints that a mark names; None if it is damaged: see Fence."""
    try:
        body = json.loads(text)
        known: Mapping[str, str] = body["checkpoints"]
        return known if body["xxh3"] == _seal(generation, known) else None
    except (ValueError, KeyError, TypeError):
        return None


def raise_fence(root: Storage, generation: int, look: Callable[[], Mapping[str, str]]) -> None:
    """Mark durably that a generation has begun and which checkpoints count: those that `look` finds. Once per
    generation: where the mark is there already, nobody looks.

    Raises: CheckpointError if a newer one has begun; OSError; what `look` raises
    """
    before = read_fence(root)
    before.check(generation, root.place)
    if before.generation == generation:
        return
    known = look()
    body = {"generation": generation, "checkpoints": dict(known), "xxh3": _seal(generation, known)}
    root.make_folder()
    with contextlib.suppress(FileExistsError):  # another process of this generation was first: as good
        root.create(f".generation-{generation:08d}.json", json.dumps(body, indent=1).encode())
    for name in root.names():
        match = _NAME.fullmatch(name)
        if match and int(match[1]) < generation:
            root.remove(name)


def _seal(generation: int, known: Mapping[str, str]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps([generation, dict(known)], sort_keys=True).encode())
