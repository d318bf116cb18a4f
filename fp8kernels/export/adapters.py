"""Models with adapters of PEFT still on them: what is exported is the merged model, and the user's stays as it is."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

MERGE = "call model = model.merge_and_unload() and export that"


def merged(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model without adapters: itself where it has none, else a copy with their weights added to its layers'.

    returns  (model, notes for the report)
    raises   ValueError, with the way out, if its adapters cannot be merged
    """
    peft: Any = sys.modules.get("peft")  # a model can hold its wrappers only where it is imported
    if peft is None:
        return model, []
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not isinstance(model, peft.PeftModel):
        if wrapped:
            raise ValueError(
                f"export: {wrapped[0]!r} and {len(wrapped) - 1} other layers hold adapters of PEFT, and the model is "
                f"no PeftModel that could merge them; export the PeftModel around it, or merge first: {MERGE}"
            )
        return model, []
    name = model.active_adapter
    kind = type(model.peft_config[name]).__name__ if isinstance(name, str) and name in model.peft_config else "adapter"
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"export: a {kind} cannot be merged into the weights; export the model without it (model.get_base_model())"
        )
    try:
        plain = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise ValueError(f"export: the {kind} {name!r} does not merge ({error}); {MERGE}") from error
    if any(isinstance(module, BaseTunerLayer) for module in plain.modules()):
        raise ValueError(f"export: the {kind} {name!r} stays on the model after merging; {MERGE}")
    return plain, [f"adapter {name!r} was merged into the weights of a copy; input scales are those of training"]
