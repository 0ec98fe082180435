"""What a checkpoint folder holds, as plain data: tensors, their pieces, files, checksums and the caller's facts.

`manifest.json` is written last and carries a checksum of itself, so its presence means that everything it names was
durable before. Our reader needs nothing else and never unpickles. Formats are names such as "float32".
Must not know: torch, bulk I/O, process groups, models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import xxhash

from windlass.checkpoint.storage import Files, Place, files_of, read_file
from windlass.dist.box import Box, Shape
from windlass.dist.errors import CheckpointError

FORMAT = "windlass-checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
METADATA_NAME = ".metadata"


@dataclass(frozen=True)
class StoredPiece:
    """One box of one tensor: raw row-major bytes at `[offset, offset + num_bytes)` of a file."""

    file: str
    offset: int
    num_bytes: int
    box: Box
    xxh3: str


@dataclass(frozen=True)
class StoredTensor:
    """One global tensor and the pieces that tile it (none if it has no elements)."""

    shape: Shape
    dtype: str
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True)
class StoredFile:
    """Size and xxh3 of one whole file."""

    num_bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """The whole of a checkpoint except the bytes."""

    step: int
    world_size: int
    saved_at: float  # seconds since the epoch
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    extra: dict[str, Any] = field(default_factory=dict)
    seal: str = field(default="", compare=False)  # of the document this was parsed from: tells namesakes apart

    @property
    def num_bytes(self) -> int:
        return sum(f.num_bytes for f in self.files.values())

    @property
    def generation(self) -> int:
        """Return which start of the job's workers wrote this; 0 where starts are not counted."""
        found = self.extra.get("generation", 0)
        return found if isinstance(found, int) else 0

    def pieces_of_file(self, file: str) -> list[tuple[str, StoredPiece]]:
        """Return (tensor key, piece) of everything stored in one file, by offset."""
        found = [(key, p) for key, tensor in self.tensors.items() for p in tensor.pieces if p.file == file]
        return sorted(found, key=lambda pair: pair[1].offset)

    def dump(self) -> bytes:
        """Write JSON, one file and one tensor per line, that ends in the checksum of all bytes before it."""
        files = {name: {"bytes": f.num_bytes, "xxh3": f.xxh3} for name, f in sorted(self.files.items())}
        tensors = {key: _tensor_json(tensor) for key, tensor in sorted(self.tensors.items())}
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "saved_at": self.saved_at,
            "extra": self.extra,
        }
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items()]
        lines += [f'"files": {_by_line(files)}', f'"tensors": {_by_line(tensors)}', ""]
        head = ("{\n" + ",\n".join(lines)).encode()
        return head + _seal(head)

    @staticmethod
    def parse(data: bytes, where: str) -> Manifest:
        """Read a manifest. Raises: CheckpointError naming `where` if it is damaged or of another version."""
        try:
            body = json.loads(data)
        except ValueError as error:
            raise CheckpointError(f"{where} is not readable JSON ({error}): the file is damaged") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise CheckpointError(f"{where} is not the manifest of a Windlass checkpoint")
        if body.get("version") != VERSION:
            raise CheckpointError(
                f"{where} has format version {body.get('version')}, this Windlass reads version {VERSION}: "
                "use the Windlass that wrote it"
            )
        head = data[: data.rfind(_SEAL)]
        if data != head + _seal(head):
            raise CheckpointError(f"{where} does not match its own checksum: the file is damaged")
        return Manifest(
            step=body["step"],
            world_size=body["world_size"],
            saved_at=body["saved_at"],
            tensors={key: _tensor_from_json(value) for key, value in body["tensors"].items()},
            files={name: StoredFile(value["bytes"], value["xxh3"]) for name, value in body["files"].items()},
            extra=body["extra"],
            seal=body["xxh3"],
        )


def load_manifest(files: Files) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises: CheckpointError if it is missing or damaged; OSError if it cannot be read now, which says nothing about it
    """
    try:
        data = read_file(files, MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{files.place} is not a complete checkpoint: it has no {MANIFEST_NAME}") from error
    return Manifest.parse(data, f"{files.place}/{MANIFEST_NAME}")


def read_manifest(checkpoint: Place | Files) -> Manifest:
    """Read the manifest of a checkpoint. Raises: CheckpointError if it is missing or damaged, or cannot be read."""
    files = files_of(checkpoint)
    try:
        return load_manifest(files)
    except OSError as error:
        raise CheckpointError(unreadable(files, error)) from error


def unreadable(files: Files, error: OSError) -> str:
    """Say that a manifest is there but cannot be read now."""
    return f"{files.place}/{MANIFEST_NAME} cannot be read: {error.strerror or error}"


def readable_bytes(num_bytes: float) -> str:
    """Write a byte count for people: '12.3 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


_SEAL = b'"xxh3": "'


def _seal(head: bytes) -> bytes:
    return _SEAL + xxhash.xxh3_64_hexdigest(head).encode() + b'"\n}\n'


def _by_line(values: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()) + "\n}"


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "pieces": [
            {
                "file": p.file,
                "offset": p.offset,
                "bytes": p.num_bytes,
                "box": [p.box.offsets, p.box.sizes],
                "xxh3": p.xxh3,
            }
            for p in tensor.pieces
        ],
    }


def _tensor_from_json(value: dict[str, Any]) -> StoredTensor:
    pieces = tuple(
        StoredPiece(p["file"], p["offset"], p["bytes"], Box(tuple(p["box"][0]), tuple(p["box"][1])), p["xxh3"])
        for p in value["pieces"]
    )
    return StoredTensor(tuple(value["shape"]), value["dtype"], pieces)
