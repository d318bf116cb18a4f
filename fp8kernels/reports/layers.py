"""Layers over time: amax beside what the scale reaches, and maps of what is stale, saturated, noisy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .contents import Contents, Layers
from .curves import key, plain
from .html import Markup, clean, join, missing, shown, table, tag
from .svg import INK, MUTED, Plots, colour
from .thin import thin, thin_grid

SHOWN = 6  # layers whose amax is drawn as curves
WORST = 10  # tensors in the table
NAMED = 26  # layers of a map that have a tick label
SMALLEST = 1e-6  # fraction at the lower end of the colours; 0 stays empty
WIDE = 9.6  # inches
NOISE = 6.0  # dB that the colours span at least: one mantissa bit
TICKS = 5  # of a map's steps, at most
NARROW = 20.0  # largest over smallest number of a panel, above which its axis is logarithmic


def layers_of(items: Sequence[Contents], plots: Plots) -> Markup:
    """For each run that measured its layers: curves of some, maps of all, the worst tensors."""
    parts = []
    for item in items:
        parts.append(tag("h3", key(item)))
        found = item.layers
        if found is None:
            parts.append(
                missing("No layers were measured: the run computes in high precision, or saturation.every is not set.")
            )
            continue
        maps = [
            _amax(found, plots, item.label),
            _stale(found, plots, item.label),
            *(_fraction(found, plots, item.label, *which) for which in FRACTIONS),
            _sqnr(found, plots, item.label),
        ]
        parts += [tag("div", *maps, class_="figures"), _worst(found)]
    return join(parts)


def chosen(found: Layers) -> list[int]:
    """Layers whose curves are drawn: the most stale one, and others evenly spread over the model."""
    count = len(found.names)
    if count <= SHOWN:
        return list(range(count))
    stale = np.fmax.reduce([np.fmax.reduce(g["stale"], axis=1) for g in found.grids.values()])
    worst = int(np.nanargmax(stale)) if np.isfinite(stale).any() else 0
    spread = [round(n * (count - 1) / (SHOWN - 2)) for n in range(SHOWN - 1)]
    picked = {worst, *spread}
    return sorted(picked)


def _amax(found: Layers, plots: Plots, label: str) -> Markup:
    """Small multiples: amax, and the amax that the scale is made for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    rows, roles = chosen(found), list(found.grids)
    said, every = [], 1
    with plots.draw(WIDE, 0.7 + 1.25 * len(rows)) as figure:
        grid = figure.subplots(len(rows), len(roles), sharex=True, squeeze=False)
        for line, layer in enumerate(rows):
            for column, role in enumerate(roles):
                axes, numbers = grid[line, column], found.grids[role]
                amax = thin(found.steps, numbers["amax"][layer].astype(np.float64))
                every = max(every, amax.every)
                reach = numbers["scale"][layer].astype(np.float64) * numbers["target"][layer]
                t = thin(found.steps, reach)
                mark = {"marker": "o", "markersize": 2.5} if amax.steps.size < 40 else {}
                axes.plot(amax.steps, amax.high, color=colour(0), label="amax of the tensor", **mark)
                axes.plot(t.steps, t.high, color=colour(1), linestyle="--", label="scale × target")
                values = np.concatenate([amax.high, t.high])
                wide = values.size > 0 and values.min() > 0 and values.max() / values.min() > NARROW
                if wide:
                    axes.set_yscale("log")
                    axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_locator(LogLocator(numticks=4) if wide else MaxNLocator(3))
                axes.yaxis.set_major_formatter(FuncFormatter(plain))
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                axes.set_title(f"{_short(found.short[layer], 34)}, {role}", fontsize=9)
                if line == len(rows) - 1:
                    axes.set_xlabel("optimizer step")
                if amax.high.size:
                    said.append(f"{found.names[layer]} {role} {amax.high[0]:.3g} to {amax.high[-1]:.3g}")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        title = "amax and scale over time"
        which = "all layers" if len(rows) == len(found.names) else f"{len(rows)} of {len(found.names)} layers, evenly "
        which += "" if len(rows) == len(found.names) else "spread, with the most stale one among them"
        caption = (
            f"{label}: {which}. Solid: the tensor's largest magnitude, in its own units; dashed: the one that its "
            f"scale is made for. Where solid runs above dashed, the scale is stale. From amax, scale and target in "
            f"layers.jsonl" + (f"; a point is the largest of up to {every} measurements." if every > 1 else ".")
        )
        return plots.figure(figure, title, f"{title}. amax: {'; '.join(said)}.", caption, wide=True)


FRACTIONS = (
    (
        "past_target",
        "Past the target",
        "share of elements",
        "elements beyond scale × target: HiF8 loses mantissa bits there, E4M3 saturates",
    ),
    ("past_maximum", "Saturated", "share of elements", "elements beyond the largest value of the format"),
)


def _fraction(found: Layers, plots: Plots, label: str, metric: str, title: str, unit: str, meaning: str) -> Markup:
    from matplotlib.colors import LogNorm

    largest = max(float(np.nanmax(g[metric], initial=0.0)) for g in found.grids.values())
    if not largest > 0:
        return missing(f"{title}: no element of any tensor in any measured step ({meaning}).")
    return _map(
        found,
        plots,
        metric,
        title,
        unit,
        f"{label}: {meaning}; the largest of the steps that share a cell. Empty cells had none. From {metric} in "
        f"layers.jsonl.",
        f"largest {largest:.3g}",
        norm=LogNorm(SMALLEST, 1),
        colours="viridis",
        change=lambda grid: np.where(grid > 0, np.maximum(grid, SMALLEST), np.nan),
        ticks=[(10.0**e, f"{10.0 ** (e + 2):g}%") for e in range(round(math.log10(SMALLEST)), 1)],
    )


def _stale(found: Layers, plots: Plots, label: str) -> Markup:
    from matplotlib.colors import Normalize

    values = np.concatenate([g["stale"].ravel() for g in found.grids.values()])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return missing("Stale scales: no measurement has a finite ratio.")
    reach = int(np.clip(np.ceil(np.abs(np.log2(values)).max()), 1, 6))
    reach += reach % 2 if reach > 3 else 0  # so that every second power of two has a tick, and 1 too
    return _map(
        found,
        plots,
        "stale",
        "Stale scales",
        "amax / (scale × target)",
        f"{label}: how far the tensor has outgrown its scale (above 1), or the scale has room left (below 1); "
        f"the largest of the steps that share a cell. From stale in layers.jsonl.",
        f"from {values.min():.3g} to {values.max():.3g}",
        norm=Normalize(-reach, reach),
        colours="RdBu_r",
        change=lambda grid: np.clip(np.log2(np.where(grid > 0, grid, np.nan)), -reach, reach),
        ticks=[(e, f"{2**e}" if e >= 0 else f"1/{2**-e}") for e in range(-reach, reach + 1, 1 if reach < 4 else 2)],
    )


def _sqnr(found: Layers, plots: Plots, label: str) -> Markup:
    from matplotlib.colors import Normalize

    values = np.concatenate([g["sqnr_db"].ravel() for g in found.grids.values()])
    values = values[np.isfinite(values)]
    if not values.size:
        return missing("Signal to quantization noise: no measurement has a finite ratio.")
    high = float(values.max())
    low = min(float(np.quantile(values, 0.01)), high - NOISE)
    return _map(
        found,
        plots,
        "sqnr_db",
        "Signal to quantization noise",
        "SQNR, dB",
        f"{label}: 20 log10(|x| / |x - rounded|) of each tensor; 6 dB are one mantissa bit; the smallest of the "
        f"steps that share a cell. From sqnr_db in layers.jsonl.",
        f"from {values.min():.1f} to {high:.1f} dB",
        norm=Normalize(low, high),
        colours="cividis",
        worst="lowest",
    )


def _map(
    found: Layers,
    plots: Plots,
    metric: str,
    title: str,
    unit: str,
    caption: str,
    said: str,
    *,
    norm: Any,
    colours: str,
    change: Any = None,
    ticks: list[tuple[float, str]] | None = None,
    worst: str = "highest",
) -> Markup:
    """A heat map of layers by steps, one panel a role."""
    roles, count = list(found.grids), len(found.names)
    height = 1.5 + min(3.8, max(0.7, 0.17 * count))
    with plots.draw(WIDE, height) as figure:
        panels = figure.subplots(1, len(roles), sharey=True, squeeze=False)[0]
        for axes, role in zip(panels, roles, strict=True):
            grid, ends = thin_grid(found.grids[role][metric], found.steps, worst=worst)
            image = axes.imshow(
                grid if change is None else change(grid),
                aspect="auto",
                norm=norm,
                cmap=colours,
                interpolation="none",
                extent=(-0.5, ends.size - 0.5, count - 0.5, -0.5),
            )
            axes.grid(visible=False)
            axes.set_title(role)
            marks = range(0, ends.size, -(-ends.size // TICKS))
            axes.set_xticks(marks, [plain(ends[m]) for m in marks])
            axes.set_xlabel("optimizer step")
            for spine in axes.spines.values():
                spine.set_visible(True)
                spine.set_color(MUTED)
        every = -(-count // NAMED)
        panels[0].set_yticks(range(0, count, every), [_short(name, 26) for name in found.short[::every]], fontsize=8)
        bar = figure.colorbar(image, ax=list(panels), shrink=0.95, pad=0.01, aspect=14)
        bar.set_label(unit, color=INK)
        bar.outline.set_edgecolor(MUTED)
        if ticks is not None:
            bar.set_ticks([at for at, _ in ticks], labels=[text for _, text in ticks])
            bar.minorticks_off()
        size = f"{count} layers by {found.steps.size} measured steps"
        alt = f"{title}, a heat map of {size} for {', '.join(roles)}: {said}."
        return plots.figure(figure, title, alt, caption, wide=True)


def _worst(found: Layers) -> Markup:
    """The tensors that were most stale."""
    rows = []
    for role, grids in found.grids.items():
        for layer, name in enumerate(found.names):
            stale = grids["stale"][layer]
            if not np.isfinite(stale).any():
                continue
            at = int(np.nanargmax(stale))
            rows.append((float(stale[at]), name, role, at))
    rows.sort(key=lambda row: (-row[0], row[1], row[2]))
    body = []
    for stale, name, role, at in rows[:WORST]:
        line = {metric: grid[found.names.index(name), at] for metric, grid in found.grids[role].items()}
        body.append(
            [
                name,
                role,
                f"{found.steps[at]:g}",
                shown(stale, ".3g"),
                shown(float(line["past_target"]), ".3%"),
                shown(float(line["past_maximum"]), ".3%"),
                shown(float(line["bits_lost"]), ".2f"),
                shown(float(line["sqnr_db"]), ".1f", " dB"),
            ]
        )
    head = ("layer", "tensor", "step", "stale", "past target", "saturated", "bits lost past it", "SQNR")
    caption = f"The {len(body)} most stale of {len(rows)} tensors, each at its worst measured step (layers.jsonl)"
    return table(caption, head, body, numbers=range(2, 8))


def _short(name: str, length: int) -> str:
    name = clean(name)
    return name if len(name) <= length else f"…{name[-length + 1 :]}"
