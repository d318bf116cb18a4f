"""The blocks of a model, as in `model.layers.N`, of which a recipe may leave the first and the last ones alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..nn.producer import Producer
from ..nn.state import ScaledLayer

ORIGINAL = "_fp8_original"  # the class a converted layer had


def high_precision_blocks(model: nn.Module, first: int, last: int) -> dict[str, str]:
    """Why layers stay as they are, by the prefix of their names: those of the first and of the last blocks.

    The blocks are the longest ModuleList (or Sequential) of modules of one class; lists inside of a block, as of the
    experts of a layer, are no blocks of the model.

    raises   ValueError if none would be left, or there are no blocks, or two lists are the longest
    """
    if not first and not last:
        return {}
    asked = f"high_precision_blocks=({first}, {last})"
    found = list(_lists(model, ""))
    if not found:
        raise ValueError(
            f"{asked}: {type(model).__name__} has no blocks, that is, no ModuleList of modules of one class; give the "
            f"whole model, or take recipe.replace(high_precision_blocks=(0, 0)) and overrides by name"
        )
    count = max(len(blocks) for _, blocks in found)
    name, blocks = next(each for each in found if len(each[1]) == count)
    others = [f"{other!r}" for other, each in found if len(each) == count]
    if len(others) > 1:
        raise ValueError(
            f"{asked}: {type(model).__name__} has several lists of {count} blocks, {', '.join(others)}: which are "
            f"meant is not clear; take recipe.replace(high_precision_blocks=(0, 0)) and overrides by name"
        )
    if first + last >= count:
        raise ValueError(
            f"{asked}: {name!r} of {type(model).__name__} has {count} blocks, so that no block would be 8-bit; "
            f"recipe.replace(high_precision_blocks=…) takes fewer"
        )
    names = [f"{name}.{child}." if name else f"{child}." for child in blocks._modules]
    reasons = {prefix: _which("first", first) for prefix in names[:first]}
    return reasons | {prefix: _which("last", last) for prefix in names[count - last :]}


def _which(end: str, count: int) -> str:
    return f"the {end} block" if count == 1 else f"one of the {end} {count} blocks"


def _lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The outermost lists of modules of one class."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and len(set(map(_class, module))) == 1:
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _lists(child, f"{name}.{child_name}" if name else child_name)


def _class(module: nn.Module) -> type:
    """The class that a module had before it was converted or fused."""
    if isinstance(module, ScaledLayer):
        original: type = module.__dict__.get(ORIGINAL, type(module))
        return original
    return module.fp8_original if isinstance(module, Producer) else type(module)
