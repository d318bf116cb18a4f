"""The recipe that a configuration names, and the scaling state that a run leaves beside its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..recipe import Alarm, Recipe, Role, get_recipe
from ..scaling.delayed import is_state

EIGHT_BIT = "fp8_state.safetensors"  # the scaling state, beside weights that anyone loads
RECIPE = "fp8_recipe.json"  # {"recipe", "recipe_changes"}, beside it

ROLE_FIELDS = ("input", "weight", "grad")
KEEP = "keep"  # the key of `changes` for layers that stay as they are


def recipe_of(name: str | None, changes: dict[str, Any] | None = None) -> Recipe | None:
    """A recipe by its name with some fields changed; None where no recipe is named, the BF16 run.

    changes  any field of Recipe. Of the roles input, weight and grad: the name of a format, null, or the fields of a
             Role to change, {target: 224}. alarm: fields of Alarm. keep: patterns of layer names that stay as they are
    raises   ValueError naming an unknown recipe, field or value, with the near match
    """
    if name is None:
        return None
    recipe = get_recipe(name)
    values = dict(changes or {})
    kept = values.pop(KEEP, [])
    for role in ROLE_FIELDS:
        if role in values:
            values[role] = _role(recipe, role, values[role])
    if isinstance(values.get("alarm"), dict):
        values["alarm"] = _changed(recipe.alarm, values["alarm"], "alarm")
    if "overrides" in values:
        raise ValueError("recipe_changes.overrides: write layers that stay as they are as keep: [patterns]")
    try:
        recipe = recipe.replace(**values)
    except TypeError as error:
        raise ValueError(f"recipe_changes: {error}") from None
    for pattern in [kept] if isinstance(kept, str) else reversed(kept):
        recipe = recipe.with_override(pattern, None)
    return recipe


def _role(recipe: Recipe, role: str, value: Any) -> Role | None:
    now: Role | None = getattr(recipe, role)
    if value is None or isinstance(value, str):
        if value in (None, "bf16") and role != "grad":
            raise ValueError(f"recipe_changes.{role}={value!r}: only the gradient can stay in high precision")
        changed: Role | None = getattr(recipe.with_format(**{role: value}), role)
        return changed
    if not isinstance(value, dict):
        raise ValueError(f"recipe_changes.{role}={value!r} must be a format or the fields of a role")
    if now is None:
        if "fmt" not in value:
            raise ValueError(f"recipe_changes.{role}: {recipe.name} has none, so that fmt is needed, such as fmt: hif8")
        now = getattr(recipe.with_format(**{role: value["fmt"]}), role)
    return _changed(now, value, role)


def _changed(now: Any, values: dict[str, Any], where: str) -> Any:
    known = [field.name for field in dataclasses.fields(now)]
    for key in values:
        if key not in known:
            raise ValueError(f"recipe_changes.{where}: unknown field {key!r}; known are {', '.join(known)}")
    try:
        made: Alarm | Role = dataclasses.replace(now, **values)
    except TypeError as error:
        raise ValueError(f"recipe_changes.{where}: {error}") from None
    return made


def save_eight_bit(state: dict[str, Tensor], path: Path) -> bool:
    """Write the scaling state of a state_dict, and nothing else of it; returns whether there was any."""
    from safetensors.torch import save_file

    found = {key: value.contiguous().cpu() for key, value in state.items() if is_state(key)}
    if found:
        save_file(found, path)
    return bool(found)


def load_eight_bit(model: nn.Module, path: Path) -> None:
    """Read what `save_eight_bit` wrote into the same layers, converted with the same recipe.

    raises   ValueError naming layers that the model has and the file lacks, or the other way round
    """
    from safetensors.torch import load_file

    state = load_file(path)
    own = {key for key in model.state_dict() if is_state(key)}
    if own != state.keys():
        odd = sorted(own ^ state.keys())
        raise ValueError(
            f"{path} holds the scales of other layers than this model's: {len(odd)} entries are on one side only, "
            f"such as {odd[0]}"
        )
    model.load_state_dict(state, strict=False)
