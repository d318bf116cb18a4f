"""Two models on the same documents: what they differ by, how sure that is, and what so few documents could show."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..statistics import bootstrap_difference, equivalence, holm, minimal_detectable_drop, paired
from .answers import Answers, Document, is_answer, is_loss, match, numbers

PREFERRED = ("acc_norm", "acc", "exact_match", "correct")  # length-normalised accuracy where a task has it
MARGIN = 0.01  # relative; what HiF8 QAT was published to stay below
FEWEST = 6  # items that must differ, all in one direction, before the exact test finds anything: 2 / 2**6 < 0.05


@dataclass(frozen=True)
class Score:
    """One model on one task, compared with nothing.

    value           accuracy as a fraction, mean of another metric, or bits per byte
    standard_error  of the value alone; two such values differ by less than they seem to where the models agree
    """

    task: str
    metric: str
    shots: int | None
    items: int
    value: float
    standard_error: float
    cut: int


@dataclass(frozen=True)
class Comparison:
    """Two models on one task; `first` is the reference, `drop` how much the second is worse.

    unit                      "accuracy" (fractions), "bits per byte", or the metric's own
    first, second             values of both
    drop                      how much worse the second is: lower accuracy, more bits
    relative_drop             drop / first
    low, high                 bootstrap interval of the drop, paired
    p_value                   McNemar's exact test, two-sided; None where documents are not simply right or wrong
    p_holm                    with Holm's correction for the tasks asked together
    only_first, only_second   documents that one of them alone got right
    detectable_drop           the smallest drop that so many documents that differ so often show in 4 of 5 cases
    unpaired_standard_error   of the drop, had each model answered documents of its own
    parts                     of a group: accuracy of both and items, by subtask
    verdict, statement        whether the second is shown to be no worse than a margin, relative; "no worse", "worse" or
                              "not shown", and the sentence
    cut                       prompts that lost their beginning because the context is short, of both models
    """

    task: str
    metric: str
    unit: str
    shots: int | None
    items: int
    first: float
    second: float
    drop: float
    relative_drop: float
    low: float
    high: float
    unpaired_standard_error: float
    p_value: float | None = None
    p_holm: float | None = None
    only_first: int | None = None
    only_second: int | None = None
    detectable_drop: float | None = None
    parts: dict[str, dict[str, Any]] | None = None
    verdict: str | None = None
    statement: str | None = None
    cut: int = 0


def choose_metric(answers: Answers, wanted: str | None = None) -> str:
    """The metric that a task is judged by: the one wanted, or the best known that it has.

    raises   ValueError naming those that it has
    """
    names = answers.metrics()
    if wanted is not None:
        for name in names:
            if name == wanted or name.split(",")[0] == wanted:
                return name
        raise ValueError(f"task {answers.task!r} has no metric {wanted!r}; it has {', '.join(names)}")
    for preferred in PREFERRED:
        for name in names:
            if name.split(",")[0] == preferred:
                return name
    usable = [n for n in names if is_loss(answers.documents, n) or is_number(answers.documents, n)]
    if not usable:
        raise ValueError(f"task {answers.task!r} has no metric of single documents; it has {', '.join(names)}")
    return usable[0]


def is_number(documents: tuple[Document, ...], metric: str) -> bool:
    """Whether a metric is one finite number in every document."""
    values = [document.values[metric] for document in documents]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def score(answers: Answers, metric: str | None = None) -> Score:
    """One model on one task."""
    metric = choose_metric(answers, metric)
    documents = answers.documents
    if is_loss(documents, metric):
        nats, sizes = _losses(documents, metric)
        value, error = _ratio(nats, sizes), float(np.std(nats / sizes) / math.log(2) / math.sqrt(len(nats)))
    else:
        values = np.array([float(document.values[metric]) for document in documents])
        value, error = float(values.mean()), float(values.std() / math.sqrt(len(values)))
    return Score(answers.task, metric, answers.shots, len(documents), value, error, answers.cut)


def compare(
    first: Answers, second: Answers, *, metric: str | None = None, level: float = 0.95, margin: float = MARGIN
) -> Comparison:
    """Two models on one task, document by document.

    first   of the reference
    level   of the interval
    margin  a relative drop of accuracy that would still count as no loss
    raises  ValueError if they did not answer the same documents, or the task has no such metric
    """
    pairs = match(first, second)
    metric = choose_metric(first, metric)
    if metric not in second.metrics():
        raise ValueError(f"task {first.task!r}: only one of the models has the metric {metric!r}; evaluate both again")
    common: dict[str, Any] = {"task": first.task, "metric": metric, "shots": first.shots, "items": len(pairs)}
    if is_loss(first.documents, metric) and is_loss(second.documents, metric):
        found = _compare_losses(pairs, metric, level)
    elif is_answer(first.documents, metric) and is_answer(second.documents, metric):
        found = _compare_answers(pairs, metric, level, margin)
    elif is_number(first.documents, metric) and is_number(second.documents, metric):
        found = _compare_numbers(pairs, metric, level)
    else:
        raise ValueError(f"task {first.task!r}: {metric!r} is not one finite number in each document; give --metric")
    return Comparison(**common, **found, cut=first.cut + second.cut)


def detectable_drop(items: int, differing: int, level: float = 0.95) -> float:
    """The smallest drop that so many items show in 4 of 5 cases, if models differ on at least so many of them.

    Where so few differences cannot show any drop, as many are taken as it needs. Infinite if all items were too few.
    """
    for count in range(max(differing, FEWEST), items + 1):
        found = minimal_detectable_drop(items, differing=count / items, level=level)
        if math.isfinite(found):
            return found
    return math.inf


def with_holm(comparisons: list[Comparison]) -> list[Comparison]:
    """The same comparisons with p-values corrected for how many there are."""
    tested = [c.p_value for c in comparisons if c.p_value is not None]
    corrected = iter(holm(tested) if tested else [])
    return [c if c.p_value is None else replace(c, p_holm=next(corrected)) for c in comparisons]


def _compare_answers(
    pairs: list[tuple[Document, Document]], metric: str, level: float, margin: float
) -> dict[str, Any]:
    a, b = numbers(pairs, metric)
    found = paired(a, b, level=level)
    shown = equivalence(found, margin, relative=True)
    parts: dict[str, dict[str, Any]] = {}
    for pair, right, still in zip(pairs, a, b, strict=True):
        part = parts.setdefault(pair[0].part, {"first": 0.0, "second": 0.0, "items": 0})
        part["items"] += 1
        part["first"] += right
        part["second"] += still
    for part in parts.values():
        part["first"] /= part["items"]
        part["second"] /= part["items"]
    spread = found.first * (1 - found.first) + found.second * (1 - found.second)
    return {
        "unit": "accuracy",
        "first": found.first,
        "second": found.second,
        "drop": found.drop,
        "relative_drop": found.relative_drop,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "only_first": found.only_first,
        "only_second": found.only_second,
        "detectable_drop": detectable_drop(found.items, found.only_first + found.only_second, level),
        "unpaired_standard_error": math.sqrt(spread / found.items),
        "parts": parts if len(parts) > 1 else None,
        "verdict": shown.verdict,
        "statement": shown.text,
    }


def _compare_numbers(pairs: list[tuple[Document, Document]], metric: str, level: float) -> dict[str, Any]:
    a, b = (np.array(values) for values in numbers(pairs, metric))
    drop = bootstrap_difference(a, b, level=level)
    return _values(metric, a.mean(), b.mean(), drop.mean, drop.low, drop.high, math.hypot(_error(a), _error(b)))


def _compare_losses(pairs: list[tuple[Document, Document]], metric: str, level: float) -> dict[str, Any]:
    """Bits per byte (or word) over all documents; the interval is that of the ratio's linear part."""
    a, sizes = _losses(tuple(first for first, _ in pairs), metric)
    b, other = _losses(tuple(second for _, second in pairs), metric)
    if not np.array_equal(sizes, other):
        raise ValueError(f"the documents of {pairs[0][0].part!r} have other lengths for the two models")
    share = sizes / sizes.sum()
    rates = (b - a) / sizes / math.log(2)  # bits a byte that the second needs more, by document
    rise = float((share * rates).sum())
    around = bootstrap_difference(rise + len(rates) * share * (rates - rise), np.zeros(len(rates)), level=level)
    first, second = _ratio(a, sizes), _ratio(b, sizes)
    spread = math.hypot(_error(a / sizes), _error(b / sizes)) / math.log(2)
    unit = "bits per word" if metric.startswith("word") else "bits per byte"
    return _values(unit, first, second, rise, around.low, around.high, spread)


def _values(unit: str, first: Any, second: Any, drop: float, low: float, high: float, spread: float) -> dict[str, Any]:
    relative = drop / float(first) if first else math.nan
    return {
        "unit": unit,
        "first": float(first),
        "second": float(second),
        "drop": drop,
        "relative_drop": relative,
        "low": low,
        "high": high,
        "unpaired_standard_error": spread,
    }


def _losses(documents: tuple[Document, ...], metric: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """fp64 [n] negative log-likelihoods in nats, fp64 [n] bytes or words."""
    pairs = np.array([document.values[metric] for document in documents], dtype=np.float64)  # [n, 2]
    return -pairs[:, 0], pairs[:, 1]


def _ratio(nats: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> float:
    return float(nats.sum() / sizes.sum() / math.log(2))


def _error(values: np.ndarray[Any, Any]) -> float:
    return float(values.std() / math.sqrt(len(values)))
