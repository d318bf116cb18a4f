"""stream: the tensors of an export one layer after the other, without a file: new weights for a server that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..nn import Linear
from .adapters import merged
from .formats import NATIVE, get_layout
from .layout import CODES, SCALE
from .merged_view import is_merged_in_view, merged_view
from .names import checkpoint_names
from .plan import check_numbers, in_dtype, others, plan_export
from .write import HIGH_PRECISION, converted_linears, pack_layer

COMPRESSED = "compressed-tensors"


def stream(
    model: nn.Module, *, format: str = COMPRESSED, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Every tensor that `export` would write in this format, under the names of transformers, as (name, tensor, scale).

    model    a converted model, trained or calibrated; also under FSDP2, where every rank has to take the whole stream,
             and with adapters of PEFT: LoRA is merged a layer at a time, other adapters in a copy of the model
    format   as export's
    dtype    of what stays in high precision
    returns  for an 8-bit layer ("model.layers.0.mlp.up_proj.weight", float8_e4m3fn [N, K], scale), the scale being the
             tensor `weight_scale` of the file; of the native layout, its weight_codes, uint8. A static input scale
             comes behind it as ("….input_scale", tensor, None), and so do all other tensors

    Layers are rounded as they are asked for: beside the model there is one layer at a time. The model must not train
    while the stream is read. It is not changed. The bytes are those of an export at the same moment.

    raises   ValueError as export does, before the first tensor
    """
    if dtype not in HIGH_PRECISION:
        raise ValueError(f"stream: dtype is {dtype}, it must be one of {', '.join(map(str, HIGH_PRECISION))}")
    if format != NATIVE:
        get_layout(format)
    if (view := merged_view(model)) is not None:
        check_numbers(model)
        layers = _layers(view, format)
        if all(name in layers for name, layer in view.named_modules() if is_merged_in_view(layer)):
            return _parts(view, layers, dtype, native=format == NATIVE)
    model, _ = merged(model)
    check_numbers(model)
    return _parts(model, _layers(model, format), dtype, native=format == NATIVE)


def pairs(parts: Iterator[tuple[str, Tensor, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    """A stream as (name, tensor), each scale behind its weight: what the load_weights of vLLM's models takes."""
    for name, tensor, scale in parts:
        yield name, tensor
        if scale is not None:
            yield scale_name(name), scale


def scale_name(name: str) -> str:
    """What a file calls the scale of a weight."""
    return f"{name.removesuffix(CODES)}{SCALE}" if name.endswith(f".{CODES}") else f"{name}_scale"


def _layers(model: nn.Module, format: str) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """The 8-bit layers by their names, each with what makes its tensors."""
    if format == NATIVE:
        return {name: partial(_codes, layer) for name, layer in converted_linears(model).items()}
    return {name: layer.tensors for name, layer in plan_export(model, format).layers.items()}


def _parts(
    model: nn.Module, layers: dict[str, Callable[[], dict[str, Tensor]]], dtype: torch.dtype, *, native: bool
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if native else checkpoint_names(model, tensors)

    for layer, make in layers.items():
        tensors = named({f"{layer}.{key}": tensor for key, tensor in make().items()})
        weight = next(name for name in tensors if name.rpartition(".")[2] in ("weight", CODES))
        yield weight, tensors.pop(weight), tensors.pop(scale_name(weight))
        yield from ((name, tensor, None) for name, tensor in tensors.items())
    for name, tensor in others(model, layers, {}):
        yield from ((saved, part, None) for saved, part in named({name: in_dtype(tensor, dtype)}).items())


def _codes(layer: Linear) -> dict[str, Tensor]:
    return pack_layer(layer)[1]
