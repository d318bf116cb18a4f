"""export: a converted model to a folder with 8-bit weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Linear, ScaledLayer
from ..scaling.delayed import INPUT, WEIGHT, is_state
from .atomic import staged_folder
from .config import quantization_config, write_config
from .layout import CODES, INPUT_SCALE, MANIFEST, SCALE, WEIGHTS, LayerEntry, Manifest, file_stamp

HIGH_PRECISION = (torch.bfloat16, torch.float32)


def export(
    model: nn.Module, out: str | Path, *, tokenizer: Any = None, dtype: torch.dtype = torch.bfloat16
) -> Manifest:
    """Write a converted model as a folder: 8-bit weights, scales, and everything else in `dtype`.

    model      a model after fp8kernels.convert; where it has a `config` with save_pretrained, that is written too
    tokenizer  anything with save_pretrained, or None
    dtype      bfloat16 or float32, for what stays in high precision (embeddings, norms, biases)
    returns    the manifest, as written to fp8kernels.json

    The scales are those that eval mode uses: a delayed scale is written as the static scale it has become. The folder
    appears whole or not at all; an earlier export of that name is replaced.

    raises     ValueError if nothing is converted, or a converted layer is not a Linear; FileExistsError if `out` holds
               something that export did not write
    source     layout: fp8kernels/export/layout.py
    """
    if dtype not in HIGH_PRECISION:
        raise ValueError(f"export: dtype is {dtype}, it must be one of {', '.join(map(str, HIGH_PRECISION))}")
    from safetensors.torch import save_file

    out = Path(out)
    layers, tensors, tied = pack(model, dtype)
    recipe = next(module.fp8_recipe.name for module in model.modules() if isinstance(module, ScaledLayer))
    with staged_folder(out, may_replace=lambda folder: (folder / MANIFEST).is_file()) as staged:
        for part in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
            if part is not None and hasattr(part, "save_pretrained"):
                part.save_pretrained(staged)
        save_file(tensors, staged / WEIGHTS, metadata={"format": "pt"})
        manifest = Manifest(
            recipe=recipe,
            model_class=type(model).__name__,
            dtype=_word(dtype),
            layers=layers,
            tensors={name: (_word(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()},
            tied=tied,
        )
        write_config(staged, quantization_config(layers), dtype=_word(dtype))
        manifest = replace(manifest, files={path.name: file_stamp(path) for path in sorted(staged.iterdir())})
        (staged / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def pack(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, LayerEntry], dict[str, Tensor], dict[str, str]]:
    """What export writes: the layers' entries, the tensors by name, and the names that share another's tensor.

    raises   ValueError if nothing is converted, or a converted layer is not a Linear
    """
    converted = {name: module for name, module in model.named_modules() if isinstance(module, ScaledLayer)}
    if not converted:
        raise ValueError("export: the model has no 8-bit layers; call fp8kernels.convert(model) first")
    if "" in converted:
        raise ValueError("export: the model is one bare layer; put it into a module, so that its tensors have names")
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in converted.items():
        if not isinstance(layer, Linear):
            raise ValueError(
                f"export: layer {name!r} is a converted {type(layer).__name__}; a checkpoint holds Linear layers only: "
                f"convert again with a filter or an override that leaves it as it is"
            )
        layers[name], packed = _pack_layer(layer)
        tensors.update({f"{name}.{key}": tensor for key, tensor in packed.items()})
    tied: dict[str, str] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        owner, _, key = name.rpartition(".")
        if is_state(name) or (owner in converted and key == "weight"):
            continue
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        tensors[name] = _own(tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None))
    return layers, tensors, tied


@torch.no_grad()
def _pack_layer(layer: Linear) -> tuple[LayerEntry, dict[str, Tensor]]:
    recipe = layer.fp8_recipe
    if recipe.input.clamp:
        raise ValueError(
            f"export: layer {layer.fp8_name!r} clamps its input, which exported layers do not; revert the model, "
            f"convert it with a recipe without clamp and load the state_dict of before into it"
        )
    was_training = layer.training
    layer.eval()  # so that nothing is noted
    try:
        coded = layer.fp8_quantize(layer.weight, WEIGHT, exact=True)  # codes [N, K], scale [R, C]
    finally:
        layer.train(was_training)
    input_scale = layer.fp8_scale[INPUT : INPUT + 1].reshape(1, 1)
    if recipe.input.scaling == "current":
        input_scale = torch.zeros_like(input_scale)
    static = bool(input_scale > 0)
    entry = LayerEntry(
        weight_fmt=recipe.weight.fmt,
        weight_block=recipe.weight.block,
        input_fmt=recipe.input.fmt,
        input_block=recipe.input.block,
        input_scaling="static" if static else "current",
        input_target=recipe.target(INPUT),
        power_of_two=recipe.power_of_two,
    )
    packed = {CODES: coded.codes, SCALE: coded.scale, INPUT_SCALE: input_scale}
    return entry, {key: _own(tensor.detach().cpu()) for key, tensor in packed.items()}


def _own(tensor: Tensor) -> Tensor:
    """The tensor with a storage of its own: a file does not take two views of one storage."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
