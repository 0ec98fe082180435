"""The layout of a snapshot: which box of which tensor lies where among the bytes of a rank. Written once, JSON.

Kept by every member of a redundancy group, because the layout of a lost node must survive it.
Must not know: torch (formats are names such as "float32"), segments, networks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from windlass.dist.box import Box, Shape
from windlass.dist.errors import CheckpointError

VERSION = 1
ALIGNMENT = 64  # bytes; of fragments, and of the parts into which state is cut


@dataclass(frozen=True)
class Fragment:
    """The bytes of one box of one global tensor, row-major, at `offset` of the rank's bytes."""

    key: str
    dtype: str
    global_shape: Shape
    box: Box
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """All fragments of one rank, in order of their offsets. `frames` belongs to those who persist it."""

    fragments: tuple[Fragment, ...]
    num_bytes: int
    frames: dict[str, Any] | None = None

    @cached_property
    def _text(self) -> bytes:
        rows = [
            [f.key, f.dtype, f.global_shape, f.box.offsets, f.box.sizes, f.offset, f.num_bytes] for f in self.fragments
        ]
        document = {"version": VERSION, "num_bytes": self.num_bytes, "fragments": rows, "frames": self.frames}
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def digest(self) -> str:
        """xxh3_128 of the document: the layout's name."""
        return xxhash.xxh3_128_hexdigest(self._text)

    def dump(self) -> bytes:
        """Return the document."""
        return self._text

    @staticmethod
    def parse(data: bytes, digest: str | None = None) -> Layout:
        """Read a document, and compare it with its name where given.

        Raises: CheckpointError if it is damaged or contradicts itself
        """
        found = xxhash.xxh3_128_hexdigest(data)
        if digest is not None and found != digest:
            raise CheckpointError(f"the layout {digest} is damaged: its bytes are those of {found}")
        try:
            document = json.loads(data)
            if document["version"] != VERSION:
                raise ValueError(f"version {document['version']!r}, this program reads {VERSION}")
            fragments = tuple(
                Fragment(str(key), str(dtype), tuple(shape), Box(tuple(offsets), tuple(sizes)), int(offset), int(size))
                for key, dtype, shape, offsets, sizes, offset, size in document["fragments"]
            )
            layout = Layout(fragments, int(document["num_bytes"]), document["frames"])
            layout.check()
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the layout {digest or ''} cannot be read: {error}") from error
        return layout

    def check(self) -> None:
        """Raise CheckpointError unless fragments lie in order, aligned, apart, and inside their tensors."""
        end = 0
        for f in self.fragments:
            box, whole = f.box, Box.whole(f.global_shape)
            inside = len(box.sizes) == len(whole.sizes) and all(
                min(o, s) >= 0 and o + s <= w for o, s, w in zip(box.offsets, box.sizes, whole.sizes, strict=True)
            )
            fits = f.num_bytes % box.numel == 0 if inside and box.numel else f.num_bytes == 0
            if not inside or not fits or f.offset < end or f.offset % ALIGNMENT:
                raise CheckpointError(
                    f"the layout is wrong at '{f.key}': box {f.box} of shape {list(f.global_shape)}, {f.num_bytes} "
                    f"bytes at {f.offset}, after {end} bytes"
                )
            end = f.offset + f.num_bytes
        if end > self.num_bytes:
            raise CheckpointError(f"the layout is wrong: fragments end at {end}, beyond its {self.num_bytes} bytes")
