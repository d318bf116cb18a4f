"""Which modules hand codes to the 8-bit layers behind them: norms before linear layers, activations inside MLPs.

A block is recognised by what its forward does, not by its name: transformers' Llama, Qwen and Mistral layers, its
vision transformers and timm's blocks all say "these linear layers, and nothing else, read the result of this norm".
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .. import nn as scaled
from ..nn.mlp import Chain, FusedGatedMLP, FusedMLP, Gated
from ..nn.norm import FusedNorm
from ..nn.producer import Place, Producer, fused_class
from ..nn.state import ScaledLayer
from ..recipe import Recipe
from .source import Unreadable, chain, global_of, readers, text_of

FUSED = "already fused"

# What a forward says, its argument called x. RMSNorm as transformers writes it, in every model anew:
RMS_NORM = """input_dtype = x.dtype
x = x.to(torch.float32)
variance = x.pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * x.to(input_dtype)"""
# a subclass of LayerNorm that calls the function itself, and has a switch to a faster one, as timm's
_CALL = r"layer_norm\(x, self\.normalized_shape, self\.weight, self\.bias, self\.eps\)"
LAYER_NORM = re.compile(
    rf"(if self\._fast_norm:\n    (x =|return) fast_{_CALL}\n(else:\n    )?)?"
    rf"(return F\.{_CALL}|x = F\.{_CALL}\nreturn x)"
)
# the MLP of Llama and its relatives
GATED_MLP = re.compile(
    r"(?:return|(?P<out>\w+) =) self\.(?P<down>\w+)\(self\.(?P<act>\w+)\(self\.(?P<gate>\w+)\(x\)\) \* "
    r"self\.(?P<up>\w+)\(x\)\)(?(out)\nreturn (?P=out))"
)


@dataclass(frozen=True)
class Fusion:
    """What becomes of one norm or MLP: the layers it makes codes for, or the reason why it does not."""

    name: str
    module: nn.Module
    mixin: type[Producer]
    places: tuple[Place, ...] = ()
    parts: Chain | Gated | None = None
    reason: str | None = None


def plan_fusion(model: nn.Module) -> list[Fusion]:
    """A decision for every norm and MLP that stands before or around 8-bit linear layers of a converted model."""
    counts = Counter(id(child) for module in model.modules() for child in module._modules.values())
    out: list[Fusion] = []
    taken: set[int] = set()  # layers whose input somebody makes already
    for found in _candidates(model):
        reason = found.reason or _why_not(found, counts, taken)
        if reason is None:
            taken.update(id(getattr(place.parent, place.name)) for place in found.places)
            out.append(found)
        else:
            out.append(Fusion(found.name, found.module, found.mixin, reason=reason))
    return out


def fuse(fusions: Sequence[Fusion]) -> None:
    """Carry the decisions out, in place."""
    for fusion in fusions:
        if fusion.reason is None:
            module = fusion.module
            module.__class__ = fused_class(fusion.mixin, type(module))
            assert isinstance(module, Producer)
            module.join(fusion.places, fusion.parts)


def _candidates(model: nn.Module) -> Iterator[Fusion]:
    for name, module in model.named_modules():
        if isinstance(module, Producer):
            yield Fusion(name, module, FusedNorm, reason=FUSED)
        elif (mlp := _mlp(name, module)) is not None:
            yield mlp
        for child_name, child in module.named_children():
            if not isinstance(child, Producer) and is_norm(child):
                yield _norm(f"{name}.{child_name}" if name else child_name, child, module, child_name)


def _norm(name: str, norm: nn.Module, block: nn.Module, origin: str) -> Fusion:
    try:
        places = _distinct(readers(block, origin))
    except Unreadable as error:
        return Fusion(name, norm, FusedNorm, reason=str(error))
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and len(norm.normalized_shape) != 1:
        return Fusion(name, norm, FusedNorm, reason=f"it normalises over {len(norm.normalized_shape)} dimensions")
    return Fusion(name, norm, FusedNorm, places, reason=None if places else "nothing reads its result")


def _mlp(name: str, module: nn.Module) -> Fusion | None:
    """The decision for an MLP of a known kind; None for everything else."""
    if len(module._modules) < 3 or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None
    gated = GATED_MLP.fullmatch(text_of(module))
    if gated is not None:
        act, last = gated["act"], gated["down"]
        parts: Chain | Gated = Gated("", gated["gate"], gated["up"], gated["down"], act)
    else:
        names = chain(module)
        linear = [n for n, part in enumerate(names) if isinstance(getattr(module, part), nn.Linear)]
        if len(linear) != 2 or linear[1] - linear[0] < 2:
            return None
        act, last = names[linear[0] + 1], names[linear[1]]
        between = names[linear[0] + 2 : linear[1]]
        for part in between:
            if not isinstance(getattr(module, part), (nn.Identity, nn.Dropout)):
                return Fusion(name, module, FusedMLP, reason=f"{part} stands between {act} and {last}")
        parts = Chain("", tuple(names[: linear[0] + 1]), tuple(between), tuple(names[linear[1] :]))
    mixin = FusedGatedMLP if isinstance(parts, Gated) else FusedMLP
    activation = activation_of(getattr(module, act))
    if activation is None:
        return Fusion(name, module, mixin, reason=f"no kernel computes {type(getattr(module, act)).__name__}")
    return Fusion(name, module, mixin, (Place(module, last),), parts._replace(activation=activation))


def _why_not(found: Fusion, counts: Counter[int], taken: set[int]) -> str | None:
    """Why the layers that read a result cannot share its codes, in words, or None."""
    layers = [getattr(place.parent, place.name) for place in found.places]
    if counts[id(found.module)] > 1:
        return "it is called from several places"
    for place, layer in zip(found.places, layers, strict=True):
        if not isinstance(layer, ScaledLayer):
            return f"{place.name} is not converted"
        if type(layer) is not scaled.Linear:
            return f"{place.name} is a {type(layer).__name__}, which quantizes for itself"
        if layer.fp8_recipe.input.clamp:
            return f"{place.name} clamps its input before it is rounded"
        if counts[id(layer)] > 1 or id(layer) in taken:
            return f"{place.name} is called from several places"
        if _input_rules(layer.fp8_recipe) != _input_rules(layers[0].fp8_recipe):
            return f"{found.places[0].name} and {place.name} have different recipes for their input"
    return None


def _input_rules(recipe: Recipe) -> tuple[object, ...]:
    """All that decides what the state of an input becomes."""
    return (
        recipe.input, recipe.algorithm, recipe.window, recipe.margin, recipe.power_of_two, recipe.warmup_steps,
        recipe.interval,
    )  # fmt: skip


def _distinct(places: list[Place]) -> tuple[Place, ...]:
    return tuple(dict.fromkeys(places))


def is_norm(module: nn.Module) -> bool:
    """torch's LayerNorm and RMSNorm, and by what their forward does transformers' RMSNorm and timm's LayerNorm."""
    if module._modules or isinstance(module, ScaledLayer) or "forward" in module.__dict__:
        return False
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        return True
    if isinstance(module, nn.LayerNorm):
        is_plain = not getattr(module, "_fast_norm", False) and global_of(module, "F") is F
        return is_plain and LAYER_NORM.fullmatch(text_of(module)) is not None
    if set(module._parameters) != {"weight"} or global_of(module, "torch") is not torch:
        return False
    return text_of(module) == RMS_NORM


def activation_of(module: nn.Module) -> str | None:
    """The name of the activation that a module computes, or None if no kernel knows it."""
    if "forward" in module.__dict__:
        return None
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if type(module) in (nn.SiLU, nn.ReLU):
        return type(module).__name__.lower()
    if type(module).__module__ != "transformers.activations":
        return None
    act = getattr(module, "act", None)  # GELU of transformers is a function, or another one written out in Python
    if type(module).__name__ == "GELUActivation" and act is F.gelu:
        return "gelu"
    if type(module).__name__ == "GELUTanh" and isinstance(act, functools.partial) and act.func is F.gelu:
        return "gelu_tanh"
    return {"SiLUActivation": "silu", "NewGELUActivation": "gelu_tanh"}.get(type(module).__name__)
