"""What convert fused in a model, and why not the rest."""

from __future__ import annotations

from torch import nn

from fp8kernels import convert, get_recipe
from fp8kernels.convert import plan_fusion
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
