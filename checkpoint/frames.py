"""What torch.save writes before and after a tensor's bytes: made once per layout, so that later no torch is needed.

An archive of a tensor without checksums depends on its shape and dtype only, not on its values nor on where in a file
it lies. The trainer, which has torch, makes these frames; the snapshot process (`archives.py`) joins them with bytes.
Must not know: files, segments, who writes.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from typing import IO, Any, cast

import torch

from windlass.checkpoint.archives import FRAMES_VERSION
from windlass.checkpoint.memory.layout import Fragment
from windlass.checkpoint.reader import dtype_of
from windlass.checkpoint.writer import address_of, without_crc32
from windlass.dist.errors import CheckpointError


def frames_of(fragments: Iterable[Fragment]) -> dict[str, Any]:
    """Return the frames of a rank's fragments as JSON, each distinct one once; for `Layout.frames`."""
    made: list[list[str]] = []
    known: dict[tuple[str, tuple[int, ...]], int] = {}
    numbers = []
    for f in fragments:
        what = (f.dtype, f.box.sizes)
        if f.box.numel == 0:
            numbers.append(-1)
            continue
        if what not in known:
            known[what] = len(made)
            made.append([_packed(part) for part in frame_of(dtype_of(f.dtype), f.box.sizes)])
        numbers.append(known[what])
    return {"version": FRAMES_VERSION, "made": made, "of": numbers}


def frame_of(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Return the bytes of an archive of such a tensor before and after its own."""
    tensor = torch.empty(shape, dtype=dtype)  # never touched, so a large one takes no memory
    sink = _Sink(tensor)
    with without_crc32():
        torch.save(tensor, cast(IO[bytes], sink))
    if len(sink.parts) != 2:
        raise CheckpointError(
            f"torch {torch.__version__} did not write a tensor's bytes in one part, so checkpoints cannot be written "
            "outside the trainer: use checkpoint.mode=sync, or a torch that Windlass is tested with (2.11 to 2.13)"
        )
    before, after = sink.parts
    return bytes(before), bytes(after)


class _Sink:
    """Keeps what goes by, but for the tensor's own bytes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.watched = (tensor.data_ptr(), tensor.nbytes)
        self.parts = [bytearray()]

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if len(view) == self.watched[1] and address_of(view) == self.watched[0]:
            self.parts.append(bytearray())
        else:
            self.parts[-1] += view
        return len(view)

    def flush(self) -> None:
        """Nothing is pending."""


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()
