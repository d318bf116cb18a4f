"""Which layers are converted: a list of decisions, each with its reason. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .. import nn as scaled
from ..nn.linear import why_not_patches
from ..ops.check import FLOATS
from ..recipe import Recipe, Role, matches
from ..scaling.block import get_block
from . import adapters
from .blocks import high_precision_blocks

Filter = Callable[[nn.Module, str], bool]

# what a layer becomes; the exact type, because a subclass may compute something else in its forward
REPLACEMENTS: dict[type[nn.Module], type[scaled.ScaledLayer]] = {
    nn.Linear: scaled.Linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: scaled.Linear,
    nn.Conv1d: scaled.Conv1d,
    nn.Conv2d: scaled.Conv2d,
    nn.Conv3d: scaled.Conv3d,
    nn.MultiheadAttention: scaled.MultiheadAttention,
}
CONVERTED = "already converted"
CANDIDATES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer: `recipe` is what it is converted with, or None, and then `reason` says why not."""

    name: str
    module: nn.Module
    recipe: Recipe | None
    reason: str | None = None

    @property
    def replacement(self) -> type[scaled.ScaledLayer]:
        return REPLACEMENTS[type(self.module)]


def decide(model: nn.Module, recipe: Recipe, keep: Filter | None = None) -> list[Decision]:
    """A decision for every layer that could be 8-bit, in the order of `named_modules`.

    keep     filter (module, name) -> bool; False leaves the layer as it is
    raises   ValueError where the recipe's high_precision_blocks do not fit the model
    """
    blocks = high_precision_blocks(model, *recipe.high_precision_blocks)
    out: list[Decision] = []
    plain_attention: set[int] = set()  # out-projections of attention that stays: its forward goes past the layer
    for name, module in model.named_modules():
        if not _is_candidate(module):
            if stack := _stack(module):
                out.append(Decision(name, module, None, f"{stack}: a stack of weights, which 8-bit layers cannot take"))
            continue
        stays = next((reason for prefix, reason in blocks.items() if f"{name}.".startswith(prefix)), None)
        decision = decide_layer(name, module, recipe, keep, adapters.origin(model, name), stays)
        if id(module) in plain_attention:
            decision = Decision(name, module, None, "its MultiheadAttention is not converted, and goes past it")
        if isinstance(module, nn.MultiheadAttention) and decision.recipe is None and decision.reason != CONVERTED:
            plain_attention.add(id(module.out_proj))
        out.append(decision)
    return out


def decide_layer(
    name: str,
    module: nn.Module,
    recipe: Recipe,
    keep: Filter | None,
    origin: adapters.Origin | None = None,
    stays: str | None = None,
) -> Decision:
    """The decision for one layer; `stays` is why the place where it stands is left alone."""
    origin = origin or adapters.Origin(name)
    if isinstance(module, scaled.ScaledLayer):
        return Decision(name, module, None, CONVERTED)
    if type(module) not in REPLACEMENTS:
        base = next(base for base in CANDIDATES if isinstance(module, base))
        return Decision(
            name, module, None, f"{type(module).__name__} is a subclass of {base.__name__} with a forward of its own"
        )
    if keep is not None and not keep(module, name):
        return Decision(name, module, None, "excluded by the filter")
    if stays is not None:
        return Decision(name, module, None, stays)
    own, pattern = recipe.for_layer(origin.name)
    if own is None:
        return Decision(name, module, None, f"the recipe leaves {pattern!r} as it is")
    if origin.adapts is not None and (pattern is None or matches(pattern, origin.adapts)):
        return Decision(name, module, None, adapters.REASON)
    reason = why_not(module, own)
    return Decision(name, module, own if reason is None else None, reason)


def why_not(module: nn.Module, recipe: Recipe) -> str | None:
    """Why a layer cannot be converted with a recipe, in words, or None."""
    for parameter in module.parameters():
        if parameter.dtype not in FLOATS:
            return f"its weight is {parameter.dtype}; float32, bfloat16 and float16 can be converted"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        reason = why_not_patches(module)
        if reason is not None:
            return f"only kernel = stride is a linear layer: {reason}"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized"
    return next((r for r in (_why_not_blocks(shape, recipe) for shape in _weight_shapes(module)) if r), None)


def _why_not_blocks(shape: tuple[int, int], recipe: Recipe) -> str | None:
    """shape is [N, K] of a weight: the input has K columns, the weight N rows, the gradient N columns."""
    rows, cols = shape
    if not rows or not cols:
        return f"its weight is empty: {shape}"
    sides: list[tuple[Role | None, int, int, str]] = [
        (recipe.input, 1, cols, "in_features"),
        (recipe.weight, rows, cols, "weight"),
        (recipe.grad, 1, rows, "out_features"),
    ]
    for role, row_count, col_count, what in sides:
        if role is None:
            continue
        block = get_block(role.block)
        if (block.cols and col_count % block.cols) or (what == "weight" and block.rows and row_count % block.rows):
            size = (row_count, col_count) if what == "weight" else col_count
            return f"block {block.name!r} does not divide {what} {size}"
        if what != "weight" and block.rows and block.rows > 1:
            return f"block {block.name!r} on {what} would need the number of tokens to be a multiple of {block.rows}"
    return None


def _weight_shapes(module: nn.Module) -> list[tuple[int, int]]:
    """[N, K] of every weight that takes part in a product."""
    weights = [p for name, p in module.named_parameters() if p.ndim >= 2 and not name.startswith("bias")]
    return [(w.shape[0], w[0].numel()) for w in weights]


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, (*CANDIDATES, scaled.ScaledLayer))


def _stack(module: nn.Module) -> str | None:
    """The parameters of a module that are weights of several layers in one, such as experts [E, N, K]; or None."""
    found = [
        f"{name} {list(p.shape)}"
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and min(p.shape) > 1
    ]
    return ", ".join(found) or None
