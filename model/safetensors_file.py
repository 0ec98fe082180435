"""The safetensors format: headers read and written by hand, because its library cannot read parts of a tensor into
given memory, nor write a file that never exists in memory. Must not know: models, names.
Source: https://github.com/huggingface/safetensors (format section of the README)
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from windlass.dist.errors import ModelError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as named by the format
    offset: int  # bytes from the start of the file
    num_bytes: int


def read_header(file: Path) -> dict[str, Stored]:
    """Return the tensors of a file, after checking that all their bytes are there.

    Raises:      ModelError naming the file
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(_LENGTH.size)
            length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else size
            if _LENGTH.size + length > size:
                raise ModelError(f"{file} is truncated: {size} bytes do not even hold its header. Copy it again.")
            entries = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}.") from error
    entries.pop("__metadata__", None)
    base, tensors = _LENGTH.size + length, {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        if base + end > size:
            raise ModelError(
                f"{file} is truncated: tensor {name} ends at byte {base + end}, the file has {size}. Copy it again."
            )
        tensors[name] = Stored(file, tuple(entry["shape"]), entry["dtype"], base + begin, end - begin)
    return tensors


def pack_header(tensors: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Return the head of a file whose data are these tensors, in this order, without gaps."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return _LENGTH.pack(len(body)) + body
