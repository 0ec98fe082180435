"""The plain single-process training loop that every distributed result is held against, and a small model for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from windlass.data.batch import IGNORE, Batch
from windlass.model.meta import weightless
from windlass.model.protocol import Init
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.units import model_parts

VOCAB, WIDTH, ROWS, TOKENS = 53, 24, 2, 12


class Embed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)

    def forward(self, tokens_BT: torch.Tensor, context: Any) -> torch.Tensor:
        return self.tokens(tokens_BT)


class Mixer(nn.Module):
    """An odd block: uneven sizes, a scalar, an unused and (optionally) a frozen parameter."""

    def __init__(self, frozen: bool, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 37)
        self.down = nn.Linear(37, width, bias=False)
        self.gain = nn.Parameter(torch.empty(()))
        self.unused = nn.Parameter(torch.empty(5))
        if frozen:
            self.up.weight.requires_grad_(False)

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        mixed = context @ self.norm(h)
        return h + (1 + self.gain) * self.down(torch.tanh(self.up(mixed)))


class Head(nn.Module):
    def __init__(self, tied: nn.Parameter | None, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, VOCAB, bias=False)
        if tied is not None:
            self.out.weight = tied

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(h))

    def forward(self, h: torch.Tensor, labels_BT: torch.Tensor, weights_BT: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.logits(h)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        how = "sum" if weights_BT is None else "none"
        loss = F.cross_entropy(wide.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction=how)
        return loss if weights_BT is None else (loss * weights_BT.flatten()).sum()


class OddModel:
    """Satisfies BlockModel: causal averaging instead of attention, so that it is small and quick."""

    def __init__(
        self,
        num_blocks: int = 3,
        tied: bool = False,
        frozen: bool = False,
        frozen_embed: bool = False,
        width: int = WIDTH,
        block: Callable[[bool, int], nn.Module] = Mixer,
    ):
        with weightless():  # plain torch.device("meta") imports half of torch to draw values that nobody sees
            self.embed = Embed(width)
            self.blocks = nn.ModuleList(block(frozen and i == 1, width) for i in range(num_blocks))
            self.head = Head(self.embed.tokens.weight if tied else None, width)
        if frozen_embed:
            self.embed.requires_grad_(False)

    def context(self, positions_BT: torch.Tensor, documents_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        same = documents_BT[:, :, None] == documents_BT[:, None, :]
        causal = torch.ones_like(same[0], dtype=torch.bool).tril()
        weights = (same & causal).to(dtype)
        return weights / weights.sum(-1, keepdim=True)

    def init(self, name: str) -> Init:
        return Init("normal", 0.2)


def fill(name: str, start: int, stop: int, out: torch.Tensor) -> None:
    """Values that depend on the parameter's name and element index only."""
    salt = sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 977
    index = torch.arange(start, stop, dtype=torch.float64)
    out.copy_((torch.sin(index * 12.9898 + salt) * 0.25).to(torch.float32))


def make_batch(sample: int, rows: int = ROWS) -> Batch:
    """A micro-batch that is a function of its number: two documents per row, ragged labels."""
    generator = torch.Generator().manual_seed(1000 + sample)
    tokens = torch.randint(0, VOCAB, (rows, TOKENS), generator=generator)
    cut = 3 + sample % 5
    documents = (torch.arange(TOKENS) >= cut).long().expand(rows, TOKENS).contiguous()
    positions = torch.where(documents == 0, torch.arange(TOKENS), torch.arange(TOKENS) - cut).contiguous()
    labels = torch.roll(tokens, -1, dims=1)
    labels[:, cut - 1] = IGNORE
    labels[:, -1] = IGNORE
    return Batch(tokens, positions, documents, labels, torch.arange(sample * rows, (sample + 1) * rows))


def realise(model: Any, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Give a meta model real values; return its parameters by checkpoint name, tied ones once."""
    real: dict[int, nn.Parameter] = {}
    named: dict[str, nn.Parameter] = {}
    for part, module in model_parts(model):
        for prefix, child in module.named_modules():
            for name, old in list(child._parameters.items()):
                if old is None:
                    continue
                if id(old) not in real:
                    full = f"{part}.{prefix}.{name}" if prefix else f"{part}.{name}"
                    value = torch.empty(old.numel(), dtype=dtype)
                    fill(full, 0, old.numel(), value)
                    real[id(old)] = nn.Parameter(value.view(old.shape), requires_grad=old.requires_grad)
                    named[full] = real[id(old)]
                child._parameters[name] = real[id(old)]
    return named


def loss_sum(model: Any, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    context = model.context(batch.positions_BT, batch.documents_BT, dtype)
    h = model.embed(batch.tokens_BT, context)
    for block in model.blocks:
        h = block(h, context)
    weights = () if batch.weights_BT is None else (batch.weights_BT,)
    out: torch.Tensor = model.head(h, batch.labels_BT, *weights)
    return out


@dataclass
class Trained:
    losses: list[float]
    norms: list[float]
    parameters: dict[str, torch.Tensor]


def train_plain(
    model: Any, steps: list[list[Batch]], config: OptimizerConfig, dtype: torch.dtype, lr: float = 1e-2
) -> Trained:
    """Train with nothing but torch: all micro-batches of all ranks, one after another, in one process."""
    named = realise(model, dtype)
    trainable = [p for p in named.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
    losses, norms = [], []
    for batches in steps:
        tokens = sum(b.num_valid for b in batches)
        optimizer.zero_grad()
        for p in trainable:
            p.grad = torch.zeros_like(p)  # a parameter that gets no gradient decays all the same
        total = 0.0
        for batch in batches:
            loss = loss_sum(model, batch, dtype)
            (loss / tokens).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.clip_norm or float("inf"))
        optimizer.step()
        losses.append(total / tokens)
        norms.append(norm.item())
    return Trained(losses, norms, {name: p.detach().clone() for name, p in named.items()})
