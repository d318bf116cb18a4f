"""norm_quantize on CPU cores, composed: torch's own norm into a tensor of x's dtype, then the compiled quantize.

limits  what torch's norm and kernels/quantize/cpu.py take; RMSNorm has no bias here
equal   not to the bit: y is rounded once to x's dtype before it is quantized, and torch sums rows in its own order. The
        codes lie between those of y_reference - δ and y_reference + δ, with δ = u(x.dtype) |y| and the error of the sum
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import Observer, Rounding
from ..quantize import cpu as quantize_cpu
from . import Norm, Normed


def why_not(
    x: Tensor, scale: Tensor, norm: Norm, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if norm.bias is not None and not norm.center:
        return "RMSNorm with a bias: torch's own RMSNorm has none"
    for name, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None and vector.device.type != "cpu":
            return f"{name} is on {vector.device}: this kernel takes CPU tensors"
    return quantize_cpu.why_not(x, scale, how, transpose=transpose, observer=observer)


def norm_quantize(
    x: Tensor, scale: Tensor, norm: Norm, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> Normed:
    """Codes of the normalised rows of x; see reference.py for every argument."""
    # an fp32 weight beside a bf16 x keeps rstd and mean in fp32
    weight = None if norm.weight is None else norm.weight.float() + norm.offset  # [K]
    bias = None if norm.bias is None else norm.bias.float()  # [K]
    mean: Tensor | None = None
    if not norm.center:
        y, rstd = torch.ops.aten._fused_rms_norm(x, x.shape[1:], weight, norm.eps)
    else:
        if weight is None:
            weight = torch.ones(x.shape[1], dtype=torch.float32)
        y, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight, bias, norm.eps)
    mean = None if mean is None else mean.reshape(-1)  # [M]
    quantized = quantize_cpu.quantize(y.to(x.dtype), scale, how, transpose=transpose, observer=observer)
    return Normed(quantized, rstd.reshape(-1), mean)
