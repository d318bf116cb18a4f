"""The alarm: a layer that saturates for several steps in a row is named, with the fraction and amax against scale."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..formats import get_format
from ..nn.state import ScaledLayer
from ..nn.step import after_commit
from ..scaling.delayed import COUNTERS, ROLES


class SaturationWarning(UserWarning):
    """A layer saturates, and keeps doing so."""


class SaturationError(RuntimeError):
    """The same, where the recipe's alarm policy is "raise"."""


@dataclass
class _Watch:
    """What the alarm remembers of a layer between commits: its counters, and the scales that were in use."""

    counters: Tensor
    scale: Tensor
    in_a_row: list[int] = field(default_factory=lambda: [0] * len(ROLES))
    told: list[bool] = field(default_factory=lambda: [False] * len(ROLES))


_watched: weakref.WeakKeyDictionary[ScaledLayer, _Watch] = weakref.WeakKeyDictionary()


def check_saturation(found: list[ScaledLayer]) -> None:
    """Called after every commit; looks at what each layer counted since the last one.

    Layers on a GPU are looked at when their counters are read for a summary, because reading them here would stall it.

    raises   SaturationError where a layer's policy is "raise"
    """
    found = [layer for layer in found if layer.fp8_counters.device.type == "cpu"]
    if not found:
        return
    counters = torch.stack([layer.fp8_counters for layer in found])  # [L, 3, 4]
    before = torch.stack([_memory(layer).counters for layer in found])
    steps = (counters - before).tolist()
    messages, fatal = [], False
    for layer, now, step in zip(found, counters, steps, strict=True):
        memory, alarm = _memory(layer), layer.fp8_recipe.alarm
        memory.counters, used = now, memory.scale
        memory.scale = layer.fp8_scale.clone()
        for index, (elements, saturated, _, _) in enumerate(step):
            if elements <= 0:
                continue  # not seen in this step, or an older checkpoint was loaded
            over = saturated > alarm.fraction * elements
            memory.in_a_row[index] = memory.in_a_row[index] + 1 if over else 0
            if not over:
                memory.told[index] = False
            if memory.in_a_row[index] >= alarm.steps and not memory.told[index] and alarm.policy != "ignore":
                memory.told[index] = True
                messages.append(_message(layer, index, used[index], saturated / elements, memory.in_a_row[index]))
                fatal |= alarm.policy == "raise"
    if messages and fatal:
        raise SaturationError("\n".join(messages))
    for message in messages:
        warnings.warn(message, SaturationWarning, stacklevel=2)


def _memory(layer: ScaledLayer) -> _Watch:
    memory = _watched.get(layer)
    if memory is None or memory.counters.shape[1] != COUNTERS:
        memory = _watched[layer] = _Watch(torch.zeros_like(layer.fp8_counters), layer.fp8_scale.clone())
    return memory


def _message(layer: ScaledLayer, index: int, used: Tensor, fraction: float, steps: int) -> str:
    role = layer.fp8_recipe.roles()[index]
    fmt = get_format(role.fmt if role is not None else layer.fp8_recipe.input.fmt)
    amax, scale = float(layer.fp8_history[index, 0]), float(used)
    return (
        f"{layer.fp8_name or type(layer).__name__}: {ROLES[index]} saturates for {steps} steps in a row: "
        f"{fraction:.3%} of its elements exceed {fmt.name}'s largest value; newest amax {amax:.4g} against scale "
        f"{scale:.4g} * {fmt.max:g} = {scale * fmt.max:.4g}. Give it head-room (recipe margin=1), a shorter window, "
        f"or leave the layer out"
    )


after_commit.append(check_saturation)
