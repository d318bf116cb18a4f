"""E4M3 (the "fn" kind: no infinities) and E5M2.

source  OCP 8-bit Floating Point Specification (OFP8) rev 1.0
"""

from __future__ import annotations

import math

import torch

from .format import Format


def _value(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The IEEE-like reading of a code, without special codes."""
    bias = 2 ** (exponent_bits - 1) - 1
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    magnitude = 2.0 ** (exponent - bias) * (1 + mantissa) if exponent else 2.0 ** (1 - bias) * mantissa
    return math.copysign(magnitude, -1 if code & 0x80 else 1)


def _e4m3(code: int) -> float:
    return math.nan if code & 0x7F == 0x7F else _value(code, 4, 3)


def _e5m2(code: int) -> float:
    if code & 0x7F == 0x7C:
        return -math.inf if code & 0x80 else math.inf
    return math.nan if code & 0x7F > 0x7C else _value(code, 5, 2)


E4M3 = Format(
    name="e4m3",
    code_id=1,
    values=tuple(_e4m3(code) for code in range(256)),
    ties="even",
    beyond=480.0,
    nan_code=0x7F,
    target=448.0,
    grad_target=448.0,
    carrier=torch.float8_e4m3fn,
)

E5M2 = Format(
    name="e5m2",
    code_id=2,
    values=tuple(_e5m2(code) for code in range(256)),
    ties="even",
    beyond=65536.0,
    nan_code=0x7E,
    target=57344.0,
    grad_target=57344.0,
    carrier=torch.float8_e5m2,
)
