"""norm_quantize in Triton: NVIDIA GPUs from sm_80 on, AMD's gfx950, and CPU tensors in Triton's interpreter.

method  row_kernel keeps a row in registers from its statistics to its codes, so that x is read once. Where it cannot
        (rows beyond LARGEST_ROW, other blocks than tensor, row and parts of a row, transposed codes) statistics_kernel
        finds rstd and mean, and the kernels of quantize make y of them where they would read x
limits  x whose rows are not contiguous is copied first
equal   to quantize of the same y to the bit; y differs from the reference's by the order of the sums
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import Observer, Rounding
from ..quantize import triton_jit as quantize_triton
from ..quantize.tile.triton_jit import (
    STATE,
    Source,
    finish,
    finite_size,
    load_tile,
    normalise,
    quantize_tile,
    scale_of_codes,
    sink,
    size_of,
    store_codes,
    usable_scale,
)
from ..quantize.triton_jit import INPUT_TYPES, PROGRAMS, USUAL_TILE, WARPS, pow2, row_stride, with_plain_rows
from ..triton_jit import jit, number_of, processors, scale_from_amax, triton
from ..triton_jit import why_not as why_not_here
from . import Norm, Normed

if triton is not None:
    import triton.language as tl

LARGEST_ROW = 8192  # elements that stay in the registers of 8 warps, 32 a thread


def why_not(
    x: Tensor, scale: Tensor, norm: Norm, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    reason = quantize_triton.why_not(x, scale, how, transpose=transpose, observer=observer)
    return reason or why_not_norm(x, norm)


def why_not_norm(x: Tensor, norm: Norm) -> str | None:
    """Why weight or bias of a norm cannot be read by a kernel, or None."""
    reason = why_not_here({"x": x, "weight": norm.weight, "bias": norm.bias})
    if reason is not None:
        return reason
    for name, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None and vector.dtype not in INPUT_TYPES:
            return f"{name} is {vector.dtype}: this kernel takes fp32, bf16 and fp16"
    return None


def norm_quantize(
    x: Tensor, scale: Tensor, norm: Norm, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> Normed:
    """Codes of the normalised rows of x; see reference.py for every argument.

    raises   ValueError if the block does not divide x, or scale is not on its grid
    """
    rows, cols = x.shape
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device) if norm.center else None
    out = Normed(quantize_triton.empty(x, scale, how, transpose=transpose), rstd, mean)
    if x.numel() == 0:
        quantize_triton.nothing(scale, out.quantized)
        return out
    x = with_plain_rows(x)
    source = with_vectors(Source(x, row_stride(x)), norm)
    with torch.cuda.device_of(x):
        if stays_in_registers(cols, how, transpose=transpose):
            launch_rows(source, scale, norm, how, out, observer)
        else:
            launch_statistics(source, norm, out)
            source = source._replace(rstd=rstd, mean=mean)
            quantize_triton.launch(source, scale, how, out.quantized, observer)
    return out


def with_vectors(source: Source, norm: Norm) -> Source:
    """The source with weight, offset and bias of the norm."""
    if norm.weight is not None:
        source = source._replace(weight=norm.weight.contiguous(), offset=float(norm.offset))
    return source if norm.bias is None else source._replace(bias=norm.bias.contiguous())


def stays_in_registers(cols: int, how: Rounding, *, transpose: bool) -> bool:
    """Whether row_kernel takes rows of that length."""
    patch = how.block.cols or pow2(cols)
    one_scale = how.block.rows is None and how.block.cols is None
    return cols <= LARGEST_ROW and not transpose and (one_scale or (how.block.rows == 1 and patch == pow2(patch)))


def launch_rows(
    source: Source, scale: Tensor, norm: Norm, how: Rounding, out: Normed, observer: Observer | None
) -> None:
    rows, cols = source.x.shape
    width = pow2(cols)
    height = min(max(1, USUAL_TILE // width), pow2(rows))
    groups = triton.cdiv(rows, height)
    programs = min(groups, PROGRAMS * processors(source.x.device))
    shape = {"CENTER": norm.center, "TILE_ROWS": height, "TILE_COLS": width, "num_warps": WARPS}
    one_scale = how.block.rows is None
    state = torch.zeros(STATE, dtype=torch.int64, device=source.x.device)
    amaxes = torch.empty(programs, dtype=torch.int32, device=source.x.device) if one_scale else None
    if one_scale:
        norm_amax_kernel[(programs,)](source, scale, amaxes, rows, cols, groups, norm.eps, **shape)
    row_kernel[(programs,)](
        source, scale.contiguous(), amaxes, sink(out.quantized, state, observer), out.rstd, out.mean,
        rows, cols, groups, norm.eps, how.target, 2.0**how.margin,
        PATCH=0 if one_scale else how.block.cols or width, AMAXES=pow2(programs), FMT=how.fmt.code_id,
        SATURATE=how.saturate, POWER_OF_TWO=how.power_of_two, CARRIER=how.carrier, **shape,
    )  # fmt: skip


def launch_statistics(source: Source, norm: Norm, out: Normed) -> None:
    rows, cols = source.x.shape
    width = min(pow2(cols), USUAL_TILE)
    height = min(USUAL_TILE // width, pow2(rows))
    statistics_kernel[(triton.cdiv(rows, height),)](
        source, out.rstd, out.mean, rows, cols, norm.eps, TILE_ROWS=height, TILE_COLS=width, num_warps=WARPS
    )


@jit
def norm_amax_kernel(  # type: ignore[no-untyped-def]
    source, scale_ptr, amaxes_ptr, rows, cols, groups, eps,
    CENTER: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """The largest finite |y| that each program meets, 0 where the scale is given."""
    amax = 0
    if tl.load(scale_ptr) == 0:
        for group in range(tl.program_id(0), groups, tl.num_programs(0)):
            row, col, mask = rows_at(group, rows, cols, TILE_ROWS, TILE_COLS)
            y, _, _ = norm_tile(source, row, col, mask, cols, eps, CENTER)
            amax = tl.maximum(amax, tl.max(finite_size(y)))
    tl.store(amaxes_ptr + tl.program_id(0), amax)


@jit
def row_kernel(  # type: ignore[no-untyped-def]
    source, scale_ptr, amaxes_ptr, sink, rstd_ptr, mean_ptr, rows, cols, groups, eps, target, headroom,
    PATCH: tl.constexpr, AMAXES: tl.constexpr, FMT: tl.constexpr, SATURATE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    CARRIER: tl.constexpr, CENTER: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Whole rows, under one scale (PATCH 0) or with a scale for each PATCH columns of a row."""
    if PATCH == 0:
        at = tl.arange(0, AMAXES)
        amax = number_of(tl.max(tl.load(amaxes_ptr + at, mask=at < tl.num_programs(0), other=0)))
        own = scale_from_amax(amax, target, headroom, POWER_OF_TWO)
        scale = usable_scale(tl.load(scale_ptr), own, CARRIER)
        if tl.program_id(0) == 0:
            tl.store(sink.scale, scale_of_codes(scale, CARRIER))
    worst, saturated, flushed, nonfinite = 0, 0, 0, 0
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        row, col, mask = rows_at(group, rows, cols, TILE_ROWS, TILE_COLS)
        y, rstd, mean = norm_tile(source, row, col, mask, cols, eps, CENTER)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
        if CENTER:
            tl.store(mean_ptr + row, mean, mask=row < rows)
        if PATCH != 0:
            across: tl.constexpr = TILE_COLS // PATCH
            y = tl.reshape(y, [TILE_ROWS, across, PATCH])
            amax = tl.max(size_of(y), axis=2)  # [rows, across]
            patch = tl.arange(0, across)
            patches = tl.cdiv(cols, PATCH)
            slot = row[:, None] * patches + patch[None, :]
            is_slot = (row < rows)[:, None] & (patch < patches)[None, :]
            own = scale_from_amax(number_of(tl.max(finite_size(y), axis=2)), target, headroom, POWER_OF_TWO)
            scale = usable_scale(tl.load(scale_ptr + slot, mask=is_slot, other=1.0), own, CARRIER)
            tl.store(sink.scale + slot, scale_of_codes(scale, CARRIER), mask=is_slot)
            tl.store(sink.amax + slot, number_of(amax), mask=is_slot)
            worst = tl.maximum(worst, tl.max(amax))
            codes, marks, strange = quantize_tile(y, scale[:, :, None], FMT, SATURATE, CARRIER)
            codes = tl.reshape(codes, [TILE_ROWS, TILE_COLS])
        else:
            worst = tl.maximum(worst, tl.max(size_of(y)))
            codes, marks, strange = quantize_tile(y, scale, FMT, SATURATE, CARRIER)
        store_codes(codes, sink, row, col, mask, rows, cols)
        mark = tl.sum(marks)
        saturated += mark & 0xFFFF
        flushed += mark >> 16
        nonfinite += tl.sum(strange)
    finish(sink, worst, saturated, flushed, nonfinite, tl.cast(rows, tl.int64) * cols, PATCH == 0)


@jit
def rows_at(group, rows, cols, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows and columns of whole rows, int64, and which of the elements are there."""
    row = tl.cast(group, tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = tl.cast(tl.arange(0, TILE_COLS), tl.int64)
    return row, col, (row < rows)[:, None] & (col < cols)[None, :]


@jit
def norm_tile(source, row, col, mask, cols, eps, CENTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """y [rows, cols], rstd [rows] and mean [rows] of whole rows; without CENTER the mean is 0."""
    x = load_tile(source, row, col, mask, 0)
    mean = tl.zeros([x.shape[0]], tl.float32)
    centered = x
    if CENTER:
        mean = mean_of(tl.sum(x, axis=1), cols)
        centered = tl.where(mask, x - mean[:, None], 0.0)
    rstd = reciprocal_root(mean_of(tl.sum(centered * centered, axis=1), cols) + eps)
    return normalise(x, mean[:, None], rstd[:, None], source, col, mask), rstd, mean


@jit
def mean_of(total, count):  # type: ignore[no-untyped-def]
    return tl.div_rn(total, tl.cast(count, tl.float32))  # "/" may be approximate


@jit
def reciprocal_root(x):  # type: ignore[no-untyped-def]
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))  # rsqrt is approximate


@jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    source, rstd_ptr, mean_ptr, rows, cols, eps, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr
):
    """rstd and, where it is wanted, mean of rows of any length; LayerNorm reads them twice."""
    row = tl.cast(tl.program_id(0), tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    mean = tl.zeros([TILE_ROWS], tl.float32)
    if mean_ptr is not None:
        for start in range(0, cols, TILE_COLS):
            col = tl.cast(start, tl.int64) + tl.arange(0, TILE_COLS)
            mask = (row < rows)[:, None] & (col < cols)[None, :]
            mean += tl.sum(load_tile(source, row, col, mask, 0), axis=1)
        mean = mean_of(mean, cols)
        tl.store(mean_ptr + row, mean, mask=row < rows)
    square = tl.zeros([TILE_ROWS], tl.float32)
    for start in range(0, cols, TILE_COLS):
        col = tl.cast(start, tl.int64) + tl.arange(0, TILE_COLS)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        centered = tl.where(mask, load_tile(source, row, col, mask, 0) - mean[:, None], 0.0)
        square += tl.sum(centered * centered, axis=1)
    tl.store(rstd_ptr + row, reciprocal_root(mean_of(square, cols) + eps), mask=row < rows)
