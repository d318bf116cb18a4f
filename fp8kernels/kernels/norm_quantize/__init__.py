"""norm_quantize: RMSNorm or LayerNorm of every row, straight to 8-bit codes; the normalised tensor is never written."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..quantize import Quantized


class Norm(NamedTuple):
    """Which norm: y = (x - mean) * rstd * weight + bias, in fp32; RMSNorm has no mean and no bias.

    weight  fp32, bf16 or fp16 [K], or None
    bias    the same, or None
    eps     added to the mean square (RMSNorm) or the variance (LayerNorm)
    center  True is LayerNorm, False is RMSNorm
    offset  what is added to weight: 1 where a model stores weight - 1 (Gemma), else 0
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    center: bool
    offset: float = 0.0


class Normed(NamedTuple):
    """The codes of y, and what the backward needs: rstd fp32 [M]; mean fp32 [M], or None for RMSNorm."""

    quantized: Quantized
    rstd: Tensor
    mean: Tensor | None
