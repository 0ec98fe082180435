"""The `.metadata` file of torch.distributed.checkpoint, written from plain rows.

The only place that knows torch's metadata classes, and it knows them by name: the file is a pickle, and its few opcodes
are written here directly. Importing torch.distributed.checkpoint instead costs a second and 48 MiB at the first save of
every run, and ties the file to the torch that wrote it. Only fields that torch 2.11 and 2.13 share are written; a test
compares the result with torch's own objects. Must not know: our manifest, ranks, how items are written.
Source: torch.distributed.checkpoint.metadata and .filesystem; the opcodes are documented in Python's pickletools.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from windlass.dist.box import Box, Shape

if TYPE_CHECKING:
    import torch

DATA_SUFFIX = ".distcp"
METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"
CONTIGUOUS = 0  # _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


@dataclass(frozen=True)
class DcpItem:
    """One saved box: a complete `torch.save` archive at `[offset, offset + num_bytes)` of a file."""

    box: Box
    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class DcpTensor:
    """One whole tensor and the items that tile it."""

    shape: Shape
    dtype: torch.dtype | str  # by its name where there is no torch: "float32"
    items: Sequence[DcpItem]


def data_file_name(rank: int) -> str:
    """Return the name that torch's own writer gives to the first file of a rank."""
    return f"__{rank}_0{DATA_SUFFIX}"


def dcp_metadata(tensors: Mapping[str, DcpTensor]) -> bytes:
    """Build the bytes of `.metadata`.

    Every key maps to itself in `planner_data`: state dicts are flat, and conversion tools keep the full names.
    """
    return _Pickle().dump(tensors)


class _Pickle:
    """Writes values as opcodes. What repeats (names, keys, sizes) is defined once, in front, and referred to."""

    def __init__(self) -> None:
        self.defined: dict[bytes, int] = {}

    def dump(self, tensors: Mapping[str, DcpTensor]) -> bytes:
        items = [(key, number, item) for key, tensor in tensors.items() for number, item in enumerate(tensor.items)]
        body = self.object(
            METADATA,
            "Metadata",
            state_dict_metadata=_dict((self.text(key), self.tensor(tensor)) for key, tensor in tensors.items()),
            planner_data=_dict((self.text(key), _tuple([self.text(key)])) for key in tensors),
            storage_data=_dict((self.index(key, number, item.box), self.place(item)) for key, number, item in items),
        )
        front = [
            value + pickle.LONG_BINPUT + struct.pack("<I", number) + pickle.POP
            for value, number in self.defined.items()
        ]
        return pickle.PROTO + bytes([2]) + b"".join(front) + body + pickle.STOP

    def tensor(self, tensor: DcpTensor) -> bytes:
        memory_format = self.name(METADATA, "_MEM_FORMAT_ENCODING") + _tuple([_int(CONTIGUOUS)]) + pickle.REDUCE
        dtype = self.name("torch", str(tensor.dtype).removeprefix("torch."))
        # The tuple of TensorProperties.__getstate__: dtype, layout, requires_grad, memory format, pin_memory.
        state = _tuple([dtype, self.name("torch", "strided"), pickle.NEWFALSE, memory_format, pickle.NEWFALSE])
        chunks = [
            self.object(
                METADATA, "ChunkStorageMetadata", offsets=self.size(item.box.offsets), sizes=self.size(item.box.sizes)
            )
            for item in tensor.items
        ]
        return self.object(
            METADATA,
            "TensorStorageMetadata",
            properties=self.restored(METADATA, "TensorProperties", state),
            size=self.size(tensor.shape),
            chunks=pickle.EMPTY_LIST + pickle.MARK + b"".join(chunks) + pickle.APPENDS,
        )

    def index(self, key: str, number: int, box: Box) -> bytes:
        fields = {"fqn": self.text(key), "offset": self.size(box.offsets), "index": _int(number)}
        return self.object(METADATA, "MetadataIndex", **fields)

    def place(self, item: DcpItem) -> bytes:
        fields = {"relative_path": self.text(item.file), "offset": _int(item.offset), "length": _int(item.num_bytes)}
        return self.object(FILESYSTEM, "_StorageInfo", **fields)

    def object(self, module: str, name: str, **fields: bytes) -> bytes:
        """A dataclass instance, made without its constructor and given its attributes."""
        return self.restored(module, name, _dict((self.text(field), value) for field, value in fields.items()))

    def restored(self, module: str, name: str, state: bytes) -> bytes:
        return self.name(module, name) + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD

    def name(self, module: str, name: str) -> bytes:
        return self.once(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def size(self, sizes: Shape) -> bytes:
        # By its full name: a definition must not refer to another.
        return self.once(pickle.GLOBAL + b"torch\nSize\n" + _tuple([_tuple(map(_int, sizes))]) + pickle.REDUCE)

    def text(self, text: str) -> bytes:
        data = text.encode()
        return self.once(pickle.BINUNICODE + struct.pack("<I", len(data)) + data)

    def once(self, value: bytes) -> bytes:
        number = self.defined.setdefault(value, len(self.defined))
        return pickle.LONG_BINGET + struct.pack("<I", number)


def _dict(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    return pickle.EMPTY_DICT + pickle.MARK + b"".join(key + value for key, value in pairs) + pickle.SETITEMS


def _tuple(values: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(values) + pickle.TUPLE


def _int(number: int) -> bytes:
    data = pickle.encode_long(number)
    return pickle.LONG1 + bytes([len(data)]) + data
