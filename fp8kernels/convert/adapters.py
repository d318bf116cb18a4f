"""Layers inside PEFT's wrappers: what they were called in the plain model, and which of them are adapters.

PEFT puts a wrapper where a layer was and the layer inside of it, beside small matrices of its own. A recipe speaks of
the model that the user wrote, so its patterns see names without the wrappers.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

REASON = "an adapter of PEFT, which stays in high precision unless an override of the recipe names it"


class Origin(NamedTuple):
    """Where a layer comes from.

    name    in the plain model; for an adapter, the name of the layer that it adapts, then the adapter's own
    adapts  of an adapter, the name of that layer
    """

    name: str
    adapts: str | None = None


def origin(model: nn.Module, name: str) -> Origin:
    """What a layer of a model is; any name is its own origin where no wrapper of PEFT stands above it."""
    peft = sys.modules.get("peft")  # a model can hold its wrappers only where it is imported
    if peft is None or not name:
        return Origin(name)
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kept: list[str] = []
    adapts = None
    module: Any = model
    parts = iter(name.split("."))
    for part in parts:
        parent, module = module, module._modules[part]
        if isinstance(parent, peft.PeftModel) and part != "base_model":
            adapts = ""  # a prompt's encoder, which adapts the whole model
        elif isinstance(parent, (peft.PeftModel, BaseTuner)):
            continue  # base_model.model
        if isinstance(parent, BaseTunerLayer):
            if part == "base_layer":
                continue
            if part in parent.adapter_layer_names:
                adapts = ".".join(kept)
        if isinstance(parent, ModulesToSaveWrapper):
            if part == "modules_to_save":
                module = module._modules[next(parts)]  # one trained copy for each adapter's name
            continue
        kept.append(part)
    return Origin(".".join(kept), adapts)
