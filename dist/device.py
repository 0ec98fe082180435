"""One accelerator or the CPU, behind one face. The only file that names torch.cuda, pinned memory and streams.

Must not know: ranks beyond the local one, models, process groups.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from windlass.dist.control_group import memory_limit
from windlass.dist.errors import ConfigError, OffloadError

# Dense matrix peak of one device, FLOP/s without sparsity, from the vendors' data sheets: (bf16/fp16, fp32 vector).
PEAK_FLOPS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIE": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10": (125e12, 31.2e12),
    "L4": (121e12, 30.3e12),
    "V100": (125e12, 15.7e12),
    "4090": (165e12, 82.6e12),
    "3090": (71e12, 35.6e12),
}


@dataclass(frozen=True)
class Device:
    """Where this rank computes. `index` is the accelerator's number on this host (0 on the CPU)."""

    kind: str  # "cpu" | "cuda"
    index: int = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.index) if self.kind == "cuda" else torch.device("cpu")

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.index) if self.kind == "cuda" else _cpu_name()

    def synchronize(self) -> None:
        """Wait until all work given to the device is done.

        Blocks: host
        """
        if self.kind == "cuda":
            torch.cuda.synchronize(self.index)

    def memory_bytes(self) -> int:
        """Bytes held now: allocated by torch on the accelerator, resident set of the process on the CPU."""
        if self.kind == "cuda":
            return torch.cuda.memory_allocated(self.index)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def peak_bytes(self) -> int:
        """Return the most bytes held since the last `reset_peak` (see `memory_bytes`)."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.index)
        return _status_bytes("VmHWM")

    def reset_peak(self) -> None:
        """Start a new window for `peak_bytes`."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self.index)
        elif os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")

    def total_bytes(self) -> int:
        """Return the memory of the device (of the host, or of this container, on the CPU)."""
        if self.kind == "cuda":
            return torch.cuda.get_device_properties(self.index).total_memory
        return host_bytes()

    def peak_flops(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s within reach in this format: a table for GPUs, measured once on the CPU (0: unknown)."""
        if self.kind == "cpu":
            return measured_flops(dtype)
        name = self.name.upper()
        found = next(
            (peaks for key, peaks in PEAK_FLOPS.items() if re.search(rf"\b{key}", name.replace("-", " "))), None
        )
        if found is None:
            return 0.0
        return found[0] if dtype in (torch.bfloat16, torch.float16) else found[1]

    def empty_pinned(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return host memory for copies to and from the device: page-locked with an accelerator, ordinary without."""
        return torch.empty(numel, dtype=dtype, pin_memory=self.kind == "cuda")

    def register(self, memory: torch.Tensor) -> str:
        """Page-lock host memory at its exact size, for fast copies; return why the driver refuses, or nothing.

        Invariant: `memory` is contiguous and is unregistered before it is freed
        """
        if self.kind == "cpu" or memory.numel() == 0:
            return ""
        torch.cuda.init()
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self.index):
            code = runtime.cudaHostRegister(memory.data_ptr(), memory.numel() * memory.element_size(), 0)
            if int(code) == 0:
                return ""
            # The driver would report this once more, to whoever launches the next kernel.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.torch_device)
        return f"{runtime.cudaGetErrorString(code)} (CUDA error {int(code)})"

    def unregister(self, memory: torch.Tensor) -> None:
        """Undo `register`.

        Raises: OffloadError if the driver does not know this memory
        """
        if self.kind == "cpu" or memory.numel() == 0:
            return
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self.index):
            code = runtime.cudaHostUnregister(memory.data_ptr())
        if int(code) != 0:
            raise OffloadError(
                f"{memory.numel()} elements of page-locked memory cannot be unlocked: "
                f"{runtime.cudaGetErrorString(code)}. Only what `register` has locked can be"
            )

    def mark(self) -> Any:
        """Return a mark behind all work given to this thread's stream so far, to be passed to `copy`; None on the CPU,
        where work is done when it returns."""
        if self.kind == "cpu":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.index))
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any = None) -> None:
        """Copy once the device has reached the mark `after`, beside the compute stream; each direction has a stream.

        Both must be there before `after`: memory that the device still used for something else when it was obtained
        may only be written once that is done.

        Blocks: the calling thread, without the interpreter's lock, until the copy is there
        """
        if target.device.type == source.device.type == "cpu":
            if after is not None:
                after.synchronize()
            target.copy_(source)
            return
        with torch.cuda.device(self.index):
            stream = _copy_stream(self.index, f"{source.device.type} to {target.device.type}")
            with torch.cuda.stream(stream):
                if after is not None:
                    stream.wait_event(after)
                target.copy_(source, non_blocking=True)
                finished = torch.cuda.Event(blocking=True)  # blocking: without a core that spins
                finished.record(stream)
            finished.synchronize()

    def use(self) -> None:
        """Make this the calling thread's current device."""
        if self.kind == "cuda":
            torch.cuda.set_device(self.index)


def pick_device(wish: str, local_rank: int = 0) -> Device:
    """Choose the device of this rank: `auto` takes an accelerator where there is one.

    Raises: ConfigError when CUDA is asked for and this rank has none.
    """
    if wish not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"train.device = {wish!r}: must be one of auto, cpu, cuda")
    num_cuda = num_accelerators() if wish != "cpu" else 0
    if wish == "cpu" or (wish == "auto" and num_cuda == 0):
        return Device("cpu")
    if local_rank >= num_cuda:
        raise ConfigError(
            f"train.device = '{wish}': local rank {local_rank} needs CUDA device {local_rank}, this host has "
            f"{num_cuda}. Start at most {num_cuda} workers per host, or use train.device=cpu"
        )
    device = Device("cuda", local_rank)
    device.use()
    return device


def num_accelerators() -> int:
    """Return how many CUDA devices this process may use."""
    return torch.cuda.device_count()


@lru_cache(maxsize=64)
def _copy_stream(index: int, direction: str) -> Any:
    """Return the stream of one direction of copies; the direction only tells streams apart."""
    return torch.cuda.Stream(index)


def available_host_bytes() -> int:
    """Return how much more memory this host can give without swapping; the control group's limit is not looked at."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return host_bytes()


def host_bytes() -> int:
    """Return the memory this process may use: the host's, or less when a control group limits it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, memory_limit() or total)


@lru_cache(maxsize=4)
def measured_flops(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Measure matrix multiplication on this CPU once, with the threads this process has now.

    Units: FLOP/s
    """
    first = torch.ones(64, 64, dtype=dtype)
    torch.mm(first, first)  # loads the kernels, which can take longer than all that follows
    best, end = 0.0, time.perf_counter() + seconds
    # From small to large, because a format without a fast kernel on this CPU is hundreds of times slower (bf16, fp16).
    for n in (64, 128, 256, 512, 512, 768, 768, 768, 1024, 1024):
        a = torch.ones(n, n, dtype=dtype)
        torch.mm(a, a)  # some kernels are made for a shape when it is first seen
        start = time.perf_counter()
        torch.mm(a, a)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
        if time.perf_counter() > end:
            break
    return best


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "CPU"
