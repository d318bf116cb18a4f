"""Checkpoints of others with E4M3 weights, read as layers that hold codes: compressed-tensors, "fp8", modelopt.

    compressed-tensors  `<layer>.weight` F8_E4M3 [N, K], `.weight_scale` of a tensor, a channel or a block of 128x128,
                        `.input_scale` where inputs are static; config_groups say which
    fp8                 the same with `activation_scheme`, and `.weight_scale_inv` where weights have blocks; the name
                        notwithstanding it decodes, too: x ≈ code * scale
    modelopt            the same with `quant_algo: "FP8"`: scales of tensors, static inputs

A layer is 8-bit where its weight is, in the file; config.json says how its inputs are scaled. Scales may be stored in
any float dtype and with any number of dimensions. Nothing is decoded: the bytes of the weights are the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import get_format
from ..headers import TensorHeader
from ..scaling.block import get_block
from .layout import CODES, INPUT_SCALE, SCALE, LayerEntry
from .patterns import REGEX, matches

METHODS = ("compressed-tensors", "fp8", "modelopt")
FMT = "e4m3"
STORED = "F8_E4M3"  # the format's name in safetensors files
OTHER_EIGHT_BITS = ("F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
INPUT_SCALES = ("input_scale", "activation_scale")
CACHE_SCALES = ("k_scale", "v_scale", "q_scale")  # of an 8-bit cache; ours makes its own
EDGE = 128  # elements; the side of a block of weights, and the length of a block of inputs
WAY_OUT = "load the model that it was made of, or write it as FP8 with scales of tensors, channels or blocks of 128x128"


@dataclass(frozen=True)
class Scheme:
    """What a config says of some layers: the block of their weights' scales, and the block and scaling of inputs."""

    weight_block: str
    input_block: str
    input_scaling: str
    targets: tuple[str, ...] = ()


def foreign_entries(settings: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, LayerEntry]:
    """The 8-bit layers of a checkpoint, each with how its codes are read.

    settings  `quantization_config` of config.json
    tensors   what the headers of all files announce
    returns   layers in the order of the files; a block that its weight ends in the middle of is read by rows of 1x128
    raises    ValueError naming the layer or field that is unknown, contradictory, or that no 8-bit layer computes
    """
    method = settings.get("quant_method")
    if method not in METHODS:
        raise ValueError(
            f"quantization_config is of the method {method!r}; read are fp8kernels, {', '.join(METHODS)}: {WAY_OUT}"
        )
    if method == "compressed-tensors":
        schemes = _compressed_schemes(settings)
    else:
        schemes = [_fp8_scheme(settings) if method == "fp8" else _modelopt_scheme(settings)]
    entries = {}
    for name, header in tensors.items():
        dtype, shape = header.dtype, header.shape
        layer, _, key = name.rpartition(".")
        if key == "weight_packed" or dtype in OTHER_EIGHT_BITS:
            raise ValueError(f"{name} is {dtype} {list(shape)}, read are weights in {STORED}: {WAY_OUT}")
        if dtype != STORED:
            continue
        if key != "weight" or len(shape) != 2:
            raise ValueError(f"{name} {list(shape)} is {STORED} and no weight of a linear layer: {WAY_OUT}")
        entries[layer] = _entry(layer, shape, _scheme_of(layer, schemes), tensors)
    if not entries:
        raise ValueError(f"config.json says {method!r}, but no weight in the files is {STORED}: {WAY_OUT}")
    return entries


def in_memory(layer: str, entry: LayerEntry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer as InferenceLinear holds them, by its own names.

    tensors   those of the file that are the layer's, by their full names: see `names_of`
    returns   weight_codes uint8 [N, K], the bytes of the weight, not copied; weight_scale fp32 on the block's grid;
              input_scale fp32 [1, 1], 0 where inputs take the scale of their own amax
    """
    codes = tensors[f"{layer}.weight"].view(torch.uint8)  # [N, K]
    rows, columns = codes.shape
    scale = _first(layer, WEIGHT_SCALES, tensors).to(torch.float32)
    if entry.weight_block == "1x128":  # the last rows of the grid stand for fewer than 128 rows of the weight
        scale = scale.reshape(-1, columns // EDGE)  # [ceil(N / 128) or N, K / 128]
        if scale.shape[0] != rows:
            scale = scale.repeat_interleave(EDGE, dim=0)[:rows]
    else:
        scale = scale.reshape(get_block(entry.weight_block).grid(rows, columns))
    if entry.input_scaling == "static":
        given = _first(layer, INPUT_SCALES, tensors).to(torch.float32).reshape(1, 1)
    else:
        given = torch.zeros(1, 1, dtype=torch.float32, device=codes.device)
    return {CODES: codes, SCALE: scale.contiguous(), INPUT_SCALE: given}


def names_of(layer: str, tensors: Mapping[str, Any]) -> list[str]:
    """The names in the files that belong to the codes of a layer; a bias is its own."""
    keys = ("weight", *WEIGHT_SCALES, *INPUT_SCALES)
    return [name for name in (f"{layer}.{key}" for key in keys) if name in tensors]


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is a scale of somebody's 8-bit cache, which no layer of ours reads."""
    return name.rpartition(".")[2] in CACHE_SCALES


def _entry(layer: str, shape: tuple[int, ...], scheme: Scheme, tensors: Mapping[str, TensorHeader]) -> LayerEntry:
    rows, columns = shape
    found = [key for key in WEIGHT_SCALES if f"{layer}.{key}" in tensors]
    if len(found) != 1:
        raise ValueError(f"{layer}.weight is {STORED} with {len(found)} of the scales {WEIGHT_SCALES}, it needs one")
    stored = tensors[f"{layer}.{found[0]}"].shape
    wanted: tuple[tuple[int, ...], ...]
    block = scheme.weight_block
    if block == "tensor":
        wanted = ((), (1,), (1, 1))
    elif block == "row":
        wanted = ((rows, 1), (rows,))
    elif block == "1x128":
        wanted = ((rows, -(-columns // EDGE)),)
    else:
        wanted = ((-(-rows // EDGE), -(-columns // EDGE)),)
        block = block if rows % EDGE == 0 else "1x128"
    if stored not in wanted:
        raise ValueError(
            f"{layer}.{found[0]} has shape {list(stored)}; scales of a {scheme.weight_block} of {list(shape)} have "
            f"{' or '.join(str(list(one)) for one in wanted)}"
        )
    if columns % EDGE and "128" in block + scheme.input_block:
        raise ValueError(
            f"{layer}.weight {list(shape)}: blocks of {EDGE} do not divide its {columns} inputs; write it with scales "
            "of channels, and inputs scaled by token"
        )
    given = [key for key in INPUT_SCALES if f"{layer}.{key}" in tensors]
    if scheme.input_scaling == "static":
        if len(given) != 1:
            raise ValueError(
                f"{layer}: its inputs are static, and {len(given)} of {INPUT_SCALES} are in the files, it needs one"
            )
        numbers = tensors[f"{layer}.{given[0]}"].shape
        if numbers not in ((), (1,), (1, 1)):
            raise ValueError(f"{layer}.{given[0]} has shape {list(numbers)}; a static input has one scale")
    return LayerEntry(
        weight_fmt=FMT,
        weight_block=block,
        input_fmt=FMT,
        input_block=scheme.input_block,
        input_scaling=scheme.input_scaling,
        input_target=get_format(FMT).max,
        power_of_two=False,
    )


def _fp8_scheme(settings: Mapping[str, Any]) -> Scheme:
    scheme, size = settings.get("activation_scheme"), settings.get("weight_block_size")
    if scheme not in ("static", "dynamic"):
        raise ValueError(f"quantization_config: activation_scheme is {scheme!r}, it is 'static' or 'dynamic'")
    if size is None:
        return Scheme("tensor", *(("tensor", "static") if scheme == "static" else ("row", "current")))
    if scheme == "static" or list(size) != [EDGE, EDGE]:
        raise ValueError(
            f"quantization_config: weight_block_size is {size} with activation_scheme {scheme!r}; blocks of weights "
            f"are {[EDGE, EDGE]}, with dynamic inputs"
        )
    return Scheme("128x128", "1x128", "current")


def _modelopt_scheme(settings: Mapping[str, Any]) -> Scheme:
    if settings.get("quant_algo") != "FP8":
        raise ValueError(f"quantization_config: quant_algo is {settings.get('quant_algo')!r}, read is 'FP8': {WAY_OUT}")
    return Scheme("tensor", "tensor", "static")


def _compressed_schemes(settings: Mapping[str, Any]) -> list[Scheme]:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError("quantization_config: config_groups says nothing; it tells how weights and inputs are scaled")
    schemes = []
    for name, group in groups.items():
        where = f"quantization_config: {name}"
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise ValueError(f"{where} says nothing of weights")
        if not isinstance(group.get("input_activations"), Mapping):
            raise ValueError(
                f"{where} rounds weights alone (input_activations is null), 8-bit layers round inputs, too: {WAY_OUT}"
            )
        weights, inputs = group["weights"], group["input_activations"]
        for what, part in (("weights", weights), ("input_activations", inputs)):
            if part.get("type") != "float" or part.get("num_bits") != 8 or part.get("symmetric") is False:
                raise ValueError(
                    f"{where}: {what} are {part.get('type')!r} of {part.get('num_bits')} bits, symmetric "
                    f"{part.get('symmetric')}; read are symmetric 8-bit floats: {WAY_OUT}"
                )
        block, scaling = _inputs(where, inputs)
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"{where}: targets is {targets!r}, it is a list of names")
        schemes.append(Scheme(_weights(where, weights), block, scaling, tuple(targets)))
    return schemes


def _weights(where: str, weights: Mapping[str, Any]) -> str:
    strategy, sides = weights.get("strategy"), weights.get("block_structure")
    if strategy in ("tensor", "channel") and not weights.get("dynamic"):
        return "tensor" if strategy == "tensor" else "row"
    if strategy == "block" and (sides == f"{EDGE}x{EDGE}" or (isinstance(sides, list) and sides == [EDGE, EDGE])):
        return "128x128"
    if strategy == "group" and weights.get("group_size") == EDGE:
        return "1x128"
    raise ValueError(
        f"{where}: weights have the strategy {strategy!r} (block_structure {sides}, group_size "
        f"{weights.get('group_size')}, dynamic {weights.get('dynamic')}): {WAY_OUT}"
    )


def _inputs(where: str, inputs: Mapping[str, Any]) -> tuple[str, str]:
    strategy, dynamic = inputs.get("strategy"), inputs.get("dynamic")
    if strategy == "tensor" and dynamic in (False, None):
        return "tensor", "static"
    if dynamic is True and strategy in ("token", "tensor"):
        return ("row" if strategy == "token" else "tensor"), "current"
    if dynamic is True and strategy == "group" and inputs.get("group_size") == EDGE:
        return "1x128", "current"
    raise ValueError(
        f"{where}: input_activations have the strategy {strategy!r}, dynamic {dynamic}, group_size "
        f"{inputs.get('group_size')}; read are static tensors, and dynamic tokens, tensors and groups of {EDGE}"
    )


def _scheme_of(layer: str, schemes: list[Scheme]) -> Scheme:
    """The group of a layer: the only one; else the one that names it, else the one for all linear layers."""
    if len(schemes) == 1:
        return schemes[0]
    named = [scheme for scheme in schemes if any(_names(target, layer) for target in scheme.targets)]
    found = named or [scheme for scheme in schemes if "Linear" in scheme.targets]
    if len(found) != 1:
        raise ValueError(f"{layer} stands in {len(found)} of the {len(schemes)} config_groups, it must in one")
    return found[0]


def _names(target: str, layer: str) -> bool:
    return matches(target, layer) or (not target.startswith(REGEX) and layer.endswith(f".{target}"))


def _first(layer: str, keys: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    return next(tensors[f"{layer}.{key}"] for key in keys if f"{layer}.{key}" in tensors)
