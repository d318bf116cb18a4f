"""From numbers to sentences: many comparisons at once, what is shown and what is not, what n items could show."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from .answers import Paired
from .check import Numbers, fraction, numbers

STEPS = 200  # halvings of an interval; it ends at neighbouring floats


class Statement(NamedTuple):
    """What an interval shows: "no worse", "worse" or "not shown", and the sentence."""

    verdict: str
    text: str


def holm(p_values: Numbers) -> list[float]:
    """p-values of m comparisons, such that the chance of any false one among those below alpha is at most alpha.

    The i-th smallest becomes the largest of (m - j + 1) * p_(j) over j <= i, at most 1. Holds for any dependence.

    returns  [m], in the order given
    raises   ValueError if there are none, or one lies outside [0, 1]
    source   Holm, Scandinavian Journal of Statistics 6 (1979)
    """
    p = numbers(p_values, "p_values")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"p_values reach from {p.min():g} to {p.max():g}; a p-value lies between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result.tolist()


def equivalence(comparison: Paired, margin: float = 0.01, *, relative: bool = False) -> Statement:
    """Whether the second model is no worse than the first by more than a margin; "no difference found" is no proof.

    "no worse"   the whole interval of the drop lies below the margin
    "worse"      it lies above
    "not shown"  the margin lies within: more items are needed

    margin    a fraction; of accuracy itself, or with relative=True of the first model's accuracy
    raises    ValueError if the margin is not between 0 and 1
    source    non-inferiority by confidence interval: Piaggio et al., CONSORT statement, JAMA 308 (2012)
    """
    fraction(margin, "margin")
    low, high = (comparison.low, comparison.high)
    if relative:
        low, high = comparison.relative_low, comparison.relative_high
    kind = "relative" if relative else "absolute"
    found = (
        f"{kind} drop between {low:.2%} and {high:.2%} with {comparison.level:.4g} confidence, {comparison.items} items"
    )
    if high < margin:
        inside = f"within ±{margin:.2%} as a whole; " if low > -margin else ""
        return Statement("no worse", f"no worse than {margin:.2%} shown: {inside}{found}")
    if low > margin:
        return Statement("worse", f"worse by more than {margin:.2%} shown: {found}")
    return Statement("not shown", f"no worse than {margin:.2%} not shown: {found}")


def minimal_detectable_drop(items: int, *, differing: float, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest drop of accuracy that a paired comparison of so many items finds with the given power.

    Solves  n d^2 = (z_a sqrt(q) + z_b sqrt(q - d^2))^2  for d, with z_a of (1 + level) / 2, z_b of the power.

    differing  q, the fraction of items that only one of the models gets right; a drop cannot be larger
    returns    d, a fraction; infinite where so few items find no drop at all
    raises     ValueError if items < 1, or another argument is not between 0 and 1 (differing may be 1)
    source     Connor, Sample size for testing differences in proportions for the paired-sample design,
               Biometrics 43 (1987); normal approximation
    """
    fraction(level, "level")
    fraction(power, "power")
    if items < 1 or not 0 < differing <= 1:
        raise ValueError(f"items={items} must be at least 1, and differing={differing} above 0 and at most 1")
    z_level, z_power = NormalDist().inv_cdf((1 + level) / 2), NormalDist().inv_cdf(power)

    def finds(drop: float) -> bool:
        spread = z_level * math.sqrt(differing) + z_power * math.sqrt(max(differing - drop * drop, 0.0))
        return math.sqrt(items) * drop >= spread

    low, high = 0.0, differing
    if not finds(high):
        return math.inf
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if finds(middle) else (middle, high)
    return high
