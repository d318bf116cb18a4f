"""The state of a model's layers as named numbers, for curves: what report tells, but of the time since last asked."""

from __future__ import annotations

import torch
from torch import nn

from ..nn.state import ScaledLayer
from ..nn.step import layers
from ..scaling.delayed import COUNTERS, ROLES

PREFIX = "fp8"
TOTAL = f"{PREFIX}/total"


class Meter:
    """Reads a model's layers, and begins to count now.

    raises   ValueError if the model has no 8-bit layers
    """

    def __init__(self, model: nn.Module) -> None:
        if not layers(model):
            raise ValueError("the model has no 8-bit layers; call fp8kernels.convert(model) first")
        self.counted: dict[str, list[list[int]]] = {}  # by the layer's name: the counters at the last look
        self.read(model)

    def read(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        """Numbers by tensor, "fp8/<layer>/<role>/<what>", and of the model, "fp8/total/<what>"; waits for a GPU.

            scale      in use from now on
            amax       the newest in the history
            overshoot  amax / (scale * target); above 1 the history lags behind
            saturated, flushed  fractions of the elements since the last look; of the total also nonfinite, a count
            worst      the largest fraction of one tensor that saturated
            high_precision  layers that have fallen back

        A tensor is left out in which nothing was seen since the last look.
        """
        names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
        out: dict[str, float] = {}
        sums, worst, high = [0] * COUNTERS, 0.0, 0
        for layer in layers(model):
            if layer.fp8_scale.is_meta:
                continue
            name = names[id(layer)]
            counters, scale, amax = numbers(layer)
            before = self.counted.get(name, [[0] * COUNTERS for _ in ROLES])
            self.counted[name] = counters
            high += layer.fp8_high
            for index, role in enumerate(ROLES):
                step = [now - then for now, then in zip(counters[index], before[index], strict=True)]
                if step[0] <= 0:
                    continue  # not seen, or an older checkpoint was loaded
                sums = [a + b for a, b in zip(sums, step, strict=True)]
                worst = max(worst, step[1] / step[0])
                out |= {
                    f"{PREFIX}/{name}/{role}/{key}": value
                    for key, value in (
                        ("scale", scale[index]),
                        ("amax", amax[index]),
                        ("overshoot", overshoot(layer, index, amax[index], scale[index])),
                        ("saturated", step[1] / step[0]),
                        ("flushed", step[2] / step[0]),
                    )
                }
        elements, saturated, flushed, nonfinite = sums
        totals = {
            f"{TOTAL}/saturated": saturated / max(elements, 1),
            f"{TOTAL}/flushed": flushed / max(elements, 1),
            f"{TOTAL}/nonfinite": float(nonfinite),
            f"{TOTAL}/worst": worst,
            f"{TOTAL}/high_precision": float(high),
        }
        return out, totals


def steps_of(model: nn.Module) -> int:
    """The optimizer steps that a model has seen, also before it was loaded from a checkpoint."""
    return max(int(layer.fp8_step) for layer in layers(model))


def numbers(layer: ScaledLayer) -> tuple[list[list[int]], list[float], list[float]]:
    """counters [3][4], scales [3] and newest amax [3] of a layer, in one transfer; float64 holds counts to 2**53."""
    state = (layer.fp8_counters, layer.fp8_scale[:, None], layer.fp8_history[:, :1])
    rows = torch.cat([x.double() for x in state], 1).tolist()
    return [[int(n) for n in row[:COUNTERS]] for row in rows], [row[-2] for row in rows], [row[-1] for row in rows]


def overshoot(layer: ScaledLayer, index: int, amax: float, scale: float) -> float:
    """Newest amax / (scale * target): above 1 the history lags behind; 0 before the first commit."""
    reach = scale * layer.fp8_recipe.target(index)
    return amax / reach if reach else 0.0
