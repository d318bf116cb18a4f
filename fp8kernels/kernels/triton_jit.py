"""What the Triton kernels share: whether Triton runs here, and encode and decode of the formats inside a kernel.

equal   to the formats of fp8kernels/formats to the bit: rounding is arithmetic on the bits of an fp32 number, as in
        csrc/formats, so it does not depend on the conversions of an architecture or of Triton's interpreter
"""

from __future__ import annotations

import functools
import os
import struct
from typing import Any

import torch
from torch import Tensor

from ..formats import E4M3, FORMATS, HIF8

try:
    import triton as triton  # a name for the kernels' files too
    import triton.language as tl

    jit, constexpr = triton.jit, tl.constexpr
    MISSING = None
except ImportError as error:
    triton, MISSING = None, f"triton does not load: {error}"

    def jit(function: Any) -> Any:
        """Without Triton a kernel is a function that nobody calls."""
        return function

    def constexpr(value: Any) -> Any:
        return value


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CPU = "Triton runs there only in its interpreter, with TRITON_INTERPRET=1 set before the start"
OLDEST = (8, 0)  # compute capability; older ones have no bf16


def why_not(tensors: dict[str, Tensor | None]) -> str | None:
    """Why a Triton kernel cannot run on these tensors, in words, or None.

    tensors   by the name that the message gives them; None stands for one that was not given
    """
    if triton is None:
        return MISSING
    given = {name: x for name, x in tensors.items() if x is not None}
    first = next(iter(given.values()))
    for name, x in given.items():
        if x.device.type == "cpu" and not INTERPRETED:
            return f"{name} is on the CPU: {ON_CPU}"
        if x.device.type not in ("cpu", "cuda"):
            return f"{name} is on {x.device}: this kernel takes CUDA tensors"
        if x.device != first.device:
            return f"{name} is on {x.device}, other tensors on {first.device}"
    return too_old(first.get_device()) if first.is_cuda and torch.version.hip is None else None


@functools.cache
def too_old(device: int) -> str | None:
    """Why an NVIDIA GPU is too old, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the GPU is sm_{capability[0]}{capability[1]}: this kernel needs sm_{OLDEST[0]}{OLDEST[1]} or newer"
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a device has; the interpreter one, so that the loops of programs turn more than once."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def fp32_bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


# Inside a kernel a format is its code_id, a constexpr, and these are indexed by it.
BY_ID = sorted(FORMATS.values(), key=lambda fmt: fmt.code_id)
HIF8_ID, E4M3_ID = constexpr(HIF8.code_id), constexpr(E4M3.code_id)
MAX_BITS = constexpr(tuple(fp32_bits(fmt.max) for fmt in BY_ID))
OVERFLOW_BITS = constexpr(tuple(fp32_bits(fmt.overflow_at) for fmt in BY_ID))
HAS_INF = constexpr(tuple(fmt.inf_code is not None for fmt in BY_ID))
INF_CODE = constexpr(tuple(fmt.inf_code or 0 for fmt in BY_ID))
NAN_CODE = constexpr(tuple(fmt.nan_code for fmt in BY_ID))
MANTISSA = constexpr((0, 3, 2))  # bits kept by E4M3 and E5M2; HiF8's depend on the exponent
LOWEST = constexpr((0, -6, -14))  # exponent of their smallest normal number
MAGNITUDE = constexpr(0x7FFFFFFF)  # all bits of an fp32 number but the sign
INF_BITS = constexpr(0x7F800000)
QUIET_NAN = constexpr(0x7FC00000)
HIF8_KEPT = constexpr(0b01_01_10_11)  # mantissa bits that HiF8 keeps, two bits for each four exponents from 0 on
NOTHING = constexpr((127 - 24) << 23)  # 2**-24, which HiF8 rounds to zero, stands for all that it rounds to zero
IN_INTERPRETER = constexpr(INTERPRETED)
SMALLEST_SCALE = constexpr(2.0**-126)
LARGEST_SCALE = constexpr(float(torch.finfo(torch.float32).max))


@jit
def bits_of(y):  # type: ignore[no-untyped-def]
    return y.to(tl.int32, bitcast=True)


@jit
def number_of(bits):  # type: ignore[no-untyped-def]
    return bits.to(tl.float32, bitcast=True)


@jit
def to_fp32(x):  # type: ignore[no-untyped-def]
    """fp32, bf16 or fp16 to fp32, exactly. bf16 by its bits: the interpreter has no bf16 of its own."""
    if x.dtype == tl.bfloat16:
        return number_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return x.to(tl.float32)


@jit
def round_to(y, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 to fp32, bf16 or fp16, to the nearest, ties to even. bf16 by its bits: the interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = bits_of(y)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where((bits & MAGNITUDE) > INF_BITS, (bits >> 16) | 0x40, rounded)  # a NaN stays one
        return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return y.to(dtype)


@jit
def encode(y, FMT: tl.constexpr, SATURATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 to codes, int32 0 .. 255; see Format.encode."""
    bits = bits_of(y)
    magnitude = bits & MAGNITUDE
    sign = (bits >> 24) & 0x80
    inside = tl.minimum(magnitude, MAX_BITS[FMT])  # what lies between the largest and overflow rounds to the largest
    if FMT == HIF8_ID:
        code = hif8_code(hif8_round(inside))
        sign = tl.where(code == 0, 0, sign)
    else:
        code = fp8_code(inside, MANTISSA[FMT], LOWEST[FMT])
    if not SATURATE:
        if HAS_INF[FMT]:
            code = tl.where(magnitude >= OVERFLOW_BITS[FMT], INF_CODE[FMT], code)
        else:
            magnitude = tl.where(magnitude >= OVERFLOW_BITS[FMT], QUIET_NAN, magnitude)
    return tl.where(magnitude > INF_BITS, NAN_CODE[FMT], code | sign)


@jit
def decode(codes, FMT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of any integer type to fp32, exactly; every value is exact in bf16 and fp16 too."""
    codes = codes.to(tl.int32)
    rest = codes & 0x7F
    if FMT == HIF8_ID:
        bits = hif8_bits(rest)
        bits = tl.where(rest == INF_CODE[FMT], INF_BITS, bits)
    else:
        bits = fp8_bits(rest, MANTISSA[FMT], LOWEST[FMT])
        if HAS_INF[FMT]:
            bits = tl.where(rest >= INF_CODE[FMT], INF_BITS, bits)
            bits = tl.where(rest > INF_CODE[FMT], QUIET_NAN, bits)
        else:
            bits = tl.where(rest == NAN_CODE[FMT], QUIET_NAN, bits)
    bits = bits | ((codes & 0x80) << 24)
    if FMT == HIF8_ID:
        bits = tl.where(codes == NAN_CODE[FMT], QUIET_NAN, bits)
    return number_of(bits)


@jit
def fp8_code(magnitude, MANTISSA_BITS: tl.constexpr, LOWEST_EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of a magnitude up to the largest value to a code without its sign, rounded to nearest even."""
    shift: tl.constexpr = 23 - MANTISSA_BITS
    below_half: tl.constexpr = (1 << (shift - 1)) - 1
    zero: tl.constexpr = (127 + LOWEST_EXPONENT - 1) << MANTISSA_BITS  # the code's exponent field counts from here
    normal = ((magnitude + below_half + ((magnitude >> shift) & 1)) >> shift) - zero
    # Added to 2**(23 + exponent of the last step), a smaller number is rounded to whole steps, in the lowest bits.
    anchor: tl.constexpr = (127 + 23 + LOWEST_EXPONENT - MANTISSA_BITS) << 23
    steps = bits_of(number_of(magnitude) + number_of(tl.full(magnitude.shape, anchor, tl.int32))) - anchor
    return tl.where(magnitude < ((127 + LOWEST_EXPONENT) << 23), steps, normal)


@jit
def fp8_bits(rest, MANTISSA_BITS: tl.constexpr, LOWEST_EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """A code without its sign to the bits of its magnitude; not for Inf and NaN."""
    normal = (rest << (23 - MANTISSA_BITS)) + ((127 + LOWEST_EXPONENT - 1) << 23)
    anchor: tl.constexpr = (127 + 23 + LOWEST_EXPONENT - MANTISSA_BITS) << 23
    steps = number_of(rest + anchor) - number_of(tl.full(rest.shape, anchor, tl.int32))
    return tl.where(rest < (1 << MANTISSA_BITS), bits_of(steps), normal)


@jit
def hif8_kept(size):  # type: ignore[no-untyped-def]
    """How many mantissa bits the numbers with that |exponent| keep; size up to 24."""
    return (HIF8_KEPT >> ((size >> 1) & 0x1E)) & 3


@jit
def hif8_round(magnitude):  # type: ignore[no-untyped-def]
    """The bits of a magnitude up to the largest value, rounded to a value of HiF8, ties away; NOTHING is zero."""
    magnitude = tl.maximum(magnitude, NOTHING)
    exponent = (magnitude >> 23) - 127
    kept = hif8_kept(tl.abs(exponent))
    half = tl.where(exponent == -23, 1 << 23, (1 << 22) >> kept)  # all of [2**-23, 2**-22) rounds to 2**-22
    return (magnitude + half) & -((1 << 23) >> kept)


@jit
def hif8_code(rounded):  # type: ignore[no-untyped-def]
    """The bits of a positive value of HiF8, or NOTHING, to its code; the layout is in csrc/formats/hif8.h."""
    exponent = (rounded >> 23) - 127
    size = tl.abs(exponent)
    kept = hif8_kept(size)
    negative = (exponent >> 31) & 1
    mantissa = (rounded & 0x7FFFFF) >> (23 - kept)
    near = 8 + ((size + negative) << 3)
    far = ((4 - kept) << 5) + (negative << 4) + (size << kept) - 16
    code = tl.where(size < 2, near, far) + mantissa
    return tl.where(size > 15, tl.maximum(exponent + 23, 0), code)


@jit
def hif8_bits(rest):  # type: ignore[no-untyped-def]
    """A code without its sign to the bits of its magnitude; not for Inf and NaN."""
    # s is |exponent| and mantissa, joined as in fp32: the leading bit of |exponent| is not stored from 0x20 on
    is_far = rest >= 0x20
    s = tl.where(is_far, (0x10 | (rest & 0x0F)) << (19 + (rest >> 5)), ((rest & 7) | ((rest & 0x10) >> 1)) << 20)
    negative = tl.where(is_far, rest >> 4, rest >> 3) & 1
    joined = (s ^ -(negative << 23)) + (negative << 23)  # -|exponent| in two's complement, the mantissa as it is
    denormal = tl.where(rest == 0, 0, (rest + (127 - 23)) << 23)
    return tl.where(rest < 8, denormal, joined + (127 << 23))


@jit
def quotient(x, scale):  # type: ignore[no-untyped-def]
    """x / scale as the codes of every format want it: correctly rounded from 2**-24 on, an infinity beyond fp32.

    With r the rounded 1 / scale, one step takes x * r to within a unit in the last place, and the next one is exact
    (Markstein, IBM J. Res. Dev. 34, 1990). It has no slow path and needs no special function unit, unlike tl.div_rn;
    tests/cpp/test_quotient_steps.cpp tries it. The interpreter's fma rounds twice, so it divides.
    """
    if IN_INTERPRETER:
        return tl.div_rn(x, scale)
    lift = tl.where(scale < 2.0**-30, 2.0**64, tl.where(scale > 2.0**60, 2.0**-64, 1.0))  # so that nothing underflows
    near = scale * lift
    r = tl.div_rn(tl.full(near.shape, 1.0, tl.float32), near)
    x, near, r = tl.broadcast(x * lift, near)[0], tl.broadcast(near, x)[0], tl.broadcast(r, x)[0]
    q = x * r
    faithful = tl.fma(tl.fma(-q, near, x), r, q)
    correct = tl.fma(tl.fma(-faithful, near, x), r, faithful)
    return tl.where((bits_of(q) & MAGNITUDE) < INF_BITS, correct, q)


@jit
def scale_from_amax(amax, target, headroom, POWER_OF_TWO: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale that puts a finite amax at target; see scaling/rules.py. headroom is 2**margin."""
    scale = tl.div_rn(amax, target) * headroom  # "/" may be approximate, and the reference divides exactly
    scale = tl.minimum(tl.maximum(scale, SMALLEST_SCALE), LARGEST_SCALE)
    if POWER_OF_TWO:
        bits = bits_of(scale)
        up = number_of((bits & INF_BITS) + (1 << 23))
        scale = tl.where((bits & 0x7FFFFF) != 0, tl.minimum(up, LARGEST_SCALE), scale)
    return tl.where(amax == 0, 1.0, scale)
