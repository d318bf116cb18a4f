"""Scales of an 8-bit cache from sample text, so that every prompt is coded alike.

Needs transformers (the extra 'fp8kernels[serve]').
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..formats import Format, get_format
from ..scaling.rules import scale_from_amax
from .code_store import aim


def calibrate_cache(
    model: Any, batches: Iterable[Tensor], fmt: Format | str = "hif8"
) -> dict[int, tuple[Tensor, Tensor]]:
    """The scales of keys and values, fp32 [KH] each, of every layer of full attention, from their amax in the batches.

    model    a decoder of transformers, in eval mode or not; it is run as it is, without gradients
    batches  token ids int64 [B, T] without padding
    returns  what `use_eight_bit_cache(model, fmt, scales=…)`, `kv_cache_entry(fmt, …)` and `scales_by_module` take. A
             head that is all zeros has the scale 1

    Numbers of other text may be larger: up to 2,184 times with HiF8 and twice with E4M3 they fit, and beyond that the
    cache codes that head anew.

    raises   ValueError if there is no batch, or a key or value is NaN or Inf; the message names the layer
    """
    fmt = get_format(fmt)
    found: dict[int, list[Tensor]] = {}
    device = next(model.parameters()).device
    for ids in batches:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids.to(device), past_key_values=cache, use_cache=True)
        for i, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
                continue
            amax = [x.abs().amax((0, 2, 3)).float() for x in (layer.keys, layer.values)]  # [KH]
            if not all(bool(x.isfinite().all()) for x in amax):
                raise ValueError(f"layer {i} has keys or values that are NaN or Inf; the model cannot be calibrated")
            found[i] = amax if i not in found else [a.maximum(b) for a, b in zip(found[i], amax, strict=True)]
    if not found:
        raise ValueError("no batch of tokens was given, or no layer has full attention: there is nothing to calibrate")
    target = aim(fmt)
    return {i: (scale_from_amax(k, target).cpu(), scale_from_amax(v, target).cpu()) for i, (k, v) in found.items()}


def scales_by_module(model: nn.Module, scales: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, tuple[float, float]]:
    """One scale for all heads by the name of an attention module: what `export(…, cache_scales=…)` takes.

    model    the one that was calibrated; its attention modules are those with a `layer_idx`, `k_proj` and `v_proj`
    scales   of `calibrate_cache(model, batches, "e4m3")`; the largest scale of a layer's heads fits them all
    raises   ValueError if a layer has no such module
    """
    names = {
        module.layer_idx: name
        for name, module in model.named_modules()
        if all(hasattr(module, each) for each in ("layer_idx", "k_proj", "v_proj"))
    }
    lacking = sorted(set(scales) - set(names))
    if lacking:
        raise ValueError(f"layers {lacking} have no attention module with layer_idx, k_proj and v_proj")
    return {names[i]: (float(k.max()), float(v.max())) for i, (k, v) in scales.items()}
