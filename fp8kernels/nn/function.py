"""The product of an 8-bit layer and its backward: y = decode(x) @ decode(w).T, gradients straight through."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import get_format
from ..ops.check import matrix_shape
from ..recipe import Recipe
from ..scaling.delayed import GRAD, INPUT, WEIGHT
from .clamp import beyond, limit
from .coded import codes_for
from .dtensor import is_dtensor
from .gathered import gathered_codes
from .observe import observe_gradient
from .state import Coded, ScaledLayer, quantize_role
from .tensor_parallel import over_shards


def output_dtype(x: Tensor) -> torch.dtype:
    """What torch.nn.functional.linear would return: autocast's dtype, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def scaled_linear(layer: ScaledLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x[..., K] @ weight[N, K].T + bias through 8-bit codes, differentiable in x, weight and bias.

    A CodedTensor that was made for this layer is not quantized again. The codes, not the high-precision tensors, are
    kept for the backward. raises TypeError for float64 and integer x
    """
    if is_dtensor(weight) or is_dtensor(x):
        return over_shards(scaled_linear, layer, x, weight, bias)
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
    recipe, dtype = layer.fp8_recipe, output_dtype(x)
    trained = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    needs_grad = trained and torch.is_grad_enabled()
    transpose = needs_grad and keeps_transposed(x.device, recipe)
    x_coded = codes_for(layer, x, transpose=transpose and weight.requires_grad)
    if x_coded is None:
        x_coded = layer.fp8_quantize(x, INPUT, transpose=transpose and weight.requires_grad)
    w_coded = gathered_codes(weight, transpose=transpose and x.requires_grad)
    if w_coded is None:
        w_coded = layer.fp8_quantize(weight, WEIGHT, transpose=transpose and x.requires_grad)
    if not needs_grad:
        return product(x_coded, w_coded, bias, dtype)
    observer = (layer.fp8_pending, layer.fp8_counters) if layer.training else (None, None)
    lost: tuple[Tensor | None, Tensor | None] = (None, None)
    if recipe.straight_through == "clipped":
        lost = clipped(layer, INPUT, x, x_coded), clipped(layer, WEIGHT, weight, w_coded)
    grad = _Gradient(recipe, layer.fp8_carrier(GRAD, x.device), transpose)
    out: Tensor = _Linear.apply(x, weight, bias, *x_coded, *w_coded, layer.fp8_scale, *observer, *lost, grad, dtype)
    observe_gradient(layer, out)
    return out


def clipped(layer: ScaledLayer, index: int, x: Tensor, coded: Coded) -> Tensor | None:
    """Where a tensor lies beyond what its codes can hold, bool of its shape; None for scales of the tensor itself."""
    recipe = layer.fp8_recipe
    if (recipe.input, recipe.weight)[index].scaling == "current" or not x.requires_grad:
        return None
    clamp = recipe.clamp(index)
    if clamp is not None:
        return beyond(x, limit(layer.fp8_scale[index : index + 1], clamp))
    return beyond(x, limit(coded.scale.reshape(1), get_format(coded.fmt).max))


def keeps_transposed(device: torch.device, recipe: Recipe) -> bool:
    """Whether the backward multiplies codes that were transposed when they were made.

    A GPU's FP8 tensor cores read both operands along K, which in the two products of the backward is another dimension
    than in the forward; transposing in the pass that quantizes costs less than a pass of its own. A CPU takes a
    transposed view.
    """
    return recipe.grad is not None and one_scale(recipe) and device.type == "cuda"


def one_scale(recipe: Recipe) -> bool:
    """Whether all three tensors have one scale, which a transposed product needs."""
    return all(role is None or role.block == "tensor" for role in recipe.roles())


def product(x: Coded, w: Coded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x[..., K] @ w[N, K].T + bias, not differentiable; gemm writes bf16 or fp32, fp16 is rounded from fp32."""
    gemm_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16):
        bias = bias.float()
    out: Tensor = torch.ops.fp8kernels.product(x.codes, x.scale, x.fmt, w.codes, w.scale, w.fmt, bias, gemm_dtype)
    return out if out.dtype == dtype else out.to(dtype)


class _Gradient(NamedTuple):
    """How a layer's backward runs: its recipe, the k of the gradient's carrier, and whether codes_t is saved."""

    recipe: Recipe
    carrier: int | None
    transposed: bool


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
        x_fmt: str,
        x_codes_t: Tensor | None,
        w_codes: Tensor,
        w_scale: Tensor,
        w_fmt: str,
        w_codes_t: Tensor | None,
        scale: Tensor,
        pending: Tensor | None,
        counters: Tensor | None,
        x_beyond: Tensor | None,
        w_beyond: Tensor | None,
        how: _Gradient,
        dtype: torch.dtype,
    ) -> Tensor:
        x_saved, w_saved = (x_codes_t, w_codes_t) if how.transposed else (x_codes, w_codes)
        ctx.save_for_backward(x_saved, x_scale, w_saved, w_scale, x_beyond, w_beyond)
        ctx.state = (scale, pending, counters)
        ctx.how, ctx.fmts, ctx.shape = how, (x_fmt, w_fmt), x.shape
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return product(Coded(x_codes, x_scale, x_fmt), Coded(w_codes, w_scale, w_fmt), bias, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        recipe, carrier, transposed = ctx.how
        x_saved, x_scale, w_saved, w_scale, x_beyond, w_beyond = ctx.saved_tensors
        x_dtype, w_dtype, bias_dtype = ctx.dtypes
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        g = grad.reshape(matrix_shape(grad))  # [M, N]
        d_bias = g.sum(0).to(bias_dtype) if needs_bias else None
        d_x = d_w = None
        if recipe.grad is not None and one_scale(recipe):
            coded = _quantize_grad(g, recipe, carrier, ctx.state, transpose=transposed and needs_w)
            if needs_x:
                w_t = w_saved if transposed else w_saved.t()  # [K, N]
                d_x = product(coded, Coded(w_t, w_scale, ctx.fmts[1]), None, x_dtype)  # [M, K]
            if needs_w:
                x_t = x_saved if transposed else x_saved.reshape(matrix_shape(x_saved)).t()  # [K, M]
                d_w = product(coded.t(), Coded(x_t, x_scale, ctx.fmts[0]), None, w_dtype)  # [N, K]
        else:
            if recipe.grad is not None:
                g = _decode(_quantize_grad(g, recipe, carrier, ctx.state), grad.dtype)
            if needs_w:  # first, so that the decoded input, which may be large, is gone before d_x is there
                x = Coded(x_saved.reshape(matrix_shape(x_saved)), x_scale, ctx.fmts[0])
                d_w = (g.t() @ _decode(x, g.dtype)).to(w_dtype)  # [N, K]
            if needs_x:
                d_x = (g @ _decode(Coded(w_saved, w_scale, ctx.fmts[1]), g.dtype)).to(x_dtype)  # [M, K]
        d_x = None if d_x is None else d_x.reshape(ctx.shape)
        if d_x is not None and x_beyond is not None:
            d_x = d_x.masked_fill(x_beyond, 0.0)
        if d_w is not None and w_beyond is not None:
            d_w = d_w.masked_fill(w_beyond, 0.0)
        return d_x, d_w, d_bias, *[None] * 15


def _quantize_grad(
    g: Tensor,
    recipe: Recipe,
    carrier: int | None,
    state: tuple[Tensor, Tensor | None, Tensor | None],
    *,
    transpose: bool = False,
) -> Coded:
    assert recipe.grad is not None
    scale, pending, counters = state
    observer = None if pending is None or counters is None else (pending[GRAD : GRAD + 1], counters[GRAD])
    return quantize_role(
        g,
        recipe.grad,
        recipe.target(GRAD),
        recipe.power_of_two,
        scale[GRAD : GRAD + 1],
        observer,
        transpose=transpose,
        carrier=carrier,
        clamp=recipe.clamp(GRAD),
        propagate=True,
    )


def _decode(coded: Coded, dtype: torch.dtype) -> Tensor:
    out: Tensor = torch.ops.fp8kernels.dequantize(coded.codes, coded.scale, coded.fmt, dtype)
    return out
