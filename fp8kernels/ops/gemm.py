"""The verb gemm: out[M, N] = x[M, K] @ w[N, K].T on 8-bit codes."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from ..formats import Format, get_format
from ..kernels.gemm import ACTIVATIONS, Epilogue, Operand
from ..kernels.quantize import Rounding
from ..scaling.block import TENSOR
from ..scaling.qtensor import QTensor
from . import check
from .library import LIBRARY, register
from .table import choose


@overload
def gemm(
    x: QTensor,
    w: QTensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = ...,
    activation: str = ...,
    residual: Tensor | None = ...,
    out_fmt: None = None,
    out_scale: None = None,
) -> Tensor: ...


@overload
def gemm(
    x: QTensor,
    w: QTensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = ...,
    activation: str = ...,
    residual: Tensor | None = ...,
    out_fmt: Format | str,
    out_scale: Tensor | float | None,
) -> QTensor: ...


def gemm(
    x: QTensor,
    w: QTensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    activation: str = "none",
    residual: Tensor | None = None,
    out_fmt: Format | str | None = None,
    out_scale: Tensor | float | None = None,
) -> Tensor | QTensor:
    """activation(x[..., K] @ w[N, K].T + bias) + residual, the products of 8-bit codes summed in fp32.

    x           QTensor [..., K], blocks "tensor", "row" or "1x128"
    w           QTensor [N, K], also transposed views; blocks as x, and "128x128"; the formats may differ
    bias        fp32, bf16 or fp16 [N], or None; differentiable
    out_dtype   bf16, fp32 or fp16; not looked at with out_fmt
    activation  "none", "relu", "silu", "gelu" (exact) or "gelu_tanh"
    residual    fp32, bf16 or fp16 [..., N], or None; differentiable
    out_fmt     None, or the format of codes to return instead of numbers, rounded from fp32
    out_scale   with out_fmt: the scale that decodes those codes, one positive number or fp32 tensor
    returns     [..., N] of out_dtype, or a QTensor with block "tensor"
    error       without an epilogue (K + 2) * 2**-24 * |x| @ |w|.T + u * |out|, with u = 2**-8 for bf16, 2**-11 for
                fp16, 2**-24 for fp32 (Higham 2002, 3.1); for tensor cores see docs/NUMERICS.md
    raises      TypeError, ValueError with both shapes if they do not multiply or are on different devices; ValueError
                where a gradient is asked for through an activation or codes
    """
    for name, operand in (("x", x), ("w", w)):
        if not isinstance(operand, QTensor):
            raise TypeError(f"gemm: {name} is {type(operand).__name__}, it must be a QTensor; see fp8kernels.quantize")
    check.one_of("gemm", "out_dtype", out_dtype, check.FLOATS)
    if w.codes.ndim != 2 or x.codes.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"gemm: x {tuple(x.shape)} and w {tuple(w.shape)} do not multiply: out = x @ w.T needs "
            f"x [..., K] and w [N, K] with the same K"
        )
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype not in check.FLOATS):
        raise ValueError(
            f"gemm: bias is {bias.dtype} of shape {tuple(bias.shape)}, it must be float32, bfloat16 or float16 of "
            f"shape ({w.shape[0]},)"
        )
    check.same_device("gemm", x=x.codes, w=w.codes, bias=bias)
    product = (x.codes, x.scale, x.fmt.name, w.codes, w.scale, w.fmt.name, bias)
    if activation == "none" and residual is None and out_fmt is None and out_scale is None:
        return torch.ops.fp8kernels.gemm(*product, out_dtype)
    _check_epilogue(x, w, bias, activation, residual, out_fmt)
    if out_fmt is None:
        if out_scale is not None:
            raise ValueError("gemm: out_scale is given without out_fmt, the format of the codes to return")
        return torch.ops.fp8kernels.gemm_epilogue(*product, out_dtype, activation, residual)
    fmt, scale = get_format(out_fmt), _given_scale(out_scale, x)
    codes, _, _ = torch.ops.fp8kernels.gemm_quantize(*product, activation, residual, scale, fmt.name)
    return QTensor(codes, scale, fmt, TENSOR)


def _check_epilogue(
    x: QTensor, w: QTensor, bias: Tensor | None, activation: str, residual: Tensor | None, out_fmt: Format | str | None
) -> None:
    check.one_of("gemm", "activation", activation, ACTIVATIONS)
    shape = (*x.shape[:-1], w.shape[0])
    if residual is not None and (residual.shape != shape or residual.dtype not in check.FLOATS):
        raise ValueError(
            f"gemm: residual is {residual.dtype} of shape {tuple(residual.shape)}, it must be float32, bfloat16 or "
            f"float16 of the result's shape {shape}"
        )
    check.same_device("gemm", x=x.codes, residual=residual)
    given = [tensor for tensor in (bias, residual) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        if activation != "none":
            raise ValueError(not_differentiable(f"activation={activation!r}"))
        if out_fmt is not None:
            raise ValueError(not_differentiable(f"out_fmt={out_fmt!r}"))


def not_differentiable(what: str) -> str:
    """The message for a gradient that a fused result has not kept what it needs for."""
    return (
        f"gemm: with {what} nothing is differentiable, as the sum is not kept; call gemm without it and apply torch's "
        f"own function to the result, or detach bias and residual, or use torch.no_grad()"
    )


def _given_scale(scale: Tensor | float | None, x: QTensor) -> Tensor:
    """The scale of a result's codes, fp32 [1, 1]."""
    if scale is None:
        raise ValueError(
            "gemm: out_fmt needs out_scale: the amax of a result is not known before it is written. Give the scale "
            "that decodes the codes, such as one of delayed scaling, or call gemm and then quantize"
        )
    if not isinstance(scale, Tensor):
        if not 0 < scale < math.inf:
            raise ValueError(f"gemm: out_scale is {scale}; x ≈ code * scale needs a positive, finite scale")
        return torch.full((1, 1), scale, dtype=torch.float32, device=x.device)
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise ValueError(f"gemm: out_scale is {scale.dtype} of shape {tuple(scale.shape)}, it must be one float32")
    check.same_device("gemm", x=x.codes, out_scale=scale)
    return scale.reshape(1, 1)  # its value is not looked at: that would wait for a GPU


def kernel_args(
    x: QTensor,
    w: QTensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    activation: str = "none",
    residual: Tensor | None = None,
    out_fmt: Format | str | None = None,
    out_scale: Tensor | float | None = None,
) -> tuple[Any, ...]:
    """The arguments the kernels see; an epilogue is among them only if there is one."""
    matrix = x.codes.reshape(check.matrix_shape(x.codes))  # [M, K]
    args = (Operand(matrix, x.scale, x.fmt), Operand(w.codes, w.scale, w.fmt), bias, out_dtype)
    if residual is not None:
        residual = residual.reshape(check.matrix_shape(residual))  # [M, N]
    if out_fmt is not None:
        fmt = get_format(out_fmt)
        how = Rounding(fmt, TENSOR, fmt.target)
        return *args, Epilogue(activation, residual, how, _given_scale(out_scale, x))
    epilogue = Epilogue(activation, residual)
    return args if epilogue.is_plain else (*args, epilogue)


def run_gemm(
    x: Tensor,
    x_scale: Tensor,
    x_fmt: str,
    w: Tensor,
    w_scale: Tensor,
    w_fmt: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Choose a kernel and run it on x seen as a matrix; a product without elements needs none."""
    shape = (*x.shape[:-1], w.shape[0])
    matrix = x.reshape(check.matrix_shape(x))  # [M, K]
    if not matrix.shape[0] or not w.shape[0]:
        return x.new_empty(shape, dtype=out_dtype)
    if not matrix.shape[1]:
        out = x.new_zeros(shape, dtype=out_dtype)
        return out if bias is None else out + bias.to(out_dtype)
    args = (Operand(matrix, x_scale, get_format(x_fmt)), Operand(w, w_scale, get_format(w_fmt)), bias, out_dtype)
    out = choose("gemm", *args).run(*args)  # [M, N]
    return check.reshaped(out, shape)


def _fake(
    x: Tensor,
    x_scale: Tensor,
    x_fmt: str,
    w: Tensor,
    w_scale: Tensor,
    w_fmt: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.bias_dtype = None if inputs[6] is None else inputs[6].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Codes and scales are not differentiable; the bias is."""
    bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)  # [N]
    return None, None, None, None, None, None, bias, None


_PRODUCT = (
    "Tensor x, Tensor x_scale, str x_fmt, Tensor w, Tensor w_scale, str w_fmt, Tensor? bias, ScalarType out_dtype"
)
register(f"gemm({_PRODUCT}) -> Tensor", run_gemm, _fake)
# the same for layers that have a backward of their own: an op with a gradient costs the host four times as much
register(f"product({_PRODUCT}) -> Tensor", run_gemm, _fake)
torch.library.register_autograd("fp8kernels::gemm", _backward, setup_context=_setup_context, lib=LIBRARY)
