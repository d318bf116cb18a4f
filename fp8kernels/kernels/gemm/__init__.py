"""gemm: out[M, N] = x[M, K] @ w[N, K].T, both operands 8-bit codes with scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...formats import Format
from ..quantize import Observer, Rounding

ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")  # their place is the number that compiled kernels know


class Operand(NamedTuple):
    """codes uint8 [rows, K], any strides; scale fp32 [R, C] with R dividing rows and C dividing K."""

    codes: Tensor
    scale: Tensor
    fmt: Format


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of a sum before it is written: out = activation(sum + bias) + residual, and codes of that.

    activation  one of ACTIVATIONS; "gelu" is exact, "gelu_tanh" its approximation, both as in torch
    residual    fp32, bf16 or fp16 [M, N], or None
    rounding    None writes numbers; a Rounding with block "tensor" writes codes instead
    scale       fp32 [1, 1], positive: of those codes; the amax of this very result is not known before it is written
    observer    where amax and counts of the codes are noted, or None
    """

    activation: str = "none"
    residual: Tensor | None = None
    rounding: Rounding | None = None
    scale: Tensor | None = None
    observer: Observer | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing becomes of the sum but its rounding."""
        return self.activation == "none" and self.residual is None and self.rounding is None


PLAIN = Epilogue()
