"""What both sides of a benchmark train: one decoder, its starting weights, its batches, its optimizer settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from windlass.data.batch import Batch
from windlass.launch.config import CONFIGS, load_dataclass
from windlass.launch.start import initial_values
from windlass.model.build import build_model, materialise
from windlass.model.config import ModelConfig
from windlass.model.loss import PLAIN, Loss, LossConfig
from windlass.model.protocol import BlockModel

Fill = Callable[[str, int, int, torch.Tensor], None]


def model_config(name: str) -> ModelConfig:
    """Return a model preset by name, or a YAML file of model keys."""
    path = Path(name) if name.endswith(".yaml") else CONFIGS / "model" / f"{name}.yaml"
    config = load_dataclass(path, "model")
    assert isinstance(config, ModelConfig)
    return config


def plain_loss(
    h_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor, weights_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the summed cross entropy as any PyTorch user writes it."""
    assert weights_BT is None, "the workload weights no tokens"
    logits = F.linear(h_BTD, weight_VD).flatten(0, 1).float()
    return F.cross_entropy(logits, labels_BT.flatten(), reduction="sum")


class Workload:
    """One rank's view of the training job that every side runs."""

    lr, betas, eps, decay = 3e-4, (0.9, 0.95), 1e-8, 0.1

    def __init__(
        self,
        *,
        model: str,
        bf16: bool,
        micro_batch: int,
        seq_len: int,
        clip: float,
        seed: int,
        rank: int,
        world_size: int,
        device: str = "cpu",
    ) -> None:
        self.config = model_config(model)
        self.bf16, self.micro_batch, self.seq_len, self.clip, self.seed = bf16, micro_batch, seq_len, clip, seed
        self.rank, self.world_size, self.device = rank, world_size, device
        self.num_parameters = 0

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options that describe the job."""
        parser.add_argument("--model", default="gpt-50m", help="model preset, or YAML file of model keys")
        parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
        parser.add_argument("--micro-batch", type=int, default=2, help="sequences per rank and step (%(default)s)")
        parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence (%(default)s)")
        parser.add_argument("--clip", type=float, default=1.0, help="global gradient norm limit, 0: off (%(default)s)")
        parser.add_argument("--seed", type=int, default=0)

    @classmethod
    def from_arguments(cls, given: argparse.Namespace, rank: int, world_size: int) -> Workload:
        """Build the job of one rank from parsed options."""
        return cls(
            model=given.model,
            bf16=given.dtype == "bf16",
            micro_batch=given.micro_batch,
            seq_len=given.seq_len,
            clip=given.clip,
            seed=given.seed,
            rank=rank,
            world_size=world_size,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Format of activations."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def empty_model(self, loss: Loss | LossConfig = PLAIN) -> tuple[BlockModel, Fill]:
        """Return the model on the meta device and what fills it (Windlass's way)."""
        model = build_model(self.config, loss=loss)
        self.num_parameters = sum(p.numel() for p in {id(p): p for p in _parameters(model)}.values())
        return model, initial_values(model, self.seed)

    def model(self, *, autocast: bool) -> BlockModel:
        """Return the whole model with real fp32 weights.

        Under autocast the loss is torch's own, because autocast does not reach into the one of the decoder, an
        autograd function, whose matrix products would then run in fp32.
        """
        model, fill = self.empty_model(plain_loss if autocast else PLAIN)
        materialise(model, fill, torch.float32, self.device)
        return model

    def batch(self, step: int, number: int | None = None) -> Batch:
        """Return a micro-batch of a step, this rank's by default. Two steps take turns, so that the loss must fall."""
        which = self.rank if number is None else number
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + (step % 2) * 1009 + which)
        shape = (self.micro_batch, self.seq_len + 1)
        tokens = torch.randint(self.config.vocab_size, shape, generator=generator)
        positions = torch.arange(self.seq_len).expand(self.micro_batch, -1).contiguous()
        return Batch(
            tokens[:, :-1].contiguous(),
            positions,
            torch.zeros_like(positions),
            tokens[:, 1:].contiguous(),
            torch.arange(self.micro_batch),
        ).to(torch.device(self.device))


def _parameters(model: BlockModel) -> list[torch.nn.Parameter]:
    return [p for part in (model.embed, model.blocks, model.head) for p in part.parameters()]
