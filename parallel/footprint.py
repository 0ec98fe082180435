"""How many bytes the parts of a model keep between forward and backward, found without computing anything.

A part is run once on the meta device, where tensors have shapes but no memory, while every allocation is noted together
with its end. So the answer holds for any `BlockModel`, a user's own included. A block is tried at three short lengths
and its bytes are the parabola through them, because masks and positions need real values, which are cheap only when
short. Attention counts as what a fused kernel keeps, on the CPU as on a GPU. (The first use takes seconds: torch's
meta versions of many operations import its compiler. What must start quickly plans without activations.)
Must not know: ZeRO, ranks, optimizers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from windlass.dist.errors import ModelError
from windlass.model.protocol import BlockModel
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.units import model_parts

LENGTHS = (64, 128, 256)


@dataclass(frozen=True)
class PartFootprint:
    """One part of the model in one micro-batch.

    Units:  bytes; `kept` from forward to backward, `output` the share of it that the next part reads, `peak` the most
            at any moment of the forward, `gradients` of its parameters when backward has formed them
    """

    kept: int
    output: int
    peak: int
    gradients: int


@dataclass(frozen=True)
class Footprint:
    """Activations of one micro-batch.

    Units:  bytes; `kept` at the turn from forward to backward, `workspace` the most on top of that while one part
            runs, `context` masks and position tables
    """

    kept: int
    workspace: int
    context: int
    parts: tuple[PartFootprint, ...]


def measure_footprint(
    model: BlockModel, activation: ActivationConfig, *, micro_batch: int, seq_len: int, dtype: torch.dtype
) -> Footprint:
    """Return the activation bytes of a model whose parameters are on the meta device.

    Rows are taken as packed with several documents, the case that needs a mask.
    Raises: ModelError if a part looks at values, which do not exist here
    """
    lengths = LENGTHS if seq_len > LENGTHS[-1] else (seq_len,)
    probes = [_Probe(model, micro_batch, length, dtype) for length in lengths]
    modules = model_parts(model)
    parts: list[PartFootprint] = []
    seen: dict[str, PartFootprint] = {}
    hidden_width = 0
    try:
        for i, (_, module) in enumerate(modules):
            kind = f"{type(module)} {module} {[tuple(p.shape) for p in module.parameters()]}"
            if kind not in seen and i == len(modules) - 1:
                whole = _Probe(None, micro_batch, seq_len, dtype)
                seen[kind] = whole.run(module, hidden_width, labels=True)
            elif kind not in seen:
                found = [p.run(module, hidden_width) for p in probes]
                hidden_width = hidden_width or found[0].output // (micro_batch * lengths[0] * dtype.itemsize)
                rows = ([getattr(part, f.name) for part in found] for f in fields(PartFootprint))
                seen[kind] = PartFootprint(*(_extrapolate(lengths, sizes, seq_len) for sizes in rows))
            parts.append(seen[kind])
    except RuntimeError as error:
        raise ModelError(f"the model cannot be tried without values: {str(error).splitlines()[0]}") from error
    context = _extrapolate(lengths, [p.context_bytes for p in probes], seq_len)
    return _add_up(parts, activation, context)


@dataclass(frozen=True)
class HeldPart:
    """What one part of the model holds under an activation policy.

    Units:  bytes; `kept` from forward to backward, `rebuilt` more from its recomputation on, `workspace` while it runs
    """

    kept: int
    rebuilt: int
    workspace: int


def hold(parts: Sequence[PartFootprint], activation: ActivationConfig) -> list[HeldPart]:
    """Return what each part of a whole model, first to last, holds."""
    held = []
    for i, part in enumerate(parts):
        recompute = activation.policy == "recompute" and 0 < i < len(parts) - 1 and (i - 1) % activation.every == 0
        kept = part.output if recompute else part.kept
        # The loss head forms its gradients in forward; elsewhere backward forms them beside one gradient of the output.
        backward = 0 if i == len(parts) - 1 else part.output + part.gradients
        held.append(HeldPart(kept, part.kept - kept, max(part.peak - part.kept, backward)))
    return held


def _add_up(parts: Sequence[PartFootprint], activation: ActivationConfig, context: int) -> Footprint:
    below, highest = 0, 0
    for part in hold(parts, activation):
        below += part.kept
        highest = max(highest, below + part.rebuilt + part.workspace)
    return Footprint(below, highest - below, context, tuple(parts))


class _Probe:
    """Runs parts on rows of one length, on tensors without memory."""

    def __init__(self, model: BlockModel | None, micro_batch: int, length: int, dtype: torch.dtype) -> None:
        self._shape, self._dtype = (micro_batch, length), dtype
        self._context: Any = None
        self.context_bytes = 0
        if model is not None:
            positions_BT = torch.arange(length).expand(self._shape).contiguous()
            documents_BT = (positions_BT >= length // 2).long()
            given = {positions_BT.untyped_storage().data_ptr(), documents_BT.untyped_storage().data_ptr()}
            storages: dict[int, int] = {}

            def note(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor.to("meta")

            with torch.no_grad():
                self._context = _map_tensors(model.context(positions_BT, documents_BT, dtype), note)
            self.context_bytes = sum(storages.values())

    def run(self, module: nn.Module, hidden_width: int, labels: bool = False) -> PartFootprint:
        """Run one part; without a hidden width it is the embedding."""
        live = _LiveBytes()
        with torch.device("meta"), _FusedAttentionMode():
            values = {
                name: torch.empty(p.shape, dtype=self._dtype, requires_grad=p.requires_grad)
                for name, p in module.named_parameters()
            }
            buffers = {name: b.to("meta") for name, b in module.named_buffers()}
            ids_BT = torch.zeros(self._shape, dtype=torch.long)
            first = ids_BT
            if hidden_width:
                first = torch.empty((*self._shape, hidden_width), dtype=self._dtype, requires_grad=True)
            with live:
                out = functional_call(module, {**values, **buffers}, (first, ids_BT if labels else self._context))
        output = out.untyped_storage().nbytes() if out.dim() else 0
        gradients = sum(v.numel() * v.itemsize for v in values.values() if v.requires_grad)
        return PartFootprint(live.now, output, live.peak, gradients)


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused attention kernels keep: inputs, output, one number per row, and the mask as numbers."""

    @staticmethod
    def forward(
        ctx: Any, q_BNTH: torch.Tensor, k_BKTH: torch.Tensor, v_BKTH: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        out_BNTH = q_BNTH.new_empty((*q_BNTH.shape[:-1], v_BKTH.shape[-1]))
        lse_BNT = q_BNTH.new_empty(q_BNTH.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(
            q_BNTH, k_BKTH, v_BKTH, out_BNTH, lse_BNT, None if mask is None else mask.to(q_BNTH.dtype)
        )
        return out_BNTH


class _FusedAttentionMode(TorchFunctionMode):
    """Puts `_FusedAttention` in the place of torch's, which on the meta device would write out all scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return _FusedAttention.apply(*(given.get(name) for name in names))
        return func(*args, **kwargs)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        _map_tensors([args, kwargs or {}], self._know)
        out = func(*args, **(kwargs or {}))
        _map_tensors(out, self._count)
        return out

    def _know(self, tensor: torch.Tensor) -> torch.Tensor:
        self._known.add(tensor.untyped_storage())
        return tensor

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())
        return tensor

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a copy of nested containers and dataclasses with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map_tensors(v, change) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), change) for f in fields(value) if f.init})
    return value


def _extrapolate(lengths: Sequence[int], sizes: Sequence[int], length: int) -> int:
    """Return the value at `length` of the polynomial through the points."""
    total = Fraction(0)
    for i, x in enumerate(lengths):
        term = Fraction(sizes[i])
        for other in (y for j, y in enumerate(lengths) if j != i):
            term *= Fraction(length - other, x - other)
        total += term
    return round(total)
