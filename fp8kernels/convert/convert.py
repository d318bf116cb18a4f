"""convert and revert: change the class of layers in place, so that every reference to them stays good."""

from __future__ import annotations

import collections
import re
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import nn

from ..console import console
from ..nn.broadcast import RANKS_OWN, ignore, ignore_no_more
from ..nn.dry_run import watch_stages
from ..nn.producer import Producer, producers
from ..nn.state import Family, ScaledLayer, copies
from ..nn.step import layers, unwatch, watch
from ..recipe import Recipe, get_recipe
from ..scaling.delayed import PREFIX, is_state
from .blocks import ORIGINAL
from .decide import CONVERTED, REPLACEMENTS, Decision, Filter, decide
from .fuse import Fusion, plan_fusion
from .fuse import fuse as carry_out

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    recipe: Recipe | str = "hif8-qat",
    *,
    filter: Filter | None = None,
    fuse: bool = True,
    group: Any = None,
    verbose: bool = True,
) -> Model:
    """Make the linear layers, patch embeddings and attention projections of a model 8-bit, in place.

    model    any torch.nn.Module; parameters, hooks and references to its layers stay as they are
    recipe   a name ("hif8-qat", "hif8-qat-mlp", "e4m3-delayed", "e4m3-row", "e4m3-block128") or a Recipe
    filter   (module, name) -> bool; False leaves a layer as it is
    fuse     let norms and activations hand codes to the 8-bit layers that alone read them: one rounding for q, k and v,
             and on a GPU one kernel for the norm and its rounding. Histories and scales stay those of fuse=False
    group    with torch.distributed, the ranks that this model has scales in common with; None: they are found at the
             first commit (ranks that hold the same layers, see nn/ranks.py)
    verbose  print what was converted, and why the rest was not
    returns  the model
    raises   ValueError if nothing can be converted (with the reasons), the recipe is unknown or its
             high_precision_blocks do not fit the model; TypeError if this is no module. A model that is converted
             already is left as it is, and the table says so
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, this is {type(model).__name__}")
    recipe = get_recipe(recipe)
    decisions = decide(model, recipe, filter)
    todo = [d for d in decisions if d.recipe is not None]
    if not todo and not any(d.reason == CONVERTED for d in decisions):
        reasons = "\n".join(f"  {d.name or '(the model)'}: {d.reason}" for d in decisions[:20])
        raise ValueError(
            f"convert: nothing in {type(model).__name__} can be converted with {recipe.name!r}:\n"
            + (reasons or "  it has no Linear, Conv or MultiheadAttention layers")
        )
    family = Family()
    for decision in todo:
        _replace(decision, family)
    fusions = plan_fusion(model) if fuse and todo else []
    carry_out(fusions)
    _avoid_fused_encoder(model)
    if todo and not hasattr(model, "_fp8_load_check"):
        model._fp8_load_check = model.register_load_state_dict_pre_hook(_check_state)  # type: ignore[assignment]
    watch(model, group)
    ignore(model)
    watch_stages(RANKS_OWN)
    if verbose:
        console().print(table(decisions, recipe))
        if fusions:
            console().print(fusion_table(fusions))
    return model


def revert(model: Model) -> Model:
    """Give the plain model back, in place: classes as before, no scaling state, the same parameters.

    raises   ValueError if the model has no 8-bit layers
    """
    found = layers(model)
    if not found:
        raise ValueError("revert: the model has no 8-bit layers")
    reverted = {id(layer) for layer in found}
    for producer in list(producers):
        if any(id(reader) in reverted for reader in producer.fp8_readers):
            producer.release()
    for layer in found:
        layer.detach_state()
        copies.pop(layer, None)
        layer.__class__ = layer.__dict__.pop(ORIGINAL, _plain(type(layer)))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and "_fp8_activation" in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop("_fp8_activation")
    ignore_no_more(model)
    handle: Any = model.__dict__.pop("_fp8_load_check", None)
    if handle is not None:
        handle.remove()
    unwatch(model)
    return model


def table(decisions: list[Decision], recipe: Recipe) -> Table:
    """The decisions as a rich table: layers that differ only in a number stand in one row."""
    done = sum(d.recipe is not None for d in decisions)
    out = Table(title=f"{recipe.name}: {done} of {len(decisions)} layers converted", title_justify="left")
    for column in ("layer", "count", "type", "input", "weight", "gradient"):
        out.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
    rows: collections.Counter[tuple[str, ...]] = collections.Counter()
    for d in decisions:
        pattern = re.sub(r"\d+", "*", d.name) or "(the model)"
        kind = d.module.__dict__.get(ORIGINAL, type(d.module)).__name__
        if d.recipe is None:
            rows[pattern, kind, f"stays: {d.reason}", "", ""] += 1
        else:
            first, second, third = map(_describe, d.recipe.roles())
            rows[pattern, kind, first, second, third] += 1
    for (pattern, kind, first, second, third), count in rows.items():
        out.add_row(pattern, str(count), kind, first, second, third, style=None if second else "dim")
    return out


def fusion_table(fusions: list[Fusion]) -> Table:
    """The fusions as a rich table: modules that differ only in a number stand in one row."""
    done = sum(f.reason is None for f in fusions)
    out = Table(title=f"{done} of {len(fusions)} norms and MLPs make the codes themselves", title_justify="left")
    for column in ("module", "count", "type", "codes for"):
        out.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
    rows: collections.Counter[tuple[str, str, str, bool]] = collections.Counter()
    for f in fusions:
        cls = f.module.fp8_original if isinstance(f.module, Producer) else type(f.module)
        said = ", ".join(place.name for place in f.places) if f.reason is None else f"none: {f.reason}"
        rows[re.sub(r"\d+", "*", f.name) or "(the model)", cls.__name__, said, f.reason is None] += 1
    for (pattern, kind, said, is_fused), count in rows.items():
        out.add_row(pattern, str(count), kind, said, style=None if is_fused else "dim")
    return out


def _describe(role: Any) -> str:
    return "high precision" if role is None else f"{role.fmt} {role.scaling} {role.block}"


def _replace(decision: Decision, family: Family) -> None:
    module, recipe = decision.module, decision.recipe
    assert recipe is not None
    module.__dict__[ORIGINAL] = type(module)
    module.__class__ = decision.replacement
    assert isinstance(module, ScaledLayer)
    module.attach(recipe, decision.name, family)


def _plain(scaled: type) -> type[nn.Module]:
    """The torch class behind one of ours, for layers that were made as 8-bit layers from the start."""
    return next(plain for plain, ours in REPLACEMENTS.items() if ours is scaled)


def _avoid_fused_encoder(model: nn.Module) -> None:
    """torch's fused encoder layer computes from the weights, past the layers; without this flag it is not taken."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer) or "_fp8_activation" in module.__dict__:
            continue
        if any(isinstance(child, ScaledLayer) for child in module.modules()):
            module.__dict__["_fp8_activation"] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0


def _check_state(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a foreign or damaged checkpoint before any weight is touched.

    raises   ValueError naming what does not fit
    """
    own = model.state_dict(keep_vars=True)
    wrong = []
    for key, value in own.items():
        given = state_dict.get(prefix + key)
        if given is None or not isinstance(given, torch.Tensor):
            continue
        fits = given.shape == value.shape
        if key.endswith(f"{PREFIX}history"):  # of another window: trimmed or extended
            fits = given.ndim == value.ndim and given.shape[0] == value.shape[0]
        if not fits:
            wrong.append(f"{key}: shape {tuple(given.shape)}, the model has {tuple(value.shape)}")
        elif is_state(key) and given.is_floating_point() and not bool((given.isfinite() & (given >= 0)).all()):
            wrong.append(f"{key}: holds a negative or non-finite number")
    if wrong:
        more = f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            "the checkpoint does not fit this converted model; nothing was loaded:\n  " + "\n  ".join(wrong[:10]) + more
        )
