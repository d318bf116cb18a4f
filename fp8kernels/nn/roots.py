"""Which models are watched: converted ones and their copies. An optimizer step commits those it holds parameters of."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from .state import ScaledLayer, copies

ROOT = "_fp8_root"  # the attribute of a watched model


class Root:
    """Stands in a watched model, travels with it through deepcopy and pickle, and has the copy watched too.

    group  the ranks that share scales, or None: they find each other (ranks.py); a pickle does not carry it
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        self.model, self.group = weakref.ref(model), group
        _roots[model] = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Root | None:
        model = self.model()
        copied = None if model is None else memo.get(id(model))  # copy makes the new model before its attributes
        return None if copied is None else Root(copied, self.group)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]


# in the order of their conversion, which is that of commits, and the same on every rank
_roots: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()


def watch(model: nn.Module, group: Any = None) -> None:
    """Commit the model after every optimizer step that updates one of its parameters."""
    if group is not None or getattr(model, ROOT, None) is None:
        model.__dict__[ROOT] = Root(model, group)


def unwatch(model: nn.Module) -> None:
    """Stop committing the model by itself."""
    model.__dict__.pop(ROOT, None)
    _roots.pop(model, None)


def group_of(model: nn.Module) -> Any:
    """The group that `convert` was given for this model."""
    root = model.__dict__.get(ROOT)
    return None if root is None else root.group


def layers(model: nn.Module) -> list[ScaledLayer]:
    """The 8-bit layers of a model, each once, in the order of `model.modules()`."""
    found: list[ScaledLayer] = []
    _walk(model, found, set())
    return found


def _walk(module: nn.Module, found: list[ScaledLayer], seen: set[int]) -> None:
    """named_modules makes a name for every module; a walk without them takes a quarter of the time."""
    seen.add(id(module))
    if isinstance(module, ScaledLayer):
        found.append(module)
    for child in module._modules.values():
        if child is not None and id(child) not in seen:
            _walk(child, found, seen)


def stepped_by(*optimizers: Optimizer) -> Iterator[tuple[nn.Module, list[ScaledLayer]]]:
    """The models that have a parameter in one of the optimizers, with their layers; each layer once."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    taken: set[int] = set()
    families: dict[int, list[ScaledLayer]] = {}
    for layer in list(copies):  # copies of a part of a model, which no root came along with
        families.setdefault(id(layer.fp8_family), []).append(layer)
    strays = [nn.ModuleList(family) for family in families.values()]
    for owner in [*list(_roots), *strays]:
        if not any(id(p) in held for p in owner.parameters()):
            continue
        found = [layer for layer in layers(owner) if id(layer) not in taken]
        taken.update(map(id, found))
        if found:
            yield owner, found
