"""What the counters lead to: a layer that saturates for several steps in a row is named, with the fraction and amax
against scale; and HiF8 with route="auto" leaves its carrier where that cannot hold too many of a tensor's elements.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field

from ..formats import E4M3, get_format
from ..nn.state import ScaledLayer
from ..nn.step import after_commit
from ..scaling.delayed import COUNTERS, ROLES
from .reading import Reading, readings


class SaturationWarning(UserWarning):
    """A layer saturates, and keeps doing so."""


class SaturationError(RuntimeError):
    """The same, where the recipe's alarm policy is "raise"."""


class CarrierWarning(UserWarning):
    """A tensor of a layer left its carrier, because that could not hold too many of its elements."""


@dataclass
class _Watch:
    """What the alarm remembers of a layer between readings: its counters, and the scales that were in use."""

    scale: list[float]
    counters: list[list[int]] = field(default_factory=lambda: [[0] * COUNTERS for _ in ROLES])
    in_a_row: list[int] = field(default_factory=lambda: [0] * len(ROLES))
    told: list[bool] = field(default_factory=lambda: [False] * len(ROLES))


_watched: weakref.WeakKeyDictionary[ScaledLayer, _Watch] = weakref.WeakKeyDictionary()


def check_saturation(found: list[ScaledLayer]) -> None:
    """Called after every commit; looks at what each layer counted since the last reading (see reading.py).

    raises   SaturationError where a layer's policy is "raise"
    """
    saturates: list[str] = []
    leaves: list[str] = []
    fatal = False
    for reading in readings(found):
        for layer, index, step, used in _over(reading):
            alarm, memory = layer.fp8_recipe.alarm, _watched[layer]
            if _may_leave_its_carrier(layer, index):
                layer.fp8_routes = (*layer.fp8_routes[:index], "exact", *layer.fp8_routes[index + 1 :])
                leaves += (
                    [_why_it_leaves(layer, index, step, memory.in_a_row[index])] if alarm.policy != "ignore" else []
                )
                memory.in_a_row[index] = 0  # with its own codes it has another chance
            elif alarm.policy != "ignore" and not memory.told[index]:
                memory.told[index] = True
                saturates.append(_message(layer, index, used, step, memory.in_a_row[index]))
                fatal |= alarm.policy == "raise"
    if leaves:
        warnings.warn("\n".join(leaves), CarrierWarning, stacklevel=2)
    if fatal:
        raise SaturationError("\n".join(saturates))
    for message in saturates:
        warnings.warn(message, SaturationWarning, stacklevel=2)


def _over(reading: Reading) -> list[tuple[ScaledLayer, int, list[int], float]]:
    """The layers and roles that were over the alarm's fraction for its steps, with counts and the scale in use."""
    out = []
    for layer, counters, scale in zip(*reading, strict=True):
        memory, alarm = _watched.setdefault(layer, _Watch(scale)), layer.fp8_recipe.alarm
        before, memory.counters = memory.counters, counters
        used, memory.scale = memory.scale, scale
        for index in range(len(ROLES)):
            step = [now - then for now, then in zip(counters[index], before[index], strict=True)]
            elements, saturated, flushed, _ = step
            if elements <= 0:
                continue  # not seen in this step, or an older checkpoint was loaded
            lost = saturated + flushed if _may_leave_its_carrier(layer, index) else saturated
            over = lost > alarm.fraction * elements
            memory.in_a_row[index] = memory.in_a_row[index] + 1 if over else 0
            memory.told[index] = memory.told[index] and over
            if memory.in_a_row[index] >= alarm.steps:
                out.append((layer, index, step, used[index]))
    return out


def _may_leave_its_carrier(layer: ScaledLayer, index: int) -> bool:
    return layer.fp8_routes[index] == "auto" and layer.fp8_carrier(index, layer.fp8_scale.device) is not None


def _why_it_leaves(layer: ScaledLayer, index: int, step: list[int], steps: int) -> str:
    elements, saturated, flushed, _ = step
    return (
        f"{layer.fp8_name or type(layer).__name__}: {ROLES[index]} leaves its carrier: for {steps} steps in a row E4M3 "
        f"could not hold {saturated / elements:.3%} (saturated) and {flushed / elements:.3%} (flushed) of its "
        f"elements. From now on it takes the exact route; route='carrier' in its Role keeps the carrier"
    )


def _message(layer: ScaledLayer, index: int, used: float, step: list[int], steps: int) -> str:
    """Reads the newest amax, which on a GPU waits: once, as a tensor that saturates is told once."""
    role = layer.fp8_recipe.roles()[index]
    fmt = get_format(role.fmt if role is not None else layer.fp8_recipe.input.fmt)
    shift = layer.fp8_carrier(index, layer.fp8_scale.device)
    what, largest = (fmt.name, fmt.max) if shift is None else (f"{fmt.name}'s carrier", E4M3.max * 2.0**-shift)
    amax = float(layer.fp8_history[index, 0])
    return (
        f"{layer.fp8_name or type(layer).__name__}: {ROLES[index]} saturates for {steps} steps in a row: "
        f"{step[1] / step[0]:.3%} of its elements exceed the largest value of {what}; newest amax {amax:.4g} against "
        f"scale {used:.4g} * {largest:g} = {used * largest:.4g}. Give it head-room (recipe margin=1), a shorter "
        f"window, or leave the layer out"
    )


after_commit.append(check_saturation)
