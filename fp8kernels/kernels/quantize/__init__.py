"""quantize: a tensor to 8-bit codes, the scales that decode them, and what was seen on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...formats import Format
from ...scaling.block import Block


@dataclass(frozen=True)
class Rounding:
    """How x becomes codes, apart from the scale itself.

    target        the magnitude that the amax of a block without a scale is put at
    margin        binades of head-room above it
    power_of_two  scales made here are rounded up to a power of two
    saturate      overflow becomes the largest value (True), or Inf / NaN (False)
    carrier       None, or k >= 0: the values of fmt, rounded as ever, are written as E4M3 codes of value * 2**k, and
                  the scale returned is scale * 2**-k, so that it decodes those codes. E4M3 saturates, whatever
                  `saturate` says; a scale below 2**(k - 126) is raised to that. `carrier.py` has what this loses
    """

    fmt: Format
    block: Block
    target: float
    margin: int = 0
    power_of_two: bool = False
    saturate: bool = True
    carrier: int | None = None


class Observer(NamedTuple):
    """Where a tensor's amax and counts are noted, in place; noting the same tensor twice is harmless for `pending`.

    pending   fp32 [1], raised to the largest finite, positive amax
    counters  int64 [4], to which the counts are added
    """

    pending: Tensor
    counters: Tensor


class Quantized(NamedTuple):
    """codes uint8 [M, K]; codes_t uint8 [K, M] or None; scale and amax fp32 on the block's grid; counts int64 [4].

    counts are the numbers of elements: all, saturated, flushed to zero, not finite (see COUNTS).
    """

    codes: Tensor
    codes_t: Tensor | None
    scale: Tensor
    amax: Tensor
    counts: Tensor


COUNTS = ("elements", "saturated", "flushed", "nonfinite")
