"""What gpu_offload.py trains: models of every scale, weights that cost nothing to make, and how much fits where.

Weights are cut out of one table of random numbers: filling billions of them one by one would take longer than training.
"""

from __future__ import annotations

import shutil
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from workload import Fill, Workload

from windlass.dist.device import Device, available_host_bytes
from windlass.model.build import build_model
from windlass.model.config import ModelConfig
from windlass.model.loss import PLAIN, Loss, LossConfig
from windlass.model.protocol import BlockModel

GIB = 1 << 30


@dataclass(frozen=True)
class Scale:
    """How large everything is. Units: bytes; tokens; `kept_free` is for activations and what frameworks take."""

    equality: dict[str, Any]
    on_drive: dict[str, Any]  # what policies that use the drive are compared on
    finetune: dict[str, Any]
    block: dict[str, Any]  # keys of the model whose number of blocks follows from what is free
    finetune_tokens: int
    tokens: int
    seq_len: int
    chunk: int
    device_kept_free: int
    host_kept_free: int
    disk_kept_free: int
    most_device: int = 1 << 62
    most_host: int = 1 << 62
    most_disk: int = 1 << 62
    adam_elements: int = 100_000_000
    calibrate_s: float = 40.0


def llama(hidden: int, layers: int, heads: int, kv_heads: int, wide: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": wide,
        "vocab_size": vocab,
        "max_seq_len": 8192,
    }


FULL = Scale(
    equality=llama(4096, 4, 32, 32, 11008, 32000),  # 1.07B
    on_drive=llama(2048, 4, 16, 16, 5632, 32000),
    finetune=llama(4096, 32, 32, 32, 11008, 32000),  # Llama 2 7B
    block=llama(6144, 1, 48, 8, 16384, 32000),
    finetune_tokens=16384,
    tokens=8192,
    seq_len=2048,
    chunk=8 << 20,
    device_kept_free=14 * GIB,
    host_kept_free=14 * GIB,
    disk_kept_free=6 * GIB,
)
QUICK = Scale(
    equality=llama(2048, 4, 16, 16, 5632, 32000),
    on_drive=llama(1024, 4, 16, 16, 2816, 32000),
    finetune=llama(2048, 22, 16, 16, 5632, 32000),
    block=llama(4096, 1, 32, 8, 11008, 32000),
    finetune_tokens=16384,
    tokens=8192,
    seq_len=2048,
    chunk=4 << 20,
    device_kept_free=14 * GIB,
    host_kept_free=14 * GIB,
    disk_kept_free=6 * GIB,
    most_device=40 * GIB,
    most_host=24 * GIB,
    most_disk=12 * GIB,
    calibrate_s=15.0,
)
REHEARSAL = Scale(
    equality=llama(64, 2, 4, 2, 128, 256),
    on_drive=llama(64, 1, 4, 2, 128, 256),
    finetune=llama(128, 3, 4, 4, 256, 256),
    block=llama(128, 1, 4, 2, 384, 256),
    finetune_tokens=128,
    tokens=128,
    seq_len=64,
    chunk=16384,
    device_kept_free=0,
    host_kept_free=0,
    disk_kept_free=0,
    most_device=12 << 20,
    most_host=6 << 20,
    most_disk=6 << 20,
    adam_elements=100_000,
    calibrate_s=3.0,
)


class BigWorkload(Workload):
    """A workload of a model that is not a preset, with weights that cost nothing to make."""

    def __init__(self, keys: dict[str, Any], tokens: int, seq_len: int, device: Device, *, clip: float = 1.0) -> None:
        super().__init__(
            model="tiny",
            bf16=True,
            micro_batch=max(1, tokens // seq_len),
            seq_len=seq_len,
            clip=clip,
            seed=0,
            rank=0,
            world_size=1,
            device=str(device.torch_device),
        )
        self.config = ModelConfig(**keys)

    def empty_model(self, loss: Loss | LossConfig = PLAIN) -> tuple[BlockModel, Fill]:
        model = build_model(self.config, loss=loss)
        parts = [p for part in (model.embed, *model.blocks, model.head) for p in part.parameters()]
        self.num_parameters = sum(p.numel() for p in parts)
        return model, fill_from_table


@lru_cache(maxsize=1)
def random_table() -> torch.Tensor:
    return torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02


def fill_from_table(name: str, start: int, stop: int, out: torch.Tensor) -> None:
    """Write initial values of elements [start, stop) of a parameter; norms are 1."""
    if "norm" in name:
        out.fill_(1.0)
        return
    table, first = random_table(), zlib.crc32(name.encode())
    done = 0
    while done < stop - start:
        at = (first + start + done) % table.numel()
        count = min(stop - start - done, table.numel() - at)
        out[done : done + count].copy_(table[at : at + count])
        done += count


@dataclass(frozen=True)
class Fit:
    """How many blocks there are, and on which tier the state of each rests."""

    blocks: int
    on_device: int
    on_host: int
    on_nvme: int

    def table(self) -> list[dict[str, str]]:
        """Return offload.table: the embedding, the head and the first blocks on the device, the last ones on nvme."""
        rows = [{"units": "*", "optimizer": "host"}]
        rows += [{"units": name, "optimizer": "device"} for name in ("embed", "head")]
        for i in range(self.on_device):
            rows.append({"units": f"blocks.{i}", "optimizer": "device"})
        for i in range(self.blocks - self.on_nvme, self.blocks):
            rows.append({"units": f"blocks.{i}", "optimizer": "nvme"})
        return rows


def free_bytes(scale: Scale, device: Device, folder: Path) -> dict[str, int]:
    """Return what a model may take of each tier."""
    held = device.memory_bytes() if device.kind == "cuda" else 0
    return {
        "device": min(device.total_bytes() - held - scale.device_kept_free, scale.most_device),
        "host": min(available_host_bytes() - scale.host_kept_free, scale.most_host),
        "nvme": min(shutil.disk_usage(folder).free - scale.disk_kept_free, scale.most_disk),
    }


def fit(ends: int, block: int, free: dict[str, int], *, with_disk: bool) -> Fit:
    """Return the largest number of blocks: bf16 parameters and gradients on the device, 12 bytes of state anywhere."""
    best = Fit(0, 0, 0, 0)
    for blocks in range(1, 1000):
        left = free["device"] - 4 * (ends + blocks * block) - 12 * ends
        if left < 0:
            break
        on_device = min(blocks, left // (12 * block))
        on_host = min(blocks - on_device, free["host"] // (12 * block))
        on_nvme = blocks - on_device - on_host
        if on_nvme * 12 * block <= (free["nvme"] if with_disk else 0):
            best = Fit(blocks, on_device, on_host, on_nvme)
    return best
