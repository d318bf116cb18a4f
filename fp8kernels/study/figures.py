"""The page's figures, as SVG that is the same for the same rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..export.atomic import write_file
from ..statistics import signed_error_percent
from . import outcomes
from .rows import Study
from .settings import Settings

PUBLISHED_APE = 0.12  # percent, of the steps in 8 bits, from the published logs
AROUND = (8, 48)  # steps before and after the outlier that are drawn


def draw(made: Study, folder: Path) -> list[str]:
    """The figures for which there are runs; returns the names of their files.

    raises   ImportError naming the extra to install, where matplotlib is absent
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("the study's figures need matplotlib: pip install 'fp8kernels[demo]'") from error
    names = []
    drawings: tuple[tuple[str, Callable[[Any, Study], Any]], ...] = (
        ("loss-and-exam.svg", _overview),
        ("forgetting.svg", _forgetting),
        ("outlier.svg", _outlier),
    )
    with mpl.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 8}):
        for name, drawing in drawings:
            figure = drawing(plt, made)
            if figure is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            _save(figure, folder / name)
            plt.close(figure)
            names.append(name)
    return names


def _save(figure: Any, path: Path) -> None:
    write_file(path, lambda staged: figure.savefig(staged, bbox_inches="tight", metadata={"Date": None}))


def _overview(plt: Any, made: Study) -> Any:
    """APE and exam drop of every HiF8 setting with its intervals, in the order of the experiments."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    listed = [Settings(**made.grid["centre"])]
    for variants in made.grid["experiments"].values():
        listed += [one for one in (Settings(**variant) for variant in variants) if not one.spike]
    found = [one for settings in dict.fromkeys(listed) if (one := outcomes.outcome(made, settings)) is not None]
    found = [one for one in found if one.settings.labels == "shifted once" and one.settings.master]
    if not found:
        return None
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 0.6 + 0.19 * len(found)))
    places = np.arange(len(found))[::-1]
    for axis, label, intervals in (
        (axes[0], "APE of the loss, %", [one.ape for one in found]),
        (axes[1], "exam, points below BF16", [one.exam for one in found]),
    ):
        middle = np.array([one.mean for one in intervals])
        reach = [middle - [one.low for one in intervals], [one.high for one in intervals] - middle]
        axis.errorbar(middle, places, xerr=np.maximum(reach, 0), fmt="o", markersize=3, linewidth=1, color="tab:blue")
        axis.set_xlabel(label)
        axis.grid(axis="x", linewidth=0.3)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes[0].xaxis.set_minor_locator(NullLocator())
    axes[0].axvline(PUBLISHED_APE, color="tab:red", linewidth=0.8, linestyle=":", label="published")
    axes[0].legend(fontsize=6)
    axes[1].axvline(0, color="black", linewidth=0.6)
    axes[0].set_yticks(places, [_short(one.settings) for one in found])
    return figure


def _forgetting(plt: Any, made: Study) -> Any:
    """Accuracy in the exam after the run, by learning rate, for both precisions and both kinds of labels."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    drawn = False
    for labels, style in (("shifted once", "-"), ("shifted twice", "--")):
        for precision, colour in (("bf16", "black"), ("hif8", "tab:blue")):
            points = []
            for settings, rows in made.runs.items():
                wanted = Settings(precision=precision, learning_rate=settings.learning_rate, labels=labels)
                if settings == wanted:
                    accuracy = [100 * outcomes.right(row["exam"]).mean() for row in rows.values()]
                    points.append((settings.learning_rate, float(np.mean(accuracy))))
            if points:
                rates, accuracies = zip(*sorted(points), strict=True)
                size = {"bf16": 6, "hif8": 3}[precision]  # both are seen where they lie on each other
                axis.plot(rates, accuracies, style, marker="o", markersize=size, linewidth=size / 3, color=colour)
                axis.lines[-1].set_label(f"{precision}, {labels}")
                drawn = True
    if not drawn:
        plt.close(figure)
        return None
    axis.axhline(100 * outcomes.right(made.base["exam"]).mean(), color="grey", linewidth=0.8, label="the base")
    axis.axhline(25, color="grey", linewidth=0.8, linestyle=":", label="chance")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("exam, %")
    axis.legend(fontsize=6)
    return figure


def _outlier(plt: Any, made: Study) -> Any:
    """Signed error of the loss around the outlier, by algorithm, the mean over seeds."""
    step = made.grid["train"]["spike_step"]
    figure, axis = plt.subplots(figsize=(6, 2.8))
    drawn = False
    for variant in made.grid["experiments"].get("spike", ()):
        settings = Settings(**variant)
        pairs = made.both(settings.matched(), settings)
        if not pairs:
            continue
        curves = [signed_error_percent(run["losses"], plain["losses"]) for plain, run in pairs]
        mean = np.mean(np.asarray(curves), axis=0)
        first, last = max(step - 1 - AROUND[0], 0), min(step - 1 + AROUND[1], len(mean))
        label = settings.scaling if settings.scaling == "current" else settings.algorithm
        axis.plot(np.arange(first, last) + 1, mean[first:last], linewidth=1, label=label)
        drawn = True
    if not drawn:
        plt.close(figure)
        return None
    axis.axvline(step, color="black", linewidth=0.6, linestyle=":")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("step; dotted: the outlier")
    axis.set_ylabel("loss above BF16's, %")
    axis.legend(fontsize=6)
    return figure


def _short(settings: Settings) -> str:
    return settings.name().replace("exponential_moving_average", "exponential")
