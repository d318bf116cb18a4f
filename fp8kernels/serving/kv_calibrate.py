"""Scales of an 8-bit cache from sample text, so that every prompt is coded alike.

Needs transformers (the extra 'fp8kernels[serve]').
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
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
    returns  what `use_eight_bit_cache(model, fmt, scales=…)` and `export.kv_cache.kv_cache_entry(fmt, …)` take. A head
             that is all zeros has the scale 1

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
