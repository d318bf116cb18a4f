"""The slow loop: one commit per optimizer step, for the whole model at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from . import roots
from .kept import stepping
from .prepared import prepared
from .roots import group_of, layers, stepped_by, unwatch
from .state import ScaledLayer

AfterCommit = Callable[[list[ScaledLayer]], None]
after_commit: list[AfterCommit] = []  # called with the layers of a model once their scales stand

_hooked = False
_late: list[Optimizer] = []  # that stepped within a backward which is still running


def commit(model: nn.Module, *, group: Any = None) -> None:
    """Turn what was seen since the last commit into scales, in every layer of the model.

    Called by itself after `optimizer.step()` of an optimizer that holds parameters of the model; call it by hand
    where no torch optimizer steps. Committing twice in one step changes nothing. With torch.distributed running,
    amax is reduced (MAX) in one collective over the ranks of `group` that hold the same layers (default: of all ranks;
    nn/ranks.py finds them at the first commit).

    raises   ValueError if the model has no 8-bit layers, or if ranks disagree on what is 8-bit
    """
    found = layers(model)
    if not found:
        raise ValueError("commit: the model has no 8-bit layers; call fp8kernels.convert(model) first")
    commit_layers(found, model, group=group or group_of(model))


def commit_layers(found: list[ScaledLayer], owner: nn.Module | None = None, *, group: Any = None) -> None:
    """`commit` for the layers of a model."""
    if any(layer.fp8_scale.is_meta for layer in found):
        raise ValueError("commit: the model is on the meta device; give it storage with .to_empty(device=…) first")
    with torch.no_grad():
        ready = prepared(found)
        ready.share()
        ready.reduce(owner, group)
        ready.run()
    for listener in after_commit:
        listener(found)


def watch(model: nn.Module, group: Any = None) -> None:
    """Commit the model, and copies of it, after every optimizer step that updates one of their parameters."""
    global _hooked
    roots.watch(model, group)
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepping.add(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Commit what the optimizer holds parameters of; an optimizer that steps within a backward waits for its end."""
    stepping.discard(optimizer)
    if torch._C._current_graph_task_id() == -1:
        _commit_for(optimizer)
        return
    if not _late:
        torch.autograd.Variable._execution_engine.queue_callback(_after_backward)  # type: ignore[attr-defined]
    _late.append(optimizer)


def _after_backward() -> None:
    """Each optimizer in the backward holds a few parameters; the models that they belong to are committed once."""
    optimizers = tuple(_late)
    _late.clear()
    _commit_for(*optimizers)


def _commit_for(*optimizers: Optimizer) -> None:
    for owner, found in stepped_by(*optimizers):
        commit_layers(found, owner, group=group_of(owner))


__all__ = ["after_commit", "commit", "commit_layers", "layers", "unwatch", "watch"]
