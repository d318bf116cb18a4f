"""Two loss curves, step by step, in percent of the baseline."""

from __future__ import annotations

import numpy as np

from .check import Array, Numbers, pairs


def ape(losses: Numbers, baseline: Numbers) -> list[float]:
    """Absolute percentage error of each step: 100 * |loss - baseline| / |baseline|.

    losses, baseline  [n], of the same steps in the same order
    returns           [n], in percent
    raises            ValueError if they are empty, differ in length, are not finite, or if a baseline is 0
    """
    return np.abs(_error(losses, baseline)).tolist()


def signed_error_percent(losses: Numbers, baseline: Numbers) -> list[float]:
    """100 * (loss - baseline) / |baseline| of each step; above 0 where the loss is the worse one.

    returns  [n], in percent
    raises   ValueError as `ape`
    """
    return _error(losses, baseline).tolist()


def _error(losses: Numbers, baseline: Numbers) -> Array:
    loss, base = pairs(losses, baseline, ("losses", "baseline"))
    zero = np.flatnonzero(base == 0)
    if zero.size:
        raise ValueError(f"baseline[{zero[0]}] is 0; nothing is a percentage of it")
    return 100 * (loss - base) / np.abs(base)
