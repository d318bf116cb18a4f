"""act_quantize on CPU cores, composed: torch's own activation into a tensor of x's dtype, then the compiled quantize.

limits  what kernels/quantize/cpu.py takes
equal   not to the bit: the activation and the product with `other` are each rounded once to x's dtype. The codes lie
        between those of y_reference - δ and y_reference + δ, δ = 2 u(x.dtype) |y| and the fp32 error of the activation
"""

from __future__ import annotations

from torch import Tensor

from ..quantize import Observer, Quantized, Rounding
from ..quantize import cpu as quantize_cpu
from .reference import activate


def why_not(
    x: Tensor,
    other: Tensor | None,
    activation: str,
    scale: Tensor,
    how: Rounding,
    *,
    transpose: bool = False,
    observer: Observer | None = None,
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if other is not None and other.device.type != "cpu":
        return f"other is on {other.device}: this kernel takes CPU tensors"
    return quantize_cpu.why_not(x, scale, how, transpose=transpose, observer=observer)


def act_quantize(
    x: Tensor,
    other: Tensor | None,
    activation: str,
    scale: Tensor,
    how: Rounding,
    *,
    transpose: bool = False,
    observer: Observer | None = None,
) -> Quantized:
    """Codes of activation(x) * other, or of activation(x); see reference.py for every argument."""
    y = activate(x, activation)  # [M, K]
    if other is not None:
        y = y * other
    return quantize_cpu.quantize(y, scale, how, transpose=transpose, observer=observer)
