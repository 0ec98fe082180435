"""Number formats of the training state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class PrecisionConfig:
    """bf16 compute keeps fp32 master weights and moments; fp32 and fp64 compute on the master itself."""

    param: str = field(
        default="fp32",
        metadata={"help": "format of parameters and activations in compute", "choices": ("fp32", "bf16", "fp64")},
    )
    reduce: str = field(
        default="auto",
        metadata={
            "help": "format in which gradients are kept, accumulated and reduced (auto: fp32, or fp64 with param=fp64)",
            "choices": ("auto", "fp32", "bf16", "fp64"),
        },
    )

    @property
    def param_dtype(self) -> torch.dtype:
        return DTYPES[self.param]

    @property
    def reduce_dtype(self) -> torch.dtype:
        return self.master_dtype if self.reduce == "auto" else DTYPES[self.reduce]

    @property
    def master_dtype(self) -> torch.dtype:
        return torch.float64 if self.param == "fp64" else torch.float32
