"""What offloading costs, in closed form: the models of the published systems, as far as they can be written in a line.

They serve to understand a plan and to check the simulator, which is what decides. Every quantity is per rank.
Must not know: plans, units, lanes. Sources: ZeRO-Infinity (arXiv:2104.07857, section 4), Fuyou (arXiv:2403.06504),
Deep Optimizer States (arXiv:2410.21316), Superpipeline (arXiv:2410.08791).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from windlass.offload.rates import Rates

STATE_BYTES = 12  # of one element: master weight and two moments in fp32
UPDATE_DRAM_BYTES = 28  # read and written for one element by AdamW: four fp32 read, three written
STREAMED_DRAM_BYTES = 24  # the same for an element whose state passes through host memory to the device and back
DAY_S = 86400.0


# -- ZeRO-Infinity -----------------------------------------------------------------------------------------------------


def transformer_params(layers: int, hidden: int) -> int:
    """Return the parameters of the blocks of a transformer, biases and norms left out."""
    return 12 * layers * hidden * hidden


def model_state_bytes(layers: int, hidden: int) -> int:
    """Return the bytes of parameters, gradients and optimizer state as ZeRO-Infinity counts them, 20 per parameter."""
    return 20 * transformer_params(layers, hidden)


def checkpoint_bytes(batch: int, seq_len: int, hidden: int, layers: int, every: int = 1) -> int:
    """Return the bytes of 16-bit activations between blocks, kept every so many of them."""
    return 2 * batch * seq_len * hidden * layers // every


def activation_working_bytes(batch: int, seq_len: int, hidden: int, heads: int, every: int = 1) -> int:
    """Return the bytes of the activations inside the blocks between two kept ones."""
    return batch * seq_len * every * (16 * hidden + 2 * heads * seq_len)


def state_working_bytes(hidden: int) -> int:
    """Return the bytes of the largest operator's parameters and gradient, hidden to four times that."""
    return 4 * hidden * 4 * hidden


def intensity(state: str, *, tokens: int = 0, hidden: int = 0, every: int = 1) -> float:
    """Return FLOPs of a step per byte of `state` moved: "parameters" (with gradients), "optimizer" or "activations".

    Parameters are loaded in forward, recomputation and backward and gradients stored once; optimizer state is read and
    written.
    """
    match state:
        case "parameters":
            return float(tokens)
        case "optimizer":
            return tokens / 4
    return 24.0 * hidden * every


def efficiency(flops_per_byte: float, bytes_per_s: float, flops_per_s: float) -> float:
    """Return the share of peak that is left when moving does not overlap with computing."""
    return flops_per_byte * bytes_per_s / (flops_per_byte * bytes_per_s + flops_per_s)


def required_bandwidth(target: float, flops_per_byte: float, flops_per_s: float) -> float:
    """Return the bytes/s for an efficiency between 0 and 1."""
    return target / (1 - target) * flops_per_s / flops_per_byte


# -- Fuyou: which activations to swap ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swappable:
    """Activations that may be carried to the host instead of being recomputed. Units: bytes, FLOPs to recompute."""

    num_bytes: float
    flops: float


@dataclass(frozen=True)
class SwapModel:
    """Iteration time as a function of the activation bytes carried to the host, all state resting on drives.

    Drives are half-duplex: the times of reading and writing add. `inter_bytes` between blocks are always carried.
    Units:  parameters; FLOPs of one forward; FLOP/s; bytes/s; updates/s; bytes
    """

    params: float
    forward_flops: float
    flops_per_s: float
    link: float
    file_read: float
    file_write: float
    host_free: float
    inter_bytes: float
    tensors: tuple[Swappable, ...]
    cpu_update: float = math.inf

    def forward_s(self, swapped: float) -> float:
        """Return the seconds of forward."""
        p16 = 2 * self.params
        spilled = max(0.0, swapped - self.host_free)
        file_s = p16 / self.file_read + spilled / self.file_write
        return max(self.forward_flops / self.flops_per_s, swapped / self.link, p16 / self.link, file_s)

    def backward_s(self, swapped: float, recomputed: float) -> float:
        """Return the seconds of backward, with the update inside, when so many FLOPs are recomputed."""
        p16, state = 2 * self.params, STATE_BYTES * self.params
        spilled = max(0.0, swapped - self.host_free)
        return max(
            (2 * self.forward_flops + recomputed) / self.flops_per_s,
            p16 / self.link,
            (p16 + swapped) / self.link,
            (p16 + state + spilled) / self.file_read + (state + p16) / self.file_write,
            self.params / self.cpu_update,
        )

    def iterations(self) -> Iterator[tuple[float, float]]:
        """Yield (bytes swapped, seconds of an iteration), tensors that save most FLOPs per byte first."""
        swapped, recomputed = self.inter_bytes, self.forward_flops
        yield swapped, self.forward_s(swapped) + self.backward_s(swapped, recomputed)
        for tensor in sorted(self.tensors, key=lambda t: -t.flops / t.num_bytes):
            swapped, recomputed = swapped + tensor.num_bytes, recomputed - tensor.flops
            yield swapped, self.forward_s(swapped) + self.backward_s(swapped, max(recomputed, 0.0))

    def best(self) -> tuple[float, float]:
        """Walk until the time rises: it is convex. Return (bytes swapped, seconds)."""
        points = self.iterations()
        best = next(points)
        for point in points:
            if point[1] > best[1]:
                break
            best = point
        return best


def gpt_tensors(tokens: int, hidden: int, layers: int) -> tuple[Swappable, ...]:
    """Return what a GPT block may carry out, 16-bit: outputs of its four products, then what is next to free."""
    one = 2.0 * tokens * hidden
    flops = tokens * hidden
    # (times tokens x hidden, FLOPs per element): down projection, attention output, QKV, up projection; the rest.
    rows = ((1, 8 * hidden), (1, 2 * hidden), (3, 2 * hidden), (4, 2 * hidden), (7, 0))
    return tuple(Swappable(n * one, n * flops * each) for n, each in rows for _ in range(layers))


def break_even_tokens(
    flops_per_s: float, bytes_per_s: float, bytes_per_param: float, *, recompute: bool = True
) -> float:
    """Return the tokens of a step from which compute hides the moves of so many bytes per parameter, for any model."""
    return bytes_per_param * flops_per_s / ((8 if recompute else 6) * bytes_per_s)


# -- Deep Optimizer States: which share to update on the device --------------------------------------------------------


def update_s_per_param(share: float, rates: Rates) -> float:
    """Return the seconds per parameter of an update of host state of which the device makes a share.

    Both directions of the link and the CPU work at once. Bounded by host memory, too, where its rate is known.
    """
    fp32 = rates.alone("h2d") / 4
    cpu = (1 - share) * rates.cpu_s_per_element
    down = 3 * share / fp32 + (1 - share) / (2 * fp32)
    up = 3 * share / fp32
    dram = ((1 - share) * UPDATE_DRAM_BYTES + share * STREAMED_DRAM_BYTES) / (rates.host_memory or math.inf)
    return max(cpu, down, up, share / (rates.device_update or math.inf), dram)


def best_device_share(rates: Rates, most: float = 1.0) -> float:
    """Return the share of updates to make on the device: where the CPU and the way to the device take equally long."""
    fp32 = rates.alone("h2d") / 4
    if math.isinf(fp32):
        return most if rates.cpu_s_per_element else 0.0
    cpu, back = rates.cpu_s_per_element, 1 / (2 * fp32)
    share = (cpu - back) / (cpu + 3 / fp32 - back) if cpu > back else 0.0
    if rates.device_update and rates.device_update < fp32 / 3:
        share = min(share, cpu / (cpu + 1 / rates.device_update))
    return min(max(share, 0.0), most)


def device_stride(rates: Rates) -> int:
    """Return the stride of the paper: every so many-th sub-group is updated on the device."""
    fp32 = rates.alone("h2d") / 4
    device = 3 / fp32 + (1 / rates.device_update if rates.device_update else 0.0)
    return 1 + math.ceil(device / (rates.cpu_s_per_element + 1 / (2 * fp32)) - 1e-9)


# -- Superpipeline: a sliding window -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A sliding window: `kept` parts on the device, `moved` of them exchanged at once; `stalls`: loading is slower."""

    kept: int
    moved: int
    stalls: bool


def sliding_window(
    part_s: Sequence[float], part_bytes: float, link: float, device_bytes: float, latency_s: float = 0.0
) -> Window:
    """Return the largest window that fits, and the smallest exchange that hides the latency of a copy.

    No stall if a part takes at least as long as loading one, and two exchanges fit into the window.
    """
    kept = max(2, min(len(part_s), int(device_bytes // part_bytes)))
    mean, load = sum(part_s) / len(part_s), part_bytes / link
    moved = 1
    while 2 * (moved + 1) <= kept and moved * mean < moved * load + latency_s:
        moved += 1
    return Window(kept, moved, moved * mean < moved * load + latency_s)


# -- floors and wear ---------------------------------------------------------------------------------------------------


def cpu_update_floor_s(params: float, host_memory: float) -> float:
    """Return the least seconds for AdamW in host memory: what passes through DRAM."""
    return params * UPDATE_DRAM_BYTES / host_memory


def device_update_floor_s(params: float, rates: Rates) -> float:
    """Return the least seconds for the device to update state that rests in host memory: both ways at once."""
    return params * STATE_BYTES / min(rates.together("h2d"), rates.together("d2h"))


@dataclass(frozen=True)
class Wear:
    """What a run costs the drives. Units: bytes written per step; steps and days until they reach what is rated."""

    bytes_per_step: int
    steps: float
    days: float


def wear(bytes_per_step: int, step_s: float, endurance_bytes: float) -> Wear | None:
    """Return how long drives last at this rate; None where their endurance is not known or nothing is written."""
    if not endurance_bytes or not bytes_per_step:
        return None
    steps = endurance_bytes / bytes_per_step
    return Wear(bytes_per_step, steps, steps * step_s / DAY_S)
