"""What norm_backward means, in plain torch.

With z = (x - mean) * rstd and g = dy * (weight + offset): dx = rstd * (g - mean(g) - z * mean(g * z)), where the means
are over the row, and RMSNorm has no mean(g).
"""

from __future__ import annotations

from torch import Tensor

from ..norm_quantize import Norm


def why_not(dy: Tensor, x: Tensor, rstd: Tensor, mean: Tensor | None, norm: Norm) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, mean: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias.

    dy       fp32, bf16 or fp16 [M, K]: the gradient of the norm's result, straight through the rounding to codes
    x        fp32, bf16 or fp16 [M, K], as norm_quantize had it
    rstd     fp32 [M]; mean fp32 [M], or None for RMSNorm
    returns  dx [M, K] in x's dtype; dweight [K] in weight's dtype or None; dbias [K] in bias's dtype or None. All is
             computed in fp32 and rounded once
    """
    dy32 = dy.float()  # [M, K]
    z = (x.float() if mean is None else x.float() - mean[:, None]) * rstd[:, None]  # [M, K]
    g = dy32 if norm.weight is None else dy32 * (norm.weight.float() + norm.offset)  # [M, K]
    dx = g - z * (g * z).mean(1, keepdim=True)
    if mean is not None:
        dx = dx - g.mean(1, keepdim=True)
    dweight = None if norm.weight is None else (dy32 * z).sum(0).to(norm.weight.dtype)  # [K]
    dbias = None if norm.bias is None else dy32.sum(0).to(norm.bias.dtype)  # [K]
    return (dx * rstd[:, None]).to(x.dtype), dweight, dbias
