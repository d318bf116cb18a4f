"""gemm: out[M, N] = x[M, K] @ w[N, K].T, both operands 8-bit codes with scales."""

from __future__ import annotations

import os
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

_fast = os.environ.get("FP8KERNELS_FAST_ACCUMULATION") == "1"


def fast_accumulation(*, on: bool | None = None) -> bool:
    """Whether products of FP8 codes may stay in the tensor cores' own sums, which on sm_90 keep about 14 bits.

    on       True or False sets it for the process; None leaves it. The environment variable
             FP8KERNELS_FAST_ACCUMULATION=1 sets it at the start. Off by default: every 128 of K are added up in fp32
    returns  what it was before
    source   DeepSeek-V3, arXiv 2412.19437, section 3.3.2, on the precision of FP8 sums on Hopper
    """
    global _fast
    before = _fast
    if on is not None:
        _fast = on
    return before
