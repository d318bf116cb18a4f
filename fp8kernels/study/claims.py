"""What the published study says, as an effect and a bound, and the rule that makes a verdict of an interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..formats import get_format
from ..statistics import Interval
from . import outcomes
from .rows import Study
from .settings import Settings

VERDICTS = ("shown", "not shown", "contradicted")
FAMILY = 0.05  # the chance of any wrong verdict among all claims, shared out evenly

Measure = Callable[[Study, Settings, float], Interval | None]  # study, centre, level -> the effect


@dataclass(frozen=True)
class Claim:
    """One sentence of the published study, made measurable.

    text      what is claimed
    reported  what the published runs gave
    effect    what is measured here, in words and unit
    measure   the effect's interval; None where the runs are not there
    below     whether the claim says that the effect lies below the bound, or above it
    bound     in the effect's unit
    """

    text: str
    reported: str
    effect: str
    measure: Measure
    below: bool
    bound: float = 0.0


@dataclass(frozen=True)
class Judged:
    """A claim with what was measured; `found` is None where the runs are not there."""

    claim: Claim
    found: Interval | None
    verdict: str
    level: float


def verdict(found: Interval | None, bound: float, *, below: bool) -> str:
    """ "shown" if the whole interval lies on the claim's side of the bound, "contradicted" if on the other side."""
    if found is None:
        return "not shown"
    if not below:
        return verdict(Interval(-found.mean, -found.high, -found.low), -bound, below=True)
    return "shown" if found.high < bound else "contradicted" if found.low > bound else "not shown"


def judge(study: Study, centre: Settings, claims: tuple[Claim, ...] | None = None) -> list[Judged]:
    """Every claim with its verdict; intervals are wider the more claims there are (Bonferroni)."""
    claims = CLAIMS if claims is None else claims
    level = 1 - FAMILY / len(claims)
    judged = []
    for claim in claims:
        found = claim.measure(study, centre, level)
        judged.append(Judged(claim, found, verdict(found, claim.bound, below=claim.below), level))
    return judged


def _ape_of(**changes: object) -> Measure:
    def measure(study: Study, centre: Settings, level: float) -> Interval | None:
        found = outcomes.outcome(study, replace(centre, **changes), level=level)  # type: ignore[arg-type]
        return None if found is None else found.ape

    return measure


def _ape_over(first: dict[str, object], second: dict[str, object]) -> Measure:
    """APE of the centre with the first changes, less that with the second."""

    def measure(study: Study, centre: Settings, level: float) -> Interval | None:
        one, two = replace(centre, **first), replace(centre, **second)  # type: ignore[arg-type]
        return outcomes.ape_difference(study, one, two, level=level)

    return measure


def _bias(study: Study, centre: Settings, level: float) -> Interval | None:
    found = outcomes.outcome(study, centre, level=level)
    return None if found is None else found.bias


def _relative_drop(study: Study, centre: Settings, level: float) -> Interval | None:
    found = outcomes.outcome(study, centre, level=level)
    return None if found is None else found.relative


def _exam_over(first: dict[str, object], second: dict[str, object]) -> Measure:
    """Accuracy of the centre with the first changes, less that with the second."""

    def measure(study: Study, centre: Settings, level: float) -> Interval | None:
        one, two = replace(centre, **first), replace(centre, **second)  # type: ignore[arg-type]
        return outcomes.exam_difference(study, one, two, level=level)

    return measure


def _bf16_exam_over(first: dict[str, object], second: dict[str, object]) -> Measure:
    """The same of BF16 runs: no 8 bits anywhere."""

    def measure(study: Study, centre: Settings, level: float) -> Interval | None:
        plain = centre.matched()
        one, two = replace(plain, **first), replace(plain, **second)  # type: ignore[arg-type]
        return outcomes.exam_difference(study, one, two, level=level)

    return measure


def _bf16_forgets(**changes: object) -> Measure:
    """Accuracy of the base less that after BF16 training."""

    def measure(study: Study, centre: Settings, level: float) -> Interval | None:
        return outcomes.forgotten(study, replace(centre.matched(), **changes), level=level)  # type: ignore[arg-type]

    return measure


def _bf16_learns(**changes: object) -> Measure:
    """Held-out loss of the base less that after BF16 training."""

    def measure(study: Study, centre: Settings, level: float) -> Interval | None:
        return outcomes.learnt(study, replace(centre.matched(), **changes), level=level)  # type: ignore[arg-type]

    return measure


TEN_TIMES = 1e-3  # the centre's learning rate is 1e-4
TENTH = 1e-5
LARGEST = float(get_format("hif8").max)

CLAIMS = (
    Claim(
        "The loss stays within 0.12 % of BF16's",
        "APE 0.1201 % over the quantized steps",
        "mean APE of the centre, %",
        _ape_of(),
        below=True,
        bound=0.12,
    ),
    Claim(
        "The loss stays within 0.12 % at the published learning rate, 1e-5, too",
        "APE 0.1201 % over the quantized steps",
        "mean APE at 1e-5, %",
        _ape_of(learning_rate=TENTH),
        below=True,
        bound=0.12,
    ),
    Claim(
        "HiF8's loss lies above BF16's",
        "signed error +0.0885 to +0.1716 %, never negative",
        "mean signed error of the centre, %",
        _bias,
        below=False,
    ),
    Claim(
        "Near-lossless: accuracy drops by less than 1 % relative",
        "MMLU 0.43 %, HellaSwag 0.58 %, ARC-C 0.23 %, ARC-E 1.06 %; all within one standard error",
        "relative drop in the exam, %",
        _relative_drop,
        below=True,
        bound=1.0,
    ),
    Claim(
        "Max over a window is better than the most recent amax: loss",
        "APE 0.194 % to 0.120 %, with five other changes",
        "APE of most_recent less that of max, points",
        _ape_over({"algorithm": "most_recent"}, {}),
        below=False,
    ),
    Claim(
        "Max over a window is better than the most recent amax: knowledge",
        "at 1e-4: MMLU 26.13 % (most recent), 26.73 % (max); ARC-C 32.59 %, 32.51 %",
        "accuracy of max less that of most_recent, points",
        _exam_over({}, {"algorithm": "most_recent"}),
        below=False,
    ),
    Claim(
        "Max is better than an average of the window",
        "averages were tried and given up for max",
        "APE of exponential_moving_average less that of max, points",
        _ape_over({"algorithm": "exponential_moving_average"}, {}),
        below=False,
    ),
    Claim(
        "A long window is better than a short one",
        "64 entries (8 optimizer steps) in the final recipe, 30 before",
        "APE of window 1 less that of window 64, points",
        _ape_over({"window": 1}, {"window": 64}),
        below=False,
    ),
    Claim(
        "Scales that are renewed every 10 steps only cost at most 0.016 points of APE",
        "most_recent: 0.194 % each step, 0.210 % every 10 steps",
        "APE with interval 10 less that with 1 (most_recent), points",
        _ape_over({"algorithm": "most_recent", "interval": 10}, {"algorithm": "most_recent"}),
        below=True,
        bound=0.016,
    ),
    Claim(
        "Blocks and attention left in BF16 lower the error",
        "all linears 0.194 %, five blocks in BF16 0.113 %",
        "APE of all linears less that of the middle MLPs, points",
        _ape_over({"layers": "all"}, {}),
        below=False,
    ),
    Claim(
        "The first steps in BF16 help",
        "500 of 10,000 steps in the final recipe; not tested alone",
        "APE without them less that with them, points",
        _ape_over({"warmup_steps": 0}, {}),
        below=False,
    ),
    Claim(
        "15 is the target for HiF8, not the edge of its range",
        "15 in all runs",
        "APE of the format's largest value as the target less that of 15, points",
        _ape_over({"target": LARGEST}, {}),
        below=False,
    ),
    Claim(
        "Ranks need not share their amax",
        "scales per rank in all runs",
        "APE without sharing less that with it, points (within 0.016)",
        _ape_over({"ranks": 2, "reduced": False}, {"ranks": 2}),
        below=True,
        bound=0.016,
    ),
    Claim(
        "A large learning rate makes the model forget",
        "MMLU 43.36 % at 1e-5, 26.66 % at 1e-4, BF16",
        "BF16 accuracy at a tenth of the centre's rate less that at ten times, points",
        _bf16_exam_over({"learning_rate": TENTH}, {"learning_rate": TEN_TIMES}),
        below=False,
    ),
    Claim(
        "A small learning rate keeps what was known",
        "1e-5 in the final recipe; yet its BF16 baseline has MMLU 43.4 %, the model card 60.7 %",
        "what BF16 forgets at 1e-5, points",
        _bf16_forgets(learning_rate=TENTH),
        below=True,
        bound=1.0,
    ),
    Claim(
        "The same with weights in BF16, as the published runs have them",
        "as above",
        "what BF16 with BF16 weights forgets at 1e-5, points",
        _bf16_forgets(learning_rate=TENTH, master=False),
        below=True,
        bound=1.0,
    ),
    Claim(
        "And the model still learns from the text",
        "loss 11.38 to 5.02 in 10,000 steps; to begin near ln V = 11.94 is what labels shifted twice do",
        "fall of the held-out loss in that run, nats",
        _bf16_learns(learning_rate=TENTH, master=False),
        below=False,
    ),
    Claim(
        "The learning rate explains the forgetting: labels that are shifted twice add nothing",
        "labels shifted twice in all runs, which is not mentioned",
        "BF16 accuracy with labels shifted once less that with them shifted twice, points",
        _bf16_exam_over({}, {"labels": "shifted twice"}),
        below=True,
        bound=1.0,
    ),
    Claim(
        "Labels that are shifted twice add nothing at 1e-5 either",
        "MMLU 43.4 % after the BF16 run, 60.7 % before",
        "the same at 1e-5, points",
        _bf16_exam_over({"learning_rate": TENTH}, {"learning_rate": TENTH, "labels": "shifted twice"}),
        below=True,
        bound=1.0,
    ),
    Claim(
        "Eight bits do not add to the forgetting at a large learning rate",
        "at 1e-4: MMLU 26.66 % (BF16), 26.73 % (max)",
        "BF16 accuracy less HiF8's at ten times the rate, points",
        lambda study, centre, level: outcomes.exam_difference(
            study,
            replace(centre, learning_rate=TEN_TIMES).matched(),
            replace(centre, learning_rate=TEN_TIMES),
            level=level,
        ),
        below=True,
        bound=1.0,
    ),
)
