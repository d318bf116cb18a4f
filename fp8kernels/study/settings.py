"""What one run of the study is: every factor of the published recipe as a field, and the run that it is paired with."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from ..recipe import Alarm, Recipe, Role
from ..scaling.rules import ALGORITHMS

PRECISIONS = ("bf16", "hif8")
SCALINGS = ("delayed", "current")
LAYERS = ("mlp-middle", "mlp", "all", "all+head")
UNITS = ("step", "call")
LABELS = ("shifted once", "shifted twice")


@dataclass(frozen=True)
class Settings:
    """One run; the defaults are the centre of the published study's final recipe, its window scaled to short runs.

    precision      "hif8", or "bf16": no layer is converted
    scaling        "delayed", or "current": each tensor's own amax
    algorithm      amax history to amax, of Recipe
    window         entries of a history
    unit           what an entry is: the largest amax of an optimizer "step", or that of one forward "call", of which
                   a step has `micro_batches`
    target         where amax lands, of all three roles
    clamp          values past the target are cut to it
    warmup_steps   optimizer steps in BF16, in which histories fill
    interval       optimizer steps from one making of the scales to the next
    layers         "mlp-middle": gate, up and down of all blocks but the first and the last; "mlp": of all blocks;
                   "all": the attention too; "all+head": the output head too
    gradients      whether the gradient of an 8-bit layer's output is 8-bit
    learning_rate  the peak
    labels         "shifted once", as a language model learns; "shifted twice": the token after the next, as where
                   labels that were shifted before go to a model that shifts them
    master         whether BF16 computes from fp32 weights; False keeps and updates the weights in BF16
    micro_batches  parts of a batch, whose gradients add up
    ranks          processes that share a batch, gradients averaged
    reduced        whether ranks share their amax
    spike          0, or the factor by which one weight row of a middle block is multiplied during one step
    """

    precision: str = "hif8"
    scaling: str = "delayed"
    algorithm: str = "max"
    window: int = 16
    unit: str = "step"
    target: float = 15.0
    clamp: bool = False
    warmup_steps: int = 8
    interval: int = 1
    layers: str = "mlp-middle"
    gradients: bool = True
    learning_rate: float = 1e-4
    labels: str = "shifted once"
    master: bool = True
    micro_batches: int = 1
    ranks: int = 1
    reduced: bool = True
    spike: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (
            ("precision", PRECISIONS),
            ("scaling", SCALINGS),
            ("algorithm", tuple(ALGORITHMS)),
            ("layers", LAYERS),
            ("unit", UNITS),
            ("labels", LABELS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, known))}")
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))
            elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{field.name}={value!r} must be of type {kind.__name__}")
        if self.learning_rate <= 0 or self.spike < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be above 0, spike={self.spike} and "
                f"warmup_steps={self.warmup_steps} at least 0"
            )
        if min(self.window, self.interval, self.micro_batches, self.ranks) < 1:
            raise ValueError("window, interval, micro_batches and ranks must be at least 1")
        if self.precision == "hif8" and not self.master:
            raise ValueError("master=False is for precision='bf16'; the weights that are rounded to HiF8 are fp32")
        if self.precision == "hif8":
            self.recipe(2)

    def matched(self) -> Settings:
        """The BF16 run that differs in precision alone: same batches, learning rate, labels, parts and ranks.

        Of a run in BF16 it is the plain one with the same learning rate, which is its own.
        """
        kept: tuple[str, ...] = ("learning_rate",)
        if self.precision == "hif8":
            kept += ("labels", "micro_batches", "ranks", "spike")
        return Settings(precision="bf16", **{name: getattr(self, name) for name in kept})

    def name(self) -> str:
        """What tells the run from the centre: "hif8", "bf16 learning_rate=0.001"; also its name as a file."""
        base = Settings(precision=self.precision)
        changed = [
            f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}".replace(" ", "-")
            for f in fields(self)
            if (value := getattr(self, f.name)) != getattr(base, f.name)
        ]
        return " ".join([self.precision, *changed])

    def recipe(self, blocks: int) -> Recipe | None:
        """The recipe for a Llama of so many blocks; None is BF16."""
        if self.precision == "bf16":
            return None
        role = Role("hif8", self.scaling, target=self.target, route="exact", clamp=self.clamp)
        recipe = Recipe(
            "study",
            role,
            role,
            role if self.gradients else None,
            algorithm=self.algorithm,
            window=self.window,
            warmup_steps=self.warmup_steps * (self.micro_batches if self.unit == "call" else 1),
            interval=self.interval,
            alarm=Alarm(policy="ignore"),
        )
        if self.layers != "all+head":
            recipe = recipe.with_override("*lm_head", None)
        if self.layers.startswith("mlp"):
            recipe = recipe.with_override("*.self_attn.*", None)
        if self.layers == "mlp-middle":
            for block in {0, blocks - 1}:
                recipe = recipe.with_override(f"*.layers.{block}.*", None)
        return recipe


def settings(changes: dict[str, Any], where: str, base: Settings | None = None) -> Settings:
    """The centre (or `base`) with some fields changed.

    raises   ValueError that says where, with the near match of an unknown field
    """
    known = [f.name for f in fields(Settings)]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown factor {name!r}{hint}")
    kinds = {f.name: type(f.default) for f in fields(Settings)}
    try:
        changes = {n: float(v) if kinds[n] is float and isinstance(v, str) else v for n, v in changes.items()}
        return replace(base or Settings(), **changes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
