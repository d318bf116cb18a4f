"""What the counters lead to: a layer that saturates for several steps in a row is named, with the fraction and amax
against scale; and HiF8 with route="auto" leaves its carrier where that cannot hold too many of a tensor's elements.

This runs after every commit, so as long as nothing saturates it looks at all layers at once: a few operations on one
tensor. Layers are looked at one by one when there is something to say of them. The policy "fallback" acts on the same
counters in nn/fallback.py, which is part of the commit, as ranks must agree there.
"""

from __future__ import annotations

import warnings
from operator import is_

import torch
from torch import Tensor

from ..nn.fallback import largest, may_leave_its_carrier
from ..nn.state import ScaledLayer
from ..nn.step import after_commit
from ..scaling.delayed import ROLES
from .reading import Reading, readings

WATCH = "fp8_alarm"  # the attribute of a list's first layer; copies are without it
SPEAKING = ("warn", "raise")  # policies that say that a layer saturates


class SaturationWarning(UserWarning):
    """A layer saturates, and keeps doing so."""


class SaturationError(RuntimeError):
    """The same, where the recipe's alarm policy is "raise"."""


class CarrierWarning(UserWarning):
    """A tensor of a layer left its carrier, because that could not hold too many of its elements."""


class _Watch:
    """What the alarm remembers of a list of layers between readings; all tensors are on the CPU.

    counters  int64 [L, 3, 4], the last reading's; scale fp32 [L, 3], in use since then
    in_a_row  int64 [L, 3], readings over the alarm's fraction; told bool [L, 3], whether that was said
    """

    def __init__(self, layers: list[ScaledLayer], counters: Tensor, scale: Tensor) -> None:
        alarms = [layer.fp8_recipe.alarm for layer in layers]
        self.layers, self.recipes = layers, [layer.fp8_recipe for layer in layers]
        self.fraction = torch.tensor([[alarm.fraction] for alarm in alarms], dtype=torch.float64)  # [L, 1]
        self.steps = torch.tensor([[alarm.steps] for alarm in alarms])  # [L, 1]
        self.counters, self.scale = torch.zeros_like(counters), scale
        self.in_a_row = torch.zeros(scale.shape, dtype=torch.int64)
        self.told = torch.zeros(scale.shape, dtype=torch.bool)
        self.any_in_a_row = False
        self.routes: list[tuple[str, ...]] = []
        self.may_leave = torch.zeros(scale.shape, dtype=torch.bool)

    def holds(self, layers: list[ScaledLayer]) -> bool:
        """Whether these are the layers, with the recipes that they had."""
        return (
            len(layers) == len(self.layers)
            and all(map(is_, layers, self.layers))
            and all(map(is_, self.recipes, [layer.fp8_recipe for layer in layers]))
        )

    def take(self, counters: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, list[list[int]]]:
        """A reading: the counts since the last one, the scales in use then, and [layer, role] of what was over the
        alarm's fraction for its steps."""
        routes = [layer.fp8_routes for layer in self.layers]
        if routes != self.routes:
            rows = [[may_leave_its_carrier(layer, index) for index in range(len(ROLES))] for layer in self.layers]
            self.routes, self.may_leave = routes, torch.tensor(rows)
        step, used = counters - self.counters, self.scale
        self.counters, self.scale = counters, scale
        elements = step[..., 0]
        lost = torch.where(self.may_leave, step[..., 1] + step[..., 2], step[..., 1])
        over = lost > self.fraction * elements
        if not self.any_in_a_row and not bool(over.any()):
            return step, used, []
        seen = elements > 0  # else not seen in this step, or an older checkpoint was loaded
        self.in_a_row = torch.where(seen, torch.where(over, self.in_a_row + 1, 0), self.in_a_row)
        self.any_in_a_row = bool(self.in_a_row.any())
        self.told &= over | ~seen
        return step, used, ((self.in_a_row >= self.steps) & seen).nonzero().tolist()


def check_saturation(found: list[ScaledLayer]) -> None:
    """Called after every commit; looks at what each layer counted since the last reading (see reading.py).

    raises   SaturationError where a layer's policy is "raise"
    """
    saturates: list[str] = []
    leaves: list[str] = []
    fatal = False
    for reading in readings(found):
        watch = _watch(reading)
        step, used, ripe = watch.take(reading.counters, reading.scale)
        for row, index in ripe:
            layer, counts = watch.layers[row], step[row, index].tolist()
            policy, in_a_row = layer.fp8_recipe.alarm.policy, int(watch.in_a_row[row, index])
            if may_leave_its_carrier(layer, index):
                layer.fp8_routes = (*layer.fp8_routes[:index], "exact", *layer.fp8_routes[index + 1 :])
                leaves += [_why_it_leaves(layer, index, counts, in_a_row)] if policy != "ignore" else []
                watch.in_a_row[row, index] = 0  # with its own codes it has another chance
            elif policy in SPEAKING and not watch.told[row, index]:
                watch.told[row, index] = True
                saturates.append(_message(layer, index, float(used[row, index]), counts, in_a_row))
                fatal |= policy == "raise"
    if leaves:
        warnings.warn("\n".join(leaves), CarrierWarning, stacklevel=2)
    if fatal:
        raise SaturationError("\n".join(saturates))
    for message in saturates:
        warnings.warn(message, SaturationWarning, stacklevel=2)


def _watch(reading: Reading) -> _Watch:
    """What is remembered of these layers, or a new memory."""
    first = reading.layers[0]
    known: _Watch | None = first.__dict__.get(WATCH)
    if known is None or not known.holds(reading.layers):
        known = _Watch(reading.layers, reading.counters, reading.scale)
        first.__dict__[WATCH] = known
    return known


def _why_it_leaves(layer: ScaledLayer, index: int, step: list[int], steps: int) -> str:
    elements, saturated, flushed, _ = step
    return (
        f"{layer.fp8_name or type(layer).__name__}: {ROLES[index]} leaves its carrier: for {steps} steps in a row E4M3 "
        f"could not hold {saturated / elements:.3%} (saturated) and {flushed / elements:.3%} (flushed) of its "
        f"elements. From now on it takes the exact route; route='carrier' in its Role keeps the carrier"
    )


def _message(layer: ScaledLayer, index: int, used: float, step: list[int], steps: int) -> str:
    """Reads the newest amax, which on a GPU waits: once, as a tensor that saturates is told once."""
    what, top = largest(layer, index)
    amax = float(layer.fp8_history[index, 0])
    return (
        f"{layer.fp8_name or type(layer).__name__}: {ROLES[index]} saturates for {steps} steps in a row: "
        f"{step[1] / step[0]:.3%} of its elements exceed the largest value of {what}; newest amax {amax:.4g} against "
        f"scale {used:.4g} * {top:g} = {used * top:.4g}. Give it head-room (recipe margin=1), a shorter "
        f"window, or leave the layer out"
    )


after_commit.append(check_saturation)
