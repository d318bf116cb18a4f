"""The HiF8 carrier: values rounded to HiF8 as ever, then written as E4M3 codes of value * 2**k.

why      FP8 tensor cores multiply E4M3, not HiF8. The codes are ordinary E4M3 ones whose scale is that of HiF8 times
         2**-k, so every gemm, dequantize and transpose takes them as they are
exact    for every HiF8 value v with |v| * 2**k in E4M3: with k = 4 (target 15) from 2**-12 to 28, with k = 1 (target
         224) from 2**-9 to 224
loses    "below": values that E4M3's last steps cannot hold, at most 1.5 * 2**-(9 + k), 1.2e-5 of the amax with k = 4;
         "above": values beyond E4M3's largest, met only where a scale is stale, which saturate. Both are counted
source   exhaustive over the 253 finite HiF8 values; tests/kernels/test_carrier.py
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...formats import E4M3, HIF8, Format
from ...scaling.rules import SMALLEST_SCALE

# From this k on E4M3 holds everything below: a larger one would only lose above.
LARGEST_SHIFT = int(math.log2(E4M3.smallest / HIF8.smallest))


class Recoding(NamedTuple):
    """What becomes of each of 256 codes: the E4M3 code uint8 [256], and which lose something, bool [256] each.

    above  larger in magnitude than E4M3's largest value (an infinity too): it saturates
    below  finite and not zero, not above, and not exact in E4M3: it goes to the nearest, which may be zero
    """

    codes: Tensor
    above: Tensor
    below: Tensor


def why_not(fmt: Format, target: float) -> str | None:
    """Why tensors of a format with their amax at a target (before margin) have no carrier, in words, or None."""
    if fmt is not HIF8:
        return f"{fmt.name} has no carrier: it is a format of the tensor cores itself"
    if target > E4M3.max:
        return f"target={target:g} lies beyond {E4M3.max:g}, the largest value of the carrier's format"
    return None


def shift(target: float, head_room: float = 1.0) -> int:
    """The largest k >= 0 with head_room * target * 2**k in E4M3's range: 4 for a target of 15, 1 for 224.

    target     where amax lands, before margin: head-room that is asked for is to be left above it in E4M3 too
    head_room  how many times the target is to be held: a delayed amax may be exceeded (with 1.5: 4 and 0)
    raises     ValueError if the target lies beyond E4M3's largest value
    """
    reason = why_not(HIF8, target)
    if reason is not None:
        raise ValueError(f"no carrier: {reason}")
    return max(0, min(math.floor(math.log2(E4M3.max / (target * head_room))), LARGEST_SHIFT))


@functools.cache
def recoding(fmt: Format, k: int, device: torch.device | str = "cpu") -> Recoding:
    """The tables of a format and k: to the nearest value, ties to the even code, overflow saturated, NaN stays NaN."""
    carried = fmt.table(torch.float64, device) * 2.0**k  # [256] exact
    codes = E4M3.encode(carried)
    above = carried.abs() > E4M3.max
    below = carried.isfinite() & ~above & (E4M3.decode(codes).double() != carried)
    return Recoding(codes, above, below)


def usable(scale: Tensor, k: int) -> Tensor:
    """The scales that a carried tensor is divided by: so large that those of its codes are no subnormal numbers."""
    return scale.clamp(min=SMALLEST_SCALE * 2.0**k)


def scale_of_codes(scale: Tensor, k: int) -> Tensor:
    """scale * 2**-k, exact: what decodes the E4M3 codes of a tensor that was divided by scale."""
    return usable(scale, k) * 2.0**-k


def pays(device: torch.device) -> bool:
    """Whether a device multiplies E4M3 codes faster than decoded numbers: GPUs with FP8 tensor cores do."""
    return device.type == "cuda" and _has_fp8_cores(device.index)


def _has_fp8_cores(device: int | None) -> bool:
    """sm_89 and newer; of AMD's those that take the OCP formats, from gfx950 on."""
    return _capability(device) >= ((9, 5) if torch.version.hip else (8, 9))


# What torch.compiler.assume_constant_result does; calling that would load all of torch.compile with this package
_has_fp8_cores._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _capability(device: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
