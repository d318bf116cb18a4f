"""What norm_quantize means, in plain torch: the norm in fp32, and the quantize reference on its result.

source  RMSNorm: Zhang, Sennrich 2019, arXiv 1910.07467. LayerNorm: Ba et al. 2016, arXiv 1607.06450
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import Observer, Rounding
from ..quantize import reference as quantize_reference
from . import Norm, Normed


def why_not(
    x: Tensor, scale: Tensor, norm: Norm, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def norm_quantize(
    x: Tensor, scale: Tensor, norm: Norm, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> Normed:
    """Codes of y = (x - mean) * rstd * (weight + offset) + bias, all in fp32; y is not rounded to x's dtype.

    x         fp32, bf16 or fp16 [M, K], any strides
    scale     fp32 [M / rows, K / cols]; 0 stands for "not known": that block takes the scale of y's own amax
    returns   Normed; amax, counts and codes are those of y
    observer  is raised and added to in place
    """
    y, rstd, mean = normalise(x.float(), norm)
    return Normed(quantize_reference.quantize(y, scale, how, transpose=transpose, observer=observer), rstd, mean)


def normalise(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [M, K], rstd [M] and mean [M] or None, in the dtype of x: fp32 here, fp64 in the tests."""
    mean = x.mean(1) if norm.center else None  # [M]
    centered = x if mean is None else x - mean[:, None]  # [M, K]
    rstd = torch.rsqrt(centered.square().mean(1) + norm.eps)  # [M]
    y = centered * rstd[:, None]  # [M, K]
    if norm.weight is not None:
        y = y * (norm.weight.to(x.dtype) + norm.offset)
    if norm.bias is not None:
        y = y + norm.bias.to(x.dtype)
    return y, rstd, mean
