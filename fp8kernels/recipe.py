"""A recipe says which format and which scaling each tensor of a layer gets; a frozen value that reads as it prints."""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass, field, fields, replace
from types import EllipsisType
from typing import Any, TypeAlias

from .formats import get_format
from .kernels.quantize import carrier
from .scaling.block import get_block
from .scaling.rules import DECAY, Algorithm, get_algorithm

SCALINGS = ("delayed", "current", "static")
POLICIES = ("warn", "raise", "fallback", "ignore")
DELAYED_HEAD_ROOM = 1.5  # times the amax of past steps that a carrier of delayed scaling still holds, at least
STRAIGHT_THROUGH = ("plain", "clipped")
ROUTES = ("auto", "carrier", "exact")
Override: TypeAlias = "Recipe | EllipsisType | None"


@dataclass(frozen=True)
class Role:
    """How one tensor of a layer (input, weight or output gradient) becomes 8-bit.

    fmt      "hif8", "e4m3" or "e5m2"
    scaling  "delayed": from the amax of past steps. "current": from this tensor's amax. "static": frozen
    block    which elements share a scale; delayed and static scaling keep one scale per tensor
    target   where amax lands in the format; None is the format's own (HiF8 15, gradients 224; E4M3 448; E5M2 57344)
    route    how HiF8 reaches the tensor cores. "exact": its own codes, decoded by the product. "carrier": as E4M3 codes
             of shifted values, at the full FP8 rate (docs/NUMERICS.md says what they cannot hold). "auto": a carrier on
             GPUs with FP8 tensor cores, for as long as the counters allow (`Alarm`), else exact. Other formats have
             one route
    clamp    cut values beyond target * scale to that before they are rounded, and count them as saturated. Scales from
             the tensor itself cut nothing. With route="auto" HiF8 then takes the exact route
    """

    fmt: str
    scaling: str = "delayed"
    block: str = "tensor"
    target: float | None = None
    route: str = "auto"
    clamp: bool = False

    def __post_init__(self) -> None:
        get_format(self.fmt)
        get_block(self.block)
        if self.scaling not in SCALINGS:
            raise ValueError(_unknown("scaling", self.scaling, SCALINGS))
        if self.scaling != "current" and self.block != "tensor":
            raise ValueError(
                f"scaling={self.scaling!r} keeps one scale per tensor, block={self.block!r} needs scaling='current'"
            )
        if self.clamp and self.scaling == "current":
            raise ValueError(
                "clamp=True cuts what lies beyond a scale of past steps; scaling='current' follows each tensor and "
                "leaves nothing to cut: take 'delayed' or 'static'"
            )
        if self.target is not None and not 0 < self.target <= get_format(self.fmt).max:
            raise ValueError(
                f"target={self.target} is outside (0, {get_format(self.fmt).max:g}], the range of {self.fmt}"
            )
        if self.route not in ROUTES:
            raise ValueError(_unknown("route", self.route, ROUTES))
        reason = carrier.why_not(get_format(self.fmt), self.target or get_format(self.fmt).target)
        if self.route == "carrier" and reason is not None:
            raise ValueError(f"route='carrier': {reason}; take route='auto'")


@dataclass(frozen=True)
class Alarm:
    """When a layer that saturates is reported, and when HiF8 with route="auto" leaves its carrier.

    policy    "warn", "raise", "ignore", or "fallback": the layer computes in high precision until it would no longer
              saturate
    fraction  of a tensor's elements that saturate within one step; of a carrier's, that it saturates or flushes
    steps     optimizer steps in a row
    recover   optimizer steps in a row with at most half of the fraction, after which a layer in high precision is 8-bit
              again
    """

    policy: str = "warn"
    fraction: float = 1e-3
    steps: int = 3
    recover: int = 100

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(_unknown("alarm policy", self.policy, POLICIES))
        if self.steps < 1 or self.recover < 1 or self.fraction < 0:
            raise ValueError(
                f"Alarm(fraction={self.fraction}, steps={self.steps}, recover={self.recover}): they must be "
                f"at least 0, 1 and 1"
            )


@dataclass(frozen=True)
class Recipe:
    """Which format and scaling the input, the weight and the output gradient of a layer get.

    grad          None keeps gradients in the precision of the output (BF16 under autocast)
    algorithm     history to amax: "max", "moving_average" (the mean of the window), "exponential_moving_average",
                  "most_recent", or a function [T, window] -> [T]
    decay         of the exponential moving average: what an amax weighs against that of the next step
    window        optimizer steps that a history holds
    margin        binades of head-room above amax
    power_of_two  scales are rounded up to powers of two
    warmup_steps  optimizer steps in which histories fill while the layer computes in high precision
    interval      optimizer steps from one making of the delayed scales to the next; histories take part in every step
    straight_through  the gradient of rounding x and w: "plain" is 1 everywhere, "clipped" is 0 where |x| lies beyond
                  the largest value (or the clamp) times the scale, and 1 elsewhere. Scales from the tensor itself
                  clip nothing
    high_precision_blocks  how many of the model's first and last blocks stay as they are, whatever overrides say
    overrides     (name pattern, Recipe, None or ...) pairs, the first match wins; None leaves the layer as it is, and
                  ... takes this recipe itself, as where nothing matches. A pattern is a glob on the full layer name, or
                  a regular expression behind "re:"
    alarm         when a saturating layer is reported
    """

    name: str
    input: Role
    weight: Role
    grad: Role | None = None
    algorithm: str | Algorithm = "max"
    decay: float = DECAY
    window: int = 64
    margin: int = 0
    power_of_two: bool = False
    warmup_steps: int = 0
    interval: int = 1
    straight_through: str = "plain"
    high_precision_blocks: tuple[int, int] = (0, 0)
    overrides: tuple[tuple[str, Override], ...] = ()
    alarm: Alarm = field(default_factory=Alarm)

    def __post_init__(self) -> None:
        get_algorithm(self.algorithm)
        if self.window < 1 or self.warmup_steps < 0 or self.interval < 1:
            raise ValueError(
                f"window={self.window} must be >= 1, warmup_steps={self.warmup_steps} >= 0 and "
                f"interval={self.interval} >= 1"
            )
        if self.straight_through not in STRAIGHT_THROUGH:
            raise ValueError(_unknown("straight_through", self.straight_through, STRAIGHT_THROUGH))
        blocks = self.high_precision_blocks
        if len(blocks) != 2 or any(not isinstance(n, int) or n < 0 for n in blocks):
            raise ValueError(f"high_precision_blocks={blocks}: two numbers of blocks, the first ones and the last ones")
        object.__setattr__(self, "high_precision_blocks", tuple(blocks))  # a list, where it was read from a file
        if not 0 < self.decay < 1:
            raise ValueError(f"decay={self.decay} must be between 0 and 1")
        for pattern, _ in self.overrides:
            if pattern.startswith("re:"):
                re.compile(pattern[3:])

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed.

        raises   TypeError naming the near match of an unknown field
        """
        names = [f.name for f in fields(self)]
        for name in changes:
            if name not in names:
                raise TypeError(_unknown("recipe field", name, names))
        return replace(self, **changes)

    def with_override(self, pattern: str, recipe: Override) -> Recipe:
        """The same recipe, but layers whose name matches get another one, or None: stay as they are."""
        return replace(self, overrides=((pattern, recipe), *self.overrides))

    def with_format(self, **formats: str | None) -> Recipe:
        """The same recipe with the formats of roles changed: with_format(grad="e5m2")."""
        changes: dict[str, Role | None] = {}
        for role, fmt in formats.items():
            if role not in ("input", "weight", "grad"):
                raise TypeError(_unknown("role", role, ("input", "weight", "grad")))
            if fmt is None or fmt == "bf16":
                changes[role] = None
            else:
                now = getattr(self, role)
                scaling = (now or self.weight).scaling if role == "grad" else now.scaling
                changes[role] = (
                    Role(fmt, scaling) if role == "grad" else replace(now, fmt=fmt, target=None, route="auto")
                )
        return self.replace(**changes)

    def frozen(self) -> Recipe:
        """The same recipe with delayed scales held where they are: for serving what was trained."""

        def hold(role: Role | None) -> Role | None:
            return replace(role, scaling="static") if role is not None and role.scaling == "delayed" else role

        return self.replace(input=hold(self.input), weight=hold(self.weight), grad=hold(self.grad))

    def for_layer(self, name: str) -> tuple[Recipe | None, str | None]:
        """The recipe of a layer, and the override pattern that decided it (None if none did)."""
        for pattern, recipe in self.overrides:
            if matches(pattern, name):
                own = self if isinstance(recipe, EllipsisType) else recipe
                return (None if own is None else own.alone()), pattern
        return self.alone(), None

    def alone(self) -> Recipe:
        """The same recipe for one layer, without what says which layers of a model it is for."""
        return self.replace(overrides=(), high_precision_blocks=(0, 0))

    def roles(self) -> tuple[Role | None, Role | None, Role | None]:
        """Input, weight and gradient, in the order of the state's rows."""
        return self.input, self.weight, self.grad

    def target(self, index: int) -> float:
        """Where the amax of a role lands, margin included; the format's default where the recipe gives none."""
        role = self.roles()[index] or self.input
        fmt = get_format(role.fmt)
        default = fmt.grad_target if index == 2 else fmt.target
        return float((default if role.target is None else role.target) * 2.0**-self.margin)

    def reach(self, index: int) -> float:
        """The target of a role without margin: margin is head-room, which carriers and clamps are to keep."""
        return self.target(index) * 2.0**self.margin

    def clamp(self, index: int) -> float | None:
        """Where values of a role are cut, in units of the scale, or None."""
        role = self.roles()[index]
        return self.reach(index) if role is not None and role.clamp else None

    def carrier(self, index: int) -> int | None:
        """The k of the carrier that a role can have (its values are then E4M3 codes of value * 2**k), or None."""
        role = self.roles()[index]
        if role is None or role.route == "exact":
            return None
        if role.clamp and role.route == "auto":  # the counters would not tell what a carrier loses from what is cut
            return None
        target = self.reach(index)
        if carrier.why_not(get_format(role.fmt), target) is not None:
            return None
        return carrier.shift(target, head_room=DELAYED_HEAD_ROOM if role.scaling == "delayed" else 1.0)


def matches(pattern: str, name: str) -> bool:
    """Whether a layer name matches a glob, or a regular expression behind "re:"."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _unknown(what: str, name: object, known: Any) -> str:
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown {what} {name!r}: known are {', '.join(repr(k) for k in known)}{hint}"


HEADS = (("*lm_head", None), ("lm_head", None))  # output heads cost accuracy out of proportion; every peer keeps them
MLPS = (  # what the linear layers of MLPs are called; routers of experts and attention have names of the same form
    *((name, None) for name in ("*.gate", "*router*", "*.shared_expert_gate", "*attention.output.dense")),
    *((f"*.{name}.*", ...) for name in ("mlp", "feed_forward", "ffn", "experts", "DenseReluDense")),
    *((f"*.{name}", ...) for name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "wi", "wi_0", "wi_1")),
    *((f"*.{name}", ...) for name in ("linear1", "linear2", "intermediate.dense", "output.dense")),
    ("*", None),
)

HIF8_QAT = Recipe("hif8-qat", Role("hif8"), Role("hif8"), overrides=HEADS)
HIF8_QAT_MLP = Recipe(  # as published for openPangu-Embedded-1B: blocks 3 to 23 of 26. source  arXiv 2605.26189
    "hif8-qat-mlp",
    Role("hif8", target=15.0),
    Role("hif8", target=15.0),
    Role("hif8", target=15.0),
    algorithm="max",
    window=64,
    warmup_steps=500,
    high_precision_blocks=(3, 2),
    overrides=MLPS,
)
E4M3_DELAYED = Recipe("e4m3-delayed", Role("e4m3"), Role("e4m3"), overrides=HEADS)
E4M3_ROW = Recipe("e4m3-row", Role("e4m3", "current", "row"), Role("e4m3", "current", "row"), overrides=HEADS)
E4M3_BLOCK128 = Recipe(
    "e4m3-block128", Role("e4m3", "current", "1x128"), Role("e4m3", "current", "128x128"), overrides=HEADS
)
RECIPES = {recipe.name: recipe for recipe in (HIF8_QAT, HIF8_QAT_MLP, E4M3_DELAYED, E4M3_ROW, E4M3_BLOCK128)}


def get_recipe(recipe: Recipe | str | object) -> Recipe:
    """The recipe of that name, or what another library's recipe object means (peers.py); a Recipe stays as it is.

    raises   ValueError naming the near matches, or the field of the object that has no counterpart
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        from .peers import from_peer

        return from_peer(recipe)
    if recipe not in RECIPES:
        raise ValueError(_unknown("recipe", recipe, RECIPES))
    return RECIPES[recipe]
