"""quantize on CPU cores: the compiled kernels of csrc/quantize (AVX-512, AVX2 or plain C++, chosen at run time).

method  one pass over memory where the scale is given; a block without a scale is read for its amax first, from the
        cache where it fits. README.md tells the ideas
limits  CPU tensors of fp32, bf16 or fp16; x whose rows are not contiguous is copied first
equal   codes, scale, amax, counts and observer are those of the reference to the bit: the quotient is the correctly
        rounded one, and rounding to codes is integer arithmetic or one exact addition
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import HIF8
from ..compiled import load
from . import Observer, Quantized, Rounding
from .carrier import LARGEST_SHIFT, scale_of_codes

_cpu, MISSING = load("_cpu")

NO_CARRIER = -1  # kNoCarrier of csrc/quantize/carrier.h
INPUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # InputType of csrc/quantize/quantize.h


def why_not(
    x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if _cpu is None:
        return MISSING
    if not (x.is_cpu and scale.is_cpu):
        return f"x is on {x.device} and scale on {scale.device}: this kernel takes CPU tensors"
    if x.dtype not in INPUT_TYPES:
        return f"x is {x.dtype}: this kernel takes fp32, bf16 and fp16"
    if scale.dtype != torch.float32:
        return f"scale is {scale.dtype}: it is fp32"
    if x.layout != torch.strided or x.is_conj():
        return f"x has layout {x.layout}: this kernel takes strided tensors"
    if how.carrier is not None and (how.fmt is not HIF8 or not 0 <= how.carrier <= LARGEST_SHIFT):
        return f"a carrier of {how.fmt.name} with k = {how.carrier}: this kernel knows hif8 with 0 to {LARGEST_SHIFT}"
    if observer is not None and not (
        _is_state(observer.pending, torch.float32) and _is_state(observer.counters, torch.int64)
    ):
        return "the observer is not contiguous fp32 and int64 CPU tensors"
    return None


def _is_state(x: Tensor, dtype: torch.dtype) -> bool:
    return x.is_cpu and x.dtype == dtype and x.is_contiguous()


def quantize(
    x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> Quantized:
    """Round x to codes of x / scale, block by block; see reference.py for every argument.

    raises   ValueError if the block does not divide x, or scale is not on its grid
    """
    grid = how.block.grid(*x.shape)
    if tuple(scale.shape) != grid:
        raise ValueError(
            f"scale is {list(scale.shape)}: block {how.block.name!r} of x {list(x.shape)} has {list(grid)}"
        )
    rows, cols = x.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    codes_t = torch.empty(cols, rows, dtype=torch.uint8) if transpose else None
    used, amax = torch.empty(grid, dtype=torch.float32), torch.empty(grid, dtype=torch.float32)
    out = Quantized(codes, codes_t, used, amax, torch.empty(4, dtype=torch.int64))
    return quantize_into(x, scale, how, out, observer=observer)


def quantize_into(
    x: Tensor, scale: Tensor, how: Rounding, out: Quantized, *, observer: Observer | None = None
) -> Quantized:
    """The same into tensors that are there already, contiguous; large fresh ones cost more than filling them."""
    rows, cols = x.shape
    grid_rows, grid_cols = scale.shape
    if x.numel() == 0:
        scale = torch.where(scale == 0, 1.0, scale)
        out.scale.copy_(scale if how.carrier is None else scale_of_codes(scale, how.carrier))
        out.amax.zero_()
        out.counts.zero_()
        return out
    if x.stride(1) != 1 and cols > 1:
        x = x.contiguous()
    scale = scale.contiguous()
    _cpu.quantize(
        x.data_ptr(),
        INPUT_TYPES[x.dtype],
        rows,
        cols,
        x.stride(0) if rows > 1 else cols,
        grid_rows,
        grid_cols,
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
        torch.get_num_threads(),
        NO_CARRIER if how.carrier is None else how.carrier,
    )
    return out
