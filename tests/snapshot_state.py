"""Test doubles of snapshots: state of one rank, its capturer, and what is found in slots afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from windlass.checkpoint.memory.capture import Capturer, LocalParity
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.segment import Segment, Slot, SlotHeader, State, hash_chunks, verify
from windlass.checkpoint.policy import SnapshotConfig
from windlass.dist.box import Box
from windlass.dist.device import Device
from windlass.dist.state import Loan, Piece

JOB = "0123456789abcdef"


class HeldState:
    """Tensors of one rank: at rest, or `movable` and only lent one after the other."""

    def __init__(self, tensors: dict[str, torch.Tensor], replicas: Sequence[int] = (0,), *, movable: bool = False):
        self.tensors, self.replicas, self.movable = tensors, tuple(replicas), movable
        self.opened: list[str] = []

    def held(self) -> list[Piece]:
        return [
            Piece(k, tuple(t.shape), Box.whole(tuple(t.shape)), self._source(k, t)) for k, t in self.tensors.items()
        ]

    def _source(self, key: str, tensor: torch.Tensor) -> torch.Tensor | Loan:
        if not self.movable:
            return tensor

        def open_it() -> torch.Tensor:
            self.opened.append(key)
            return self.tensors[key].view(-1)

        return Loan(tensor.dtype, open_it)


def mixed_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Matrices, odd sizes, low precision, a scalar, and nothing, partly side by side in one buffer."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.randn(4096, generator=g)
    return {
        "model.a": flat[:1024].view(32, 32),
        "model.b": flat[1024:1025],
        "model.c": flat[1040:4080].view(8, 5, 76),
        "model.bias": torch.randn(37, generator=g).bfloat16(),
        "model.none": torch.empty(0, 3),
        "optimizer.step": torch.tensor(17 + seed),
        "optimizer.m": torch.randn(700, 3, generator=g).double(),
    }


def capturer(base: Path, source: HeldState, rank: int = 0, *, generation: int = 1, **options: Any) -> Capturer:
    """Return a capturer on a node of its own.

    `parity`: the group that makes it, True for all replicas; `opened`: it has taken its memory; other options go into
    the policy.
    """
    wish, device = options.pop("parity", False), options.pop("device", Device("cpu"))
    opened = options.pop("opened", True)
    base.mkdir(exist_ok=True)
    parity = LocalParity(source.replicas if wish is True else wish) if wish else None
    chosen = {"chunk_bytes": 4096, "bucket_bytes": 64 << 10, **options}
    made = Capturer(
        NodeFolder(base, JOB, f"node-{rank}").create(),
        job=JOB,
        generation=generation,
        rank=rank,
        world_size=len(source.replicas),
        source=source,
        device=device,
        policy=SnapshotConfig(every=1, **chosen),
        local_parity=parity,
    )
    if opened:
        made.open()
    return made


def slots(folder: NodeFolder, role: str = "data") -> list[Slot]:
    """Return the slots of the only rank of a node, writable as the snapshot process has them."""
    files = [file for file in folder.segments() if file.role == role]
    assert len(files) == 1, files
    return list(Segment.open(files[0].path, writable=True).slots)


def hashed(slot: Slot) -> SlotHeader:
    """Do what the snapshot process does with a slot that was copied."""
    header = slot.header()
    assert header is not None and header.state == State.COPIED, header
    table = hash_chunks(slot.data, header.num_bytes, header.chunk_bytes)
    assert slot.write(replace(header, state=State.FILLED, hashes={header.own_key: table}))
    found = slot.header()
    assert found is not None
    return found


def whole_steps(folder: NodeFolder) -> dict[int, dict[str, torch.Tensor]]:
    """Return the verified snapshots of a node: tensors by key, flat, of the elements that its rank holds."""
    out = {}
    for slot in slots(folder):
        header = slot.header()
        if header is not None and header.state >= State.FILLED:
            assert verify(slot, header) == []
            layout = folder.read_layout(header.layout)
            assert layout is not None
            out[header.step] = contents(layout, slot.data)
    return out


def contents(layout: Layout, data: np.ndarray) -> dict[str, torch.Tensor]:
    """Return what lies in the bytes of a rank: by key, the elements of its fragments one after the other."""
    found: dict[str, list[torch.Tensor]] = {}
    for f in layout.fragments:
        raw = bytearray(data[f.offset : f.offset + f.num_bytes].tobytes())
        dtype = getattr(torch, f.dtype)
        found.setdefault(f.key, []).append(torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype))
    return {key: torch.cat(parts) for key, parts in found.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Tell whether two sets of tensors are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
