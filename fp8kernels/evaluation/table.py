"""An evaluation as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table

from ..runs.curve import LossCurve
from .compare import Comparison, Score
from .evaluate import Evaluation


def tables(evaluation: Evaluation) -> Iterator[Table]:
    """What there is of: accuracies, losses, scores without a pair, the loss curve."""
    right = [c for c in evaluation.comparisons if c.unit == "accuracy"]
    other = [c for c in evaluation.comparisons if c.unit != "accuracy"]
    if right:
        yield _accuracies(right, evaluation)
    if other:
        yield _others(other)
    if evaluation.scores:
        yield _scores(evaluation.scores)
    if evaluation.curve is not None:
        yield _curve(evaluation.curve)


def _accuracies(comparisons: list[Comparison], evaluation: Evaluation) -> Table:
    assert evaluation.against is not None
    columns = [
        "task",
        "metric",
        "items",
        "reference",
        "model",
        "drop",
        f"{100 * evaluation.level:g}% interval",
        "relative",
    ]
    out = _table(
        f"{evaluation.model['path']} ({evaluation.model['precision']}) "
        f"against {evaluation.against['path']} ({evaluation.against['precision']})",
        [*columns, "p", "p (Holm)", "only ref/model", "shows from", "unpaired s.e."],
    )
    for c in comparisons:
        out.add_row(
            *(_named(c.task, c.shots), c.metric.split(",")[0], str(c.items), f"{c.first:.2%}", f"{c.second:.2%}"),
            *(f"{c.drop:+.2%}", f"{c.low:+.2%} … {c.high:+.2%}", _percent(c.relative_drop)),
            *(_p(c.p_value), _p(c.p_holm), f"{c.only_first}/{c.only_second}"),
            *(_percent(c.detectable_drop), f"{c.unpaired_standard_error:.2%}"),
        )
    out.caption = (
        "drop above 0: the model is worse; shows from: the smallest drop that so many items find in 4 of 5 cases"
    )
    return out


def _others(comparisons: list[Comparison]) -> Table:
    out = _table(
        "Without right and wrong", ["task", "unit", "items", "reference", "model", "worse by", "interval", "relative"]
    )
    for c in comparisons:
        interval = f"{c.low:+.5f} … {c.high:+.5f}"
        values = (f"{c.first:.4f}", f"{c.second:.4f}", f"{c.drop:+.5f}", interval, f"{c.relative_drop:+.3%}")
        out.add_row(c.task, c.unit, str(c.items), *values)
    return out


def _scores(scores: list[Score]) -> Table:
    out = _table("Scores, compared with nothing", ["task", "metric", "items", "score", "standard error"])
    for s in scores:
        out.add_row(_named(s.task, s.shots), s.metric, str(s.items), f"{s.value:.4f}", f"{s.standard_error:.4f}")
    return out


def _curve(curve: LossCurve) -> Table:
    out = _table(f"Training loss over {curve.steps} steps", ["error of the loss", "percent", "interval"])
    out.add_row("mean, absolute", f"{curve.mean:.4f}", f"{curve.mean_low:.4f} … {curve.mean_high:.4f}")
    out.add_row("mean, signed", f"{curve.bias:+.4f}", f"{curve.bias_low:+.4f} … {curve.bias_high:+.4f}")
    out.add_row(f"largest (step {curve.maximum_step})", f"{curve.maximum:.4f}", "")
    return out


def _table(title: str, columns: list[str]) -> Table:
    out = Table(title=title, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    return out


def _named(task: str, shots: int | None) -> str:
    return f"{task} ({shots}-shot)" if shots else task


def _percent(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:+.2%}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
