"""The slow loop: one commit per optimizer step, for the whole model at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..kernels.commit import ScaleRule
from ..ops import commit_states
from .producer import share
from .state import ScaledLayer, copies

AfterCommit = Callable[[list[ScaledLayer]], None]
after_commit: list[AfterCommit] = []  # called with the layers of a model once their scales stand

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_hooked = False


def layers(model: nn.Module) -> list[ScaledLayer]:
    """The 8-bit layers of a model, each once."""
    return [module for module in model.modules() if isinstance(module, ScaledLayer)]


def commit(model: nn.Module, *, group: Any = None) -> None:
    """Turn what was seen since the last commit into scales, in every layer of the model.

    Called by itself after `optimizer.step()` of an optimizer that holds parameters of the model; call it by hand
    where no torch optimizer steps. Committing twice in one step changes nothing. With torch.distributed running,
    amax is reduced (MAX) over `group` (default: all ranks) in one collective.

    raises   ValueError if the model has no 8-bit layers
    """
    found = layers(model)
    if not found:
        raise ValueError("commit: the model has no 8-bit layers; call fp8kernels.convert(model) first")
    commit_layers(found, group=group)


def commit_layers(found: list[ScaledLayer], *, group: Any = None) -> None:
    """`commit` for a list of layers."""
    if any(layer.fp8_scale.device.type == "meta" for layer in found):
        raise ValueError("commit: the model is on the meta device; give it storage with .to_empty(device=…) first")
    with torch.no_grad():
        share(found)
        for layer in found:
            layer.fp8_hold_static()
        _reduce(found, group)
        _count_step(found)
        for rule, members in _by_rule(found).items():
            commit_states([layer.fp8_state() for layer in members], rule)
    for listener in after_commit:
        listener(found)


def watch(model: nn.Module) -> None:
    """Commit the model after every optimizer step that updates one of its parameters."""
    global _hooked
    _models.add(model)
    if not _hooked:
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


def unwatch(model: nn.Module) -> None:
    """Stop committing the model by itself."""
    _models.discard(model)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Commit the models, and the copies of models, that have a parameter in this optimizer."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    families: dict[int, list[ScaledLayer]] = {}
    for layer in list(copies):
        families.setdefault(id(layer.fp8_family), []).append(layer)
    for owner, found in [(m, layers(m)) for m in list(_models)] + [(nn.ModuleList(f), f) for f in families.values()]:
        if found and any(id(p) in stepped for p in owner.parameters()):
            commit_layers(found)


def _reduce(found: list[ScaledLayer], group: Any) -> None:
    """MAX over the ranks, in one collective of one flat tensor."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1):
        return
    flat = torch.cat([layer.fp8_pending for layer in found])
    distributed.all_reduce(flat, distributed.ReduceOp.MAX, group=group)
    torch._foreach_copy_([layer.fp8_pending for layer in found], list(flat.split(found[0].fp8_pending.numel())))


def _count_step(found: list[ScaledLayer]) -> None:
    """One more step where anything was seen; warm-up ends by it."""
    seen = torch.stack([layer.fp8_pending.amax() for layer in found]).amax() > 0
    # a list, as one tensor for all would be read as a Python number
    torch._foreach_add_([layer.fp8_step for layer in found], [seen.to(torch.int64)] * len(found))
    for layer in found:
        if not layer.fp8_warm:
            layer.fp8_sync_step()


def _by_rule(found: list[ScaledLayer]) -> dict[ScaleRule, list[ScaledLayer]]:
    """Layers that one fused update can serve; margin is part of each layer's target."""
    groups: dict[ScaleRule, list[ScaledLayer]] = {}
    for layer in found:
        rule = ScaleRule(layer.fp8_recipe.algorithm, 0, layer.fp8_recipe.power_of_two)
        groups.setdefault(rule, []).append(layer)
    return groups
