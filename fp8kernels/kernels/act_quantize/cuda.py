"""act_quantize on an NVIDIA GPU: the compiled kernel of csrc/act_quantize.

method  one read of x and other from memory: a warp has a piece of a row at hand and the next one on its way. A tensor
        whose one scale is not known is read for its amax first, which the GPU decides. Transposed codes are made from
        the codes. README.md tells the ideas
limits  sm_80 and newer; CUDA tensors of fp32, bf16 or fp16; scales per tensor, row or 1x128. Rows that do not start
        every 16 bytes are read element by element
equal   not to the bit: exp, erf and tanh are those of the GPU, within 2 units in the last place. The same bits in
        every run
"""

from __future__ import annotations

from torch import Tensor

from .. import cuda
from ..compiled import load
from ..gemm import ACTIVATIONS
from ..norm_quantize.cuda import BLOCKS
from ..quantize import Observer, Quantized, Rounding
from ..quantize import cuda as quantize_cuda
from ..quantize.cpu import INPUT_TYPES

_cuda, _ = load("_cuda")


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
    pending, counters = (None, None) if observer is None else observer
    tensors = {"x": x, "other": other, "scale": scale, "pending": pending, "counters": counters}
    reason = cuda.why_not(tensors)
    return unfit(x, other, scale, how, observer) if reason is None else reason


def unfit(x: Tensor, other: Tensor | None, scale: Tensor, how: Rounding, observer: Observer | None) -> str | None:
    """What of the arguments, wherever they are, the kernel does not take; or None."""
    if other is not None and other.dtype not in INPUT_TYPES:
        return f"other is {other.dtype}: this kernel takes fp32, bf16 and fp16"
    if other is not None and other.shape != x.shape:
        return f"other is {list(other.shape)}, x {list(x.shape)}: they have one shape"
    if how.block.name not in BLOCKS:
        return f"the block is {how.block.name!r}: this kernel takes {', '.join(map(repr, BLOCKS))}"
    if x.numel() == 0:
        return f"x is {list(x.shape)}: it has no elements"
    return quantize_cuda.unfit(x, scale, how, observer)


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
    out = quantize_cuda.results(x, scale, how, transpose=transpose)
    x, scale = quantize_cuda.rows_in_memory(x), scale.contiguous()
    other = None if other is None else quantize_cuda.rows_in_memory(other)
    with cuda.on(x.device):
        error = _cuda.act_quantize(
            quantize_cuda.arguments(x, scale, how, out, observer),
            ACTIVATIONS.index(activation),
            0 if other is None else other.data_ptr(),
            0 if other is None else INPUT_TYPES[other.dtype],
            0 if other is None else other.stride(0),
        )
    cuda.check(error, "act_quantize")
    return out
