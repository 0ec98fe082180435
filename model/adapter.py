"""Unmodified `transformers` causal language models as block models.

The library's own modules run; only its outer loop (embed, layers, final norm, head) is ours, with masks and rotary
tables computed once per micro-batch. Taken over: architectures whose outer loop is exactly that, listed in `KNOWN` and
each compared with the whole model in tests/parity. Must not know: our decoder, safetensors.
Differs:     every dropout probability is set to 0, because recomputed and resharded blocks must repeat themselves
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from windlass.dist.errors import ModelError
from windlass.model.attention import document_mask
from windlass.model.config import ModelConfig
from windlass.model.hf_config import FAMILIES, resolve_model
from windlass.model.loss import Loss
from windlass.model.meta import weightless
from windlass.model.protocol import Init

KNOWN = (*FAMILIES, "arcee", "olmo", "olmo2", "phi3", "seed_oss", "smollm3", "starcoder2")


@dataclass(frozen=True)
class HfContext:
    """What every layer needs besides its input."""

    positions_BT: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    masks: dict[int | None, torch.Tensor | None]  # by sliding window


class HfEmbed(nn.Module):
    """Token embedding, plus the learned positions of GPT-2."""

    def __init__(self, tokens: nn.Module, positions: nn.Module | None) -> None:
        super().__init__()
        self.tokens, self.positions = tokens, positions

    def forward(self, tokens_BT: torch.Tensor, context: HfContext) -> torch.Tensor:
        return self.place(self.tokens(tokens_BT), context)

    def place(self, e_BTD: torch.Tensor, context: HfContext) -> torch.Tensor:
        """Add the learned positions, if there are any, to rows of the token table."""
        return e_BTD if self.positions is None else e_BTD + self.positions(context.positions_BT)


class HfBlock(nn.Module):
    """One layer of the library."""

    def __init__(self, layer: nn.Module, window: int | None) -> None:
        super().__init__()
        self.layer, self.window = layer, window

    def forward(self, h_BTD: torch.Tensor, context: HfContext) -> torch.Tensor:
        arguments: dict[str, Any] = {"attention_mask": context.masks[self.window], "position_ids": context.positions_BT}
        if context.position_embeddings is not None:
            arguments["position_embeddings"] = context.position_embeddings
        return self.layer(h_BTD, **arguments)


class HfHead(nn.Module):
    """Final norm and projection of the library, our loss."""

    def __init__(self, norm: nn.Module, proj: nn.Linear, loss: Loss) -> None:
        super().__init__()
        self.norm, self.proj, self.loss = norm, proj, loss

    def forward(
        self, h_BTD: torch.Tensor, labels_BT: torch.Tensor, weights_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.loss(self.norm(h_BTD), self.proj.weight, labels_BT, weights_BT)

    def logits(self, h_BTD: torch.Tensor) -> torch.Tensor:
        return self.proj(self.norm(h_BTD))


class HfAdapter(nn.Module):
    """A model of `transformers`, built from `config.hf_folder` on the meta device; see `model.protocol.BlockModel`.

    `hf_names` maps our parameter names to the library's.
    Raises:      ModelError if the folder's architecture is not one of `KNOWN`
    """

    def __init__(self, config: ModelConfig, loss: Loss) -> None:
        super().__init__()
        self.config = resolve_model(config)
        whole = _build_whole(self.config)
        base, library = whole.base_model, whole.config
        self.library_config = library
        gpt2 = library.model_type == "gpt2"
        layers = base.h if gpt2 else base.layers
        windows = [_window(library, i) for i in range(len(layers))]
        self.rotary = None if gpt2 else base.rotary_emb
        self.embed: nn.Module = HfEmbed(base.wte, base.wpe) if gpt2 else HfEmbed(base.embed_tokens, None)
        self.blocks = nn.ModuleList(HfBlock(layer, w) for layer, w in zip(layers, windows, strict=True))
        self.head: nn.Module = HfHead(base.ln_f if gpt2 else base.norm, whole.lm_head, loss)
        self._windows = set(windows)
        library_names = {id(parameter): name for name, parameter in whole.named_parameters()}
        self.hf_names = {name: library_names[id(parameter)] for name, parameter in self.named_parameters()}

    def context(self, positions_BT: torch.Tensor, documents_BT: torch.Tensor, dtype: torch.dtype) -> HfContext:
        embeddings = None
        if self.rotary is not None:
            like = torch.empty(0, dtype=dtype, device=positions_BT.device)  # the library asks it for dtype and device
            embeddings = self.rotary(like, position_ids=positions_BT)
        return HfContext(positions_BT, embeddings, {w: document_mask(documents_BT, w, dtype) for w in self._windows})

    def init(self, name: str) -> Init:
        """Return the library's own start: normal weights, and GPT-2's narrower residual projections."""
        if name.endswith("bias"):
            return Init("zeros")
        if "norm" in name or ".ln_" in name:
            return Init("ones")
        narrow = self.library_config.model_type == "gpt2" and name.endswith("c_proj.weight")
        scale = math.sqrt(2 * len(self.blocks)) if narrow else 1.0
        return Init("normal", self.library_config.initializer_range / scale)


def _build_whole(config: ModelConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        library = AutoConfig.from_pretrained(config.hf_folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot read {config.hf_folder}/config.json: {error}") from error
    if library.model_type not in KNOWN:
        raise ModelError(
            f"{config.hf_folder}/config.json: model_type = '{library.model_type}' is not one of {', '.join(KNOWN)}, "
            "known to be embed, layers, norm and head. Write it as your own model: docs/your-own-model.md."
        )
    for key, value in library.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(library, key, 0.0)
    with weightless():
        whole = AutoModelForCausalLM.from_config(library, attn_implementation="sdpa")
    if whole.lm_head.bias is not None:
        raise ModelError(f"{config.hf_folder}: the head has a bias, which the loss does not know.")
    _make_buffers_real(whole)
    return whole


def _make_buffers_real(whole: Any) -> None:
    """Give the buffers that no file stores (rotary frequencies) memory, and let the library compute them."""
    for module in whole.modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in names:
            meta = module._buffers[name]
            module._buffers[name] = torch.full(meta.shape, math.nan, dtype=meta.dtype, device="cpu")
        if names:
            whole._init_weights(module)
        for name in names:
            if module._buffers[name].isnan().any():
                raise ModelError(f"{type(module).__name__}: buffer {name} has no known values.")


def _window(library: Any, layer: int) -> int | None:
    window = getattr(library, "sliding_window", None)
    kinds = getattr(library, "layer_types", None)
    if kinds is not None:
        return window if kinds[layer] == "sliding_attention" else None
    return window
