"""Percentile bootstrap of a mean: draw as many values as there are, with replacement, and look at the means."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .check import Array, Numbers, fraction, numbers, pairs

DRAWN = 2**22  # numbers drawn at once, 32 MiB of indices; more are drawn in turns


class Interval(NamedTuple):
    """A mean, and the interval that holds the true one with the given confidence."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Numbers, *, level: float = 0.95, repeats: int = 10_000, seed: int = 0, block: int = 1
) -> Interval:
    """The mean, between the (1 - level) / 2 and (1 + level) / 2 quantiles of resampled means.

    values   [n], finite
    block    neighbours that are drawn together, for values that depend on their neighbours (a loss curve): about as
             long as that dependence, and well below n. Blocks go on at the start where the values end, so that each
             value is drawn equally often
    returns  a mean alone says nothing of the spread of its kind: of one value (or one block) the interval is infinite
    raises   ValueError if there are no values, one is not finite, or level, repeats or block are out of range
    source   Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; blocks: Politis and Romano,
             A circular block-resampling procedure for stationary data (1992). Of fewer than about 20 values the
             percentile interval is too narrow
    """
    array = numbers(values, "values")
    fraction(level, "level")
    if repeats < 1 or not 1 <= block <= array.size:
        raise ValueError(
            f"repeats={repeats} must be at least 1, and block={block} between 1 and the {array.size} values"
        )
    mean = float(array.mean())
    if array.size == block:
        return Interval(mean, -np.inf, np.inf)
    low, high = quantiles(_means(array, repeats, seed, block), level)
    return Interval(mean, low, high)


def bootstrap_difference(
    first: Numbers, second: Numbers, *, level: float = 0.95, repeats: int = 10_000, seed: int = 0, block: int = 1
) -> Interval:
    """The mean of first - second over pairs (the same item, step or seed), as `bootstrap_mean` of the differences.

    raises   ValueError as `bootstrap_mean`, and if the lengths differ
    """
    a, b = pairs(first, second)
    return bootstrap_mean(a - b, level=level, repeats=repeats, seed=seed, block=block)


def quantiles(draws: Array, level: float) -> tuple[float, float]:
    """The two quantiles between which the middle `level` of the draws lies."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _means(array: Array, repeats: int, seed: int, block: int) -> Array:
    """fp64 [repeats], each the mean of n values drawn in blocks; the last block is cut so that they are n."""
    n, generator = array.size, np.random.default_rng(seed)
    blocks = -(-n // block)
    lengths = np.full(blocks, block)
    lengths[-1] = n - (blocks - 1) * block
    centre = array.mean()  # sums of differences from it lose no digits to a large mean
    sums = np.concatenate([[0.0], np.cumsum(np.concatenate([array, array[:block]]) - centre)])  # [n + block + 1]
    means = np.empty(repeats)
    turn = max(1, DRAWN // blocks)
    for start in range(0, repeats, turn):
        starts = generator.integers(0, n, (min(turn, repeats - start), blocks))
        drawn = array[starts] - centre if block == 1 else sums[starts + lengths] - sums[starts]
        means[start : start + turn] = drawn.sum(1) / n
    return centre + means
