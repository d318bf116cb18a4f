"""What act_backward means, in plain torch: dx = dy * other * activation'(x), dother = dy * activation(x), in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..act_quantize.reference import activate

GELU_TANH = 0.044715  # of x**3 in the approximation of GELU


def why_not(dy: Tensor, x: Tensor, other: Tensor | None, activation: str) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def act_backward(dy: Tensor, x: Tensor, other: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and other.

    dy       fp32, bf16 or fp16 [M, K]: the gradient of the product, straight through the rounding to codes
    x, other fp32, bf16 or fp16 [M, K], as act_quantize had them
    returns  dx [M, K] in x's dtype, dother [M, K] in other's dtype or None; computed in fp32 and rounded once
    """
    dy32, x32 = dy.float(), x.float()  # [M, K]
    dother = None if other is None else (dy32 * activate(x32, activation)).to(other.dtype)
    g = dy32 if other is None else dy32 * other.float()
    return (g * slope(x32, activation)).to(x.dtype), dother


def slope(x: Tensor, activation: str) -> Tensor:
    """The derivative of the activation at x; at 0 that of relu is 0, as in torch."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (x + GELU_TANH * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * GELU_TANH * x * x)
