"""summary: per layer its formats, scales, how much saturates or is flushed, and the signal-to-noise ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..console import console
from ..nn.linear import to_patches
from ..nn.state import ScaledLayer
from ..nn.step import layers
from ..scaling.delayed import INPUT, ROLES, WEIGHT
from .meter import overshoot


@dataclass(frozen=True)
class LayerReport:
    """One tensor of one layer; fractions are over all elements since conversion.

    scale      the scale in use, 0 before the first commit
    overshoot  newest amax / (scale * target): above 1 the history lags behind
    sqnr_db    of quantizing this tensor, in dB; None where it was not measured
    route      "carrier" where HiF8 values travel as E4M3 codes; what those cannot hold is in saturated and flushed
    """

    layer: str
    role: str
    fmt: str
    scaling: str
    block: str
    scale: float
    amax: float
    overshoot: float
    saturated: float
    flushed: float
    nonfinite: int
    sqnr_db: float | None
    route: str = "exact"


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """20 log10(|x| / |x - y|): signal-to-quantization-noise ratio in decibels; inf where they are equal."""
    x, y = x.detach().double(), y.detach().double()
    noise, signal = (x - y).norm(), x.norm()
    return math.inf if noise == 0 else float(20 * torch.log10(signal / noise)) if signal > 0 else -math.inf


def report(model: nn.Module, inputs: Any = None) -> list[LayerReport]:
    """One row per layer and 8-bit tensor.

    inputs   a batch (tensor, tuple, or mapping of keyword arguments) for one forward in eval mode, which measures the
             SQNR of the layers' inputs; without it only weights are measured
    raises   ValueError if the model has no 8-bit layers
    """
    found = layers(model)
    if not found:
        raise ValueError("summary: the model has no 8-bit layers; call fp8kernels.convert(model) first")
    names = {id(module): name for name, module in model.named_modules()}
    measured = {} if inputs is None else _measure_inputs(model, found, inputs)
    rows = []
    for layer in found:
        history, scale, counters = layer.fp8_history.tolist(), layer.fp8_scale.tolist(), layer.fp8_counters.tolist()
        for index, role in enumerate(layer.fp8_recipe.roles()):
            if role is None:
                continue
            elements, saturated, flushed, nonfinite = counters[index]
            rows.append(
                LayerReport(
                    layer=names[id(layer)] or type(layer).__name__,
                    role=ROLES[index],
                    fmt=role.fmt,
                    scaling=role.scaling,
                    block=role.block,
                    scale=scale[index],
                    amax=history[index][0],
                    overshoot=overshoot(layer, index, history[index][0], scale[index]),
                    saturated=saturated / max(elements, 1),
                    flushed=flushed / max(elements, 1),
                    nonfinite=nonfinite,
                    sqnr_db=weight_sqnr(layer)
                    if index == WEIGHT
                    else measured.get(id(layer))
                    if index == INPUT
                    else None,
                    route="exact" if layer.fp8_carrier(index, layer.fp8_scale.device) is None else "carrier",
                )
            )
    return rows


def summary(model: nn.Module, inputs: Any = None, *, verbose: bool = True) -> list[LayerReport]:
    """Print a table of `report(model, inputs)` and return its rows."""
    rows = report(model, inputs)
    if verbose:
        console().print(table(rows))
    return rows


def table(rows: list[LayerReport]) -> Table:
    """The rows as a rich table."""
    out = Table(title="8-bit layers", title_justify="left")
    for column in (
        "layer",
        "tensor",
        "format",
        "scaling",
        "scale",
        "amax",
        "overshoot",
        "saturated",
        "flushed",
        "SQNR dB",
    ):
        out.add_column(column, justify="left" if column in ("layer", "tensor", "format", "scaling") else "right")
    for row in rows:
        out.add_row(
            row.layer,
            row.role,
            f"{row.fmt} (carrier)" if row.route == "carrier" else row.fmt,
            f"{row.scaling} {row.block}",
            f"{row.scale:.3g}",
            f"{row.amax:.3g}",
            f"{row.overshoot:.2f}",
            f"{row.saturated:.2%}",
            f"{row.flushed:.2%}",
            "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            style="bold red" if row.saturated > 1e-3 or row.nonfinite else None,
        )
    return out


@torch.no_grad()
def quantization_sqnr(layer: ScaledLayer, x: Tensor, index: int) -> float:
    was_training = layer.training
    layer.training = False  # no state is written
    try:
        coded = layer.fp8_quantize(x, index)
    finally:
        layer.training = was_training
    return sqnr_db(x, torch.ops.fp8kernels.dequantize(coded.codes, coded.scale, coded.fmt, torch.float32))


def weight_sqnr(layer: ScaledLayer) -> float | None:
    weight = getattr(layer, "in_proj_weight", None) if not hasattr(layer, "weight") else layer.weight
    return (
        None
        if not isinstance(weight, Tensor) or weight.is_meta
        else quantization_sqnr(layer, weight.flatten(1), WEIGHT)
    )


def _measure_inputs(model: nn.Module, found: list[ScaledLayer], inputs: Any) -> dict[int, float]:
    """One forward in eval mode; the SQNR of each layer's first input."""
    out: dict[int, float] = {}

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if isinstance(layer, ScaledLayer) and x is not None and x.is_floating_point():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                x = to_patches(x, layer.kernel_size, layer.in_channels)
            out[id(layer)] = quantization_sqnr(layer, x.detach(), INPUT)

    handles = [layer.register_forward_pre_hook(hook) for layer in found]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return out
