"""What gemm means: the product of the decoded operands in float64, and what its epilogue makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ..act_quantize.reference import activate
from ..quantize import Quantized
from ..quantize.reference import quantize, spread
from . import PLAIN, Epilogue, Operand


def why_not(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def gemm(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> Tensor | Quantized:
    """activation(x[M, K] @ w[N, K].T + bias) + residual in float64, rounded once to `out_dtype`.

    bias     fp32, bf16 or fp16 [N], or None
    returns  fp32, bf16 or fp16 [M, N]; another backend accumulates in fp32 and is, without an epilogue, within
             (K + 2) * 2**-24 * |x| @ |w|.T + u_out * |out| of this (Higham 2002, section 3.1).
             With a rounding: Quantized, the codes of the number rounded to fp32, whatever `out_dtype` is
    """
    out = decoded(x) @ decoded(w).T  # [M, N]
    if bias is not None:
        out = out + bias.double()
    if epilogue.activation != "none":
        out = activate(out, epilogue.activation)
    if epilogue.residual is not None:
        out = out + epilogue.residual.double()
    if epilogue.rounding is None:
        return out.to(out_dtype)
    assert epilogue.scale is not None, "an epilogue that writes codes needs their scale"
    return quantize(out.float(), epilogue.scale, epilogue.rounding, observer=epilogue.observer)


def decoded(operand: Operand) -> Tensor:
    """What an operand stands for, float64 [rows, K]."""
    codes, fmt = operand.codes, operand.fmt
    return table64(fmt, codes) * spread(operand.scale.double(), codes.shape[0], codes.shape[1])


def table64(fmt: Format, codes: Tensor) -> Tensor:
    """The codes' values in float64."""
    return fmt.table(torch.float64, codes.device)[codes.long()]
