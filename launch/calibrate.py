"""What the memories, links, drives and cores of this machine can do, measured: the facts offloading is planned from.

Every figure is the median of samples taken in rounds, one of each figure per round, so that a busy moment of the
machine touches one sample of all figures and not all of one. Files bypass the page cache and are written whole before
they are read, since a file system answers for extents that were never written without asking the drive. The transfers
are those of the runtime.
Must not know: jobs, plans, the command line.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from windlass.dist.device import Device, host_bytes
from windlass.launch.file_probe import FileProbe
from windlass.parallel.optim import OptimizerConfig, UpdateKernel

MIB = 1 << 20
ROUNDS = 5
BUSY_PERCENT = 25
BUFFER_BYTES = 256 * MIB  # at least; more where the cache is large
PIECE_BYTES = 32 * MIB  # of one copy
CHUNK = 4 << 20  # elements of one update, as offload.chunk

Step = Callable[[int], float]  # does one piece of work, the i-th; returns its size in the unit of the figure


@dataclass
class Figure:
    """One quantity: what runs at once to measure it, under which key of `cluster` it goes ("": none), its samples."""

    name: str
    unit: str
    steps: list[Step]
    key: str = ""
    how: str = ""
    finish: Callable[[], None] = lambda: None  # counted in: what makes the work complete
    samples: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.samples)

    def sample(self, seconds: float) -> float:
        """Run the steps side by side for about this long.

        Units: unit of the figure, all steps together
        """
        begin = time.perf_counter()
        sizes = _together([lambda step=step: _repeat(step, begin + seconds) for step in self.steps])  # type: ignore[misc]
        self.finish()
        return sum(sizes) / (time.perf_counter() - begin)


@dataclass(frozen=True)
class Calibration:
    """The figures in the order of a table, what they say as keys of `cluster`, and what a reader must know."""

    figures: list[Figure]
    cluster: dict[str, Any]
    notes: list[str]


def calibrate(
    device: Device,
    paths: Sequence[Path] = (),
    *,
    file_bytes: int = 512 * MIB,
    seconds: float = 25.0,
    deepspeed: bool = False,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> Calibration:
    """Measure. `seconds` is what all samples take together; files are written and checked before, each of `file_bytes`.

    Blocks:      host
    Raises:      OffloadError for a path that cannot hold the file; the files have no names and are gone afterwards
    """
    notes = []
    busy = psutil.cpu_percent(interval=0.3)
    if busy > BUSY_PERCENT:
        notes.append(
            f"Other programs kept the cores {busy:.0f} % busy when this began, so figures are lower than the machine "
            "allows. Measure again when they have ended."
        )
    with ExitStack() as stack:
        progress(0.0, "memory")
        figures = _memory_figures(device)
        probes = []
        for path in paths:
            progress(0.0, f"writing {path}")
            probes.append(stack.enter_context(FileProbe(path, file_bytes)))
            notes += probes[-1].notes
        figures += _file_figures(probes)
        progress(0.0, "loading DeepSpeed's kernel, or compiling it first" if deepspeed else "updates")
        figures += _core_figures(device, deepspeed)
        if len({path.stat().st_dev for path in paths}) < len(paths):
            notes.append("Some paths are on one file system: their figures are those of a drive that is shared.")
        _sample(figures, seconds, progress)
    if device.kind == "cpu":
        notes.append("No accelerator: 'device' is host memory too, and copies to and from it are between two buffers.")
    return Calibration(figures, _facts(device, figures, probes), notes)


def _sample(figures: list[Figure], seconds: float, progress: Callable[[float, str], None]) -> None:
    each = seconds / (len(figures) * (ROUNDS + 0.5))
    total = len(figures) * (ROUNDS + 1)
    for round_ in range(ROUNDS + 1):
        # Back and forth, so that what one leaves behind (heat, dirty pages) does not always meet the same next one.
        for number, figure in enumerate(figures if round_ % 2 else figures[::-1]):
            progress((round_ * len(figures) + number) / total, figure.name)
            rate = figure.sample(each / 2 if round_ == 0 else each)
            if round_:  # the first warms up
                figure.samples.append(rate)
    progress(1.0, "done")


def _repeat(step: Step, end: float) -> float:
    size, index = 0.0, 0
    while index == 0 or time.perf_counter() < end:
        size += step(index)
        index += 1
    return size


def _together(work: Sequence[Callable[[], float]]) -> list[float]:
    if len(work) == 1:
        return [work[0]()]
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one) for one in work]]


# -- memory and links --------------------------------------------------------------------------------------------------


def _working_bytes() -> int:
    """Return how much memory to go through in turn so that the cache of the CPU holds little of it when it comes again.

    Units: bytes, a multiple of a piece
    """
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = file.read_text().strip() if file.exists() else ""
    cache = int(text[:-1]) * {"K": 1 << 10, "M": MIB}[text[-1]] if text[:-1].isdigit() and text[-1] in "KM" else 0
    return -(-max(BUFFER_BYTES, min(4 * cache, host_bytes() // 16)) // (2 * PIECE_BYTES)) * 2 * PIECE_BYTES


def _pieces(tensor: torch.Tensor, low: float, high: float) -> list[torch.Tensor]:
    count = tensor.numel() // PIECE_BYTES
    return list(tensor.split(PIECE_BYTES)[int(low * count) : int(high * count)])


def _memory_figures(device: Device) -> list[Figure]:
    num_bytes = _working_bytes()
    host = device.empty_pinned(num_bytes, torch.uint8).fill_(1)
    there = torch.ones(num_bytes, dtype=torch.uint8, device=device.torch_device)
    device.synchronize()

    def copies(targets: list[torch.Tensor], sources: list[torch.Tensor], factor: int = 1) -> Step:
        def step(index: int) -> float:
            device.copy(targets[index % len(targets)], sources[index % len(sources)])
            return float(factor * PIECE_BYTES)

        return step

    # Copies in opposite directions, also those that run at once, touch halves of their own.
    h2d = copies(_pieces(there, 0, 0.5), _pieces(host, 0, 0.5))
    d2h = copies(_pieces(host, 0.5, 1), _pieces(there, 0.5, 1))
    how = "page-locked host memory" if device.kind == "cuda" else "between two buffers"
    within = copies(_pieces(host, 0, 0.5), _pieces(host, 0.5, 1), factor=2)
    threads = f"{torch.get_num_threads()} threads, read + write"
    return [
        Figure("host memory, copy", "bytes/s", [within], "host_memory_bytes_per_s", threads),
        Figure("host to device", "bytes/s", [h2d], "h2d_bytes_per_s", how),
        Figure("device to host", "bytes/s", [d2h], "d2h_bytes_per_s", how),
        Figure("both links at once, sum", "bytes/s", [h2d, d2h], "duplex_bytes_per_s", how),
    ]


# -- files -------------------------------------------------------------------------------------------------------------


def _file_figures(probes: Sequence[FileProbe]) -> list[Figure]:
    figures = []
    for probe in probes:
        alone = len(probes) == 1
        keys = ("nvme_read_bytes_per_s", "nvme_write_bytes_per_s", "nvme_mixed_bytes_per_s") if alone else ("", "", "")
        figures += _one_drive(str(probe.folder), [probe], keys, probe.how)
    if len(probes) > 1:
        keys = ("nvme_read_bytes_per_s", "nvme_write_bytes_per_s", "nvme_mixed_bytes_per_s")
        figures += _one_drive("all paths", probes, keys, f"{len(probes)} files at once")
    return figures


def _one_drive(name: str, probes: Sequence[FileProbe], keys: Sequence[str], how: str) -> list[Figure]:
    def sync() -> None:
        for probe in probes:
            probe.sync()

    reads: list[Step] = [probe.read for probe in probes]
    writes: list[Step] = [probe.write for probe in probes]
    return [
        Figure(f"{name}: read", "bytes/s", reads, keys[0], how),
        Figure(f"{name}: write", "bytes/s", writes, keys[1], how, sync),
        Figure(f"{name}: both, sum", "bytes/s", reads + writes, keys[2], how, sync),
    ]


# -- cores -------------------------------------------------------------------------------------------------------------


def _updates(kernel: UpdateKernel, device: Device) -> Step:
    count = max(_working_bytes() // (16 * CHUNK), 1)
    chunks = [[torch.full((CHUNK,), 0.5, device=device.torch_device) for _ in range(4)] for _ in range(count)]

    def step(index: int) -> float:
        weights, gradient, *state = chunks[index % count]
        kernel.update(weights, gradient, state, cut=CHUNK, steps=index + 1, lr=1e-4)
        device.synchronize()
        return float(CHUNK)

    return step


def _core_figures(device: Device, deepspeed: bool) -> list[Figure]:
    config, host = OptimizerConfig(), Device("cpu")
    threads = f"{torch.get_num_threads()} threads"
    unit = "parameters/s"
    torch_step = _updates(UpdateKernel(config), host)
    figures = [Figure("AdamW, CPU, torch", unit, [torch_step], "cpu_update_per_s", threads)]
    if deepspeed:
        step = _updates(UpdateKernel(config, "deepspeed"), host)
        figures.append(Figure("AdamW, CPU, DeepSpeed", unit, [step], "cpu_update_per_s", threads))
    if device.kind == "cuda":
        on_device = _updates(UpdateKernel(config), device)
        figures.append(Figure("AdamW, device", unit, [on_device], "device_update_per_s", "fp32 states"))
    count = max(_working_bytes() // (6 * CHUNK), 1)
    pairs = [(torch.ones(CHUNK), torch.ones(CHUNK, dtype=torch.bfloat16)) for _ in range(count)]

    def cast(index: int) -> float:
        wide, narrow = pairs[index % count]
        narrow.copy_(wide)
        return float(CHUNK)

    figures.append(Figure("fp32 to bf16, CPU", "elements/s", [cast], "cpu_cast_per_s", threads))
    return figures


# -- what it comes to --------------------------------------------------------------------------------------------------


def _facts(device: Device, figures: Sequence[Figure], probes: Sequence[FileProbe]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for figure in figures:
        if figure.key and figure.rate > facts.get(figure.key, 0.0):  # of two kernels the faster
            facts[figure.key] = _rounded(figure.rate)
            if figure.key == "cpu_update_per_s":
                facts["cpu_adam"] = "deepspeed" if "DeepSpeed" in figure.name else "torch"
    if device.kind == "cpu":
        facts["device_update_per_s"] = _rounded(next(f.rate for f in figures if f.key == "cpu_update_per_s"))
    if probes:
        facts["nvme_paths"] = [str(probe.folder.resolve()) for probe in probes]
        rates = {figure.name: figure.rate for figure in figures}
        # A step reads and writes about the same, so the time of a byte is that of both.
        through = [2 / (1 / rates[f"{p.folder}: read"] + 1 / rates[f"{p.folder}: write"]) for p in probes]
        facts["nvme_weights"] = [_rounded(value / sum(through)) for value in through] if len(probes) > 1 else []
    return facts


def _rounded(value: float, digits: int = 3) -> float:
    return round(value, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0.0
