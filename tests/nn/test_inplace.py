"""What 8-bit layers return may be changed in place, as what torch's layers return may."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fp8kernels import convert, gemm, get_recipe, quantize
from fp8kernels.nn.step import layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 16), (4, 16)),
    "linear of a batch": (lambda: nn.Linear(16, 16), (2, 4, 16)),
    "linear of a row": (lambda: nn.Linear(16, 16, bias=False), (16,)),
    "linear of nothing": (lambda: nn.Linear(16, 16), (0, 16)),
    "convolution": (lambda: nn.Conv2d(3, 16, 4, stride=4), (2, 3, 8, 8)),
    "convolution of one image": (lambda: nn.Conv2d(3, 16, 4, stride=4), (3, 8, 8)),
    "after a norm": (lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)), (2, 4, 16)),
}
RECIPES = {
    "8-bit": get_recipe("hif8-qat"),
    "gradient in 8 bits too": get_recipe("e4m3-delayed"),
    "warm-up": get_recipe("e4m3-delayed").replace(warmup_steps=5),
    "clipped": get_recipe("hif8-qat").replace(straight_through="clipped"),
}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: nn.functional.relu(y, inplace=True),
    "add": lambda y: y.add_(torch.ones_like(y)),
    "scale": lambda y: y.mul_(2.0),
    "part": lambda y: y[..., :1].zero_() if y.ndim else y,
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_result_can_be_changed_in_place(layer: str, recipe: str, change: str, training: bool, autocast: bool) -> None:  # noqa: FBT001
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = convert(build(), RECIPES[recipe], verbose=False).train(training)
    twin = copy.deepcopy(model)
    x = torch.randn(shape)

    def run(model: nn.Module, *, inside: bool) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
            if not inside:
                y = y.clone()
            CHANGES[change](y)
        loss = y.float().square().sum()
        return y.detach(), list(torch.autograd.grad(loss, list(model.parameters())))

    (y, gradients), (wanted, wanted_gradients) = run(model, inside=True), run(twin, inside=False)
    assert torch.equal(y, wanted)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted_gradients, strict=True))
    for first, second in zip(layers(model), layers(twin), strict=True):
        assert torch.equal(first.fp8_pending, second.fp8_pending)


def test_linear_and_relu_in_place_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 1))
    convert(model, "hif8-qat", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(64, 16)
    losses = []
    for _ in range(20):
        loss = (model(x) - x[:, :1]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_verb_too() -> None:
    x, w = (quantize(torch.randn(4, 16), "e4m3") for _ in range(2))
    for extra in ({}, {"residual": torch.ones(4, 4)}):
        bias = torch.zeros(4, requires_grad=True)
        out = gemm(x, w, bias, out_dtype=torch.float32, **extra)  # type: ignore[arg-type]
        out.add_(1.0)
        out.sum().backward()
        assert bias.grad is not None and torch.equal(bias.grad, torch.full((4,), 4.0))
