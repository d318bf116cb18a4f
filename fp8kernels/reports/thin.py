"""Long curves as few points: neighbours go together, always the same ones, and what was between is shown as a band."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

POINTS = 500  # of a curve; a figure is about as many pixels wide
COLUMNS = 160  # of a heat map
ROWS = 400  # of a heat map

Array = np.ndarray[Any, np.dtype[np.float64]]


class Thinned(NamedTuple):
    """Buckets of `every` neighbours: their last step, mean, smallest and largest value, fp64 [n] each."""

    steps: Array
    mean: Array
    low: Array
    high: Array
    every: int


def thin(steps: Array, values: Array, points: int = POINTS) -> Thinned:
    """A curve in at most `points` buckets; numbers that are not finite are left out."""
    keep = np.isfinite(values) & np.isfinite(steps)
    steps, values = steps[keep], values[keep]
    every = max(1, -(-values.size // points))
    starts = np.arange(0, values.size, every)
    if not starts.size:
        return Thinned(steps, values, values, values, every)
    ends = np.minimum(starts + every, values.size)
    mean = np.add.reduceat(values, starts) / (ends - starts)
    return Thinned(
        steps[ends - 1], mean, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts), every
    )


def thin_grid(grid: Array, steps: Array, *, worst: str) -> tuple[Array, Array]:
    """[rows, columns] with at most ROWS and COLUMNS of them: each keeps the "highest" or "lowest" of its neighbours.

    returns  the grid, and the last step of each column; NaN only where all neighbours are
    """
    take = np.fmax if worst == "highest" else np.fmin
    across = max(1, -(-grid.shape[1] // COLUMNS))
    down = max(1, -(-grid.shape[0] // ROWS))
    columns, rows = np.arange(0, grid.shape[1], across), np.arange(0, grid.shape[0], down)
    out = take.reduceat(take.reduceat(grid, columns, axis=1), rows, axis=0)
    return out, steps[np.minimum(columns + across, steps.size) - 1]
