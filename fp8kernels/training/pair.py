"""Two runs from one checkpoint, step by step side by side, so that only the precision differs."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .step import adamw, set_learning_rate, train_step

UNTIMED = 3  # steps; the first ones of a run allocate, and convert its first scales


@dataclass
class Curves:
    """Loss and seconds of every step of both runs; the same batch at the same index."""

    plain_loss: list[float] = field(default_factory=list)
    other_loss: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    other_seconds: list[float] = field(default_factory=list)

    def error_percent(self) -> list[float]:
        """Signed error of the other run's loss in percent of the plain run's, step by step."""
        return [100 * (b - a) / a for a, b in zip(self.plain_loss, self.other_loss, strict=True)]

    def time_ratio(self) -> float:
        """The median over the steps of (other / plain) seconds."""
        pairs = list(zip(self.plain_seconds, self.other_seconds, strict=True))
        return statistics.median(other / plain for plain, other in (pairs[UNTIMED:] or pairs))


def fork(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of a model and of its AdamW, moments included, that trains on by itself."""
    model_copy = copy.deepcopy(model)
    optimizer_copy = adamw(model_copy, optimizer.param_groups[0]["lr"])
    optimizer_copy.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model_copy, optimizer_copy


def train_pair(
    plain: tuple[nn.Module, torch.optim.Optimizer],
    other: tuple[nn.Module, torch.optim.Optimizer],
    batches: Iterable[Tensor],
    learning_rates: Iterable[float],
    after_step: Callable[[Curves], None] = lambda curves: None,
) -> Curves:
    """Train both on the same batches, alternately and with the order changing, until the learning rates end."""
    curves = Curves()
    runs = ((plain, curves.plain_loss, curves.plain_seconds), (other, curves.other_loss, curves.other_seconds))
    for step, (rate, tokens) in enumerate(zip(learning_rates, batches, strict=False)):
        for (model, optimizer), losses, seconds in runs if step % 2 == 0 else runs[::-1]:
            set_learning_rate(optimizer, rate)
            started = time.perf_counter()
            losses.append(train_step(model, optimizer, tokens))
            seconds.append(time.perf_counter() - started)
        after_step(curves)
    return curves


def cosine_schedule(peak: float, steps: int, *, warmup: int, floor: float = 0.1) -> list[float]:
    """The learning rate of each step: a straight rise, then half a cosine down to `floor` of the peak."""
    rates = []
    for step in range(steps):
        rise = min(1.0, (step + 1) / max(1, warmup))
        fall = max(0, step - warmup) / max(1, steps - warmup)
        rates.append(peak * rise * (floor + (1 - floor) * (1 + math.cos(math.pi * fall)) / 2))
    return rates
