"""What the models know: the probe over the steps, and evaluations in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..statistics import bootstrap_mean
from .contents import Contents, columns
from .curves import SIZE, finish, key, legend
from .html import MISSING, Markup, between, join, missing, number, shown, table, tag
from .svg import MUTED, Plots, colour, dash

REPEATS = 2000  # of the bootstrap of one look; a figure shows no more


def probes(items: Sequence[Contents], plots: Plots) -> Markup:
    """Accuracy over the steps, and the paired drop since the start."""
    asked = [item for item in items if item.probe]
    if not asked:
        return missing("No run was asked a knowledge probe.")
    rows = []
    for item in asked:
        first, last = item.probe[0], item.probe[-1]
        answers = last.get("answers")
        rows.append(
            [
                key(item),
                len(answers) if isinstance(answers, list) else MISSING,
                shown(first.get("accuracy"), ".1%"),
                f"{shown(last.get('accuracy'), '.1%')} at step {shown(last.get('step'), 'g')}",
                shown(_percent(last.get("drop")), "+.2f", " points"),
                between(_percent(last.get("low")), _percent(last.get("high")), "+.2f", " points"),
                shown(last.get("p_value"), ".2g"),
            ]
        )
    head = ("run", "items", "accuracy at the start", "last", "drop", "95% interval", "p (McNemar)")
    caption = "The last look against the start, item by item: a drop above 0 is forgetting"
    without = [missing(f"{item.label} was asked no probe.") for item in items if not item.probe]
    figures = [_accuracy(asked, plots), _drop(asked, plots)]
    return join([tag("div", *figures, class_="figures"), table(caption, head, rows, numbers=range(1, 7)), *without])


def _accuracy(asked: Sequence[Contents], plots: Plots) -> Markup:
    said = []
    with plots.draw(*SIZE) as figure:
        axes = figure.subplots()
        for item in asked:
            steps, values = columns(item.probe, "accuracy")
            low, high = np.array([_interval(row) for row in item.probe]).T
            style: dict[str, Any] = {"color": colour(item.place), "linestyle": dash(item.place)}
            axes.plot(steps, 100 * values, marker="o", markersize=3.5, label=legend(item.label), **style)
            axes.fill_between(steps, 100 * low, 100 * high, color=colour(item.place), alpha=0.18, linewidth=0)
            said.append(f"{item.label} from {values[0]:.1%} to {values[-1]:.1%}")
        finish(axes, "accuracy, %")
        title = "Knowledge probe"
        caption = (
            "Share of the items that were answered rightly; the band is the 95% bootstrap interval over items of "
            "each look alone. From answers in probe.jsonl."
        )
        return plots.figure(figure, title, f"Accuracy over optimizer steps: {'; '.join(said)}.", caption)


def _drop(asked: Sequence[Contents], plots: Plots) -> Markup:
    said = []
    with plots.draw(*SIZE) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=MUTED, linewidth=1)
        for item in asked:
            steps, values = columns(item.probe, "drop")
            _, low = columns(item.probe, "low")
            _, high = columns(item.probe, "high")
            keep = np.isfinite(values)
            if not keep.any():
                continue
            style: dict[str, Any] = {"color": colour(item.place), "linestyle": dash(item.place)}
            axes.plot(steps[keep], 100 * values[keep], marker="o", markersize=3.5, label=legend(item.label), **style)
            band = keep & np.isfinite(low) & np.isfinite(high)
            axes.fill_between(
                steps[band], 100 * low[band], 100 * high[band], color=colour(item.place), alpha=0.18, linewidth=0
            )
            said.append(f"{item.label} {100 * values[keep][-1]:+.2f} points at the last look")
        title = "Drop since the start"
        if not said:
            return missing(f"{title}: there was no look after the start.")
        finish(axes, "drop of accuracy, percentage points")
        caption = (
            "Accuracy at the start minus accuracy now, item by item, with its paired 95% interval: where the band "
            "lies above 0, the model forgot. From drop, low and high in probe.jsonl."
        )
        return plots.figure(figure, title, f"Paired drop over optimizer steps: {'; '.join(said)}.", caption)


def _interval(row: dict[str, Any]) -> tuple[float, float]:
    answers = [number(answer) for answer in row.get("answers") or [] if np.isfinite(number(answer))]
    if len(answers) < 2:
        return np.nan, np.nan
    found = bootstrap_mean(answers, repeats=REPEATS)
    return found.low, found.high


def evaluations(items: Sequence[Contents]) -> Markup:
    """A table for each run that was evaluated."""
    parts = []
    for item in items:
        found = item.evaluation
        tasks = found.get("tasks")
        if not isinstance(tasks, dict) or not tasks:
            continue
        body = [_task(str(name), task) for name, task in tasks.items() if isinstance(task, dict)]
        against = found.get("against")
        caption = f"{item.label}, " + (f"paired with {_called(against)}" if against else "alone: compared with nothing")
        head = (
            "task",
            "metric",
            "documents",
            "reference",
            "this run",
            "drop",
            "95% interval",
            "relative drop",
            "p (McNemar)",
            "p (Holm)",
            "drop that could be shown",
        )
        parts.append(table(caption, head, body, numbers=range(2, 11)))
        parts += [missing(f"Note: {text}") for text in found.get("warnings") or []]
    if not parts:
        return missing("No run was evaluated; `fp8kernels eval llm` writes an eval.json into a run's folder.")
    note = (
        "Drops are paired, document by document: above 0 this run is worse. Of accuracies they are percentage points. "
        "Holm's correction is for the tasks that were asked together. From eval.json."
    )
    return join([tag("p", note, class_="lead"), *parts])


def _task(name: str, task: dict[str, Any]) -> list[Any]:
    unit = str(task.get("unit") or ("accuracy" if "bits" not in str(task.get("metric")) else "bits per byte"))
    is_accuracy = unit == "accuracy"
    first, second = task.get("first"), task.get("second", task.get("value"))

    def value(x: Any) -> str:
        return shown(x, ".2%") if is_accuracy else shown(x, ".4f")

    def change(x: Any) -> str:
        return shown(_percent(x), "+.2f", " points") if is_accuracy else shown(x, "+.4f")

    low, high = task.get("low"), task.get("high")
    interval = between(_percent(low), _percent(high), "+.2f", " points") if is_accuracy else between(low, high, "+.4f")
    return [
        name,
        str(task.get("metric") or MISSING) + ("" if is_accuracy else f", {unit}"),
        shown(task.get("items"), ",.0f"),
        value(first),
        value(second),
        change(task.get("drop")),
        interval,
        shown(task.get("relative_drop"), "+.2%"),
        shown(task.get("p_value"), ".2g"),
        shown(task.get("p_holm"), ".2g"),
        change(task.get("detectable_drop")).removeprefix("+"),
    ]


def _called(against: Any) -> str:
    if isinstance(against, dict):
        return ", ".join(str(against[name]) for name in ("path", "precision") if against.get(name))
    return str(against)


def _percent(x: Any) -> float:
    return 100 * number(x)
