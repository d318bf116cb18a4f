"""Cheap parts of a module that are computed again in the backward, so that only their inputs are kept for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge


def recomputed(run: Callable[..., Tensor], *inputs: Tensor, parameters: Sequence[nn.Parameter | None] = ()) -> Tensor:
    """run(*inputs), of whose intermediate tensors none is kept.

    parameters  those that `run` reads by itself, which get their gradients too
    returns     the same bits as run(*inputs), and the same gradients: the backward runs the same operations

    For elementwise operations and norms, which cost little beside the products around them. `run` must neither draw
    random numbers nor write state. A second derivative is refused.
    """
    given = [parameter for parameter in parameters if parameter is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*inputs, *given)):
        return run(*inputs)
    out: Tensor = _Recomputed.apply(run, given, *inputs, *given)
    return out


class _Recomputed(torch.autograd.Function):
    """Takes the parameters only to route their gradients."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], parameters: list[nn.Parameter], *tensors: Tensor) -> Tensor:
        inputs = tensors[: len(tensors) - len(parameters)]
        ctx.save_for_backward(*tensors)  # parameters too: one that is written before the backward raises an error
        ctx.run, ctx.parameters = run, parameters
        device = tensors[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return run(*inputs)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors, parameters = ctx.saved_tensors, ctx.parameters
        needed = ctx.needs_input_grad[2:]
        inputs = [
            t.detach().requires_grad_(need)
            for t, need in zip(tensors[: len(tensors) - len(parameters)], needed, strict=False)
        ]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            edge = get_gradient_edge(ctx.run(*inputs))  # not the result, which nothing needs
        wanted = [t for t, need in zip([*inputs, *parameters], needed, strict=True) if need]
        found = iter(torch.autograd.grad(edge, wanted, dy))
        return None, None, *[next(found) if need else None for need in needed]
