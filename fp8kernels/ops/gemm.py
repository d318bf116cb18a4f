"""The verb gemm: out[M, N] = x[M, K] @ w[N, K].T on 8-bit codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import get_format
from ..kernels.gemm import Operand
from ..scaling.qtensor import QTensor
from . import check
from .library import LIBRARY, register
from .table import choose

OUT_DTYPES = (torch.bfloat16, torch.float32)


def gemm(x: QTensor, w: QTensor, bias: Tensor | None = None, *, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x[..., K] @ w[N, K].T + bias, the products of 8-bit codes summed in fp32.

    x        QTensor [..., K], blocks "tensor", "row" or "1x128"
    w        QTensor [N, K], also transposed views; blocks as x, and "128x128"; the formats may differ
    bias     fp32 or bf16 [N], or None; differentiable
    returns  bf16 or fp32 [..., N]
    error    (K + 2) * 2**-24 * |x| @ |w|.T + u * |out|, with u = 2**-8 for bf16 and 2**-24 for fp32 (Higham 2002, 3.1)
    raises   TypeError, ValueError with both shapes if they do not multiply or are on different devices
    """
    for name, operand in (("x", x), ("w", w)):
        if not isinstance(operand, QTensor):
            raise TypeError(f"gemm: {name} is {type(operand).__name__}, it must be a QTensor; see fp8kernels.quantize")
    check.one_of("gemm", "out_dtype", out_dtype, OUT_DTYPES)
    if w.codes.ndim != 2 or x.codes.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"gemm: x {tuple(x.shape)} and w {tuple(w.shape)} do not multiply: out = x @ w.T needs "
            f"x [..., K] and w [N, K] with the same K"
        )
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype not in OUT_DTYPES):
        raise ValueError(
            f"gemm: bias is {bias.dtype} of shape {tuple(bias.shape)}, it must be float32 or bfloat16 of shape "
            f"({w.shape[0]},)"
        )
    check.same_device("gemm", x=x.codes, w=w.codes, bias=bias)
    out: Tensor = torch.ops.fp8kernels.gemm(x.codes, x.scale, x.fmt.name, w.codes, w.scale, w.fmt.name, bias, out_dtype)
    return out


def kernel_args(
    x: QTensor, w: QTensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, ...]:
    """The arguments the kernels see."""
    matrix = x.codes.reshape(check.matrix_shape(x.codes))  # [M, K]
    return Operand(matrix, x.scale, x.fmt), Operand(w.codes, w.scale, w.fmt), bias, out_dtype


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
    return out.reshape(shape)


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


register(
    "gemm(Tensor x, Tensor x_scale, str x_fmt, Tensor w, Tensor w_scale, str w_fmt, Tensor? bias, ScalarType out_dtype)"
    " -> Tensor",
    run_gemm,
    _fake,
)
torch.library.register_autograd("fp8kernels::gemm", _backward, setup_context=_setup_context, lib=LIBRARY)
