"""quantize on an NVIDIA GPU: the compiled kernels of csrc/quantize/quantize.cu.

method  one read of x where the scales are given or a block of scales fits a tile of 16,384 elements; a larger block
        without a scale is read for its amax first, which the GPU decides. Codes transposed are written on the way for
        one scale a tensor and for 128x128. README.md tells the ideas
limits  sm_80 and newer; CUDA tensors of fp32, bf16 or fp16; x whose rows are not contiguous is copied first. Rows that
        do not start every 16 bytes are read element by element, several times slower
equal   codes, scale, amax, counts and observer are those of the reference to the bit: the quotient is the correctly
        rounded one, and rounding to codes is a look-up or one exact addition
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import HIF8
from .. import cuda
from ..compiled import load
from . import Observer, Quantized, Rounding
from .carrier import LARGEST_SHIFT, scale_of_codes
from .cpu import INPUT_TYPES, NO_CARRIER

_cuda, _ = load("_cuda")


def why_not(
    x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    pending, counters = (None, None) if observer is None else observer
    reason = cuda.why_not({"x": x, "scale": scale, "pending": pending, "counters": counters})
    return unfit(x, scale, how, observer) if reason is None else reason


def unfit(x: Tensor, scale: Tensor, how: Rounding, observer: Observer | None) -> str | None:
    """What of the arguments, wherever they are, the kernels do not take; or None."""
    if x.dtype not in INPUT_TYPES:
        return f"x is {x.dtype}: this kernel takes fp32, bf16 and fp16"
    if scale.dtype != torch.float32:
        return f"scale is {scale.dtype}: it is fp32"
    if x.layout != torch.strided:
        return f"x has layout {x.layout}: this kernel takes strided tensors"
    if how.carrier is not None and (how.fmt is not HIF8 or not 0 <= how.carrier <= LARGEST_SHIFT):
        return f"a carrier of {how.fmt.name} with k = {how.carrier}: this kernel knows hif8 with 0 to {LARGEST_SHIFT}"
    if observer is not None:
        for name, state, dtype in zip(Observer._fields, observer, (torch.float32, torch.int64), strict=True):
            if state.dtype != dtype or not state.is_contiguous():
                return f"the observer's {name} is {state.dtype}: it is a contiguous tensor of {dtype}"
    return None


def quantize(
    x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> Quantized:
    """Round x to codes of x / scale, block by block; see reference.py for every argument.

    raises   ValueError if the block does not divide x, or scale is not on its grid; RuntimeError if nothing started
    """
    return quantize_into(x, scale, how, results(x, scale, how, transpose=transpose), observer=observer)


def results(x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool) -> Quantized:
    """Memory for what a call returns.

    raises   ValueError if the block does not divide x, or scale is not on its grid
    """
    grid = how.block.grid(*x.shape)
    if tuple(scale.shape) != grid:
        raise ValueError(
            f"scale is {list(scale.shape)}: block {how.block.name!r} of x {list(x.shape)} has {list(grid)}"
        )
    rows, cols = x.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=x.device)
    codes_t = torch.empty(cols, rows, dtype=torch.uint8, device=x.device) if transpose else None
    counts = torch.empty(4, dtype=torch.int64, device=x.device)
    return Quantized(codes, codes_t, scale.new_empty(grid), scale.new_empty(grid), counts)


def quantize_into(
    x: Tensor, scale: Tensor, how: Rounding, out: Quantized, *, observer: Observer | None = None
) -> Quantized:
    """The same into tensors that are there already, contiguous."""
    if x.numel() == 0:
        scale = torch.where(scale == 0, 1.0, scale)
        out.scale.copy_(scale if how.carrier is None else scale_of_codes(scale, how.carrier))
        out.amax.zero_()
        out.counts.zero_()
        return out
    x, scale = rows_in_memory(x), scale.contiguous()
    with cuda.on(x.device):
        error = _cuda.quantize(*arguments(x, scale, how, out, observer))
    cuda.check(error, "quantize")
    return out


def rows_in_memory(x: Tensor) -> Tensor:
    """x [M, K] with neighbours along K next to each other; a copy where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def arguments(
    x: Tensor, scale: Tensor, how: Rounding, out: Quantized, observer: Observer | None
) -> tuple[int | float | bool, ...]:
    """What python/quantize_cuda.h reads; the tensors have to outlive the launch."""
    rows, cols = x.shape
    return (
        x.data_ptr(),
        INPUT_TYPES[x.dtype],
        rows,
        cols,
        x.stride(0) if rows > 1 else cols,
        *scale.shape,
        scale.data_ptr(),
        out.scale.data_ptr(),
        out.amax.data_ptr(),
        out.codes.data_ptr(),
        0 if out.codes_t is None else out.codes_t.data_ptr(),
        out.counts.data_ptr(),
        0 if observer is None else observer.pending.data_ptr(),
        0 if observer is None else observer.counters.data_ptr(),
        how.fmt.code_id,
        how.target,
        2.0**how.margin,
        how.power_of_two,
        how.saturate,
        NO_CARRIER if how.carrier is None else how.carrier,
        cuda.workspace(x.device).data_ptr(),
        cuda.processors(x.device),
        cuda.stream(x.device),
    )
