"""What a page needs of the runs, read once: their rows as columns of numbers, their layers as grids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..runs import Run
from ..runs.curve import LossCurve, loss_curve
from .html import number
from .thin import Array

ROLES = ("input", "weight", "grad")
METRICS = ("amax", "scale", "target", "past_target", "past_maximum", "bits_lost", "stale", "sqnr_db")


@dataclass
class Contents:
    """One run. `label` is what it is called on the page, `place` its colour."""

    run: Run
    label: str
    place: int
    reference: Run | None = None  # whose loss this run's is compared with
    why_none: str = ""

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        return self.run.rows("log")

    @cached_property
    def probe(self) -> list[dict[str, Any]]:
        return self.run.rows("probe")

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return self.run.rows("events")

    @cached_property
    def layers(self) -> Layers | None:
        return Layers.read(self.run.rows("layers"))

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """What eval.json holds; nothing where there is none.

        raises   ValueError if it cannot be read
        """
        path = self.run.path / "eval.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        return found if isinstance(found, dict) else {}

    @cached_property
    def curve(self) -> LossCurve | None:
        """How far the loss is from the reference's."""
        return None if self.reference is None else loss_curve(self.run, self.reference)

    def column(self, key: str) -> tuple[Array, Array]:
        """Steps and values of one number of the log, fp64 [n] each, NaN where it is missing."""
        return columns(self.log, key)


@dataclass
class Layers:
    """The rows of layers.jsonl as grids.

    names   layers in the order of the model
    steps   fp64 [S], that were measured
    grids   by role and metric, fp32 [L, S], NaN where there is no row
    """

    names: list[str]
    steps: Array
    grids: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, rows: Sequence[dict[str, Any]]) -> Layers | None:
        """None without rows."""
        names: dict[str, int] = {}
        for row in rows:
            names.setdefault(str(row.get("layer")), len(names))
        steps = np.unique(np.array([number(row.get("step")) for row in rows]))
        steps = steps[np.isfinite(steps)]
        if not names or not steps.size:
            return None
        places = {step: place for place, step in enumerate(steps.tolist())}
        grids: dict[str, dict[str, Any]] = {}
        for row in rows:
            role, column = str(row.get("role")), places.get(number(row.get("step")))
            if role not in ROLES or column is None:
                continue
            if role not in grids:
                grids[role] = {m: np.full((len(names), steps.size), np.nan, dtype=np.float32) for m in METRICS}
            place = names[str(row.get("layer"))]
            for metric, grid in grids[role].items():
                grid[place, column] = number(row.get(metric))
        ordered = {role: grids[role] for role in ROLES if role in grids}
        return cls(list(names), steps, ordered) if ordered else None

    @cached_property
    def short(self) -> list[str]:
        """The names without what all of them begin with, up to a dot."""
        if len(self.names) < 2:
            return self.names
        parts = [name.split(".") for name in self.names]
        common = 0
        while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
            common += 1
        return [".".join(p[common:]) for p in parts]


def columns(rows: Sequence[dict[str, Any]], key: str) -> tuple[Array, Array]:
    """Steps and values of one number of rows, fp64 [n] each."""
    return np.array([number(r.get("step")) for r in rows]), np.array([number(r.get(key)) for r in rows])


def contents(runs: Sequence[Run]) -> list[Contents]:
    """The runs with their labels, and with whom each is compared: the run that it names, else the first one given.

    raises   ValueError without runs
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    names = [str(run.info.get("name") or run.path.name) for run in runs]
    labels = [f"{name} ({run.path})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
    out = []
    for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
        item = Contents(run, label, place)
        item.reference, item.why_none = _reference(run, runs)
        out.append(item)
    return out


def _reference(run: Run, runs: Sequence[Run]) -> tuple[Run | None, str]:
    """Whom a run is compared with, or why with nobody."""
    named = _baseline(run)
    if named is not None:
        try:
            return Run.open(named), ""
        except (OSError, ValueError) as failed:
            error = failed
        if run is runs[0]:
            return None, f"its baseline cannot be read: {error}"
    is_baseline = any(run.path.resolve() == place.resolve() for place in map(_baseline, runs) if place is not None)
    if run is runs[0] or (named is None and is_baseline):
        others = ", and others are compared with it" if len(runs) > 1 else ""
        return None, f"it names no baseline{others}"
    return runs[0], ""


def _baseline(run: Run) -> Path | None:
    """Where the baseline that a run names lies, as seen from here or from the run; None if it names none."""
    named = run.info.get("baseline")
    if not named:
        return None
    places = [Path(str(named)), run.path / str(named), run.path.parent / str(named)]
    return next(filter(Path.is_dir, places), places[0])
