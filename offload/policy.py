"""What a user can say about offloading: one policy by name, budgets, and overrides of single choices.

A published system is a row of `POLICIES`: where each class of state rests, where and when it is updated. Must not know:
units, ranks, how bytes move.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

TIER_CHOICES = ("auto", "device", "host", "nvme")


@dataclass(frozen=True)
class Policy:
    """One published system as data.

    `param`, `grad`, `optimizer`: the tier at rest (optimizer: master weights and moments). `when`: whether updates
    begin as gradients arrive (backward) or when all have (after). `device_share`: share of the updates made on the
    device; negative: planned from measured rates. `order`: of the updates after backward.
    """

    param: str
    grad: str
    optimizer: str
    when: str = "after"
    clip: str = "two_pass"
    device_share: float = 0.0
    order: str = "arrival"
    cache: int = 0  # records of state kept in host memory from one step to the next, where they rest on NVMe
    window: int = 0  # parts whose parameters stay on the device around the turn from forward to backward (0: default)
    source: str = ""


POLICIES: dict[str, Policy] = {
    "none": Policy("device", "device", "device", device_share=1.0, source="states stay on the device"),
    "zero-offload": Policy("device", "host", "host", source="Ren et al. 2021, arXiv:2101.06840"),
    "deep-optimizer-states": Policy("device", "device", "host", device_share=-1.0, source="arXiv:2410.21316"),
    "zero-infinity": Policy("nvme", "host", "nvme", source="Rajbhandari et al. 2021, arXiv:2104.07857"),
    "fuyou": Policy("nvme", "host", "nvme", when="backward", clip="speculate", source="arXiv:2403.06504"),
    "superpipeline": Policy("host", "host", "host", window=4, source="arXiv:2410.08791"),
    "mlp-offload": Policy("device", "host", "nvme", order="alternate", cache=-1, source="MLP-Offload, SC'25"),
}
NAMES = ("none", "auto", *(name for name in POLICIES if name != "none"))


@dataclass(frozen=True)
class OffloadConfig:
    """Where training state rests between uses and what that may cost."""

    policy: str = field(
        default="none", metadata={"help": "which scheme places state and orders moves", "choices": NAMES}
    )
    param: str = field(
        default="auto", metadata={"help": "tier of parameters at rest (auto: the policy's)", "choices": TIER_CHOICES}
    )
    grad: str = field(
        default="auto",
        metadata={
            "help": "tier of reduced gradients until they are used (auto: the policy's)",
            "choices": TIER_CHOICES,
        },
    )
    optimizer: str = field(
        default="auto",
        metadata={"help": "tier of master weights and moments at rest (auto: the policy's)", "choices": TIER_CHOICES},
    )
    update: str = field(
        default="auto",
        metadata={
            "help": "when updates begin: backward, as gradients arrive; after, when all have (auto: the policy's)",
            "choices": ("auto", "backward", "after"),
        },
    )
    clip: str = field(
        default="auto",
        metadata={
            "help": "how clipping and the skip of non-finite steps stay exact. two_pass: nothing is updated before the "
            "norm is known; speculate: updates go into shadow slots, then are committed or redone (auto: the policy's)",
            "choices": ("auto", "two_pass", "speculate"),
        },
    )
    device_share: float = field(
        default=-1.0,
        metadata={"help": "share of the updates made on the device, interleaved (negative: the policy's)", "le": 1},
    )
    stride: int = field(
        default=0, metadata={"help": "every n-th update on the device instead of device_share (0: off)", "ge": 0}
    )
    host_share: float = field(
        default=0.0,
        metadata={"help": "share of the records of an optimizer on nvme that rest in host memory", "ge": 0, "le": 1},
    )
    param_device_share: float = field(
        default=0.0,
        metadata={"help": "share of the units whose offloaded parameters stay on the device", "ge": 0, "le": 1},
    )
    order: str = field(
        default="auto",
        metadata={
            "help": "order of updates after backward. arrival: that of the gradients; alternate: every other step the "
            "other way round, so that what the cache holds is used first (auto: the policy's)",
            "choices": ("auto", "arrival", "alternate"),
        },
    )
    cache: int = field(
        default=-1,
        metadata={
            "help": "records of state on nvme that stay in host memory from step to step (negative: the policy's, "
            "which is what offload.host_bytes leaves free)",
            "unit": "records",
        },
    )
    table: list[dict[str, str]] = field(
        default_factory=list,
        metadata={
            "help": "the placement by hand: rows with `units` (a pattern such as blocks.*) and any of param, grad, "
            "optimizer, update_on (cpu or device); later rows win"
        },
    )
    lookahead: tuple[int, int, int] = field(
        default=(3, 2, 1),
        metadata={"help": "how many parts of the model ahead parameters leave nvme, leave the host, and are gathered"},
    )
    window: int = field(
        default=-1,
        metadata={
            "help": "parts whose fetched parameters stay on the device around the turn from forward to backward "
            "(0 or less: the policy's, which is 2 for most)",
            "unit": "parts",
        },
    )
    tile: int = field(
        default=0,
        metadata={
            "help": "linear maps of blocks with more elements than this are cut by rows into tiles, fetched one after "
            "another (0: off)",
            "unit": "elements",
            "ge": 0,
        },
    )
    chunk: int = field(
        default=4 << 20,
        metadata={
            "help": "most elements of one record of state: what is fetched, updated and put back as a whole",
            "unit": "elements",
            "ge": 1024,
        },
    )
    slabs: int = field(
        default=4, metadata={"help": "records in host memory on their way from and to nvme", "unit": "records", "ge": 1}
    )
    device_bytes: int = field(
        default=0, metadata={"help": "budget of one rank on its device (0: no limit)", "unit": "bytes", "ge": 0}
    )
    host_bytes: int = field(
        default=0, metadata={"help": "budget of one rank in host memory (0: no limit)", "unit": "bytes", "ge": 0}
    )
    nvme_bytes: int = field(
        default=0,
        metadata={"help": "budget of one rank on nvme (0: what the drives have free)", "unit": "bytes", "ge": 0},
    )
    engine: str = field(
        default="threads",
        metadata={
            "help": "file engine: threads (preadv and pwritev), deepspeed (its asynchronous handle), gds "
            "(GPUDirect: for device memory; records pass through host memory, where it is like threads)",
            "choices": ("threads", "deepspeed", "gds"),
        },
    )
    io_threads: int = field(
        default=2, metadata={"help": "file operations under way at once, per drive and direction", "ge": 1, "le": 64}
    )
    checksums: bool = field(default=False, metadata={"help": "hash every record when written, compare when read"})
    adam: str = field(
        default="auto",
        metadata={
            "help": "AdamW on the CPU: torch's fused kernel or DeepSpeedCPUAdam (auto: what cluster.cpu_adam says)",
            "choices": ("auto", "torch", "deepspeed"),
        },
    )
    throttle: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "slow a lane down to this rate, to try out another machine: {h2d: 4e8, file read: 2e8}",
            "unit": "bytes/s",
        },
    )
    watchdog_s: float = field(
        default=300.0,
        metadata={"help": "longest wait for a transfer before the lanes are reported", "unit": "s", "gt": 0},
    )

    @property
    def active(self) -> bool:
        """Whether anything may rest elsewhere than on the device."""
        return (
            self.policy != "none"
            or bool(self.table)
            or any(tier not in ("auto", "device") for tier in (self.param, self.grad, self.optimizer))
        )

    def resolved(self) -> Policy:
        """Return the policy with the overrides of this configuration.

        Invariant: `auto` has been replaced by a policy of the planner's before
        """
        policy = POLICIES[self.policy]
        given: dict[str, Any] = {
            "param": self.param,
            "grad": self.grad,
            "optimizer": self.optimizer,
            "when": self.update,
            "clip": self.clip,
            "order": self.order,
        }
        changes = {name: value for name, value in given.items() if value != "auto"}
        changes |= {"device_share": self.device_share} if self.device_share >= 0 else {}
        changes |= {"cache": self.cache} if self.cache >= 0 else {}
        changes |= {"window": self.window} if self.window > 0 else {}
        return replace(policy, **changes)
