"""Statistics against closed forms, exact integer arithmetic, and simulations with a known truth."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from fp8kernels.statistics import (
    ape,
    bootstrap_difference,
    bootstrap_mean,
    equivalence,
    holm,
    mcnemar,
    minimal_detectable_drop,
    paired,
    signed_error_percent,
)

LEVEL = 0.95
SIGMAS = 4  # of a binomial count; a false failure in about 30,000 seeds, and seeds are fixed


def fewest_covering(trials: int, level: float = LEVEL) -> float:
    """As few of so many intervals as may hold the truth if each does with probability `level`."""
    return trials * level - SIGMAS * math.sqrt(trials * level * (1 - level))


def answers_of(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, only_first, only_second, neither)
    return np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)


def test_ape_is_the_distance_in_percent() -> None:
    assert ape([2.0, 1.98, 3.0], [2.0, 2.0, 4.0]) == pytest.approx([0.0, 1.0, 25.0], rel=1e-14)
    assert signed_error_percent([1.98, 5.0], [2.0, 4.0]) == pytest.approx([-1.0, 25.0], rel=1e-14)
    assert signed_error_percent([-1.0], [-2.0]) == [50.0]  # above the baseline, so worse


@pytest.mark.parametrize(
    "losses, baseline, message",
    [
        ([], [], "at least one number"),
        ([1.0, 2.0], [1.0], "2 values and baseline has 1"),
        ([1.0, math.nan], [1.0, 1.0], r"losses\[1\] is nan"),
        ([1.0], [math.inf], r"baseline\[0\] is inf"),
        ([1.0, 1.0], [1.0, 0.0], r"baseline\[1\] is 0"),
        ([[1.0]], [[1.0]], r"shape \(1, 1\)"),
    ],
)
def test_curves_that_cannot_be_compared(losses: list, baseline: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ape(losses, baseline)


def test_the_bootstrap_of_a_mean_is_about_that_of_normal_theory() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    repeats = 20_000
    got = bootstrap_mean(values, repeats=repeats)
    half = NormalDist().inv_cdf(0.975) * values.std() / math.sqrt(values.size)
    # the spread of a 2.5 % quantile of `repeats` draws: sqrt(p (1 - p) / repeats) over the density there, in standard
    # errors of the mean; and 1 / sqrt(n) of a standard error for what the bootstrap knows beyond the normal (skewness)
    density = NormalDist().pdf(NormalDist().inv_cdf(0.975))
    spread = SIGMAS * math.sqrt(0.025 * 0.975 / repeats) / density + 1 / math.sqrt(values.size)
    error = spread * values.std() / math.sqrt(values.size)
    assert got.mean == values.mean()
    assert abs(got.low - (values.mean() - half)) < error
    assert abs(got.high - (values.mean() + half)) < error


def test_intervals_depend_on_the_seed_alone_and_on_no_large_mean() -> None:
    values = np.random.default_rng(2).normal(0, 1, 50)
    assert bootstrap_mean(values) == bootstrap_mean(list(values))
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)
    for block in (1, 7):
        near, far = bootstrap_mean(values, block=block), bootstrap_mean(values + 1e6, block=block)
        # sums of 57 differences from the mean, whose inputs were rounded to steps of 2**-33 by adding 1e6
        assert far.high - far.low == pytest.approx(near.high - near.low, abs=57 * 2**-32)


@pytest.mark.parametrize("block", [1, 5])
def test_equal_values_have_no_spread_and_one_value_has_an_unknown_one(block: int) -> None:
    assert bootstrap_mean([3.0] * 20, block=block) == (3.0, 3.0, 3.0)
    assert bootstrap_mean([3.0] * block, block=block) == (3.0, -math.inf, math.inf)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator, trials = np.random.default_rng(3), 400
    held = 0
    for _ in range(trials):
        got = bootstrap_mean(generator.exponential(1.0, 300), repeats=1000, seed=int(generator.integers(2**31)))
        held += got.low <= 1.0 <= got.high
    assert held >= fewest_covering(trials), f"{held} of {trials}"


def test_a_curve_whose_steps_depend_on_each_other_needs_blocks() -> None:
    """An autoregressive curve of 0.8: single steps give intervals three times too narrow, blocks mend most of it."""
    generator, trials, n = np.random.default_rng(4), 200, 1000
    held = {1: 0, 50: 0}
    for _ in range(trials):
        curve = np.zeros(n + 100)
        noise = generator.normal(size=curve.size)
        for step in range(1, curve.size):
            curve[step] = 0.8 * curve[step - 1] + noise[step]
        for block in held:
            got = bootstrap_mean(curve[100:], repeats=500, block=block)
            held[block] += got.low <= 0 <= got.high
    # (1 + 0.8) / (1 - 0.8) = 9 is the variance of the mean over that of independent steps: cover of 2 Phi(1.96 / 3) - 1
    single = 2 * NormalDist().cdf(NormalDist().inv_cdf(0.975) / 3) - 1
    assert held[1] <= trials * single + SIGMAS * math.sqrt(trials * single * (1 - single))
    # blocks of b see 1 - 2 * 0.8 / ((1 - 0.8**2) * b) = 91 % of that variance: cover of 2 Phi(1.96 * sqrt(0.91)) - 1
    seen = 1 - 2 * 0.8 / ((1 - 0.8**2) * 50)
    cover = 2 * NormalDist().cdf(NormalDist().inv_cdf(0.975) * math.sqrt(seen)) - 1
    assert held[50] >= fewest_covering(trials, cover)


def test_memory_stays_bounded() -> None:
    tracemalloc.start()
    bootstrap_mean(np.arange(100_000.0), repeats=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 256 * 2**20, f"{peak / 2**20:.0f} MiB; all draws at once would be 763 MiB"


def test_a_difference_is_over_pairs() -> None:
    generator = np.random.default_rng(5)
    hard = generator.normal(0, 10, 200)  # what an item costs anyone
    first, second = hard + generator.normal(0.5, 0.1, 200), hard
    got = bootstrap_difference(first, second)
    assert 0 < got.low < got.mean < got.high
    assert got.high - got.low < 0.1 < bootstrap_mean(first).high - bootstrap_mean(first).low
    with pytest.raises(ValueError, match="first has 2 values and second has 3"):
        bootstrap_difference([1, 2], [1, 2, 3])


def exact_p(only_first: int, only_second: int, *, mid_p: bool) -> float:
    """In whole numbers: 2 P(X <= k) of Binomial(n, 1/2), less P(X = k) for mid-p."""
    n, k = only_first + only_second, min(only_first, only_second)
    tails = 2 * sum(math.comb(n, i) for i in range(k + 1)) - (math.comb(n, k) if mid_p else 0)
    return float(min(Fraction(1), Fraction(tails, 2**n)))


@pytest.mark.parametrize("mid_p", [False, True])
def test_mcnemar_is_exact(*, mid_p: bool) -> None:
    for only_first in range(24):
        for only_second in range(24):
            got = mcnemar(*answers_of(3, only_first, only_second, 2), mid_p=mid_p)
            assert (got.only_first, got.only_second) == (only_first, only_second)
            assert got.p_value == pytest.approx(exact_p(only_first, only_second, mid_p=mid_p), rel=1e-12)


@pytest.mark.parametrize("only_first, only_second", [(2500, 2500), (2650, 2350), (2100, 1900), (400, 12), (9000, 0)])
def test_mcnemar_stays_exact_with_many_items(only_first: int, only_second: int) -> None:
    got = mcnemar(*answers_of(0, only_first, only_second, 0)).p_value
    # lgamma's rounding, 2**-53 of numbers up to n ln n = 92,000, some four of them, becomes relative in exp
    assert got == pytest.approx(exact_p(only_first, only_second, mid_p=False), rel=4 * 2**-53 * 92_000 * 4)
    assert 0 <= got <= 1


def test_a_million_items_take_no_time_and_no_nan() -> None:
    n = 1_000_000
    assert mcnemar(np.ones(n), np.zeros(n)).p_value == 0.0  # 2**-999,999
    close = mcnemar(*answers_of(0, n // 2 + 1000, n // 2 - 1000, 0)).p_value
    z = (2000 - 1) / math.sqrt(n)  # with the continuity correction the normal is close to the exact test here
    assert close == pytest.approx(2 * NormalDist().cdf(-z), rel=1e-3)


def test_paired_accuracies_and_drop() -> None:
    got = paired(*answers_of(60, 12, 2, 26))
    assert (got.first, got.second, got.items) == (0.72, 0.62, 100)
    assert (got.only_first, got.only_second) == (12, 2)
    assert got.drop == pytest.approx(0.10)
    assert got.relative_drop == pytest.approx(0.10 / 0.72)
    assert got.p_value == pytest.approx(exact_p(12, 2, mid_p=False))
    assert 0 < got.low < got.drop < got.high
    assert 0 < got.relative_low < got.relative_drop < got.relative_high


def test_paired_the_other_way_round() -> None:
    ahead, behind = paired(*answers_of(60, 12, 2, 26)), paired(*answers_of(60, 2, 12, 26))
    assert behind.drop == -ahead.drop
    assert behind.p_value == ahead.p_value
    assert behind.high < 0  # a rise, and sure of it


@pytest.mark.parametrize("only_first, only_second", [(0.04, 0.02), (0.01, 0.01), (0.2, 0.05), (0.002, 0.0)])
def test_intervals_of_drops_hold_the_truth_as_often_as_they_say(only_first: float, only_second: float) -> None:
    generator, trials, n = np.random.default_rng(6), 500, 400
    cells = np.array([0.6 - only_first, only_first, only_second, 0.4 - only_second])
    held = relative = 0
    for counts in generator.multinomial(n, cells, size=trials):
        got = paired(*answers_of(*counts), repeats=2000, seed=int(generator.integers(2**31)))
        held += got.low <= only_first - only_second <= got.high
        relative += got.relative_low <= (only_first - only_second) / 0.6 <= got.relative_high
    assert held >= fewest_covering(trials), f"{held} of {trials}"
    assert relative >= fewest_covering(trials), f"{relative} of {trials}"


def test_full_agreement_on_few_items_shows_little() -> None:
    """The plain bootstrap's interval would be [0, 0], and ten items would show everything."""
    few, many = paired([1] * 10, [1] * 10), paired([1] * 5000, [1] * 5000)
    assert few.p_value == many.p_value == 1.0
    assert equivalence(few, 0.01).verdict == "not shown"
    assert equivalence(many, 0.01).verdict == "no worse"
    single = paired([1], [0])
    assert single.drop == 1.0
    assert single.low <= 0
    assert single.p_value == 1.0


def test_nothing_right_has_no_relative_drop() -> None:
    got = paired([0, 0, 0], [0, 1, 0])
    assert got.drop == pytest.approx(-1 / 3)
    assert math.isnan(got.relative_drop)
    assert equivalence(got, relative=True).verdict == "not shown"


@pytest.mark.parametrize(
    "first, second, message",
    [
        ([], [], "at least one number"),
        ([1], [1, 0], "first has 1 values and second has 2"),
        ([1, 0.5], [1, 0], r"first\[1\] is 0.5"),
        ([1, 0], [1, math.nan], r"second\[1\] is nan"),
    ],
)
def test_answers_that_cannot_be_compared(first: list, second: list, message: str) -> None:
    for compare in (mcnemar, paired):
        with pytest.raises(ValueError, match=message):
            compare(first, second)


@pytest.mark.parametrize("change", [{"level": 1.0}, {"level": 0.0}, {"repeats": 0}])
def test_settings_out_of_range(change: dict) -> None:
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name}="):
        paired([1, 0], [1, 0], **change)
    with pytest.raises(ValueError, match=f"{name}="):
        bootstrap_mean([1, 0], **change)
    with pytest.raises(ValueError, match="block=3"):
        bootstrap_mean([1, 0], block=3)


def test_holm() -> None:
    # smallest times 3, then 2, then 1, never falling
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.2])


def test_holm_keeps_the_chance_of_any_false_claim() -> None:
    generator, trials = np.random.default_rng(7), 2000
    plain = corrected = 0
    for p in generator.random((trials, 8)):  # eight true null hypotheses
        plain += p.min() < 0.05
        corrected += min(holm(p)) < 0.05
    assert corrected <= trials * 0.05 + SIGMAS * math.sqrt(trials * 0.05 * 0.95)
    assert plain > 5 * corrected


def test_what_an_interval_shows() -> None:
    worse = paired(*answers_of(500, 120, 20, 360))
    assert equivalence(worse, 0.01).verdict == "worse"
    assert equivalence(worse, 0.20).verdict == "no worse"
    assert equivalence(worse, 0.10).verdict == "not shown"
    assert equivalence(worse, 0.13).verdict == "no worse"
    assert equivalence(worse, 0.13, relative=True).verdict == "not shown"  # 10 points are 16 % of 62 %
    better = equivalence(paired(*answers_of(500, 20, 120, 360)), 0.01)
    assert better.verdict == "no worse"
    assert "±" not in better.text  # no worse, but not equivalent: it is better
    assert "within ±20.00%" in equivalence(worse, 0.20).text
    with pytest.raises(ValueError, match="margin"):
        equivalence(worse, 0.0)


def test_the_detectable_drop_is_found_as_often_as_it_says() -> None:
    items, differing, trials = 1000, 0.1, 1000
    drop = minimal_detectable_drop(items, differing=differing)
    generator = np.random.default_rng(8)
    cells = [0.5, (differing + drop) / 2, (differing - drop) / 2, 0.5 - differing]
    found = sum(
        mcnemar(*answers_of(*counts), mid_p=True).p_value < 0.05
        for counts in generator.multinomial(items, cells, size=trials)
    )
    # the normal approximation errs by about 1 / sqrt(100 differing items) of a standard deviation at the edge
    edge = NormalDist().pdf(NormalDist().inv_cdf(0.8)) / math.sqrt(items * differing)
    assert abs(found / trials - 0.8) <= SIGMAS * math.sqrt(0.8 * 0.2 / trials) + edge
    assert minimal_detectable_drop(4 * items, differing=differing) == pytest.approx(drop / 2, rel=0.05)
    assert minimal_detectable_drop(20, differing=0.05) == math.inf
