"""Who wants to see the tensors that 8-bit layers round: functions called with each of them, which change nothing.

A module hook would not do: a module that hands codes on does not while a hook watches a reader (producer.py), so that
a step under observation would not be the step that it observes. While nobody observes this costs one look at a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..scaling.delayed import GRAD
from .dtensor import local

if TYPE_CHECKING:
    from .state import ScaledLayer

Observer = Callable[["ScaledLayer", int, Tensor], None]  # layer, index of the role, the tensor in high precision
observers: list[Observer] = []


def observing(layer: ScaledLayer) -> bool:
    """Whether someone wants to see what the layer rounds now; traces and captured graphs show nothing."""
    if torch.compiler.is_compiling() or not observers or not layer.training:
        return False
    return not (layer.fp8_scale.is_cuda and torch.cuda.is_current_stream_capturing())


def observe(layers: Sequence[ScaledLayer], index: int, x: Tensor) -> None:
    """Show a tensor to the observers, once for each of the layers that round it (or read its codes)."""
    for layer in layers:
        if observing(layer):
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                for observer in observers:
                    observer(layer, index, local(x).detach())


def observe_gradient(layer: ScaledLayer, out: Any) -> None:
    """Show the gradient of a layer's output when its backward comes to it, where the recipe rounds gradients."""
    if out.requires_grad and layer.fp8_recipe.grad is not None and observing(layer):
        out.register_hook(lambda grad: observe([layer], GRAD, grad))
