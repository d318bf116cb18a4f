"""What quantize means, in plain torch.

source  delayed and current scaling as in NVIDIA TransformerEngine's user guide; OCP OFP8 rev 1.0; arXiv 2409.16626
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...scaling.block import Block
from ...scaling.rules import scale_from_amax
from . import Observer, Quantized, Rounding
from .carrier import recoding, scale_of_codes, usable


def why_not(
    x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> str | None:
    """The reference takes everything that the verb takes, and a tensor without elements."""
    return None


def quantize(
    x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> Quantized:
    """Round x to codes of x / scale, block by block.

    x         fp32, bf16 or fp16 [M, K], any strides
    scale     fp32 [M / rows, K / cols]; 0 stands for "not known": that block takes the scale of its own amax
    returns   Quantized; counts are int64 [4]: elements, saturated, flushed to zero, not finite
    observer  is raised and added to in place
    """
    fmt, block = how.fmt, how.block
    x = x.float()  # [M, K] exact
    bits = patches(x, block).abs().view(torch.int32)  # NaN > Inf > finite, as integers
    amax = bits.amax(dim=(1, 3)).view(torch.float32)  # [R, C]
    finite = patches(torch.where(x.isfinite(), x.abs(), 0.0), block).amax(dim=(1, 3))  # [R, C]
    own = scale_from_amax(finite, how.target, margin=how.margin, power_of_two=how.power_of_two)
    scale = torch.where(scale == 0, own, scale)  # [R, C]
    if how.carrier is not None:
        scale = usable(scale, how.carrier)
    y = x / spread(scale, x.shape[0], x.shape[1])  # [M, K]
    codes = fmt.encode(y, saturate=how.saturate)  # [M, K]
    is_zero = (codes & 0x7F == 0) & (codes != fmt.nan_code)
    saturated = (y.abs() >= fmt.overflow_at) & ~x.isnan()
    flushed = is_zero & (x != 0) & x.isfinite()
    if how.carrier is not None:
        carried = recoding(fmt, how.carrier, x.device)
        saturated = saturated | carried.above[codes.long()]
        flushed = flushed | carried.below[codes.long()]
        codes, scale = carried.codes[codes.long()], scale_of_codes(scale, how.carrier)
    counts = torch.stack(
        [torch.tensor(x.numel(), device=x.device), saturated.sum(), flushed.sum(), (~x.isfinite()).sum()]
    )
    if observer is not None:
        worst = bits.amax().view(torch.float32)
        observer.pending.copy_(torch.where(worst.isfinite(), observer.pending.maximum(worst), observer.pending))
        observer.counters.add_(counts)
    return Quantized(codes, codes.t().contiguous() if transpose else None, scale, amax, counts)


def patches(x: Tensor, block: Block) -> Tensor:
    """[M, K] -> [R, rows, C, cols], a view where the strides allow it."""
    grid_rows, grid_cols = block.grid(x.shape[0], x.shape[1])
    rows, cols = block.patch(x.shape[0], x.shape[1])
    return x.reshape(grid_rows, rows, grid_cols, cols)


def spread(scale: Tensor, rows: int, cols: int) -> Tensor:
    """[R, C] -> [M, K]: each scale over the elements of its patch."""
    return scale.repeat_interleave(rows // scale.shape[0], 0).repeat_interleave(cols // scale.shape[1], 1)
