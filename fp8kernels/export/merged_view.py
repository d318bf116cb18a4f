"""A model with LoRA as its merged self, without a copy: each weight is made when it is read, and not kept."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Linear
from ..nn.dtensor import is_dtensor

TUNER = "fp8_tuner"  # attribute of a layer of a view: (the wrapper of PEFT, the adapter's name)


class _Merged(Linear):
    """A Linear whose weight is the one below its wrapper plus what the adapter adds, as safe_merge makes it."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        tuner, adapter = self.__dict__[TUNER]
        held = self._parameters["weight"]
        assert held is not None
        with torch.no_grad():
            return held.detach().clone().add_(tuner.get_delta_weight(adapter).to(held.dtype))


def merged_view(model: nn.Module) -> nn.Module | None:
    """The plain model below a PeftModel as if its adapters were merged; None where that takes a copy.

    It shares all weights with the model. Views are made of LoRA with one active adapter on 8-bit Linear layers; DoRA,
    biases of adapters, weights that are merged already and other tuners take a copy (adapters.py).
    """
    peft: Any = sys.modules.get("peft")  # a model can hold its wrappers only where it is imported
    if peft is None or not isinstance(model, peft.PeftModel):
        return None
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    below: nn.Module = model.get_base_model()
    tuners = {name: module for name, module in below.named_modules() if isinstance(module, BaseTunerLayer)}
    if any(isinstance(module, ModulesToSaveWrapper) for module in below.modules()):
        return None
    if not tuners or not all(type(tuner) is LoraLinear and _is_plain(tuner) for tuner in tuners.values()):
        return None
    shared: dict[int, Any] = {id(tensor): _alias(tensor) for tensor in [*below.parameters(), *below.buffers()]}
    view = copy.deepcopy(below, shared)
    for name, tuner in tuners.items():
        parent, _, last = name.rpartition(".")
        layer = view.get_submodule(f"{name}.base_layer")
        layer.__class__ = _Merged
        layer.__dict__[TUNER] = (tuner, tuner.active_adapters[0])
        setattr(view.get_submodule(parent), last, layer)
    return view


def is_merged_in_view(layer: nn.Module) -> bool:
    """Whether a layer is one of a view that has an adapter."""
    return TUNER in layer.__dict__


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor on the same storage, so that what happens to one as an object does not happen to the other."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach()


def _is_plain(tuner: Any) -> bool:
    adapters = tuner.active_adapters
    if not isinstance(tuner.base_layer, Linear) or len(adapters) != 1 or tuner.merged or tuner.disable_adapters:
        return False
    if any(is_dtensor(parameter) for parameter in tuner.parameters()):
        return False
    name = adapters[0]
    if name not in tuner.lora_A or getattr(tuner, "fan_in_fan_out", False):
        return False
    return name not in getattr(tuner, "lora_variant", {}) and not getattr(tuner, "lora_bias", {}).get(name, False)
