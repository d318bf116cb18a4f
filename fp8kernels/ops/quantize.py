"""The verb quantize: a tensor to codes and scales."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import E4M3, Format, get_format
from ..kernels.quantize import Observer, Quantized, Rounding
from ..kernels.quantize import carrier as carriers
from ..scaling.block import Block, get_block
from ..scaling.qtensor import QTensor
from . import check
from .library import register
from .table import choose

OVERFLOWS = ("saturate", "native")


class Stats(NamedTuple):
    """What quantize saw.

    amax    fp32, the largest |x| of each block, on the grid of the scales; NaN or Inf where the block holds one
    counts  int64 [4]: elements, saturated, flushed to zero, not finite. With a carrier what it cannot hold is counted
            as saturated (above) and flushed (below); see docs/NUMERICS.md
    """

    amax: Tensor
    counts: Tensor


def quantize(
    x: Tensor,
    fmt: Format | str,
    *,
    block: Block | str = "tensor",
    scale: Tensor | float | None = None,
    target: float | None = None,
    margin: int = 0,
    power_of_two: bool = False,
    overflow: str = "saturate",
    transpose: bool = False,
    carrier: bool = False,
) -> QTensor:
    """Round a tensor to 8-bit codes and the scales that decode them.

    x             [..., K] fp32, bf16 or fp16, any strides, also empty; seen as [M, K] with leading dimensions flattened
    fmt           "hif8", "e4m3", "e5m2" or a Format
    block         which elements share a scale: "tensor", "row", "1x128", "128x128"
    scale         given scales, fp32 [M / rows, K / cols] or a number; None takes amax / target of each block
    target        where amax lands without given scales; the format's own by default (HiF8 15, E4M3 448, E5M2 57344)
    margin        binades of head-room above amax
    power_of_two  round scales made here up to a power of two
    overflow      "saturate": ±Inf and overflow become ±max. "native": Inf, or NaN where the format has no Inf
    transpose     keep the transposed codes too (the QTensor's `t()` is then contiguous)
    carrier       HiF8 for FP8 tensor cores: x is rounded to HiF8, and the values are written as E4M3 codes of
                  value * 2**k (k = 4 with target 15, 1 with 224). The QTensor's fmt is then E4M3, and its scale that
                  of HiF8 times 2**-k. What E4M3 cannot hold is counted: values below 1.2e-5 of amax, and, where a
                  given scale is stale, those beyond 448 * 2**-k, which saturate
    returns       QTensor; codes uint8 of x's shape
    error         E4M3: |x - decoded| <= max(2**-4 * |x|, 2**-10 * scale) below overflow; HiF8: docs/NUMERICS.md
    raises        TypeError for other dtypes; ValueError if the block does not divide x, a name is unknown, a scale has
                  the wrong shape or is not positive and finite, or carrier is asked for a format without one or with
                  overflow="native"
    source        OCP OFP8 rev 1.0 (E4M3, E5M2); arXiv 2409.16626 (HiF8)
    """
    return quantize_with_stats(
        x,
        fmt,
        block=block,
        scale=scale,
        target=target,
        margin=margin,
        power_of_two=power_of_two,
        overflow=overflow,
        transpose=transpose,
        carrier=carrier,
    )[0]


def quantize_with_stats(
    x: Tensor,
    fmt: Format | str,
    *,
    block: Block | str = "tensor",
    scale: Tensor | float | None = None,
    target: float | None = None,
    margin: int = 0,
    power_of_two: bool = False,
    overflow: str = "saturate",
    transpose: bool = False,
    carrier: bool = False,
) -> tuple[QTensor, Stats]:
    """`quantize`, and what it saw in the same pass: amax, and how many elements saturated or were flushed to zero."""
    fmt, block = get_format(fmt), get_block(block)
    check.float_tensor(x, "quantize")
    check.one_of("quantize", "overflow", overflow, OVERFLOWS)
    if target is not None and not target > 0:
        raise ValueError(f"quantize: target is {target}, it must be positive")
    target = fmt.target if target is None else float(target)
    k = carrier_shift(fmt, target, overflow) if carrier else None
    grid = block.grid(*check.matrix_shape(x))
    given = torch.zeros(grid, dtype=torch.float32, device=x.device) if scale is None else given_scale(scale, grid, x)
    codes, codes_t, scale_out, amax, counts = torch.ops.fp8kernels.quantize(
        x.detach(),
        given,
        fmt.name,
        block.name,
        target,
        margin,
        power_of_two,
        overflow == "saturate",
        transpose,
        k,
    )
    codes_t = codes_t if transpose else None
    return QTensor(codes, scale_out, fmt if k is None else E4M3, block, codes_t), Stats(amax, counts)


def carrier_shift(fmt: Format, target: float, overflow: str = "saturate") -> int:
    """The k of the carrier of a format whose amax lands at target.

    raises   ValueError if there is none: another format than HiF8, a target beyond E4M3, or overflow="native"
    """
    reason = carriers.why_not(fmt, target)
    if reason is None and overflow != "saturate":
        reason = f"a carrier saturates, overflow={overflow!r} would have to make Inf, which E4M3 has not"
    if reason is not None:
        raise ValueError(f"quantize: carrier=True: {reason}")
    return carriers.shift(target)


def given_scale(scale: Tensor | float, grid: tuple[int, int], x: Tensor) -> Tensor:
    """The user's scales on the block's grid."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=None if isinstance(scale, Tensor) else x.device)
    check.same_device("quantize", x=x, scale=scale)
    if scale.numel() == 1 and grid == (1, 1):
        scale = scale.reshape(1, 1)
    if tuple(scale.shape) != grid:
        raise ValueError(f"quantize: scale has shape {tuple(scale.shape)}, x of shape {tuple(x.shape)} needs {grid}")
    if scale.device.type == "cpu" and not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError("quantize: a given scale is zero, negative or not finite; x ≈ code * scale needs scale > 0")
    return scale


@functools.lru_cache(maxsize=256)  # a model has few; looking up names costs as much as a small kernel
def rounding_of(
    fmt: str, block: str, target: float, margin: int, power_of_two: bool, saturate: bool, carrier: int | None
) -> Rounding:
    return Rounding(get_format(fmt), get_block(block), target, margin, power_of_two, saturate, carrier)


def run_quantize(
    x: Tensor,
    scale: Tensor,
    fmt: str,
    block: str,
    target: float,
    margin: int,
    power_of_two: bool,
    saturate: bool,
    transpose: bool,
    carrier: int | None = None,
    *,
    observer: Observer | None = None,
) -> Quantized:
    """Choose a kernel and run it on x seen as a matrix; a tensor without elements needs none."""
    matrix = x.reshape(check.matrix_shape(x))  # [M, K]
    how = rounding_of(fmt, block, target, margin, power_of_two, saturate, carrier)
    if not x.numel():
        codes = torch.empty(matrix.shape, dtype=torch.uint8, device=x.device)
        codes_t = codes.t().contiguous() if transpose else None
        counts = torch.zeros(4, dtype=torch.int64, device=x.device)
        scale = torch.where(scale == 0, 1.0, scale)
        if carrier is not None:
            scale = carriers.scale_of_codes(scale, carrier)
        return Quantized(codes, codes_t, scale, scale.new_zeros(scale.shape), counts)
    kernel = choose("quantize", matrix, scale, how, transpose=transpose, observer=observer)
    out: Quantized = kernel.run(matrix, scale, how, transpose=transpose, observer=observer)
    return out


def _quantize(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = run_quantize(x, *args)
    return out.codes.reshape(x.shape), _or_empty(out), out.scale, out.amax, out.counts


def _or_empty(out: Quantized) -> Tensor:
    """The transposed codes, or the empty tensor that stands for None in a schema."""
    return out.codes.new_empty(0) if out.codes_t is None else out.codes_t


def _quantize_fake(
    x: Tensor,
    scale: Tensor,
    fmt: str,
    block: str,
    target: float,
    margin: int,
    power_of_two: bool,
    saturate: bool,
    transpose: bool,
    carrier: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes, codes_t = _empty_codes(x, transpose)
    return codes, codes_t, torch.empty_like(scale), torch.empty_like(scale), x.new_empty(4, dtype=torch.int64)


def _empty_codes(x: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    rows, cols = check.matrix_shape(x)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, codes.new_empty((cols, rows) if transpose else 0)


def _observed(
    x: Tensor,
    scale: Tensor,
    pending: Tensor,
    counters: Tensor,
    fmt: str,
    block: str,
    target: float,
    margin: int,
    power_of_two: bool,
    saturate: bool,
    transpose: bool,
    carrier: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, transposed codes, amax; under inference mode nothing is noted."""
    observer = None if torch.is_inference_mode_enabled() else Observer(pending, counters)
    how = (fmt, block, target, margin, power_of_two, saturate, transpose, carrier)
    out = run_quantize(x, scale, *how, observer=observer)
    return out.codes.reshape(x.shape), out.scale, _or_empty(out), out.amax


def _observed_fake(
    x: Tensor,
    scale: Tensor,
    pending: Tensor,
    counters: Tensor,
    fmt: str,
    block: str,
    target: float,
    margin: int,
    power_of_two: bool,
    saturate: bool,
    transpose: bool,
    carrier: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, codes_t = _empty_codes(x, transpose)
    return codes, torch.empty_like(scale), codes_t, torch.empty_like(scale)


_HOW = "str fmt, str block, float target, int margin, bool power_of_two, bool saturate"
register(
    f"quantize(Tensor x, Tensor scale, {_HOW}, bool transpose, int? carrier=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
register(
    f"quantize_observed(Tensor x, Tensor scale, Tensor(a!) pending, Tensor(b!) counters, {_HOW}, "
    "bool transpose, int? carrier=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _observed,
    _observed_fake,
)
