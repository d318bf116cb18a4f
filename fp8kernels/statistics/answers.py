"""Two models answer the same questions: how many more the first one gets right, and whether that is chance."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .bootstrap import quantiles
from .check import Numbers, answers, fraction

HALF = 0.5  # of an item, added to each of the four cells that answers are drawn from


class McNemar(NamedTuple):
    """Items that only one of two models gets right, and the chance of a split at least as uneven between equals."""

    only_first: int
    only_second: int
    p_value: float


class Paired(NamedTuple):
    """Two models on the same items; `drop` is how much the second is worse.

    first, second  accuracy, as fractions
    drop           first - second; low, high: its interval at `level`
    relative_drop  drop / first, NaN where the first has nothing right; relative_low, relative_high: its interval
    p_value        of McNemar's exact test, two-sided
    items          how many; only_first, only_second: those that one model gets right and the other does not
    """

    first: float
    second: float
    drop: float
    relative_drop: float
    low: float
    high: float
    p_value: float
    items: int
    relative_low: float
    relative_high: float
    only_first: int
    only_second: int
    level: float


def mcnemar(first: Numbers, second: Numbers, *, mid_p: bool = False) -> McNemar:
    """McNemar's test, exact: the items on which the models differ fall to either side like a coin.

    first, second  [n], right (1, True) or wrong (0, False), of the same items in the same order
    mid_p          counts half of the chance of just this split; less conservative, no longer guaranteed
    returns        p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2); 1 where they differ nowhere
    raises         ValueError if they are empty, differ in length, or hold other numbers
    source         McNemar (1947); mid-p: Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13:91 (2013)
    """
    a, b = answers(first, second)
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    return McNemar(only_first, only_second, _p_value(only_first, only_second, mid_p=mid_p))


def paired(
    first: Numbers,
    second: Numbers,
    *,
    level: float = 0.95,
    repeats: int = 10_000,
    seed: int = 0,
    mid_p: bool = False,
) -> Paired:
    """Compare two models on the same items: accuracies, drop, relative drop with intervals, and a p-value.

    An item's two answers are one of four pairs, so drawing n items with replacement is one draw of four counts from a
    multinomial. Half an item is added to each pair before drawing: ten items on which two models agree do not show
    that they always do, and the plain bootstrap would say so with an interval of width 0.

    first, second  [n], right (1, True) or wrong (0, False), of the same items in the same order; first is the reference
    raises         ValueError as `mcnemar`, and if level or repeats are out of range
    source         Efron and Tibshirani (1993), chapter 13; half an item: Agresti and Min, Simple improved confidence
                   intervals for comparing matched proportions, Statistics in Medicine 24 (2005)
    """
    a, b = answers(first, second)
    fraction(level, "level")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    n, only_first, only_second = a.size, int((a & ~b).sum()), int((~a & b).sum())
    cells = np.array([int((a & b).sum()), only_first, only_second, int((~a & ~b).sum())]) + HALF
    drawn = np.random.default_rng(seed).multinomial(n, cells / cells.sum(), size=repeats)  # [repeats, 4]
    drops = drawn[:, 1] - drawn[:, 2]
    right = np.maximum(drawn[:, 0] + drawn[:, 1], 1)  # of the first; a draw with none counts as one with one
    low, high = quantiles(drops / n, level)
    relative_low, relative_high = quantiles(drops / right, level)
    drop, accuracy = (only_first - only_second) / n, float(a.mean())
    return Paired(
        first=accuracy,
        second=float(b.mean()),
        drop=drop,
        relative_drop=drop / accuracy if accuracy else math.nan,
        low=low,
        high=high,
        p_value=_p_value(only_first, only_second, mid_p=mid_p),
        items=n,
        relative_low=relative_low if accuracy else math.nan,
        relative_high=relative_high if accuracy else math.nan,
        only_first=only_first,
        only_second=only_second,
        level=level,
    )


def _p_value(only_first: int, only_second: int, *, mid_p: bool) -> float:
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    log_chance = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    ratio, total, below = 1.0, 1.0, k  # chances of k, k - 1, …, 0 in units of that of k; they fall ever faster
    while below > 0 and ratio > total * 1e-18:
        ratio *= below / (n - below + 1)
        total += ratio
        below -= 1
    tails = 2 * total - (1 if mid_p else 0)
    return min(1.0, math.exp(log_chance + math.log(tails)))
