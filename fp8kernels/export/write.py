"""export: a converted model to a folder with 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..headers import CONFIG
from ..nn import Linear, ScaledLayer
from ..nn.dtensor import whole
from ..scaling.delayed import INPUT, WEIGHT
from .adapters import merged
from .atomic import staged_folder
from .config import quantization_config
from .files import is_ours, save_parts, save_shards, write_config
from .formats import NATIVE, foreign_config, get_layout
from .layout import CODES, INPUT_SCALE, MANIFEST, SCALE, LayerEntry, Manifest, file_stamp
from .names import cache_tensors, checkpoint_layers, checkpoint_names, in_order, matrices, own
from .plan import FALLEN_BACK, check_numbers, high_precision, in_dtype, others, plan_export, warmup_note
from .report import ExportReport, exported

HIGH_PRECISION = (torch.bfloat16, torch.float32)
ONE_FILE = 2**62  # bytes; more than any file has


def export(
    model: nn.Module,
    out: str | Path,
    *,
    format: str = NATIVE,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
    cache_scales: Mapping[str, tuple[float, float]] | None = None,
    kv_cache: str | dict[str, Any] | None = None,
) -> ExportReport:
    """Write a converted model as a folder that servers load: 8-bit weights, scales, and everything else in `dtype`.

    model      a model after fp8kernels.convert; where it has a `config` with save_pretrained, that is written too.
               Adapters of PEFT are merged into the weights of a copy
    format     "native": the codes and scales of training, HiF8 among them, for fp8kernels and its plug-ins.
               "compressed-tensors": E4M3, one scale for a weight and the trained static one for its input, which
               transformers, vLLM and SGLang read as they are. "compressed-tensors-dynamic": a scale for each row of a
               weight, inputs scaled token by token as they come. "compressed-tensors-block": a scale for each 128x128,
               inputs by groups of 128. "fp8": as the first, in the words of vLLM's and SGLang's Fp8Config
    tokenizer  anything with save_pretrained, or None
    dtype      bfloat16 or float32, for what stays in high precision (embeddings, norms, biases)
    max_shard_size  bytes or "5GB" of one safetensors file; the native layout is one file
    cache_scales    for compressed-tensors, (k_scale, v_scale) of an E4M3 cache by the name of an attention module; the
               file then asks the server for such a cache
    kv_cache   for native, the format of the cache that config.json asks for, "hif8" or "e4m3", or
               kv_cache_entry(fmt, scales) with calibrated scales (fp8kernels/export/kv_cache.py)
    returns    what was written, and what the way from the trained format to that of the file costs; .table() prints

    The native scales are those that eval mode uses: a delayed scale is written as the static scale it has become. For
    the others weights are rounded to E4M3 anew from the high-precision ones, with scales that bf16 holds exactly and
    that q, k and v (gate and up) have in common, because servers compute those as one; an input's static scale is the
    trained one, translated to E4M3 where it trained in another format. The folder appears whole or not at all; an
    earlier export of that name is replaced.

    raises     ValueError naming the layer, and the way out, if nothing is converted, a weight or scale is NaN or Inf, a
               format does not fit what was trained, or an adapter cannot be merged; FileExistsError if `out` holds
               something that export did not write; OSError as the disk gives it
    source     layouts: fp8kernels/export/layout.py, formats.py
    """
    if dtype not in HIGH_PRECISION:
        raise ValueError(f"export: dtype is {dtype}, it must be one of {', '.join(map(str, HIGH_PRECISION))}")
    if cache_scales is not None and not format.startswith("compressed-tensors"):
        raise ValueError(f"export: cache_scales belong to the compressed-tensors layouts, not to {format!r}")
    if kv_cache is not None and format != NATIVE:
        raise ValueError(f"export: kv_cache belongs to the native layout, not to {format!r}; give cache_scales")
    if format != NATIVE:
        get_layout(format)
    model, notes = merged(model)
    check_numbers(model)
    if format == NATIVE:
        return _export_native(model, Path(out), tokenizer, dtype, notes, kv_cache)
    plan = plan_export(model, format)
    tensors, tied = high_precision(model, plan, dtype)
    tensors.update(cache_tensors(model, cache_scales or {}))
    layers = {}
    for name, layer in plan.layers.items():
        tensors.update({f"{name}.{key}": tensor for key, tensor in layer.tensors().items()})
        layers[name] = exported(layer)
    tensors = in_order(model, checkpoint_names(model, tensors))
    # vLLM and SGLang match the names of the files, transformers those of its modules: GPT-NeoX's head has two
    listed = dict.fromkeys((*checkpoint_layers(model, plan.kept), *plan.kept))
    outside = {name: "the model has it in no Linear layer" for name in matrices(model, tensors) if name not in listed}
    ignore = [*listed, *outside]
    settings = foreign_config(plan.layout, ignore, cache=bool(cache_scales))
    with staged_folder(Path(out), may_replace=is_ours) as staged:
        save_parts(model, tokenizer, staged)
        if not write_config(staged, model, settings, dtype=_word(dtype), tied=tied):
            notes.append("the model has no config: config.json says how its layers are read, and nothing else")
        save_shards(tensors, staged, max_shard_size)
        files = tuple(sorted(path.name for path in staged.iterdir()))
    return ExportReport(format, layers, {**plan.kept, **outside}, plan.left, tied, (*notes, *plan.notes), files)


def _export_native(
    model: nn.Module,
    out: Path,
    tokenizer: Any,
    dtype: torch.dtype,
    notes: list[str],
    kv_cache: str | dict[str, Any] | None,
) -> ExportReport:
    layers, tensors, tied = pack(model, dtype)
    recipe = next(module.fp8_recipe.name for module in model.modules() if isinstance(module, ScaledLayer))
    with staged_folder(out, may_replace=is_ours) as staged:
        save_parts(model, tokenizer, staged)
        if (staged / CONFIG).is_file():
            write_config(staged, model, quantization_config(layers, kv_cache=kv_cache), dtype=_word(dtype), tied=tied)
        save_shards(tensors, staged, ONE_FILE)
        manifest = Manifest(
            recipe=recipe,
            model_class=type(model).__name__,
            dtype=_word(dtype),
            layers=layers,
            tensors={name: (_word(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()},
            tied=tied,
            files={path.name: file_stamp(path) for path in sorted(staged.iterdir())},
        )
        (staged / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    kept = {
        name: FALLEN_BACK if isinstance(module, ScaledLayer) else "not converted"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in layers
    }
    return ExportReport(
        NATIVE,
        kept=kept,
        tied=tied,
        notes=(*notes, *warmup_note(model)),
        files=(MANIFEST, *manifest.files),
        manifest=manifest,
    )


def pack(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, LayerEntry], dict[str, Tensor], dict[str, str]]:
    """What export writes: the layers' entries, the tensors by name, and the names that share another's tensor.

    raises   ValueError if nothing is converted, or a converted layer is not a Linear
    """
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in converted_linears(model).items():
        layers[name], packed = pack_layer(layer)
        tensors.update({f"{name}.{key}": tensor for key, tensor in packed.items()})
    tied: dict[str, str] = {}
    tensors.update({name: in_dtype(tensor, dtype) for name, tensor in others(model, layers, tied)})
    return layers, tensors, tied


def converted_linears(model: nn.Module) -> dict[str, Linear]:
    """The layers that a native checkpoint holds as codes: those that have fallen back to high precision stay there.

    raises   ValueError if nothing is converted, all have fallen back, or a converted layer is not a Linear
    """
    converted = {name: module for name, module in model.named_modules() if isinstance(module, ScaledLayer)}
    if not converted:
        raise ValueError("export: the model has no 8-bit layers; call fp8kernels.convert(model) first")
    if "" in converted:
        raise ValueError("export: the model is one bare layer; put it into a module, so that its tensors have names")
    found: dict[str, Linear] = {}
    for name, layer in converted.items():
        if layer.fp8_high:
            continue
        if not isinstance(layer, Linear):
            raise ValueError(
                f"export: layer {name!r} is a converted {type(layer).__name__}; a checkpoint holds Linear layers only: "
                f"convert again with a filter or an override that leaves it as it is"
            )
        found[name] = layer
    if not found:
        raise ValueError(
            "export: every 8-bit layer has fallen back to high precision, so that there are no codes to write: train "
            "it with a recipe that fits, or write it with save_pretrained"
        )
    return found


@torch.no_grad()
def pack_layer(layer: Linear) -> tuple[LayerEntry, dict[str, Tensor]]:
    """What a native checkpoint holds of one layer: weight_codes, weight_scale and input_scale, by those names.

    raises   ValueError for a recipe with clamp
    """
    recipe = layer.fp8_recipe
    if recipe.input.clamp:
        raise ValueError(
            f"export: layer {layer.fp8_name!r} clamps its input, which exported layers do not; revert the model, "
            f"convert it with a recipe without clamp and load the state_dict of before into it"
        )
    was_training = layer.training
    layer.eval()  # so that nothing is noted
    try:
        coded = layer.fp8_quantize(whole(layer.weight), WEIGHT, exact=True)  # codes [N, K], scale [R, C]
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
    return entry, {key: own(tensor.detach().cpu()) for key, tensor in packed.items()}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
