"""The product of an 8-bit layer and its backward: y = decode(x) @ decode(w).T, gradients straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import get_format
from ..recipe import Role
from ..scaling.delayed import GRAD, INPUT, WEIGHT
from .state import ScaledLayer, quantize_role


def output_dtype(x: Tensor) -> torch.dtype:
    """What torch.nn.functional.linear would return: autocast's dtype, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def scaled_linear(layer: ScaledLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x[..., K] @ weight[N, K].T + bias through 8-bit codes, differentiable in x, weight and bias.

    The codes, not the high-precision tensors, are kept for the backward. raises TypeError for float64 and integer x
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"layer {layer.fp8_name!r}: input is {x.dtype}, it must be float32, bfloat16 or float16")
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"layer {layer.fp8_name!r}: input {tuple(x.shape)} and weight {tuple(weight.shape)} do not multiply: "
            f"the input's last dimension must be {weight.shape[1]}"
        )
    if x.device != weight.device:
        raise ValueError(
            f"layer {layer.fp8_name!r}: input is on {x.device}, weight on {weight.device}; move one with .to()"
        )
    x_codes, x_scale = layer.fp8_quantize(x, INPUT)
    w_codes, w_scale = layer.fp8_quantize(weight, WEIGHT)
    recipe = layer.fp8_recipe
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not needs_grad:
        return product(x_codes, x_scale, recipe.input, w_codes, w_scale, recipe.weight, bias, output_dtype(x))
    observer = (layer.fp8_pending, layer.fp8_counters) if layer.training else (None, None)
    out: Tensor = _Linear.apply(
        x, weight, bias, x_codes, x_scale, w_codes, w_scale, layer.fp8_scale, *observer, recipe, output_dtype(x)
    )
    return out


def product(
    x: Tensor,
    x_scale: Tensor,
    x_role: Role,
    w: Tensor,
    w_scale: Tensor,
    w_role: Role,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """gemm writes bf16 or fp32; fp16 is rounded from fp32."""
    gemm_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16):
        bias = bias.float()
    out: Tensor = torch.ops.fp8kernels.gemm(
        x, x_scale, get_format(x_role.fmt).name, w, w_scale, get_format(w_role.fmt).name, bias, gemm_dtype
    )
    return out.to(dtype)


class _Linear(torch.autograd.Function):
    """Takes x and weight only to route their gradients; computes with the codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_codes: Tensor,
        x_scale: Tensor,
        w_codes: Tensor,
        w_scale: Tensor,
        scale: Tensor,
        pending: Tensor | None,
        counters: Tensor | None,
        recipe: Any,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x_codes, x_scale, w_codes, w_scale)
        ctx.state = (scale, pending, counters)
        ctx.recipe, ctx.dtypes = recipe, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return product(x_codes, x_scale, recipe.input, w_codes, w_scale, recipe.weight, bias, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x_codes, x_scale, w_codes, w_scale = ctx.saved_tensors
        recipe = ctx.recipe
        x_dtype, w_dtype, bias_dtype = ctx.dtypes
        g = grad.reshape(-1, grad.shape[-1])  # [M, N]
        x_codes_2d = x_codes.reshape(-1, x_codes.shape[-1])  # [M, K]
        d_bias = g.sum(0).to(bias_dtype) if ctx.needs_input_grad[2] else None
        x = (x_codes_2d, x_scale, recipe.input)
        w = (w_codes, w_scale, recipe.weight)
        if recipe.grad is not None:
            g, g_scale = _quantize_grad(g, recipe, *ctx.state)
            if _one_scale(recipe):
                d_x = _transposed_product((g, g_scale, recipe.grad), w, x_dtype) if ctx.needs_input_grad[0] else None
                d_w = (
                    _transposed_product((g.t(), g_scale, recipe.grad), x, w_dtype) if ctx.needs_input_grad[1] else None
                )
                return _shaped(d_x, x_codes), d_w, d_bias, *[None] * 9
            g = _decode(g, g_scale, recipe.grad, grad.dtype)
        d_x = (g @ _decode(*w, g.dtype)).to(x_dtype) if ctx.needs_input_grad[0] else None  # [M, K]
        d_w = (g.t() @ _decode(*x, g.dtype)).to(w_dtype) if ctx.needs_input_grad[1] else None  # [N, K]
        return _shaped(d_x, x_codes), d_w, d_bias, *[None] * 9


def _shaped(d_x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if d_x is None else d_x.reshape(like.shape)


def _one_scale(recipe: Any) -> bool:
    """Whether all three tensors have one scale, which a transposed product needs."""
    return all(role.block == "tensor" for role in recipe.roles())


def _quantize_grad(g: Tensor, recipe: Any, scale: Tensor, pending: Tensor | None, counters: Tensor | None) -> Any:
    observer = None if pending is None or counters is None else (pending[GRAD : GRAD + 1], counters[GRAD])
    return quantize_role(g, recipe.grad, recipe.target(GRAD), recipe.power_of_two, scale[GRAD : GRAD + 1], observer)


def _decode(codes: Tensor, scale: Tensor, role: Role, dtype: torch.dtype) -> Tensor:
    out: Tensor = torch.ops.fp8kernels.dequantize(codes, scale, get_format(role.fmt).name, dtype)
    return out


def _transposed_product(a: tuple[Tensor, Tensor, Role], b: tuple[Tensor, Tensor, Role], dtype: torch.dtype) -> Tensor:
    """a[P, Q] @ b[Q, R] with one scale each."""
    return product(a[0], a[1], a[2], b[0].t(), b[1], b[2], None, dtype)
