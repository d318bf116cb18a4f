"""norm_quantize on an NVIDIA GPU: the compiled kernel of csrc/norm_quantize.

method  one read of x from memory: a row waits in shared memory while its mean and variance are summed, and the next
        one is on its way. A tensor whose one scale is not known is read for its amax first, which the GPU decides.
        Transposed codes are made from the codes. README.md tells the ideas
limits  sm_80 and newer; CUDA tensors of fp32, bf16 or fp16; scales per tensor, row or 1x128. Rows that do not start
        every 16 bytes are read element by element
equal   not to the bit: rows are summed in fp32 in an order of their own. The same bits in every run
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from ..compiled import load
from ..quantize import Observer, Rounding
from ..quantize import cuda as quantize_cuda
from ..quantize.cpu import INPUT_TYPES
from . import Norm, Normed

_cuda, _ = load("_cuda")

BLOCKS = ("tensor", "row", "1x128")  # whose amax one team of threads sees


def why_not(
    x: Tensor, scale: Tensor, norm: Norm, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    pending, counters = (None, None) if observer is None else observer
    tensors = {"x": x, "scale": scale, "weight": norm.weight, "bias": norm.bias}
    reason = cuda.why_not(tensors | {"pending": pending, "counters": counters})
    return unfit(x, scale, norm, how, observer) if reason is None else reason


def unfit(x: Tensor, scale: Tensor, norm: Norm, how: Rounding, observer: Observer | None) -> str | None:
    """What of the arguments, wherever they are, the kernel does not take; or None."""
    for name, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None and vector.dtype not in INPUT_TYPES:
            return f"{name} is {vector.dtype}: this kernel takes fp32, bf16 and fp16"
        if vector is not None and vector.shape != x.shape[1:]:
            return f"{name} is {list(vector.shape)}: x {list(x.shape)} has rows of {x.shape[1]}"
    if how.block.name not in BLOCKS:
        return f"the block is {how.block.name!r}: this kernel takes {', '.join(map(repr, BLOCKS))}"
    if x.numel() == 0:
        return f"x is {list(x.shape)}: it has no elements"
    return quantize_cuda.unfit(x, scale, how, observer)


def norm_quantize(
    x: Tensor, scale: Tensor, norm: Norm, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> Normed:
    """Codes of the normalised rows of x; see reference.py for every argument."""
    out = quantize_cuda.results(x, scale, how, transpose=transpose)
    x, scale = quantize_cuda.rows_in_memory(x), scale.contiguous()
    weight = None if norm.weight is None else norm.weight.detach().contiguous()
    bias = None if norm.bias is None else norm.bias.detach().contiguous()
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if norm.center else None
    with cuda.on(x.device):
        error = _cuda.norm_quantize(
            quantize_cuda.arguments(x, scale, how, out, observer),
            0 if weight is None else weight.data_ptr(),
            0 if weight is None else INPUT_TYPES[weight.dtype],
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else INPUT_TYPES[bias.dtype],
            norm.eps,
            norm.offset,
            norm.center,
            rstd.data_ptr(),
            0 if mean is None else mean.data_ptr(),
        )
    cuda.check(error, "norm_quantize")
    return Normed(out, rstd, mean)
