"""A layer that holds codes, as an entry of a checkpoint says, and whether its scales can be."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.inference import InferenceLinear
from .layout import INPUT_SCALE, SCALE, LayerEntry


def inference_layer(
    inputs: int, outputs: int, *, bias: bool, entry: LayerEntry, device: torch.device | str | None = None
) -> InferenceLinear:
    """An InferenceLinear [outputs, inputs] that reads its codes as the entry says; its tensors are yet to come.

    raises   ValueError if the blocks do not divide it
    """
    return InferenceLinear(
        inputs,
        outputs,
        bias=bias,
        input_role=entry.input_role(),
        weight_role=entry.weight_role(),
        input_target=entry.input_target,
        power_of_two=entry.power_of_two,
        device=device,
    )


def check_scales(layer: str, entry: LayerEntry, weight_scale: Tensor, input_scale: Tensor, *, where: str = "") -> None:
    """Refuse scales that decode nothing.

    weight_scale   fp32, positive and finite
    input_scale    fp32 [1, 1], the same where the entry says "static"; 0 where inputs take the scale of their own amax
    where          what the message begins with
    raises         ValueError naming the layer, the scale and the number
    """
    static = entry.input_scaling == "static"
    for key, scale, good in (
        (SCALE, weight_scale, weight_scale > 0),
        (INPUT_SCALE, input_scale, input_scale > 0 if static else input_scale == 0),
    ):
        bad = scale[~(good & scale.isfinite())]
        if bad.numel():
            zero = key == INPUT_SCALE and not static
            raise ValueError(
                f"{where}{layer}.{key} holds {float(bad[0]):g} ({bad.numel()} of {scale.numel()} so): "
                + ("its inputs take the scale of their own amax, for which 0 stands" if zero else "a scale is positive")
                + "; copy the folder again, or export the model again"
            )
