"""Linear layers that transformers writes in classes of its own, as torch.nn.Linear: what can be 8-bit then is.

GPT-2 and its kin keep weights transposed, [in, out], in a class named Conv1D. Here they become Linear layers [out, in],
and stay what they were wherever they are saved or loaded: `state_dict()` has them as [in, out], `load_state_dict()`
takes them so, and a folder that save_pretrained writes is GPT-2's. Falcon's linear layer differs from torch's in
rounding between product and bias alone; it becomes torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SAME_WEIGHT = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def as_linears(model: nn.Module) -> list[str]:
    """Replace such layers in place; parameters of transposed ones are new, shared ones stay shared.

    returns  the names of the layers that were replaced
    """
    from transformers.pytorch_utils import Conv1D

    made: dict[int, nn.Linear] = {}
    replaced = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kind = type(module)
        if f"{kind.__module__}.{kind.__qualname__}" in SAME_WEIGHT:
            module.__class__ = nn.Linear
        elif kind is Conv1D:
            if id(module) not in made:
                made[id(module)] = _linear(module)
            model.set_submodule(name, made[id(module)])
        else:
            continue
        replaced.append(name)
    return replaced


def _linear(module: Any) -> nn.Linear:
    inputs, outputs = module.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta", dtype=module.weight.dtype)
    linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    linear.register_state_dict_post_hook(_transpose_saved)
    linear.register_load_state_dict_pre_hook(_transpose_loaded)
    return linear.train(module.training)


def _transpose_saved(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"].t()


def _transpose_loaded(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
    if f"{prefix}weight" in state:
        state[f"{prefix}weight"] = state[f"{prefix}weight"].t()
