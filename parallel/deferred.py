"""Weight products that wait: backward of a linear map in two pieces.

Inside `DeferProducts` every linear map with a trained weight becomes one whose backward gives the gradient of the
input (and of the bias, a cheap sum) at once and leaves the product for the weight's gradient to be formed later. The
rest of a part's backward runs once, as always.
Must not know: schedules, units. Source: Qi et al. 2023, arXiv:2401.10241, section 2.
Differs: intercepted by function, not by module, so that a user's or library's own modules take part unchanged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Product:
    """A weight gradient that is yet to be formed: rows^T @ columns, of the weight's shape.

    Shapes:      rows_SO, columns_SI -> (O, I)
    """

    parameter: nn.Parameter
    rows: torch.Tensor
    columns: torch.Tensor

    def compute(self) -> torch.Tensor:
        """Form it."""
        return self.rows.t() @ self.columns


class _Linear(torch.autograd.Function):
    """x W^T + b (or x W + b, `transposed`) without the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: nn.Parameter,
        bias: torch.Tensor | None,
        transposed: bool,
        products: list[Product],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.facts = (weight, bias is not None, transposed, products)
        if not transposed:
            return linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, saved_weight = ctx.saved_tensors
        weight, has_bias, transposed, products = ctx.facts
        grad = grads[0]
        wants_x, _, wants_bias = ctx.needs_input_grad[:3]
        x_SI, grad_SO = (t.detach().reshape(-1, t.shape[-1]) for t in (x, grad))
        products.append(Product(weight, x_SI, grad_SO) if transposed else Product(weight, grad_SO, x_SI))
        grad_x = None
        if wants_x:
            grad_x = grad @ (saved_weight.t() if transposed else saved_weight)
        return grad_x, None, grad_SO.sum(0) if has_bias and wants_bias else None, None, None


class DeferProducts(TorchFunctionMode):
    """Lets linear maps by these parameters leave their weight products in `products` when backward runs."""

    def __init__(self, parameters: Sequence[nn.Parameter], products: list[Product]) -> None:
        super().__init__()
        self._ids = {id(p) for p in parameters if p.dim() == 2}
        self._products = products

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            x, weight, bias = bind(("input", "weight", "bias"), args, kwargs)
            if id(weight) in self._ids:
                return _Linear.apply(x, weight, bias, False, self._products)
        elif func is torch.addmm and set(kwargs) <= {"input", "mat1", "mat2"}:
            bias, x, weight = bind(("input", "mat1", "mat2"), args, kwargs)
            if id(weight) in self._ids and bias.dim() == 1:
                return _Linear.apply(x, weight, bias, True, self._products)
        return func(*args, **kwargs)


def bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments by name, None where one is not given."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given.get(name) for name in names]
