"""act_quantize in Triton: NVIDIA GPUs from sm_80 on, AMD's gfx950, and CPU tensors in Triton's interpreter.

method  the kernels of quantize, which make activation(x) * other of a tile in fp32 where they would read x
limits  those of quantize; `other` too is copied first if its rows are not contiguous
equal   to quantize of the same y to the bit; y differs from the reference's by the error of exp and erf
"""

from __future__ import annotations

from torch import Tensor

from ..gemm import ACTIVATIONS
from ..quantize import Observer, Quantized, Rounding
from ..quantize import triton_jit as quantize_triton
from ..quantize.tile.triton_jit import Source
from ..quantize.triton_jit import INPUT_TYPES, row_stride, with_plain_rows
from ..triton_jit import why_not as why_not_here


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
    return quantize_triton.why_not(x, scale, how, transpose=transpose, observer=observer) or why_not_other(x, other)


def why_not_other(x: Tensor, other: Tensor | None) -> str | None:
    """Why a second factor cannot be read by a kernel, or None."""
    if other is None:
        return None
    reason = why_not_here({"x": x, "other": other})
    if reason is None and other.dtype not in INPUT_TYPES:
        return f"other is {other.dtype}: this kernel takes fp32, bf16 and fp16"
    return reason


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
    """Codes of activation(x) * other, or of activation(x); see reference.py for every argument.

    raises   ValueError if the block does not divide x, or scale is not on its grid
    """
    out = quantize_triton.empty(x, scale, how, transpose=transpose)
    if x.numel() == 0:
        return quantize_triton.nothing(scale, out)
    x = with_plain_rows(x)
    source = Source(x, row_stride(x))
    if other is not None:
        other = with_plain_rows(other)
        source = source._replace(other=other, other_stride=row_stride(other))
    quantize_triton.launch(source, scale, how, out, observer, activation=ACTIVATIONS.index(activation))
    return out
