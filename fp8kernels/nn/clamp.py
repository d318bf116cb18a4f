"""Role.clamp: values beyond the target are cut to it before they are rounded, by torch's own operations.

HiF8 has head-room above its target of 15: where a scale is stale, large values lose mantissa bits and do not clip. With
clamp they do, so that studies can tell the two apart. What is noted is the tensor as it came: its amax, and as
saturated what was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = 1 + 2.0**-22  # two of fp32, by which amax / target * target may be smaller than amax: that is not beyond


def limit(scale: Tensor, at: float) -> Tensor:
    """fp32 [1]: the magnitude at which values are cut, `at` in units of the scale; Inf where there is none yet (0)."""
    return torch.where(scale > 0, scale * (at * ROUNDINGS), torch.inf)


def beyond(x: Tensor, limit: Tensor) -> Tensor:
    """bool, of the shape of x: what is cut; Inf is, NaN is not."""
    return x.detach().abs().float() > limit


def note(x: Tensor, cut: Tensor, counts: Tensor, observer: tuple[Tensor, Tensor]) -> None:
    """Raise the pending amax and add to the counters, in place, as `quantize` does for what it is given.

    x         as it came, with at least one element
    cut       bool, of its shape
    counts    int64 [4], of the tensor that was cut
    observer  (pending fp32 [1], counters int64 [4])
    """
    pending, counters = observer
    amax = magnitude(x)
    pending.copy_(torch.where(amax.isfinite(), pending.maximum(amax), pending))
    elements, saturated, flushed, _ = counts.unbind()
    saturated = saturated.maximum(cut.sum())  # a target that rounds to beyond the format's largest saturates by itself
    counters.add_(torch.stack([elements, saturated, flushed, (~x.isfinite()).sum()]))


def magnitude(x: Tensor) -> Tensor:
    """fp32 []: the largest |x|; NaN or Inf where x holds one."""
    return x.detach().abs().amax().float()
