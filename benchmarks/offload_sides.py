"""One rank of one side of benchmarks/offload.py: training state that rests in host memory or on a drive.

All sides train what zero_sides.py trains, in the same way; the peers are set up as their documentation says for
offloading. On a machine without an accelerator host memory and device memory are one, so host offload costs copies and
wins nothing on any side; what is compared is what each system spends on it.

Not meant to be started by hand: see benchmarks/offload.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from offload_windlass import build_windlass
from workload import Workload
from zero_sides import Side, add_phases, build_alone, build_deepspeed, build_fsdp2, train

MIB = 1 << 20
# DeepSpeed keeps tensors smaller than a block in memory. With its defaults that is 1 MiB, in the tuned setting 8 MiB.
TUNED = {"block_size": 8 * MIB, "queue_depth": 32, "intra_op_parallelism": 2}
SMALL_BLOCKS = TUNED | {"block_size": MIB}
NUM_SUB_GROUPS = 8  # with the default of 1e9 elements the state of a small model is one, and nothing can be overlapped


@dataclass(frozen=True)
class TheirOffload:
    """Where DeepSpeed's stage 3 keeps optimizer state and parameters. `aio` empty: all defaults, nothing pipelined."""

    optimizer: str
    param: str = "none"
    aio: dict[str, int] | None = None

    def zero(self, workload: Workload, folder: Path) -> dict[str, Any]:
        """Return the section zero_optimization, as its documentation has it."""
        zero: dict[str, Any] = {"stage": 3, "offload_optimizer": self._place(self.optimizer, folder)}
        if self.param != "none":
            zero["offload_param"] = self._place(self.param, folder)
        if self.aio is None:
            return zero
        model, _ = workload.empty_model()
        sizes = [p.numel() for part in (model.embed, model.blocks, model.head) for p in part.parameters()]
        # A sub-group of less than a block would stay in memory as well.
        zero["sub_group_size"] = max(sum(sizes) // workload.world_size // NUM_SUB_GROUPS, self.aio["block_size"] // 2)
        # Master weights, moments and gradient of the sub-groups that are read, updated and written.
        zero["offload_optimizer"] |= {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}
        if self.param == "nvme":
            buffer = -(-max(sizes) // workload.world_size // 4096) * 4096
            # With the default of max_in_cpu no parameter of a model of less than 1e9 leaves memory.
            zero["offload_param"] |= {"max_in_cpu": 0, "buffer_size": buffer, "buffer_count": 12}
            # With the defaults it keeps every fetched parameter and runs out of buffers in the first step.
            zero |= dict.fromkeys(("stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 0)
            zero["stage3_max_live_parameters"] = 1
        return zero

    def _place(self, device: str, folder: Path) -> dict[str, Any]:
        place: dict[str, Any] = {"device": device, "pin_memory": False}  # there is nothing to pin for
        return place | ({"nvme_path": str(folder)} if device == "nvme" else {})


DEEPSPEED = {
    "deepspeed-host-opt": TheirOffload("cpu"),
    "deepspeed-host": TheirOffload("cpu", "cpu"),
    "deepspeed-nvme-opt": TheirOffload("nvme", aio=TUNED),
    "deepspeed-nvme-opt-1m": TheirOffload("nvme", aio=SMALL_BLOCKS),
    "deepspeed-nvme-opt-defaults": TheirOffload("nvme"),
    "deepspeed-nvme": TheirOffload("nvme", "nvme", aio=TUNED),
    "deepspeed-nvme-1m": TheirOffload("nvme", "nvme", aio=SMALL_BLOCKS),
    "deepspeed-nvme-defaults": TheirOffload("nvme", "nvme"),
}
OTHERS: dict[str, Callable[[Workload], Side]] = {
    "alone": build_alone,
    "fsdp2-host": partial(build_fsdp2, reshard=True, offload=True),
}


def build_their_offload(workload: Workload, spec: TheirOffload, folder: Path, *, own_adam: bool) -> Side:
    return build_deepspeed(
        workload,
        zero=spec.zero(workload, folder),
        more={"aio": spec.aio} if spec.aio else {},
        own_adam=own_adam,
        # While the engine is built on CPUs, 0.19.8 takes swapped parameters for bf16 whatever they are.
        partition_first=spec.param == "nvme" and not workload.bf16,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where a drive is mounted")
    parser.add_argument("--offload", type=json.loads, default={}, help="Windlass: keys of the group offload, as JSON")
    parser.add_argument("--stage", type=int, default=3, help="Windlass: ZeRO stage (%(default)s)")
    parser.add_argument("--torch-adam", action="store_true", help="DeepSpeed: torch's fused AdamW, not its own")
    add_phases(parser)
    Workload.add_arguments(parser)
    given = parser.parse_args()

    def build(workload: Workload) -> Side:
        if given.side in OTHERS:
            return OTHERS[given.side](workload)
        if given.side in DEEPSPEED:
            return build_their_offload(workload, DEEPSPEED[given.side], given.folder, own_adam=not given.torch_adam)
        timed = (given.warmup, given.warmup + given.steps)
        return build_windlass(workload, given.offload, given.folder, stage=given.stage, timed=timed)

    train(build, given)


if __name__ == "__main__":
    main()
