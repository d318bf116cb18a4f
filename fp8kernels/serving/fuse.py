"""Serving layers that read one value become one product, wherever the model's own source shows that they do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..convert.source import Unreadable, parameter_uses, parameters_of
from ..nn.inference import InferenceLinear
from ..nn.inference_joined import JoinedLinear, join, why_not_joined


@dataclass(frozen=True)
class FusedLayers:
    """What became of the layers of one module that read one of its arguments.

    module  its name in the model
    layers  names of the layers in it, in the order in which they are called
    reason  why they stay apart, or "" where they are one product now
    """

    module: str
    layers: tuple[str, ...]
    reason: str = ""

    def __str__(self) -> str:
        what = f"{self.module or 'the model'}: {', '.join(self.layers)}"
        return f"{what} stay apart: {self.reason}" if self.reason else f"{what} are one product"


def fuse_for_serving(model: nn.Module) -> list[FusedLayers]:
    """Join InferenceLinears that read one value into one product, in place; results keep their bits.

    Which layers read one value is taken from the source of the forward around them: transformers' Llama, Qwen, Mistral,
    OLMo and their like hand one argument to q, k and v, and another to gate and up. Codes are moved, module by module,
    never decoded; the state of the model has the names and numbers that it had.

    returns  a line for every group that was found; one whose layers stay apart says why
    """
    counts = Counter(id(child) for module in model.modules() for child in module._modules.values())
    done: list[FusedLayers] = []
    for name, module in model.named_modules():
        children = {key for key, child in module._modules.items() if isinstance(child, InferenceLinear)}
        if len(children) < 2:
            continue
        try:
            arguments = parameters_of(module)
        except Unreadable as error:
            done.append(FusedLayers(name, tuple(sorted(children)), str(error)))
            continue
        for argument in arguments:
            try:
                found = [use.path for use in parameter_uses(module, argument)]
            except Unreadable:
                continue  # an argument that more than modules read, such as a mask
            layers = tuple(path for path in dict.fromkeys(found) if path in children)
            if len(layers) > 1:
                done.append(_join(name, module, layers, counts))
    return done


def _join(name: str, module: nn.Module, layers: tuple[str, ...], counts: Counter[int]) -> FusedLayers:
    parts = [module.get_submodule(layer) for layer in layers]
    assert all(isinstance(part, InferenceLinear) for part in parts)
    for layer, part in zip(layers, parts, strict=True):
        if isinstance(part, JoinedLinear) and part.joined.codes is not None:
            return FusedLayers(name, layers, f"{layer} is part of a product already")
        if counts[id(part)] > 1:
            return FusedLayers(name, layers, f"{layer} is called from several places")
        if part._forward_hooks or part._forward_pre_hooks:
            return FusedLayers(name, layers, f"{layer} has hooks, which may change what it reads")
    reason = why_not_joined(parts)  # type: ignore[arg-type]
    if reason is None:
        join(parts)  # type: ignore[arg-type]
    return FusedLayers(name, layers, reason or "")
