"""A layer that computes in high precision: torch's product, and notes of what rounding to 8 bits would have seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.check import reshaped
from ..recipe import Recipe
from ..scaling.delayed import GRAD
from .dtensor import local
from .observe import observe_gradient
from .state import ScaledLayer, quantize_role


def high_linear(layer: ScaledLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear; histories fill and counters count as if the layer were 8-bit.

    So it is known when warm-up ends, or when the layer that fell back would no longer saturate, which scales it needs.
    """
    layer.fp8_watch(x, weight)
    out = F.linear(x, weight, bias)
    recipe = layer.fp8_recipe
    if recipe.grad is None or not layer.training or not out.requires_grad:
        return out
    observe_gradient(layer, out)
    carrier = layer.fp8_carrier(GRAD, x.device)
    noted: Tensor = _NoteGradient.apply(out, recipe, carrier, layer.fp8_scale, layer.fp8_pending, layer.fp8_counters)
    return noted


class _NoteGradient(torch.autograd.Function):
    """The identity; its backward notes the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        recipe: Recipe,
        carrier: int | None,
        scale: Tensor,
        pending: Tensor,
        counters: Tensor,
    ) -> Tensor:
        ctx.how, ctx.state = (recipe, carrier), (scale, pending, counters)
        return reshaped(out, out.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (recipe, carrier), (scale, pending, counters) = ctx.how, ctx.state
        at, g = slice(GRAD, GRAD + 1), local(grad)
        quantize_role(
            g,
            recipe.grad,
            recipe.target(GRAD),
            recipe.power_of_two,
            scale[at],
            (pending[at], counters[GRAD]),
            carrier=carrier,
            clamp=recipe.clamp(GRAD),
        )
        return grad, *[None] * 5
