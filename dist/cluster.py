"""Facts about the machines a job runs on. Zero or empty means: not known, detect it or do without.

Must not know: what a job wants.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace

import torch

from windlass.dist.device import Device, host_bytes, num_accelerators, pick_device


@dataclass(frozen=True)
class ClusterConfig:
    """What the plan may count on. Values given here win over what is detected on this machine."""

    nodes: int = field(default=0, metadata={"help": "hosts (0: 1)", "unit": "hosts", "ge": 0})
    devices_per_node: int = field(
        default=0,
        metadata={"help": "accelerators, or CPU workers, of one host (0: detect)", "unit": "devices", "ge": 0},
    )
    device_bytes: int = field(
        default=0,
        metadata={
            "help": "memory of one device (0: detect); on the CPU the share of the host's memory of one worker",
            "unit": "bytes",
            "ge": 0,
        },
    )
    host_bytes: int = field(default=0, metadata={"help": "memory of one host (0: detect)", "unit": "bytes", "ge": 0})
    device_flops: float = field(
        default=0.0, metadata={"help": "peak bf16 matrix FLOP/s of one device (0: detect)", "unit": "FLOP/s", "ge": 0}
    )
    link_bytes_per_s: float = field(
        default=0.0, metadata={"help": "bandwidth between devices of a host (0: unknown)", "unit": "bytes/s", "ge": 0}
    )
    network_bytes_per_s: float = field(
        default=0.0, metadata={"help": "bandwidth between hosts, per host (0: unknown)", "unit": "bytes/s", "ge": 0}
    )
    nvme_paths: list[str] = field(
        default_factory=list, metadata={"help": "folders on local NVMe drives of every host (empty: none)"}
    )
    nvme_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "share of the bytes that each of nvme_paths takes, such as its bandwidth (empty: equal)"},
    )
    nvme_read_bytes_per_s: float = field(
        default=0.0, metadata={"help": "reading from all nvme_paths of a host (0: unknown)", "unit": "bytes/s", "ge": 0}
    )
    nvme_write_bytes_per_s: float = field(
        default=0.0, metadata={"help": "writing to all nvme_paths of a host (0: unknown)", "unit": "bytes/s", "ge": 0}
    )
    nvme_mixed_bytes_per_s: float = field(
        default=0.0,
        metadata={
            "help": "sum of both when they are read and written at once (0: unknown)",
            "unit": "bytes/s",
            "ge": 0,
        },
    )
    nvme_endurance_bytes: int = field(
        default=0,
        metadata={"help": "rated bytes written of all drives of a host (0: unknown)", "unit": "bytes", "ge": 0},
    )
    h2d_bytes_per_s: float = field(
        default=0.0,
        metadata={"help": "copies from the host to one device alone (0: unknown)", "unit": "bytes/s", "ge": 0},
    )
    d2h_bytes_per_s: float = field(
        default=0.0,
        metadata={"help": "copies from one device to the host alone (0: unknown)", "unit": "bytes/s", "ge": 0},
    )
    duplex_bytes_per_s: float = field(
        default=0.0,
        metadata={"help": "sum of both when copies run in both directions (0: unknown)", "unit": "bytes/s", "ge": 0},
    )
    host_memory_bytes_per_s: float = field(
        default=0.0,
        metadata={"help": "bytes read and written by copies in host memory (0: unknown)", "unit": "bytes/s", "ge": 0},
    )
    cpu_adam: str = field(
        default="torch",
        metadata={"help": "the faster AdamW kernel on the CPUs of a host", "choices": ("torch", "deepspeed")},
    )
    cpu_update_per_s: float = field(
        default=0.0,
        metadata={"help": "AdamW updates by the CPUs of a host (0: unknown)", "unit": "parameters/s", "ge": 0},
    )
    device_update_per_s: float = field(
        default=0.0, metadata={"help": "AdamW updates by one device (0: unknown)", "unit": "parameters/s", "ge": 0}
    )
    cpu_cast_per_s: float = field(
        default=0.0,
        metadata={"help": "fp32 to bf16 by the CPUs of a host (0: unknown)", "unit": "elements/s", "ge": 0},
    )

    def completed(self, device: str = "auto") -> ClusterConfig:
        """Return these facts with the unknown ones filled in from this machine."""
        found = detect_cluster(device)
        return replace(found, **{f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)})


def detect_cluster(device: str = "auto") -> ClusterConfig:
    """Describe this machine as a cluster of one host."""
    chosen: Device = pick_device(device)
    if chosen.kind == "cuda":
        count = num_accelerators()
        device_bytes = chosen.total_bytes()
    else:
        count = len(os.sched_getaffinity(0))
        device_bytes = host_bytes() // count
    return ClusterConfig(
        nodes=1,
        devices_per_node=count,
        device_bytes=device_bytes,
        host_bytes=host_bytes(),
        device_flops=chosen.peak_flops(torch.bfloat16),
    )
