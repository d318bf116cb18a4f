"""Gradients of 8-bit layers against autograd of the quantised function's surrogate in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fp8kernels
from fp8kernels import Recipe, Role, convert
from fp8kernels.formats import get_format
from fp8kernels.scaling.delayed import GRAD, INPUT, WEIGHT

M, K, N = 24, 40, 32
U = 2.0**-24  # of fp32, in which products are summed
BATCH = 3.0  # times the amax that the scales were made of: so that delayed scales clip


def surrogate(x: Tensor, decoded: Tensor, limit: float | None) -> Tensor:
    """The value of the codes with the slope of the identity, or of clamp(x, -limit, limit)."""
    slope = x if limit is None else x.clamp(-limit, limit)
    return slope + (decoded - slope).detach()


def decode(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return fp8kernels.quantize(x, fmt, scale=scale.reshape(1, 1)).dequantize().double()


def layer(fmt: str, grad: str | None, scaling: str, straight_through: str) -> nn.Module:
    """A converted layer, after one step that made its scales of smaller numbers."""
    torch.manual_seed(0)
    roles = Role(fmt, scaling), Role(fmt, scaling), None if grad is None else Role(grad, scaling)
    net = convert(nn.Linear(K, N), Recipe("test", *roles, window=1, straight_through=straight_through), verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    net(torch.randn(M, K)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        net.weight.mul_(BATCH)
    return net


@pytest.mark.parametrize("straight_through", ["plain", "clipped"])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
@pytest.mark.parametrize("grad", [None, "e5m2", "hif8"])
@pytest.mark.parametrize("fmt", ["e4m3", "hif8"])
def test_gradients_are_those_of_the_surrogate(fmt: str, grad: str | None, scaling: str, straight_through: str) -> None:
    net = layer(fmt, grad, scaling, straight_through)
    x = (torch.randn(M, K) * 100 * BATCH).requires_grad_()
    g = torch.randn(M, N)
    recipe = net.fp8_recipe
    values = {INPUT: x.detach(), WEIGHT: net.weight.detach(), GRAD: g}
    own = {index: value.abs().max() / recipe.target(index) for index, value in values.items()}
    scale = {index: own[index] if scaling == "current" else net.fp8_scale[index].clone() for index in values}
    net(x).backward(g)

    limit = {i: get_format(fmt).max * float(scale[i]) if straight_through == "clipped" else None for i in values}
    x64, w64 = x.detach().double().requires_grad_(), net.weight.detach().double().requires_grad_()
    bias64 = net.bias.detach().double().requires_grad_()
    qx = surrogate(x64, decode(x.detach(), scale[INPUT], fmt), limit[INPUT])
    qw = surrogate(w64, decode(net.weight.detach(), scale[WEIGHT], fmt), limit[WEIGHT])
    g64 = g.double() if grad is None else decode(g, scale[GRAD], grad)
    (qx @ qw.T + bias64).backward(g64)

    for got, wanted, bound, terms in (
        (x.grad, x64.grad, g64.abs() @ qw.detach().abs(), N),
        (net.weight.grad, w64.grad, g64.abs().T @ qx.detach().abs(), M),
    ):
        assert ((got.double() - wanted).abs() <= (terms + 4) * U * bound).all()
    assert ((net.bias.grad - g.sum(0)).abs() <= M * U * g.abs().sum(0)).all()
    beyond = [int((x64.grad == 0).sum()), int((w64.grad == 0).sum())]
    assert (min(beyond) > 0) == (straight_through == "clipped" and scaling == "delayed" and fmt == "e4m3")


def test_the_surrogate_has_the_gradient_of_its_definition() -> None:
    """clamp(x) @ clamp(w).T, whose values are those of the surrogate where rounding is the identity."""
    torch.manual_seed(1)
    x, w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(5, 6, dtype=torch.float64)
    w.requires_grad_()

    def product(x: Tensor, w: Tensor) -> Tensor:
        return surrogate(x, x.detach().clamp(-1, 1), 1.0) @ surrogate(w, w.detach().clamp(-1, 1), 1.0).T

    torch.autograd.gradcheck(product, (x, w))


def test_an_unknown_straight_through_is_refused() -> None:
    with pytest.raises(ValueError, match="clipped"):
        fp8kernels.get_recipe("hif8-qat").replace(straight_through="clip")
