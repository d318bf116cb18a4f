"""gemm with an epilogue (activation, residual, codes out): one kernel where one takes it, else composed of verbs."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..formats import get_format
from ..kernels.act_quantize.reference import activate
from ..kernels.gemm import Epilogue, Operand
from ..kernels.quantize import Quantized, Rounding
from ..scaling.block import TENSOR
from . import check
from .gemm import not_differentiable, run_gemm
from .library import LIBRARY, register
from .table import BACKEND_VARIABLE, Kernel, choose, kernels


def fused(*args: Any) -> Kernel | None:
    """The kernel that does product and epilogue in one pass, or None: then `composed` makes the same from other verbs.

    args   those of a gemm kernel, its epilogue among them. The reference computes in float64, far slower than
           `composed`; it is taken only where FP8KERNELS_BACKEND asks for it
    """
    forced = os.environ.get(BACKEND_VARIABLE)
    for kernel in kernels("gemm"):
        wanted = kernel.name == forced if forced else kernel.name != "reference"
        if wanted and kernel.why_not(*args) is None:
            return kernel
    return None


def composed(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue) -> Any:
    """The same as a kernel with an epilogue: the product in fp32, then torch, then quantize, each by its own table."""
    out = run_gemm(x.codes, x.scale, x.fmt.name, w.codes, w.scale, w.fmt.name, bias, torch.float32)  # [M, N]
    if epilogue.activation != "none":
        out = activate(out, epilogue.activation)
    if epilogue.residual is not None:
        out = out + epilogue.residual.float()
    if epilogue.rounding is None:
        return out.to(out_dtype)
    scale, how, observer = epilogue.scale, epilogue.rounding, epilogue.observer
    if not out.numel():
        counts = torch.zeros(4, dtype=torch.int64, device=out.device)
        return Quantized(out.to(torch.uint8), None, scale, torch.zeros_like(scale), counts)  # type: ignore[arg-type]
    kernel = choose("quantize", out, scale, how, transpose=False, observer=observer)
    return kernel.run(out, scale, how, transpose=False, observer=observer)


def _run(product: tuple[Any, ...], epilogue: Epilogue) -> Any:
    """product is what run_gemm takes."""
    x, x_scale, x_fmt, w, w_scale, w_fmt, bias, out_dtype = product
    matrix = x.reshape(check.matrix_shape(x))  # [M, K]
    args = (Operand(matrix, x_scale, get_format(x_fmt)), Operand(w, w_scale, get_format(w_fmt)), bias, out_dtype)
    kernel = fused(*args, epilogue) if matrix.numel() and w.numel() else None  # kernels take no empty operands
    return composed(*args, epilogue) if kernel is None else kernel.run(*args, epilogue)


def _matrix(residual: Tensor | None) -> Tensor | None:
    return None if residual is None else residual.reshape(check.matrix_shape(residual))  # [M, N]


def _gemm_epilogue(x: Tensor, *args: Any) -> Tensor:
    product, (activation, residual) = args[:-2], args[-2:]
    out: Tensor = _run((x, *product), Epilogue(activation, _matrix(residual)))
    return check.reshaped(out, (*x.shape[:-1], args[2].shape[0]))


def _gemm_epilogue_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], args[2].shape[0]), dtype=args[6])


def _gemm_quantize(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    product, (activation, residual, out_scale, out_fmt) = args[:-4], args[-4:]
    fmt = get_format(out_fmt)
    epilogue = Epilogue(activation, _matrix(residual), Rounding(fmt, TENSOR, fmt.target), out_scale)
    out: Quantized = _run((x, *product, torch.float32), epilogue)
    return out.codes.reshape(*x.shape[:-1], args[2].shape[0]), out.amax, out.counts


def _gemm_quantize_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], args[2].shape[0]), dtype=torch.uint8)
    return codes, torch.empty_like(args[-2]), x.new_empty(4, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.bias_dtype = None if inputs[6] is None else inputs[6].dtype
    ctx.activation = inputs[8]
    ctx.residual_dtype = None if inputs[9] is None else inputs[9].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Without an activation both bias and residual are added to the result; codes and scales are not differentiable."""
    if ctx.activation != "none":
        raise RuntimeError(not_differentiable(f"activation={ctx.activation!r}"))
    bias = residual = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)  # [N]
    if ctx.residual_dtype is not None and ctx.needs_input_grad[9]:
        residual = grad.to(ctx.residual_dtype)  # [..., N]
    return None, None, None, None, None, None, bias, None, None, residual


_PRODUCT = "Tensor x, Tensor x_scale, str x_fmt, Tensor w, Tensor w_scale, str w_fmt, Tensor? bias"
register(
    f"gemm_epilogue({_PRODUCT}, ScalarType out_dtype, str activation, Tensor? residual) -> Tensor",
    _gemm_epilogue,
    _gemm_epilogue_fake,
)
torch.library.register_autograd("fp8kernels::gemm_epilogue", _backward, setup_context=_setup_context, lib=LIBRARY)
register(
    f"gemm_quantize({_PRODUCT}, str activation, Tensor? residual, Tensor out_scale, str out_fmt)"
    " -> (Tensor, Tensor, Tensor)",
    _gemm_quantize,
    _gemm_quantize_fake,
)
