"""The files around the codes: config, generation settings, tokenizer, and safetensors in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..headers import CONFIG, INDEX, WEIGHTS
from .config import KEY
from .layout import MANIFEST

PRODUCER = "fp8kernels"


def save_parts(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files, of what the model has of them."""
    for part in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
        if part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)


def write_config(
    folder: Path, model: nn.Module, settings: Mapping[str, Any], *, dtype: str, tied: Mapping[str, str]
) -> bool:
    """Put into a folder's config.json what servers go by; where there is none, make one of that alone.

    settings  `quantization_config`
    dtype     of what is not 8-bit, torch's word: "bfloat16"
    tied      names that share another's tensor; whether the output head does is `tie_word_embeddings`
    returns   whether the model had a config of its own
    """
    path = folder / CONFIG
    known = path.is_file()
    config = json.loads(path.read_text(encoding="utf-8")) if known else {}
    config[KEY] = dict(settings)
    config["dtype"] = dtype
    if known and not config.get("architectures"):
        config["architectures"] = [type(model).__name__]
    head = _head(model)
    if head is not None and "tie_word_embeddings" in config:
        config["tie_word_embeddings"] = f"{head}.weight" in tied
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return known


def save_shards(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    """model.safetensors, or shards and their index, as transformers names them.

    max_shard_size  bytes, or text like "5GB"
    raises          ValueError for a size that is none; OSError as the disk gives it
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(
            f"export: max_shard_size={max_shard_size!r} is not a size ({error}); give bytes or '5GB'"
        ) from None
    metadata = {"format": "pt", "producer": producer()}
    try:
        for name, keys in split.filename_to_tensors.items():
            save_file({key: tensors[key] for key in keys}, folder / name, metadata=metadata)
    except SafetensorError as error:  # the library's word for a disk that is full, too
        raise OSError(f"the weights could not be written beside {folder.parent}: {error}") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def producer() -> str:
    """What the header of our safetensors files names as their maker."""
    try:
        return f"{PRODUCER} {version(PRODUCER)}"
    except PackageNotFoundError:  # run from a source tree that was never installed
        return PRODUCER


def is_ours(folder: Path) -> bool:
    """Whether export wrote the folder, which it then may replace."""
    if (folder / MANIFEST).is_file():
        return True
    from safetensors import SafetensorError, safe_open

    found = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    if not found:
        return False
    try:
        with safe_open(found[0], framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return str(metadata.get("producer", "")).split(" ")[0] == PRODUCER


def _head(model: nn.Module) -> str | None:
    """The name of the output embedding, where the model says which it is."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None
