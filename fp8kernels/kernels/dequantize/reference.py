"""What dequantize means, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ..quantize.reference import spread


def why_not(codes: Tensor, scale: Tensor, fmt: Format, out_dtype: torch.dtype) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def dequantize(codes: Tensor, scale: Tensor, fmt: Format, out_dtype: torch.dtype) -> Tensor:
    """code * scale, one fp32 product rounded once more to `out_dtype`.

    codes    uint8 [M, K], any strides
    scale    fp32 [R, C]; R divides M and C divides K
    returns  fp32, bf16 or fp16 [M, K]
    """
    return (fmt.decode(codes) * spread(scale, codes.shape[0], codes.shape[1])).to(out_dtype)
