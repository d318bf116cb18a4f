"""All 8-bit layers of a model in high precision for good: what a detector asks for that no single layer answers to."""

from __future__ import annotations

import torch
from torch import nn

from ..scaling.delayed import HELD
from .roots import layers
from .sharded import TOGETHER


@torch.no_grad()
def hold_high(model: nn.Module) -> int:
    """Let all 8-bit layers of a model compute in high precision for good; with several ranks, on each of them.

    It is part of the layers' state (`fp8_fallback`): a checkpoint has it, and a model that loads one computes so, too,
    whatever its alarms' policy. The layers still note what they see, so their scales stay up to date.

    returns  how many layers computed in 8 bits until now, or would have after their warm-up
    raises   ValueError where FSDP gathers a layer's weight as codes, so that there is none in high precision
    """
    found = layers(model)
    for layer in found:
        if TOGETHER in layer.__dict__:
            raise ValueError(
                f"layer {layer.fp8_name!r} cannot fall back: all_gather_codes sends its weight to other ranks as 8-bit "
                f"codes; take another policy"
            )
    changed = 0
    for layer in found:
        changed += not layer.fp8_high
        layer.fp8_fallback.copy_(torch.tensor([HELD, 0]))
        layer.fp8_sync_step()
    return changed
