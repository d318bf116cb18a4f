"""What the Triton kernels that write codes share: a tile of numbers, its codes, what is counted, and how a call ends.

A tile is y itself (quantize), activation(x) * other (act_quantize) or the norm of x (norm_quantize), made in fp32 from
what `Source` points at and never written. Programs that stay add up what they saw and leave it in `Sink.state`; the
last of them to arrive writes counts and observer, so that no further kernel and no host has to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...triton_jit import (
    E4M3_ID,
    HIF8_ID,
    INF_BITS,
    LOWEST,
    MAGNITUDE,
    MANTISSA,
    MAX_BITS,
    NAN_CODE,
    OVERFLOW_BITS,
    SMALLEST_SCALE,
    bits_of,
    constexpr,
    encode,
    fp8_bits,
    fp8_code,
    hif8_round,
    jit,
    number_of,
    quotient,
    to_fp32,
    triton,
)
from .. import Observer, Quantized

if triton is not None:
    import triton.language as tl

STATE = 5  # numbers that programs share while they run, int64, zero at first; in this order:
SATURATED, FLUSHED, NONFINITE, WORST, ARRIVED = (constexpr(i) for i in range(STATE))


class Source(NamedTuple):
    """What a tile is made of; None is what it is made without.

    x, other  [M, K] and the distances of their rows in elements; columns follow each other
    rstd      fp32 [M], with mean fp32 [M] or None: the statistics of the norm
    weight    [K], to which offset is added; bias [K]
    """

    x: Any
    stride: int
    other: Any = None
    other_stride: int | None = None
    rstd: Any = None
    mean: Any = None
    weight: Any = None
    offset: float | None = None
    bias: Any = None


class Sink(NamedTuple):
    """Where codes and what is known of them go: the fields of Quantized and Observer, and the state of the call."""

    codes: Any
    codes_t: Any
    scale: Any
    amax: Any
    counts: Any
    state: Any
    pending: Any
    counters: Any


def sink(out: Quantized, state: Tensor, observer: Observer | None) -> Sink:
    pending, counters = observer or (None, None)
    return Sink(out.codes, out.codes_t, out.scale, out.amax, out.counts, state, pending, counters)


@jit
def load_tile(source, row, col, mask, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers at row [R] and col [C], int64, in fp32 [R, C]; 0 where the mask is not set."""
    y = to_fp32(tl.load(source.x + row[:, None] * source.stride + col[None, :], mask=mask, other=0.0))
    if ACTIVATION != 0:
        y = activate(y, ACTIVATION)
    if source.other is not None:
        at = row[:, None] * source.other_stride + col[None, :]
        y = y * to_fp32(tl.load(source.other + at, mask=mask, other=0.0))
    if source.rstd is not None:
        row_mask = tl.max(mask.to(tl.int32), axis=1) != 0
        mean = 0.0
        if source.mean is not None:
            mean = tl.load(source.mean + row, mask=row_mask, other=0.0)[:, None]
        y = normalise(y, mean, tl.load(source.rstd + row, mask=row_mask, other=0.0)[:, None], source, col, mask)
    return y


@jit
def normalise(x, mean, rstd, source, col, mask):  # type: ignore[no-untyped-def]
    """(x - mean) * rstd * (weight + offset) + bias; 0 where the mask is not set."""
    y = (x - mean) * rstd
    col_mask = tl.max(mask.to(tl.int32), axis=0) != 0
    if source.weight is not None:
        weight = to_fp32(tl.load(source.weight + col, mask=col_mask, other=0.0)) + source.offset
        y = y * weight[None, :]
    if source.bias is not None:
        y = y + to_fp32(tl.load(source.bias + col, mask=col_mask, other=0.0))[None, :]
    return tl.where(mask, y, 0.0)


@jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 to fp32; ACTIVATION is the place in kernels.gemm.ACTIVATIONS. Each of them keeps 0."""
    if ACTIVATION == 1:  # relu; NaN stays NaN
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 2:
        x = x * sigmoid(x)
    elif ACTIVATION == 3:
        x = x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 4:  # 0.5 * (1 + tanh(u)) is sigmoid(2 * u), which loses nothing where tanh is close to -1
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@jit
def size_of(y):  # type: ignore[no-untyped-def]
    """|y| as int32 bits, which order as NaN > Inf > numbers."""
    return bits_of(y) & MAGNITUDE


@jit
def finite_size(y):  # type: ignore[no-untyped-def]
    """The same of the finite numbers, 0 for the others."""
    size = size_of(y)
    return tl.where(size < INF_BITS, size, 0)


@jit
def usable_scale(known, own, CARRIER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale to divide by: the given one, or where that is 0 its own; see carrier.usable."""
    scale = tl.where(known == 0, own, known)
    if CARRIER is not None:
        scale = tl.maximum(scale, SMALLEST_SCALE * 2.0**CARRIER)
    return scale


@jit
def scale_of_codes(scale, CARRIER: tl.constexpr):  # type: ignore[no-untyped-def]
    if CARRIER is not None:
        scale = scale * 2.0 ** (-CARRIER)  # exact
    return scale


@jit
def quantize_tile(y, scale, FMT: tl.constexpr, SATURATE: tl.constexpr, CARRIER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of y / scale, int32, and per element what is to be counted.

    returns  codes; marks: 1 for saturated, 2**16 for flushed; strange: 1 for not finite
    """
    ratio = quotient(y, scale)
    inside = size_of(ratio)
    is_number = size_of(y) < INF_BITS
    saturated = (inside >= OVERFLOW_BITS[FMT]) & (inside <= INF_BITS)
    if CARRIER is None:
        codes = encode(ratio, FMT, SATURATE)
        lost = (codes & 0x7F) == 0
        if FMT == HIF8_ID:
            lost = lost & (codes != NAN_CODE[FMT])
    else:
        codes, above, lost = carry(ratio, CARRIER)
        saturated = saturated | above
    flushed = lost & (y != 0) & is_number
    marks = saturated.to(tl.int32) + (flushed.to(tl.int32) << 16)
    return codes, marks, 1 - is_number.to(tl.int32)


@jit
def carry(y, CARRIER: tl.constexpr):  # type: ignore[no-untyped-def]
    """HiF8's values of y as E4M3 codes of value * 2**CARRIER, and which lose something; see carrier.py."""
    bits = bits_of(y)
    rounded = hif8_round(tl.minimum(bits & MAGNITUDE, MAX_BITS[HIF8_ID]))
    carried = rounded + (CARRIER << 23)
    above = (carried > MAX_BITS[E4M3_ID]) & ((bits & MAGNITUDE) <= INF_BITS)
    code = fp8_code(tl.minimum(carried, MAX_BITS[E4M3_ID]), MANTISSA[E4M3_ID], LOWEST[E4M3_ID])
    below = (carried <= MAX_BITS[E4M3_ID]) & (fp8_bits(code, MANTISSA[E4M3_ID], LOWEST[E4M3_ID]) != carried)
    is_zero = rounded < ((127 - 22) << 23)  # HiF8 has no negative zero
    code = code | tl.where(is_zero, 0, (bits >> 24) & 0x80)
    return tl.where((bits & MAGNITUDE) > INF_BITS, NAN_CODE[E4M3_ID], code), above, below


@jit
def store_codes(codes, sink, row, col, mask, rows, cols):  # type: ignore[no-untyped-def]
    """Codes [R, C] at row and col of [rows, cols], and of the transposed codes where they are wanted."""
    codes = codes.to(tl.uint8)
    tl.store(sink.codes + row[:, None] * cols + col[None, :], codes, mask=mask)
    if sink.codes_t is not None:
        at = col[:, None] * rows + row[None, :]
        tl.store(sink.codes_t + at, tl.trans(codes), mask=tl.trans(mask))


@jit
def finish(sink, worst, saturated, flushed, nonfinite, elements, ONE_AMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Leave what this program saw; the last program writes the counts, the observer and, if there is one, the amax."""
    tl.atomic_add(sink.state + SATURATED, tl.cast(saturated, tl.int64), mask=saturated != 0)
    tl.atomic_add(sink.state + FLUSHED, tl.cast(flushed, tl.int64), mask=flushed != 0)
    tl.atomic_add(sink.state + NONFINITE, tl.cast(nonfinite, tl.int64), mask=nonfinite != 0)
    tl.atomic_max(sink.state + WORST, tl.cast(worst, tl.int64))
    zero = tl.cast(0, tl.int64)
    if tl.atomic_add(sink.state + ARRIVED, zero + 1) == tl.num_programs(0) - 1:
        # read where the others wrote, past the cache of this multiprocessor
        saturated_all = tl.atomic_add(sink.state + SATURATED, zero)
        flushed_all = tl.atomic_add(sink.state + FLUSHED, zero)
        nonfinite_all = tl.atomic_add(sink.state + NONFINITE, zero)
        worst_all = number_of(tl.atomic_add(sink.state + WORST, zero).to(tl.int32))
        tl.store(sink.counts, elements)
        tl.store(sink.counts + 1, saturated_all)
        tl.store(sink.counts + 2, flushed_all)
        tl.store(sink.counts + 3, nonfinite_all)
        if ONE_AMAX:
            tl.store(sink.amax, worst_all)
        if sink.pending is not None:
            pending = tl.load(sink.pending)
            is_finite = size_of(worst_all) < INF_BITS
            tl.store(sink.pending, tl.where(is_finite, tl.maximum(pending, worst_all), pending))
            tl.store(sink.counters, tl.load(sink.counters) + elements)
            tl.store(sink.counters + 1, tl.load(sink.counters + 1) + saturated_all)
            tl.store(sink.counters + 2, tl.load(sink.counters + 2) + flushed_all)
            tl.store(sink.counters + 3, tl.load(sink.counters + 3) + nonfinite_all)
