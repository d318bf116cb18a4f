"""Tensors under the names and in the order that a checkpoint of the model has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .requantize import bf16_exact
from .stored import EMBEDDING


def checkpoint_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that transformers saves under, which differ from the model's own for some architectures.

    raises   ValueError if saving also joins or splits tensors that are 8-bit here
    """
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return tensors
    if not isinstance(model, PreTrainedModel):
        return tensors
    codes = sum(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values())
    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    kept = sum(tensor.dtype == torch.float8_e4m3fn for tensor in saved.values())
    if kept != codes:
        raise ValueError(
            f"export: transformers joins or splits weights of {type(model).__name__} as it saves them ({codes} 8-bit "
            f"ones became {kept}); convert with an override that leaves those as they are, or take format='native'"
        )
    return {name: own(tensor) for name, tensor in saved.items()}


def checkpoint_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What layers are called in a checkpoint; their names in the model where saving joins or splits them."""
    names = list(names)
    numbered = {f"{name}.weight": torch.tensor([float(number)]) for number, name in enumerate(names)}
    saved = {int(tensor[0]): name.removesuffix(".weight") for name, tensor in checkpoint_names(model, numbered).items()}
    return [saved[number] for number in range(len(names))] if len(saved) == len(names) else names


def matrices(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names, in a checkpoint, of what servers make linear layers of and that is not 8-bit: experts and routers, too.

    transformers holds the experts of a layer in one tensor, and a router in a module of its own
    """
    modules = dict(model.named_modules())
    found = []
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        high = key == "weight" and tensor.ndim == 2 and tensor.dtype in (torch.bfloat16, torch.float32)
        if high and not isinstance(modules.get(layer), nn.Embedding) and not EMBEDDING.search(layer):
            found.append(layer)
    return found


def in_order(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one module stand together, in the model's order: a shard then holds whole layers."""
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    last = len(order)
    return dict(sorted(tensors.items(), key=lambda item: order.get(item[0].rpartition(".")[0], last)))


def cache_tensors(model: nn.Module, scales: Mapping[str, tuple[float, float]]) -> dict[str, Tensor]:
    """k_scale and v_scale, fp32 (1,) and exact in bf16, of attention modules.

    raises   ValueError naming a module that the model lacks, or a scale that is not positive and finite
    """
    modules: dict[str, Any] = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for name, pair in scales.items():
        if name not in modules:
            raise ValueError(f"export: cache_scales names {name!r}, which the model does not have")
        for key, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            if not 0 < scale < float("inf"):
                raise ValueError(f"export: {key} of {name!r} is {scale}; a scale is positive and finite")
            found[f"{name}.{key}"] = bf16_exact(torch.tensor([scale], dtype=torch.float32))
    return found


def own(tensor: Tensor) -> Tensor:
    """The tensor with a storage of its own: a file does not take two views of one storage."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
