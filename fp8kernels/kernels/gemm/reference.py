"""What gemm means: the product of the decoded operands in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ..quantize.reference import spread
from . import Operand


def why_not(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def gemm(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x[M, K] @ w[N, K].T + bias in float64, rounded once to `out_dtype`.

    bias     fp32 or bf16 [N], or None
    returns  fp32 or bf16 [M, N]; another backend accumulates in fp32 and is within
             (K + 2) * 2**-24 * |x| @ |w|.T + u_out * |out| of this (Higham 2002, section 3.1)
    """
    out = _decoded(x) @ _decoded(w).T
    if bias is not None:
        out = out + bias.double()
    return out.to(out_dtype)


def _decoded(operand: Operand) -> Tensor:
    codes, fmt = operand.codes, operand.fmt
    return table64(fmt, codes) * spread(operand.scale.double(), codes.shape[0], codes.shape[1])


def table64(fmt: Format, codes: Tensor) -> Tensor:
    """The codes' values in float64."""
    return fmt.table(torch.float64, codes.device)[codes.long()]
