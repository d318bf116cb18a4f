"""Loss, validation loss, the distance from the baseline, and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..runs.curve import losses, unmatched
from ..statistics import signed_error_percent
from .contents import Contents
from .html import Markup, between, clean, join, missing, shown, table, tag
from .svg import GRID, MUTED, Plots, colour, dash
from .thin import Array, thin

LAST = 0.1  # of a run's steps, whose mean loss is called its last
SIZE = (6.4, 3.7)  # inches


def losses_of(items: Sequence[Contents], plots: Plots) -> Markup:
    """Training and validation loss of all runs."""
    parts = [_curves(items, plots, "loss", "Training loss", "loss, nats per token")]
    with_validation = [i for i in items if np.isfinite(i.column("validation_loss")[1]).any()]
    if with_validation:
        parts.append(
            _curves(with_validation, plots, "validation_loss", "Validation loss", "loss, nats per token", marks=True)
        )
    rows = []
    for item in items:
        _, loss = item.column("loss")
        _, held = item.column("validation_loss")
        loss, held = loss[np.isfinite(loss)], held[np.isfinite(held)]
        last = loss[-max(1, math.ceil(LAST * loss.size)) :]
        rows.append(
            [
                key(item),
                loss.size,
                shown(loss[0] if loss.size else None, ".4f"),
                shown(last.mean() if loss.size else None, ".4f"),
                shown(held[-1] if held.size else None, ".4f"),
                shown(held.min() if held.size else None, ".4f"),
            ]
        )
    head = ("run", "steps", "first", f"mean of the last {LAST:.0%}", "last validation", "best validation")
    extra = [] if with_validation else [missing("No run measured a validation loss.")]
    summary = table("Loss in nats per token", head, rows, numbers=range(1, 6))
    return join([tag("div", *parts, class_="figures"), *extra, summary])


def distances(items: Sequence[Contents], plots: Plots) -> Markup:
    """APE against the baseline, with the mean and its interval."""
    parts, rows, notes = [], [], []
    drawn: list[tuple[Contents, Array, Array]] = []
    for item in items:
        curve, reference = item.curve, item.reference
        if curve is None or reference is None:
            why = item.why_none if reference is None else "the two runs have no step in common"
            stored = np.isfinite(item.column("ape")[1])
            if reference is None and stored.any():
                why += "; the absolute errors that were written while it trained are drawn instead"
                drawn.append((item, *item.column("ape")))
            notes.append(f"{item.label} is compared with no run: {why}.")
            continue
        ours, theirs = losses(item.run), losses(reference)
        common = sorted(ours.keys() & theirs.keys())
        values = signed_error_percent([ours[step] for step in common], [theirs[step] for step in common])
        drawn.append((item, np.array(common, dtype=np.float64), np.array(values)))
        name = str(reference.info.get("name") or reference.path.name)
        rows.append(
            [
                key(item),
                name,
                curve.steps,
                shown(curve.mean, ".3f", " %"),
                between(curve.mean_low, curve.mean_high, ".3f", " %"),
                shown(curve.maximum, ".3f", f" % at step {curve.maximum_step}"),
                shown(curve.bias, "+.3f", " %"),
                between(curve.bias_low, curve.bias_high, "+.3f", " %"),
            ]
        )
        differ = unmatched(item.run, reference)
        if differ:
            notes.append(
                f"{item.label} and {name} differ in more than their precision, so that the comparison means little: "
                + "; ".join(differ)
                + "."
            )
    if drawn:
        parts.append(tag("div", _distance_figure(drawn, plots), class_="figures"))
    head = ("run", "against", "steps", "mean APE", "95% interval", "largest APE", "mean signed error", "95% interval ")
    if rows:
        caption = (
            "APE is |loss - baseline| / baseline, step by step. Intervals by a circular block bootstrap, whose "
            "blocks are as many steps as the square root of their number"
        )
        parts.append(table(caption, head, rows, numbers=range(2, 8)))
    return join([*parts, *map(missing, notes)])


def speeds(items: Sequence[Contents], plots: Plots) -> Markup:
    """Tokens a second."""
    measured = [i for i in items if np.isfinite(i.column("tokens_per_second")[1]).any()]
    if not measured:
        return missing("No run noted its tokens per second.")
    figure = _curves(measured, plots, "tokens_per_second", "Speed", "tokens per second", zero=True)
    rows = []
    for item in measured:
        values = item.column("tokens_per_second")[1]
        values = values[np.isfinite(values)]
        total = np.nansum(item.column("tokens")[1])
        quantiles = np.quantile(values, [0.1, 0.5, 0.9])
        rows.append([key(item), *(f"{q:,.0f}" for q in quantiles), f"{total:,.0f}"])
    head = ("run", "10% quantile", "median", "90% quantile", "tokens in all")
    summary = table("Tokens per second of the steps", head, rows, numbers=range(1, 5))
    return join([tag("div", figure, class_="figures"), summary])


def key(item: Contents) -> Markup:
    """A run's name with its colour."""
    return tag("span", tag("span", class_="key", style=f"background: var(--c{item.place % 7})"), item.label)


def _curves(
    items: Sequence[Contents],
    plots: Plots,
    column: str,
    title: str,
    unit: str,
    *,
    marks: bool = False,
    zero: bool = False,
) -> Markup:
    """One number of the log over the steps, a curve a run."""
    longest, ends = 1, []
    with plots.draw(*SIZE) as figure:
        axes = figure.subplots()
        for item in items:
            steps, values = item.column(column)
            t = thin(steps, values)
            if not t.steps.size:
                continue
            longest = max(longest, t.every)
            style: dict[str, Any] = {
                "color": colour(item.place),
                "linestyle": dash(item.place),
                "label": legend(item.label),
            }
            if marks and t.steps.size <= 60:
                style |= {"marker": "o", "markersize": 3.5}
            axes.plot(t.steps, t.mean, **style)
            if t.every > 1:
                axes.fill_between(t.steps, t.low, t.high, color=colour(item.place), alpha=0.18, linewidth=0)
            ends.append(f"{item.label} from {t.mean[0]:.4g} to {t.mean[-1]:.4g}")
        if not ends:
            return missing(f"{title}: no run has a finite number.")
        finish(axes, unit, zero=zero)
        caption = f"From {column} in each run's log.jsonl, one row a step where it was measured. {_thinned(longest)}"
        return plots.figure(figure, title, f"{title} over optimizer steps: {'; '.join(ends)}.", caption)


def _distance_figure(drawn: list[tuple[Contents, Array, Array]], plots: Plots) -> Markup:
    longest, parts = 1, []
    with plots.draw(*SIZE) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=MUTED, linewidth=1)
        for item, steps, values in drawn:
            t = thin(steps, values)
            longest = max(longest, t.every)
            axes.plot(t.steps, t.mean, color=colour(item.place), linestyle=dash(item.place), label=legend(item.label))
            if t.every > 1:
                axes.fill_between(t.steps, t.low, t.high, color=colour(item.place), alpha=0.18, linewidth=0)
            parts.append(f"{item.label} between {np.nanmin(values):.3g} % and {np.nanmax(values):.3g} %")
        finish(axes, "signed error of the loss, %")
        title = "Distance of the loss from the baseline"
        caption = (
            "From the losses in log.jsonl of a run and of its baseline at the same steps: 100 (loss - baseline) / "
            f"baseline; above 0 the run loses more. {_thinned(longest)}"
        )
        return plots.figure(figure, title, f"{title} over optimizer steps: {'; '.join(parts)}.", caption)


def finish(axes: Any, unit: str, *, zero: bool = False) -> None:
    """Labels, a legend where there are several curves, and whole numbers of steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if zero:
        axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(plain))
    axes.margins(x=0.01)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="best")
    axes.grid(color=GRID)


def plain(value: float, place: int | None = None) -> str:
    """A tick's number, without the markup that matplotlib would write it in."""
    return f"{value:,.10g}" if abs(value) >= 1e-3 or not value else f"{value:.3g}"


def legend(label: str) -> str:
    """A label that matplotlib takes as it is and that leaves room for the curves."""
    label = clean(label)
    short = label if len(label) <= 40 else f"{label[:19]}…{label[-20:]}"
    return f"\u200b{short}" if short.startswith("_") else short


def _thinned(every: int) -> str:
    if every == 1:
        return "Each step is drawn."
    return (
        f"Long curves: a point is the mean of up to {every} steps, the band goes from their smallest to their largest."
    )
