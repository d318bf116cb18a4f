"""What the kernels of Triton's gemm share after the sum: scales, bias, activation, residual, numbers or codes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...quantize import Quantized
from ...quantize.tile.triton_jit import (
    STATE,
    activate,
    finish,
    quantize_tile,
    scale_of_codes,
    sink,
    size_of,
    store_codes,
    usable_scale,
)
from ...triton_jit import SMALLEST_SCALE, bits_of, constexpr, jit, number_of, round_to, to_fp32, triton
from .. import Epilogue, Operand

if triton is not None:
    import triton.language as tl

SPAN = 128  # rows of an operand that a block scale covers
HALVED = constexpr(128)  # columns of a tile from which on it is ended in halves, so that the registers suffice


class Scales(NamedTuple):
    """Where the scales of an operand lie: a grid, and how many rows and columns of the codes each covers."""

    grid: Tensor
    rows: int
    cols: int
    across: int


def scales_of(operand: Operand) -> Scales:
    (rows, cols), (down, across) = operand.codes.shape, operand.scale.shape
    return Scales(operand.scale, rows // down, cols // across, across)


def span_of(operand: Operand) -> int:
    """How many rows from a multiple of it on are sure to share a scale: 0 for all, 128, or 1."""
    down = operand.scale.shape[0]
    return 0 if down == 1 else 1 if operand.codes.shape[0] // down % SPAN else SPAN


class Ending(NamedTuple):
    """What becomes of sums, and where it is written: numbers or codes [M, N]. None is not wanted."""

    bias: Tensor | None
    residual: Tensor | None
    residual_row: int
    residual_col: int
    out: Tensor
    scale: Tensor | None


def ending_of(bias: Tensor | None, epilogue: Epilogue, out: Any) -> Ending:
    residual = epilogue.residual
    row, col = (0, 0) if residual is None else residual.stride()
    return Ending(
        None if bias is None else bias.detach().contiguous(),
        None if residual is None else residual.detach(),
        row,
        col,
        out.codes if isinstance(out, Quantized) else out,
        epilogue.scale,
    )


def sink_of(epilogue: Epilogue, out: Any) -> Any:
    """Where codes, their amax and their counts go, or None."""
    if not isinstance(out, Quantized):
        return None
    return sink(out, torch.zeros(STATE, dtype=torch.int64, device=out.codes.device), epilogue.observer)


@jit
def load_scale(scales, first, at, patch, ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scales of a tile's rows `at`, in one column of the grid; with ONE, that which they share, [1]."""
    if ONE:
        at = first + tl.arange(0, 1)
    return tl.load(scales.grid + (at // scales.rows).to(tl.int64) * scales.across + patch)


@jit
def scaled(sums, x_scale, w_scale):  # type: ignore[no-untyped-def]
    """sums * x_scale * w_scale; only the result can overflow or underflow, as the exponents are added apart."""
    x_mantissa, x_exponent = apart(x_scale)
    w_mantissa, w_exponent = apart(w_scale)
    exponent = x_exponent + w_exponent
    half = exponent >> 1
    return sums * (x_mantissa * w_mantissa * power(half, 125)) * power(exponent - half, 127)


@jit
def apart(scale):  # type: ignore[no-untyped-def]
    """Mantissa in [1, 2) and exponent of a positive number; NaN, Inf and 0 are themselves, with exponent 0."""
    is_small = scale < SMALLEST_SCALE
    bits = bits_of(tl.where(is_small, scale * 16777216.0, scale))  # 2**24 makes a subnormal number a normal one
    field = (bits >> 23) & 0xFF
    is_usual = (field != 0) & (field != 0xFF)
    mantissa = tl.where(is_usual, number_of((bits & 0x7FFFFF) | (127 << 23)), scale)
    return mantissa, tl.where(is_usual, field - tl.where(is_small, 127 + 24, 127), 0)


@jit
def power(exponent, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """2**exponent, kept within the normal numbers; sums of products have exponents far from there."""
    return number_of((tl.minimum(tl.maximum(exponent, -126), LARGEST) + 127) << 23)


@jit
def write(  # type: ignore[no-untyped-def]
    sums, top, left, m, n, x_scales, w_scales, ending, sink, X_ONE: tl.constexpr, W_ONE: tl.constexpr,
    BLOCKED: tl.constexpr, ACTIVATION: tl.constexpr, FMT: tl.constexpr, SATURATE: tl.constexpr, CARRIER: tl.constexpr,
):  # fmt: skip
    """The epilogue: a tile of sums to numbers or codes, one half of the columns after the other to save registers.

    returns  what is known of the codes: the largest |out| as bits, saturated and flushed as marks, not finite
    """
    if sums.shape[1] >= HALVED:
        HALF: tl.constexpr = sums.shape[1] // 2
        halves = tl.permute(tl.reshape(sums, (sums.shape[0], 2, HALF)), (0, 2, 1))
        first, second = tl.split(halves)
        worst, marks, strange = write(
            first, top, left, m, n, x_scales, w_scales, ending, sink, X_ONE, W_ONE, BLOCKED, ACTIVATION, FMT, SATURATE,
            CARRIER,
        )  # fmt: skip
        more, more_marks, more_strange = write(
            second, top, left + HALF, m, n, x_scales, w_scales, ending, sink, X_ONE, W_ONE, BLOCKED, ACTIVATION, FMT,
            SATURATE, CARRIER,
        )  # fmt: skip
        worst, marks, strange = tl.maximum(worst, more), marks + more_marks, strange + more_strange
    else:
        row, col = top + tl.arange(0, sums.shape[0]), left + tl.arange(0, sums.shape[1])
        mask = (row < m)[:, None] & (col < n)[None, :]
        if not BLOCKED:
            x_scale = load_scale(x_scales, top, tl.minimum(row, m - 1), 0, X_ONE)
            w_scale = load_scale(w_scales, left, tl.minimum(col, n - 1), 0, W_ONE)
            sums = scaled(sums, x_scale[:, None], w_scale[None, :])
        if ending.bias is not None:
            sums += to_fp32(tl.load(ending.bias + col, mask=col < n, other=0.0))[None, :]
        out = activate(sums, ACTIVATION)
        row, col = row.to(tl.int64), col.to(tl.int64)
        if ending.residual is not None:
            at = row[:, None] * ending.residual_row + col[None, :] * ending.residual_col
            out += to_fp32(tl.load(ending.residual + at, mask=mask, other=0.0))
        worst, marks, strange = 0, 0, 0
        if FMT is None:
            at = row[:, None] * n + col[None, :]
            tl.store(ending.out + at, round_to(out, ending.out.dtype.element_ty), mask=mask)
        else:
            out = tl.where(mask, out, 0.0)
            scale = tl.load(ending.scale)
            codes, mark, odd = quantize_tile(out, usable_scale(scale, scale, CARRIER), FMT, SATURATE, CARRIER)
            store_codes(codes, sink, row, col, mask, m, n)
            worst, marks, strange = tl.max(size_of(out)), tl.sum(mark), tl.sum(odd)
    return worst, marks, strange


@jit
def conclude(seen, m, n, ending, sink, FMT: tl.constexpr, CARRIER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of the codes, and what all programs saw of them."""
    if FMT is not None:
        if tl.program_id(0) == 0:
            scale = tl.load(ending.scale)
            tl.store(sink.scale, scale_of_codes(usable_scale(scale, scale, CARRIER), CARRIER))
        worst, marks, strange = seen
        finish(sink, worst, marks & 0xFFFF, marks >> 16, strange, tl.cast(m, tl.int64) * n, True)
