"""Backward in two pieces: inputs' gradients now, weight products later, the same numbers as in one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from windlass.parallel.deferred import DeferProducts, Product


class Layer(nn.Module):
    """Linear maps of both spellings, one used twice, one frozen, and a norm, whose gradient is never deferred."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.frozen = nn.Linear(6, 8), nn.Linear(8, 8)
        self.down = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.frozen(torch.tanh(self.up(self.norm(x)) + F.linear(x, self.up.weight)))
        flat = torch.addmm(self.bias, h.reshape(-1, 8), self.down)
        return x + flat.view(x.shape)


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer().double()


def gradients(layer: Layer, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = layer(x)
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(out.square().sum(), [x, *(layer.get_parameter(n) for n in names)])
    return dict(zip(["x", *names], found, strict=True))


def test_products_formed_later_are_the_weight_gradients(layer: Layer) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    expected = gradients(layer, x)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    products: list[Product] = []
    with DeferProducts(list(trained.values()), products):
        out = layer(x)
    found = torch.autograd.grad(out.square().sum(), [x, *trained.values()], allow_unused=True)
    at_once = {n: g for n, g in zip(["x", *trained], found, strict=True) if g is not None}
    assert set(at_once) == {"x", "norm.weight", "norm.bias", "up.bias", "bias"}
    later: dict[str, torch.Tensor] = {}
    for product in products:
        name = next(n for n, p in trained.items() if p is product.parameter)
        later[name] = later.get(name, torch.zeros(())) + product.compute()
    assert set(later) == {"up.weight", "down"} and len(products) == 3
    for name, value in {**at_once, **later}.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-13)


def test_without_a_trained_weight_nothing_is_deferred(layer: Layer) -> None:
    products: list[Product] = []
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    with DeferProducts([], products):
        layer(x).sum().backward()
    assert not products and layer.up.weight.grad is not None
