"""Folders with 8-bit weights, of every layout, to a model that holds their codes: nothing is decoded.

In order, cheap checks first: the headers of the files; what config.json says of the layers; a rehearsal without
storage, in which transformers decides what is missing, left over or of another shape; then the bytes, tensor by tensor,
each read into memory of its own, so that the process grows by the size of the files and keeps no file open.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export import Manifest
from ..export.config import QUANT_METHOD, entries, quantization_config
from ..export.foreign import foreign_entries, in_memory, is_cache_scale, names_of
from ..export.layout import LayerEntry
from ..headers import AGAIN, TensorHeader, read_headers
from ..models.causal_lm import rehearse

ALIGNMENT = 64  # bytes; products are slower over weights that do not begin where a cache line does
TORCH = {  # dtypes by the names of the safetensors format; what is not here is no tensor of a language model
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_eight_bit(
    folder: Path, config: Any, model_class: Any, settings: Mapping[str, Any], manifest: Manifest | None
) -> Any:
    """A model of transformers whose 8-bit layers are InferenceLinear.

    folder     with safetensors files, in one or in shards
    config     transformers' own, of that folder
    settings   `quantization_config` of its config.json; not looked at where there is a manifest, which says the same
    raises     ValueError naming the layer, tensor or file that is missing, left over, or that no layer can read
    """
    from ..integrations.hugging_face import Fp8KernelsConfig

    headers = read_headers(folder)
    foreign = manifest is None and settings.get("quant_method") != QUANT_METHOD
    layers = _layers(folder, settings, manifest, headers)
    config.quantization_config = Fp8KernelsConfig(**quantization_config(layers)).to_dict()
    dtype = getattr(torch, manifest.dtype) if manifest is not None else config.dtype or torch.bfloat16
    wanted = {name for name in headers if not (foreign and is_cache_scale(name))}
    meta = {name: torch.empty(headers[name].shape, dtype=_dtype(headers[name], name), device="meta") for name in wanted}
    rehearse(folder, model_class, config, _as_held(meta, layers, foreign=foreign), dtype=dtype)
    with ExitStack() as files:
        state = _as_held(_read(headers, wanted, files), layers, foreign=foreign)
    try:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except ValueError as error:  # scales that decode nothing
        raise ValueError(f"{folder}: {error}") from None
    assert not report["missing_keys"], "the rehearsal has seen to it"
    return model


def _layers(
    folder: Path, settings: Mapping[str, Any], manifest: Manifest | None, headers: Mapping[str, TensorHeader]
) -> dict[str, LayerEntry]:
    if manifest is not None:
        return manifest.layers
    try:
        if settings.get("quant_method") == QUANT_METHOD:
            return entries(dict(settings))
        return foreign_entries(settings, headers)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _as_held(tensors: dict[str, Tensor], layers: Mapping[str, LayerEntry], *, foreign: bool) -> dict[str, Tensor]:
    """The tensors of the files under the names and in the shapes in which InferenceLinear holds them."""
    if not foreign:
        return tensors
    held = dict(tensors)
    for layer, entry in layers.items():
        own = {name: held.pop(name) for name in names_of(layer, tensors)}
        held |= {f"{layer}.{key}": tensor for key, tensor in in_memory(layer, entry, own).items()}
    return held


def _read(headers: Mapping[str, TensorHeader], wanted: set[str], files: ExitStack) -> dict[str, Tensor]:
    from safetensors import safe_open

    opened: dict[Path, Any] = {}
    tensors = {}
    for name, header in headers.items():
        if name not in wanted:
            continue
        if header.file not in opened:  # pread: each tensor gets memory of its own, and the file no mapping
            opened[header.file] = files.enter_context(safe_open(header.file, framework="pt", backend="pread"))
        read = opened[header.file].get_tensor(name)
        tensors[name] = read if read.data_ptr() % ALIGNMENT == 0 else read.clone()
    return tensors


def _dtype(header: TensorHeader, name: str) -> torch.dtype:
    if header.dtype not in TORCH:
        raise ValueError(f"{header.file}: {name} is {header.dtype}, known are {', '.join(TORCH)}; {AGAIN}")
    return TORCH[header.dtype]
