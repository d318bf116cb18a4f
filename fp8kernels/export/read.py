"""check and load_into: a folder that export wrote, back into a model. Nothing is unpickled, no code is run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..nn.inference import InferenceLinear
from .inference import check_scales, inference_layer
from .layout import (
    CODES,
    INPUT_SCALE,
    SCALE,
    WEIGHTS,
    LayerEntry,
    Manifest,
    check_entry,
    file_stamp,
    read_manifest,
)

AGAIN = "copy the folder again, or export the model again"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "uint8", "I64": "int64", "BOOL": "bool"}


def check(folder: str | Path) -> Manifest:
    """Read the manifest and hold every file and every tensor's name, dtype and shape against it; load no tensor.

    raises   FileNotFoundError if the folder is no checkpoint or a file is missing; ValueError naming the file or tensor
             that is truncated, changed, renamed or foreign
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    manifest = read_manifest(folder)
    if WEIGHTS not in manifest.files:
        raise ValueError(f"{folder}: the manifest does not list {WEIGHTS}; {AGAIN}")
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {AGAIN}")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}: truncated; {AGAIN}")
        if file_stamp(path)[1] != digest:
            raise ValueError(f"{path} is not what export wrote (its sha256 differs); {AGAIN}")
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no dict)
            found = {name: (_word(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); {AGAIN}") from None
    _compare(found, manifest.tensors, path, "the manifest")
    for name, entry in manifest.layers.items():
        _check_layer(name, entry, manifest, folder)
    return manifest


def load_into(model: nn.Module, folder: str | Path) -> nn.Module:
    """Make a plain model serve the checkpoint: its converted layers become InferenceLinear, in place; returns it.

    Every tensor is held against the manifest and the model before anything in the model changes.

    raises   as `check`; ValueError naming the layer or tensor that the model lacks, or has in another shape
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    manifest = check(folder)
    _compare(_expected(model, manifest), manifest.tensors, folder / WEIGHTS, "the model", shapes_only=True)
    tensors = load_file(folder / WEIGHTS)
    for name, entry in manifest.layers.items():
        scales = tensors[f"{name}.{SCALE}"], tensors[f"{name}.{INPUT_SCALE}"]
        check_scales(name, entry, *scales, where=f"{folder / WEIGHTS}: ")
    for name, entry in manifest.layers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)  # _expected has seen to it
        _replace(model, name, _inference_layer(linear, entry))
    tensors.update({name: tensors[source] for name, source in manifest.tied.items()})
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _expected(model: nn.Module, manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that the model needs from the file, with the dtype words of the manifest."""
    expected = {name: ("", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    for name, entry in manifest.layers.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the checkpoint has a layer {name!r}, the model lacks it: take the model it was made of"
            ) from None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"layer {name!r} is a Linear in the checkpoint and a {type(linear).__name__} in the model")
        del expected[f"{name}.weight"]
        for key, value in _inference_layer(linear, entry, device="meta").state_dict().items():
            expected[f"{name}.{key}"] = ("", tuple(value.shape))
    for name, source in manifest.tied.items():
        if expected.pop(name, None) is None or source not in expected:
            raise ValueError(f"the checkpoint shares {source!r} as {name!r}, the model has no such pair of tensors")
    return expected


def _compare(found: dict, wanted: dict, path: Path, by: str, *, shapes_only: bool = False) -> None:
    """raises ValueError for the first name, dtype or shape that differs; `found` is the file, or what a model needs."""
    missing, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if shapes_only:  # the model's side: what it does not know is foreign to it, what it wants and lacks is missing
        missing, foreign = foreign, missing
    if missing:
        raise ValueError(f"{path}: tensor {missing[0]!r} is missing, {by} names it ({len(missing)} missing); {AGAIN}")
    if foreign:
        raise ValueError(f"{path}: tensor {foreign[0]!r} is unknown to {by} ({len(foreign)} unknown); {AGAIN}")
    for name, (dtype, shape) in wanted.items():
        if found[name][1] != shape:
            raise ValueError(f"{path}: tensor {name!r} has shape {shape}, {by} says {found[name][1]}; {AGAIN}")
        if not shapes_only and found[name][0] != dtype:
            raise ValueError(f"{path}: tensor {name!r} is {found[name][0]}, {by} says {dtype}; {AGAIN}")


def _check_layer(name: str, entry: LayerEntry, manifest: Manifest, folder: Path) -> None:
    """raises ValueError unless the layer's entry is sound and its tensors have the dtypes of the layout."""
    try:
        check_entry(entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: the manifest's entry of layer {name!r} is damaged ({error}); {AGAIN}") from None
    for key, dtype in ((CODES, "uint8"), (SCALE, "float32"), (INPUT_SCALE, "float32")):
        found = manifest.tensors.get(f"{name}.{key}")
        if found is None or found[0] != dtype:
            raise ValueError(f"{folder / WEIGHTS}: it needs {name}.{key} as {dtype}, it holds {found}; {AGAIN}")


def _inference_layer(linear: nn.Linear, entry: LayerEntry, device: torch.device | str | None = None) -> InferenceLinear:
    return inference_layer(
        linear.in_features, linear.out_features, bias=linear.bias is not None, entry=entry, device=device
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _word(dtype: str) -> str:
    """torch's word for a safetensors dtype."""
    return DTYPES.get(dtype, dtype.lower())
