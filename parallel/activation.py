"""What happens to a block's activations between its forward and its backward."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ActivationConfig:
    """Keep activations, or keep block inputs only and recompute in backward."""

    policy: str = field(
        default="keep", metadata={"help": "keep activations or recompute each block", "choices": ("keep", "recompute")}
    )
    every: int = field(
        default=1, metadata={"help": "with recompute: only every n-th block is recomputed", "unit": "blocks", "ge": 1}
    )

    def recomputes(self, part: str) -> bool:
        """Return whether the part of that name is recomputed: some blocks, nothing else."""
        block = part.removeprefix("blocks.")
        return self.policy == "recompute" and block != part and int(block) % self.every == 0
