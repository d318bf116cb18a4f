"""HiFloat8: a tapered 8-bit float. Near 1 it has three mantissa bits, far from 1 fewer, and 38 binades in all.

source  arXiv 2409.16626 (HiFloat8); the layout below is its table 1, after the sign bit:

    dot    D    bits after the dot     exponent          mantissa  values
    0000   DML  M3 (not 0)             M - 23            0 bits    2^-22 .. 2^-16
    0001   0    M3                     0                 3 bits    1 .. 1.875
    001    1    sign, M3               +1 -1             3 bits    2 .. 3.75, 0.5 .. 0.9375
    01     2    sign e1, M3            +-2 .. +-3        3 bits    4 .. 15, 0.125 .. 0.46875
    10     3    sign e2, M2            +-4 .. +-7        2 bits    16 .. 224, 2^-7 .. 0.109375
    11     4    sign e3, M1            +-8 .. +-15       1 bit     256 .. 32768, 2^-15 .. 0.005859375

The exponent is sign-magnitude and its leading magnitude bit is not stored. There is one zero (0x00), one NaN (0x80),
and 0x6F / 0xEF, where 1.5 * 2^15 would stand, are the infinities.
"""

from __future__ import annotations

import math

from .format import Format

DENORMAL_BIAS = 23  # a denormal code M stands for 2^(M - 23)


def _magnitude(code: int) -> float:
    """The value of a code in 0x00 .. 0x7F, infinity aside."""
    if code < 8:
        return 0.0 if code == 0 else 2.0 ** (code - DENORMAL_BIAS)
    if code < 16:
        return 1 + (code & 7) / 8
    exponent_bits, mantissa_bits = {1: (0, 3), 2: (1, 3), 3: (1, 3)}.get(code >> 4, (2, 2))
    if code >= 0x60:
        exponent_bits, mantissa_bits = 3, 1
    mantissa = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    stored = (code >> mantissa_bits) & (2**exponent_bits - 1)
    negative = (code >> (mantissa_bits + exponent_bits)) & 1
    exponent = 2**exponent_bits + stored
    return float(2.0 ** (-exponent if negative else exponent) * (1 + mantissa))


def _value(code: int) -> float:
    if code == 0x80:
        return math.nan
    magnitude = math.inf if code & 0x7F == 0x6F else _magnitude(code & 0x7F)
    return -magnitude if code & 0x80 else magnitude


HIF8 = Format(
    name="hif8",
    code_id=0,
    values=tuple(_value(code) for code in range(256)),
    ties="away",
    beyond=1.5 * 2.0**15,
    nan_code=0x80,
    target=15.0,  # the largest value with three mantissa bits: relative RMS error 0.0264 on a Gaussian
    grad_target=224.0,  # the largest value with two mantissa bits: four more binades below
)
