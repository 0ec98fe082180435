"""From a ModelConfig to a model on the meta device, and from there to real parameters.

Must not know: Hugging Face names (model.hf does), who shards what.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from windlass.dist.errors import ConfigError, ModelError
from windlass.model.attention import AttentionScheme, LocalAttention
from windlass.model.config import ModelConfig, check_model
from windlass.model.decoder import Decoder
from windlass.model.loss import PLAIN, ChunkedCrossEntropy, Loss, LossConfig
from windlass.model.meta import weightless
from windlass.model.protocol import BlockModel

Fill = Callable[[str, int, int, torch.Tensor], None]  # (name, start, stop, out_1d): writes row-major [start, stop)


def build_model(
    config: ModelConfig, attention: AttentionScheme | None = None, loss: Loss | LossConfig = PLAIN
) -> BlockModel:
    """Build the model with its parameters on the meta device and its buffers, if any, real.

    `attention` replaces the local one of the decoder; `loss` configures the local loss, or replaces it.
    Raises:      ConfigError for a config that cannot work, ModelError for a folder or factory that cannot be used
    """
    check_model(config)
    if config.kind == "custom":
        if isinstance(loss, LossConfig):
            _check_own_loss(loss)
        return _build_custom(config)
    if isinstance(loss, LossConfig):
        loss = ChunkedCrossEntropy(config.loss_chunk_tokens, loss)
    if config.kind == "transformers":
        from windlass.model.adapter import HfAdapter

        return HfAdapter(config, loss)
    if config.hf_folder:
        from windlass.model.hf_config import resolve_model

        config = resolve_model(config)
    with weightless():
        return Decoder(config, attention or LocalAttention(), loss)


def named_parameters(model: BlockModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters under their checkpoint names, part after part, a tied one once."""
    seen: set[int] = set()
    parts = [("embed", model.embed), *((f"blocks.{i}", b) for i, b in enumerate(model.blocks)), ("head", model.head)]
    for prefix, part in parts:
        for name, parameter in part.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}", parameter


def logits_of(
    model: BlockModel, tokens_BT: torch.Tensor, positions_BT: torch.Tensor, documents_BT: torch.Tensor
) -> torch.Tensor:
    """Return logits_BTV of whole rows, part after part, in this process (comparisons, examples)."""
    dtype = next(parameter.dtype for _, parameter in named_parameters(model))
    context = model.context(positions_BT, documents_BT, dtype)
    h_BTD = model.embed(tokens_BT, context)
    for block in model.blocks:
        h_BTD = block(h_BTD, context)
    head: Any = model.head
    return head.logits(h_BTD)


def materialise(model: BlockModel, fill: Fill, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Replace every meta parameter by a real one written by `fill`; tied parameters stay one object.

    Invariant:   `requires_grad` is kept; `fill` is called once per parameter with its whole range
    """
    real: dict[int, nn.Parameter] = {}
    for name, parameter in named_parameters(model):
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        fill(name, 0, values.numel(), values.view(-1))
        real[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for part in (model.embed, *model.blocks, model.head):
        for module in part.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in real:
                    module._parameters[key] = real[id(parameter)]


def _check_own_loss(loss: LossConfig) -> None:
    changed = [f.name for f in fields(loss) if getattr(loss, f.name) != f.default]
    if changed:
        raise ConfigError(
            f"loss.{changed[0]} = {getattr(loss, changed[0])} has no effect: a model of kind 'custom' brings its own "
            "loss. Remove the key, and compute it in the model's head."
        )


def _build_custom(config: ModelConfig) -> BlockModel:
    factory = _load_factory(config.factory or "")
    with weightless():
        model = factory(config)
    if not isinstance(model, BlockModel):
        lacking = [name for name in ("embed", "blocks", "head", "context", "init") if not hasattr(model, name)]
        raise ModelError(
            f"model.factory = '{config.factory}' returned {type(model).__name__} without {', '.join(lacking)}: "
            "see docs/your-own-model.md for the three parts and two methods a model has."
        )
    for name, parameter in named_parameters(model):
        if not parameter.is_meta:
            raise ModelError(
                f"model.factory = '{config.factory}': parameter {name} is on {parameter.device}, not on 'meta'. "
                "Remove the explicit device: the factory is called under torch.device('meta'), weights come later."
            )
    for part in (model.embed, model.blocks, model.head):
        for name, buffer in part.named_buffers():
            if buffer.is_meta:
                raise ModelError(
                    f"model.factory = '{config.factory}': buffer {name} has no values. Create it with device='cpu', "
                    "or compute it in context()."
                )
    return model


def _load_factory(path: str) -> Callable[[ModelConfig], object]:
    module_name, _, function_name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.factory = '{path}' cannot be loaded ({error}): it is 'package.module:function', "
            "importable from the folder you start in."
        ) from error
