"""What watching costs: the alarm's look at the counters after a commit, against the training step it belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from fp8kernels import SaturationWarning
from fp8kernels.nn.step import layers
from fp8kernels.telemetry import check_saturation
from fp8kernels.training.demo.size import FULL as DEMO
from fp8kernels.training.demo.size import QUICK, DemoSize

from .bench_train import SETTLE, Run
from .case import TIME, Case

ELEMENTS = 1000  # that each tensor is said to have had in a step


def alarm(recipe: str = "hif8-qat", size: DemoSize = DEMO, backend: str = "cpu") -> Case:
    """Counting is part of the pass that quantizes, and of its goals; looking at the counts is what is left.

    The counters move before each look, as they do in a step, and nothing saturates.
    """
    run = Run(size, recipe)
    for _ in range(SETTLE):
        run.step()
    found = layers(run.model)
    counters = [layer.fp8_counters for layer in found]
    seen = torch.tensor([ELEMENTS, 0, 0, 0])

    def look() -> None:
        torch._foreach_add_(counters, [seen] * len(counters))
        check_saturation(found)

    def check() -> None:
        worst, steps = found[len(found) // 2], found[0].fp8_recipe.alarm.steps
        look()
        assert not said(look), "an alarm without reason"
        told = []
        for _ in range(steps + 1):
            worst.fp8_counters[0, 1] += ELEMENTS // 2
            told += said(look)
        assert len(told) == 1, f"an alarm is told once, not {len(told)} times"
        assert told[0].startswith(f"{worst.fp8_name}: input saturates for {steps} steps in a row: 50.000%"), told[0]
        assert not said(look), "an alarm after it is over"

    return Case(
        "telemetry", f"the alarm after a commit, {recipe}", "-", backend, f"{len(found)} layers", "a training step",
        look, run.step, check, (), unit=TIME, extra={"converted_layers": len(found)},
    )  # fmt: skip


def said(work: Callable[[], None]) -> list[str]:
    """The words of the alarms during some work."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        work()
    return [str(each.message) for each in told if each.category is SaturationWarning]


def test_alarm(backend: str, race: Callable[[Case], None]) -> None:
    race(alarm(size=QUICK, backend=backend))
