"""What convert fused in a model, why not the rest, and which layers get codes in a forward."""

from __future__ import annotations

from torch import Tensor, nn

import fp8kernels
from fp8kernels import convert, get_recipe
from fp8kernels.convert import plan_fusion
from fp8kernels.nn.coded import CodedTensor
from fp8kernels.nn.producer import Producer

QAT = get_recipe("hif8-qat").replace(window=4)


def read_by(model: nn.Module) -> dict[str, list[str]]:
    """The readers of every fused module, by name."""
    return {
        name: [place.name for place in module.fp8_places]
        for name, module in model.named_modules()
        if isinstance(module, Producer)
    }


def reasons(model: nn.Module, recipe: object = QAT, **how: object) -> dict[str, str | None]:
    convert(model, recipe, fuse=False, verbose=False, **how)  # type: ignore[arg-type]
    return {fusion.name: fusion.reason for fusion in plan_fusion(model)}


def handed(net: nn.Module, x: Tensor) -> list[str]:
    """The names of the layers that got codes in a forward, by what they are called with."""
    seen: list[str] = []
    original = fp8kernels.nn.Linear.forward

    def forward(layer: fp8kernels.nn.Linear, x: Tensor) -> Tensor:
        if isinstance(x, CodedTensor):
            seen.append(layer.fp8_name)
        return original(layer, x)

    fp8kernels.nn.Linear.forward = forward  # type: ignore[method-assign]
    try:
        net(x)
    finally:
        fp8kernels.nn.Linear.forward = original  # type: ignore[method-assign]
    return seen
