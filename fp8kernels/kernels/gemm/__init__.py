"""gemm: out[M, N] = x[M, K] @ w[N, K].T, both operands 8-bit codes with scales."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...formats import Format


class Operand(NamedTuple):
    """codes uint8 [rows, K], any strides; scale fp32 [R, C] with R dividing rows and C dividing K."""

    codes: Tensor
    scale: Tensor
    fmt: Format
