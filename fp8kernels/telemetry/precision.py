"""What a format keeps of a tensor whose amax is not the one that its scale was made for.

A format's table says how many mantissa bits stand behind each code; a tapered one, as HiF8, has fewer of them far from
1. A tensor that outgrows its scale loses bits there long before anything saturates, and no counter shows it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import Format, get_format

ELEMENTS = 1 << 20  # of the normal tensor that limits are derived from, as many as a small layer's weight has
QUANTILES = 1 << 14  # points that stand for its elements
NOISE = 2.0  # times the noise power with a fresh scale: 3 dB, half a mantissa bit of the whole tensor
PER_BINADE = 16  # overshoots that are tried between one power of two and the next


@functools.cache
def mantissa_bits(fmt: Format) -> tuple[int, ...]:
    """The mantissa bits behind each of 256 codes: log2 of how many values share its binade; 0 for zero, Inf and NaN.

    HiF8 3 from 1/8 to 15, 2 to 224, then 1; E4M3 3, E5M2 2, and fewer below their smallest normal number
    """
    grid = [value for value, _ in fmt.magnitudes if value > 0] + [fmt.beyond]
    binades = [math.frexp(value)[1] for value in grid]

    def bits(value: float) -> int:
        if value == 0 or not math.isfinite(value):
            return 0
        return math.ceil(math.log2(binades.count(math.frexp(value)[1])))

    return tuple(bits(abs(value)) for value in fmt.values)


@functools.cache
def lost_bits(fmt: Format, device: torch.device | str = "cpu") -> Tensor:
    """fp64 [256]: how many mantissa bits each code has less than the best ones of its format; zero lost all."""
    bits = torch.tensor(mantissa_bits(fmt), dtype=torch.float64, device=device)
    return bits.max() - bits


class Limits(NamedTuple):
    """What a normal tensor shows when its noise power has become NOISE times that with a fresh scale.

    stale        its amax over the one that the scale was made for
    past_target  the fraction of its elements beyond that
    """

    stale: float
    past_target: float


@functools.cache
def limits(name: str, target: float) -> Limits:
    """The overshoot at which a format loses half a mantissa bit (3 dB) of a normal tensor of ELEMENTS elements.

    A whole bit is no limit: from one zone of HiF8 into the next the noise power grows at most fourfold, which for many
    targets it never quite reaches. The tensor's elements are quantiles of |x|, its amax what one of ELEMENTS exceeds.
    """
    fmt = get_format(name)
    p = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    x = torch.special.ndtri(0.5 + p / 2)  # [QUANTILES] |x|, ascending
    amax = float(torch.special.ndtri(torch.tensor(1 - 0.5 / ELEMENTS, dtype=torch.float64)))

    def noise(stale: float) -> float:
        scale = amax / (stale * target)
        return float((fmt.decode(fmt.encode(x / scale)).double() * scale - x).square().sum())

    fresh = noise(1.0)
    for n in range(1, 32 * PER_BINADE):
        stale = 2.0 ** (n / PER_BINADE)
        if noise(stale) >= NOISE * fresh:
            beyond = 2 * (1 - float(torch.special.ndtr(torch.tensor(amax / stale, dtype=torch.float64))))
            return Limits(stale, beyond)
    raise AssertionError(f"{name} holds a normal tensor at any scale")  # no format does: it would have no largest value
