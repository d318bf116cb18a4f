"""quantize in Triton: NVIDIA GPUs from sm_80 on, AMD's gfx950, and CPU tensors in Triton's interpreter.

method  programs that stay and go through tiles of x. Patches that fit in a tile are read once and kept in registers for
        their own amax; larger ones are read again if they have no scale. For one scale over the whole tensor a first
        kernel takes the amax, and returns at once if the scale is given. README.md tells the ideas
limits  fp32, bf16 or fp16; x whose rows are not contiguous is copied first
equal   codes, scale, amax, counts and observer are those of the reference to the bit: the quotient is the correctly
        rounded one, and rounding to codes is arithmetic on its bits
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..triton_jit import jit, number_of, processors, scale_from_amax, triton
from ..triton_jit import why_not as why_not_here
from . import Observer, Quantized, Rounding
from .tile.triton_jit import (
    STATE,
    Source,
    finish,
    finite_size,
    load_tile,
    quantize_tile,
    scale_of_codes,
    sink,
    size_of,
    store_codes,
    usable_scale,
)

if triton is not None:
    import triton.language as tl

INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 8
USUAL_TILE = 4096  # elements, 16 a thread
LARGEST_TILE = 8192  # 32 a thread; with more, registers spill
TRANSPOSED_SIDE = 64  # rows of a tile that is written transposed too: its columns are runs of 64 bytes
PROGRAMS = 8  # for each multiprocessor, which holds no more than that many of 8 warps


class Tile(NamedTuple):
    """What a program handles at a time.

    apart  every row of the tile belongs to a patch of its own; else all of the tile belongs to one
    whole  the patch fits, so that x is read once
    """

    rows: int
    cols: int
    apart: bool
    whole: bool


def why_not(
    x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    pending, counters = observer or (None, None)
    reason = why_not_here({"x": x, "scale": scale, "pending": pending, "counters": counters})
    if reason is not None:
        return reason
    if x.dtype not in INPUT_TYPES:
        return f"x is {x.dtype}: this kernel takes fp32, bf16 and fp16"
    if scale.dtype != torch.float32:
        return f"scale is {scale.dtype}: it is fp32"
    if x.layout != torch.strided or x.is_conj():
        return f"x has layout {x.layout}: this kernel takes strided tensors"
    if observer is not None and not (_is_state(pending, torch.float32) and _is_state(counters, torch.int64)):
        return "the observer is not contiguous fp32 and int64 tensors"
    return None


def _is_state(x: Tensor | None, dtype: torch.dtype) -> bool:
    return x is not None and x.dtype == dtype and x.is_contiguous()


def quantize(
    x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False, observer: Observer | None = None
) -> Quantized:
    """Round x to codes of x / scale, block by block; see reference.py for every argument.

    raises   ValueError if the block does not divide x, or scale is not on its grid
    """
    return quantize_into(x, scale, how, empty(x, scale, how, transpose=transpose), observer=observer)


def empty(x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool) -> Quantized:
    """What the result for x [M, K] is written into.

    raises   ValueError if the block does not divide x, or scale is not on its grid
    """
    rows, cols = x.shape
    grid = how.block.grid(rows, cols)
    if tuple(scale.shape) != grid:
        raise ValueError(
            f"scale is {list(scale.shape)}: block {how.block.name!r} of x {list(x.shape)} has {list(grid)}"
        )
    return Quantized(
        torch.empty(rows, cols, dtype=torch.uint8, device=x.device),
        torch.empty(cols, rows, dtype=torch.uint8, device=x.device) if transpose else None,
        torch.empty(grid, dtype=torch.float32, device=x.device),
        torch.empty(grid, dtype=torch.float32, device=x.device),
        torch.empty(4, dtype=torch.int64, device=x.device),
    )


def quantize_into(
    x: Tensor, scale: Tensor, how: Rounding, out: Quantized, *, observer: Observer | None = None
) -> Quantized:
    """The same into tensors that are there already, contiguous."""
    if x.numel() == 0:
        return nothing(scale, out)
    x = with_plain_rows(x)
    launch(Source(x, row_stride(x)), scale, how, out, observer)
    return out


def nothing(scale: Tensor, out: Quantized) -> Quantized:
    """The result for x without elements."""
    out.scale.copy_(torch.where(scale == 0, 1.0, scale))
    out.amax.zero_()
    out.counts.zero_()
    return out


def with_plain_rows(x: Tensor) -> Tensor:
    """x [M, K], copied if the elements of a row do not follow each other."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def row_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def launch(
    source: Source, scale: Tensor, how: Rounding, out: Quantized, observer: Observer | None, *, activation: int = 0
) -> None:
    """The codes of what source makes, into out [M, K]; activation is its place in kernels.gemm.ACTIVATIONS."""
    constants = {
        "ACTIVATION": activation,
        "FMT": how.fmt.code_id,
        "SATURATE": how.saturate,
        "POWER_OF_TWO": how.power_of_two,
        "CARRIER": how.carrier,
    }
    with torch.cuda.device_of(out.codes):
        if how.block.rows is None and how.block.cols is None:
            launch_tensor(source, scale, how, out, observer, constants)
        else:
            launch_patches(source, scale, how, out, observer, constants)


def launch_tensor(
    source: Source, scale: Tensor, how: Rounding, out: Quantized, observer: Observer | None, constants: dict[str, Any]
) -> None:
    rows, cols = out.codes.shape
    if is_one_row(source, cols) and out.codes_t is None:
        rows, cols = 1, rows * cols
    tile = tensor_tile(rows, cols, transpose=out.codes_t is not None)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    programs = min(tiles, PROGRAMS * processors(out.codes.device))
    state = torch.empty(STATE, dtype=torch.int64, device=out.codes.device)
    amaxes = torch.empty(programs, dtype=torch.int32, device=out.codes.device)
    shape = {"TILE_ROWS": tile.rows, "TILE_COLS": tile.cols, "num_warps": WARPS}
    amax_kernel[(programs,)](
        source, scale, amaxes, state, rows, cols, tiles, ACTIVATION=constants["ACTIVATION"], STATE=STATE, **shape
    )
    tensor_kernel[(programs,)](
        source, scale, amaxes, sink(out, state, observer), rows, cols, tiles, how.target, 2.0**how.margin,
        AMAXES=pow2(programs), **constants, **shape,
    )  # fmt: skip


def launch_patches(
    source: Source, scale: Tensor, how: Rounding, out: Quantized, observer: Observer | None, constants: dict[str, Any]
) -> None:
    rows, cols = out.codes.shape
    patch_rows, patch_cols = how.block.patch(rows, cols)
    tile = patch_tile(patch_rows, patch_cols, rows, transpose=out.codes_t is not None)
    groups = (triton.cdiv(rows, tile.rows) if tile.apart else rows // patch_rows) * (cols // patch_cols)
    programs = min(groups, PROGRAMS * processors(out.codes.device))
    state = torch.zeros(STATE, dtype=torch.int64, device=out.codes.device)
    patch_kernel[(programs,)](
        source, scale.contiguous(), sink(out, state, observer), rows, cols, patch_rows, patch_cols, groups,
        how.target, 2.0**how.margin,
        APART=tile.apart, WHOLE=tile.whole, **constants,
        TILE_ROWS=tile.rows, TILE_COLS=tile.cols, num_warps=WARPS,
    )  # fmt: skip


def is_one_row(source: Source, cols: int) -> bool:
    """Whether the rows follow each other without a gap and nothing is done by row or column: one long row."""
    return source.stride == cols and source.other_stride in (None, cols) and source.rstd is None


def tensor_tile(rows: int, cols: int, *, transpose: bool) -> Tile:
    """The tile for one scale over a tensor of that extent."""
    side = min(TRANSPOSED_SIDE, pow2(rows)) if transpose else max(1, USUAL_TILE // pow2(cols))
    side = min(side, pow2(rows))
    return Tile(side, min(USUAL_TILE // side, pow2(cols)), apart=False, whole=False)


def patch_tile(patch_rows: int, patch_cols: int, rows: int, *, transpose: bool) -> Tile:
    """The tile for patches of that extent in a tensor of so many rows.

    Rows of up to 8,192 elements are whole: they stay in registers. A longer one, or 128x128, is read again if it has no
    scale, and finds itself in the cache. Beside transposed codes a tile has 64 rows: its columns are runs of 64 bytes.
    """
    width = pow2(patch_cols)
    if patch_rows == 1:
        least = min(TRANSPOSED_SIDE if transpose else 1, pow2(rows))
        if least * width <= LARGEST_TILE:
            return Tile(min(max(least, USUAL_TILE // width), pow2(rows)), width, apart=True, whole=True)
        return Tile(least, min(width, USUAL_TILE // least), apart=True, whole=False)
    height = pow2(patch_rows)
    if height * width <= LARGEST_TILE:
        return Tile(height, width, apart=False, whole=True)
    height = min(height, max(TRANSPOSED_SIDE, USUAL_TILE // width))
    return Tile(height, min(width, USUAL_TILE // height), apart=False, whole=False)


def pow2(extent: int) -> int:
    """The next power of two, which the sides of a tile are."""
    return 1 << (extent - 1).bit_length()


@jit
def amax_kernel(  # type: ignore[no-untyped-def]
    source, scale_ptr, amaxes_ptr, state_ptr, rows, cols, tiles,
    ACTIVATION: tl.constexpr, STATE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """The largest finite |y| that each program meets, 0 where the scale is given; and a fresh state."""
    amax = 0
    if tl.load(scale_ptr) == 0:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            row, col, mask = tile_at(tile, rows, cols, TILE_ROWS, TILE_COLS)
            amax = tl.maximum(amax, tl.max(finite_size(load_tile(source, row, col, mask, ACTIVATION))))
    tl.store(amaxes_ptr + tl.program_id(0), amax)
    if tl.program_id(0) == 0:
        for i in tl.static_range(STATE):
            tl.store(state_ptr + i, 0)


@jit
def tensor_kernel(  # type: ignore[no-untyped-def]
    source, scale_ptr, amaxes_ptr, sink, rows, cols, tiles, target, headroom, AMAXES: tl.constexpr,
    ACTIVATION: tl.constexpr, FMT: tl.constexpr, SATURATE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    CARRIER: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """All tiles under one scale: the given one, or that of the largest amax of amax_kernel."""
    at = tl.arange(0, AMAXES)
    amax = number_of(tl.max(tl.load(amaxes_ptr + at, mask=at < tl.num_programs(0), other=0)))
    own = scale_from_amax(amax, target, headroom, POWER_OF_TWO)
    scale = usable_scale(tl.load(scale_ptr), own, CARRIER)
    if tl.program_id(0) == 0:
        tl.store(sink.scale, scale_of_codes(scale, CARRIER))
    worst, saturated, flushed, nonfinite = 0, 0, 0, 0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col, mask = tile_at(tile, rows, cols, TILE_ROWS, TILE_COLS)
        y = load_tile(source, row, col, mask, ACTIVATION)
        codes, marks, strange = quantize_tile(y, scale, FMT, SATURATE, CARRIER)
        store_codes(codes, sink, row, col, mask, rows, cols)
        worst = tl.maximum(worst, tl.max(size_of(y)))
        mark = tl.sum(marks)
        saturated += mark & 0xFFFF
        flushed += mark >> 16
        nonfinite += tl.sum(strange)
    finish(sink, worst, saturated, flushed, nonfinite, tl.cast(rows, tl.int64) * cols, True)


@jit
def tile_at(tile, rows, cols, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows and columns of a tile, int64, and which of its elements are there."""
    across = tl.cdiv(cols, TILE_COLS)
    row = tl.cast(tile // across, tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = tl.cast(tile % across, tl.int64) * TILE_COLS + tl.arange(0, TILE_COLS)
    return row, col, (row < rows)[:, None] & (col < cols)[None, :]


@jit
def patch_kernel(  # type: ignore[no-untyped-def]
    source, scale_ptr, sink, rows, cols, patch_rows, patch_cols, groups, target, headroom,
    APART: tl.constexpr, WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, FMT: tl.constexpr, SATURATE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, CARRIER: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Groups of patches with a scale each: the rows of a tile where they are apart, else one patch."""
    across = cols // patch_cols
    SLOTS: tl.constexpr = TILE_ROWS if APART else 1  # patches of a group, one below the other
    deep = SLOTS if APART else patch_rows  # rows of a group
    steps_across = tl.cdiv(patch_cols, TILE_COLS)
    steps = 1 if WHOLE else tl.cdiv(deep, TILE_ROWS) * steps_across
    worst, saturated, flushed, nonfinite = 0, 0, 0, 0
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        down = tl.cast(group // across, tl.int64) * SLOTS + tl.arange(0, SLOTS)
        top = tl.cast(group // across, tl.int64) * deep
        left = tl.cast(group % across, tl.int64) * patch_cols
        bottom = tl.minimum(top + deep, rows)
        slot, is_slot = down * across + group % across, down * patch_rows < rows
        known = tl.load(scale_ptr + slot, mask=is_slot, other=1.0)
        finite = tl.zeros([SLOTS], tl.int32)
        if WHOLE:
            row, col, mask = patch_at(0, top, left, bottom, patch_cols, steps_across, TILE_ROWS, TILE_COLS)
            y = load_tile(source, row, col, mask, ACTIVATION)
            finite = amax_of(finite_size(y), APART)
        elif tl.max((known == 0).to(tl.int32)) != 0:
            for step in range(steps):
                row, col, mask = patch_at(step, top, left, bottom, patch_cols, steps_across, TILE_ROWS, TILE_COLS)
                more = finite_size(load_tile(source, row, col, mask, ACTIVATION))
                finite = tl.maximum(finite, amax_of(more, APART))
        own = scale_from_amax(number_of(finite), target, headroom, POWER_OF_TWO)
        scale = usable_scale(known, own, CARRIER)  # [SLOTS]
        tl.store(sink.scale + slot, scale_of_codes(scale, CARRIER), mask=is_slot)
        amax = tl.zeros([SLOTS], tl.int32)
        for step in range(steps):
            if not WHOLE:
                row, col, mask = patch_at(step, top, left, bottom, patch_cols, steps_across, TILE_ROWS, TILE_COLS)
                y = load_tile(source, row, col, mask, ACTIVATION)
            codes, marks, strange = quantize_tile(y, scale[:, None], FMT, SATURATE, CARRIER)
            store_codes(codes, sink, row, col, mask, rows, cols)
            amax = tl.maximum(amax, amax_of(size_of(y), APART))
            mark = tl.sum(marks)
            saturated += mark & 0xFFFF
            flushed += mark >> 16
            nonfinite += tl.sum(strange)
        tl.store(sink.amax + slot, number_of(amax), mask=is_slot)
        worst = tl.maximum(worst, tl.max(amax))
    finish(sink, worst, saturated, flushed, nonfinite, tl.cast(rows, tl.int64) * cols, False)


@jit
def patch_at(  # type: ignore[no-untyped-def]
    step, top, left, bottom, patch_cols, steps_across, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr
):
    """Rows and columns of one tile of a patch, int64, and which of its elements are there."""
    row = top + (step // steps_across) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = left + (step % steps_across) * TILE_COLS + tl.arange(0, TILE_COLS)
    return row, col, (row < bottom)[:, None] & (col < left + patch_cols)[None, :]


@jit
def amax_of(size, APART: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of each row, [rows], or of all, [1]."""
    largest = tl.max(size, axis=1)
    if not APART:
        largest = tl.max(largest, axis=0, keep_dims=True)
    return largest
