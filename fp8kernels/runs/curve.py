"""The loss of a run beside that of the run it is compared with, in percent, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..statistics import ape, bootstrap_mean, signed_error_percent
from .folder import Run

MAY_DIFFER = frozenset(["name", "recipe", "recipe_changes", "baseline", "saturation", "probe", "keep", "save_every"])


@dataclass(frozen=True)
class LossCurve:
    """Errors of the loss in percent of the reference's, over the steps that both runs have.

    mean, maximum  of the absolute error; mean_low, mean_high: the interval of the mean
    bias           mean of the signed error, above 0 where the second loses more; bias_low, bias_high
    block          steps that are drawn together, since neighbours are alike
    """

    steps: int
    mean: float
    mean_low: float
    mean_high: float
    maximum: float
    maximum_step: int
    bias: float
    bias_low: float
    bias_high: float
    block: int


def loss_curve(run: Run, reference: Run, *, level: float = 0.95) -> LossCurve | None:
    """The curve's summary; None where the runs have no step in common.

    raises   ValueError if a row of a log cannot be read
    """
    ours, theirs = losses(run), losses(reference)
    steps = sorted(ours.keys() & theirs.keys())
    if not steps:
        return None
    second, first = [ours[step] for step in steps], [theirs[step] for step in steps]
    block = max(1, min(round(math.sqrt(len(steps))), len(steps)))
    errors, signed = ape(second, first), signed_error_percent(second, first)
    mean = bootstrap_mean(errors, level=level, block=block)
    bias = bootstrap_mean(signed, level=level, block=block)
    worst = max(range(len(steps)), key=errors.__getitem__)
    return LossCurve(
        len(steps), mean.mean, mean.low, mean.high, errors[worst], steps[worst], bias.mean, bias.low, bias.high, block
    )


def losses(run: Run) -> dict[int, float]:
    """Training loss by step; steps without a finite one are left out."""
    found = {int(row["step"]): row.get("loss") for row in run.rows("log") if "step" in row}
    return {step: float(loss) for step, loss in found.items() if loss is not None and math.isfinite(loss)}


def unmatched(run: Run, reference: Run) -> list[str]:
    """What the two runs differ in beside their precision: a comparison means little where they do."""
    ours, theirs = (dict(r.info.get("config") or {}) for r in (run, reference))
    names = sorted((ours.keys() | theirs.keys()) - MAY_DIFFER)
    return [
        f"{name}: {_short(theirs.get(name))} and {_short(ours.get(name))}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
