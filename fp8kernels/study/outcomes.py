"""What a run differs by from its BF16 run, and two runs from each other: over steps, held-out blocks and exam items.

Everything is paired. Steps of a curve depend on their neighbours, so they are drawn in blocks; seeds share blocks and
items, so the mean over seeds of each step, block or item is what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..statistics import Interval, ape, bootstrap_mean, mcnemar, signed_error_percent
from .rows import Row, Study
from .settings import Settings

BLOCK = 16  # steps of a loss curve that are drawn together
LEVEL = 0.95
REPEATS = 4000

Values = Sequence[float]


class Outcome(NamedTuple):
    """A setting against its BF16 run (`Settings.matched`); a difference above 0 is the setting's loss.

    seeds       both ran with
    ape         mean over steps in 8 bits of |loss - BF16's| in percent of it; highest: of all steps and seeds
    bias        the same with its sign
    held_out    loss on held-out text after the run, less BF16's, in nats
    exam        accuracy of BF16's model less this one's, in percentage points; relative: in percent of BF16's accuracy
    p_value     of the exam: exact sign test over items (McNemar's, where there is one seed)
    differing   items that the two models do not answer alike, as a fraction
    cloze       as the exam, in points
    lost        the exam's accuracy of the base less that after the run, in points
    accuracy    of the exam after the run, in percent
    """

    settings: Settings
    seeds: int
    ape: Interval
    highest: float
    bias: Interval
    held_out: Interval
    exam: Interval
    relative: Interval
    p_value: float
    differing: float
    cloze: Interval
    lost: Interval
    accuracy: float


def outcome(study: Study, settings: Settings, *, level: float = LEVEL) -> Outcome | None:
    """The setting against its BF16 run; None where they have no seed in common."""
    pairs = study.both(settings.matched(), settings)
    if not pairs:
        return None
    first = settings.warmup_steps if settings.precision == "hif8" else 0
    curves = [ape(run["losses"], plain["losses"])[first:] for plain, run in pairs]
    signed = [signed_error_percent(run["losses"], plain["losses"])[first:] for plain, run in pairs]
    held_out = [np.subtract(run["validation"], plain["validation"]) for plain, run in pairs]
    exam = [100 * (right(plain["exam"]) - right(run["exam"])) for plain, run in pairs]
    cloze = [100 * (right(plain["cloze"]) - right(run["cloze"])) for plain, run in pairs]
    lost = [100 * (right(study.base["exam"]) - right(run["exam"])) for _, run in pairs]
    drop = of_items(exam, level)
    accuracy = 100 * float(np.mean([right(plain["exam"]).mean() for plain, _ in pairs]))
    return Outcome(
        settings=settings,
        seeds=len(pairs),
        ape=interval(curves, level, block=BLOCK),
        highest=max(map(max, curves)),
        bias=interval(signed, level, block=BLOCK),
        held_out=interval(held_out, level),
        exam=drop,
        relative=scaled(drop, 100 / accuracy if accuracy else math.nan),
        p_value=sign_test(exam),
        differing=float(np.mean([np.mean(one != 0) for one in exam])),
        cloze=of_items(cloze, level),
        lost=of_items(lost, level),
        accuracy=100 * float(np.mean([right(run["exam"]).mean() for _, run in pairs])),
    )


def ape_difference(study: Study, first: Settings, second: Settings, *, level: float = LEVEL) -> Interval | None:
    """APE of the first setting less that of the second, in percentage points, over steps in which both are 8-bit."""
    start = max(first.warmup_steps, second.warmup_steps)

    def curve(settings: Settings, seed: int) -> Values:
        run, plain = study.runs[settings][seed], study.runs[settings.matched()][seed]
        return ape(run["losses"], plain["losses"])[start:]

    return _difference(study, first, second, curve, level, block=BLOCK)


def held_out_difference(study: Study, first: Settings, second: Settings, *, level: float = LEVEL) -> Interval | None:
    """Held-out loss of the first setting, over that of its BF16 run, less the same of the second; in nats."""

    def excess(settings: Settings, seed: int) -> Values:
        run, plain = study.runs[settings][seed], study.runs[settings.matched()][seed]
        return list(np.subtract(run["validation"], plain["validation"]))

    return _difference(study, first, second, excess, level)


def exam_difference(study: Study, first: Settings, second: Settings, *, level: float = LEVEL) -> Interval | None:
    """Accuracy in the exam of the first setting less that of the second, in percentage points; no BF16 between them."""
    pairs = study.both(first, second)
    if not pairs:
        return None
    return of_items([100 * (right(one["exam"]) - right(two["exam"])) for one, two in pairs], level)


def forgotten(study: Study, settings: Settings, *, level: float = LEVEL) -> Interval | None:
    """Accuracy in the exam of the base less that after the run, in percentage points."""
    rows: list[Row] = list(study.runs.get(settings, {}).values())
    if not rows:
        return None
    return of_items([100 * (right(study.base["exam"]) - right(row["exam"])) for row in rows], level)


def learnt(study: Study, settings: Settings, *, level: float = LEVEL) -> Interval | None:
    """Held-out loss of the base less that after the run, in nats: what training on text did for text."""
    rows = list(study.runs.get(settings, {}).values())
    if not rows:
        return None
    return interval([np.subtract(study.base["validation"], row["validation"]) for row in rows], level)


def interval(curves: Sequence[Values], level: float, *, block: int = 1) -> Interval:
    """The mean over seeds (equally long lists), with the bootstrap's interval over steps, blocks or items."""
    mean = np.mean(np.asarray(curves, dtype=np.float64), axis=0)
    return bootstrap_mean(mean, level=level, repeats=REPEATS, block=min(block, max(1, len(mean) // 4)))


def of_items(drops: Sequence[Values], level: float) -> Interval:
    """The same of answers: 0, 100 or -100 an item. Two items more, one to either side, stand for what was not seen:
    without them few items that all agree would show that items always do (statistics.paired does the same).
    """
    mean = np.mean(np.asarray(drops, dtype=np.float64), axis=0)
    unseen = 100 / math.sqrt(2)  # half an item of 100 in either direction has the same variance as one of this
    drawn = bootstrap_mean([*mean, unseen, -unseen], level=level, repeats=REPEATS)
    grown = (len(mean) + 2) / len(mean)
    return Interval(float(mean.mean()), grown * drawn.low, grown * drawn.high)


def scaled(one: Interval, factor: float) -> Interval:
    """The interval in another unit."""
    return Interval(*(factor * value for value in one))


def sign_test(drops: Sequence[Values]) -> float:
    """Of items that did worse or better in the sum over seeds, the chance of a split at least as uneven."""
    total = np.sum(np.asarray(drops), axis=0)
    return mcnemar((total > 0).tolist(), (total < 0).tolist()).p_value


def right(answers: str) -> np.ndarray:
    """float64 [items], 1 where the answer was right, of a row's word of 0 and 1."""
    return np.frombuffer(answers.encode(), dtype=np.uint8).astype(np.float64) - ord("0")


def _difference(
    study: Study,
    first: Settings,
    second: Settings,
    values: Callable[[Settings, int], Values],
    level: float,
    block: int = 1,
) -> Interval | None:
    seeds = [
        seed
        for seed in study.runs.get(first, {})
        if all(seed in study.runs.get(other, {}) for other in (first.matched(), second, second.matched()))
    ]
    if not seeds:
        return None
    pairs = [(np.asarray(values(first, seed)), np.asarray(values(second, seed))) for seed in seeds]
    return interval([one - two for one, two in pairs], level, block=block)
