"""What every 8-bit layer shares: its recipe, its scaling state, and how a tensor of a role is quantized."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..formats import E4M3, get_format
from ..kernels.commit import State
from ..kernels.quantize import carrier as carriers
from ..recipe import Recipe, Role
from ..scaling.block import get_block
from ..scaling.delayed import HELD, INPUT, PREFIX, ROLES, WEIGHT, fit_window, new_state
from ..scaling.rules import get_algorithm, scale_from_amax
from . import clamp as clamps
from .broadcast import RANKS_OWN, tell_running
from .dry_run import watch_stages
from .dtensor import is_dtensor, local
from .kept import Kept, may_keep
from .observe import observe

FLEETING = ("fp8_kept", "fp8_prepared", "fp8_shares", "fp8_alarm")  # attributes that a copy of a layer does without


class Family:
    """What the layers of one model have in common; a deep copy of the model is a family of its own."""


class Coded(NamedTuple):
    """An 8-bit tensor on its way into products.

    codes    uint8, the shape of the tensor
    scale    fp32 [R, C], decodes them
    fmt      the name of the codes' format: the role's, or E4M3's where a carrier stands in for HiF8
    codes_t  uint8 [K, M], transposed and contiguous, where it was asked for
    """

    codes: Tensor
    scale: Tensor
    fmt: str
    codes_t: Tensor | None = None

    def t(self) -> Coded:
        """The transposed matrix: a view, or the codes that were transposed on the way."""
        codes = self.codes.t() if self.codes_t is None else self.codes_t
        return Coded(codes, self.scale.t(), self.fmt, self.codes)


# layers that came to be by deepcopy or unpickling, in that order
copies: weakref.WeakKeyDictionary[ScaledLayer, None] = weakref.WeakKeyDictionary()
generation = 0  # grows whenever a layer's state may have got other tensors


class RecipeWarning(UserWarning):
    """A checkpoint holds scales of another recipe."""


class ScaledLayer(nn.Module):
    """Mixin for layers with 8-bit tensors. The state is plain buffers named `fp8_*`; see scaling/delayed.py."""

    fp8_recipe: Recipe
    fp8_name: str
    fp8_family: Family
    fp8_warm: bool  # whether the recipe's warm-up steps are over
    fp8_high: bool  # whether the alarm's policy "fallback" or `hold_high` has taken the layer to high precision
    fp8_held: bool = False  # whether it stays there, by `hold_high`
    fp8_calibrated: bool = False  # whether the input's scale was made to be static, whatever the recipe trains with
    fp8_scaled: tuple[int, tuple[bool, ...]] = (-1, ())  # of which generation of the state, which roles have a scale
    fp8_kept: Kept  # the weight's codes, from one commit to the next
    fp8_routes: tuple[str, ...]  # of the three roles: the recipe's; the counters turn "auto" into "exact"
    fp8_shifts: tuple[int | None, ...]  # the k of the three roles' carriers, where there is one
    fp8_history: Tensor
    fp8_pending: Tensor
    fp8_scale: Tensor
    fp8_counters: Tensor
    fp8_step: Tensor
    fp8_fallback: Tensor
    fp8_counted: Tensor  # int64 [3, 4], the counters at the last commit, where the alarm asks; not saved
    fp8_target: Tensor  # fp32 [3], where amax lands; 0 where a scale is held. Follows from the recipe; saved with an
    # interval, where a checkpoint's scales are older than its histories and only this tells what they were made for

    def attach(self, recipe: Recipe, name: str = "", family: Family | None = None) -> None:
        """Give the layer a recipe and an empty state, on the device of its weight."""
        self.fp8_family = family or Family()
        device = next(self.parameters()).device
        self.fp8_recipe, self.fp8_name = recipe, name
        self.fp8_warm = recipe.warmup_steps == 0
        self.fp8_routes = tuple("exact" if role is None else role.route for role in recipe.roles())
        self.fp8_shifts = tuple(recipe.carrier(index) for index in range(len(ROLES)))
        self.fp8_high, self.fp8_kept = False, Kept()
        for key, value in new_state(recipe.window, device).items():
            self.register_buffer(key, value)
        self.register_buffer("fp8_target", self._targets(device), persistent=recipe.interval > 1)
        self.register_buffer("fp8_counted", torch.zeros_like(self.fp8_counters), persistent=False)
        moved()

    def _targets(self, device: Any) -> Tensor:
        """Where the amax of each role lands; a static scale does not move, which 0 says."""
        held = [role is not None and role.scaling == "static" for role in self.fp8_recipe.roles()]
        targets = [0.0 if h else self.fp8_recipe.target(i) for i, h in enumerate(held)]
        return torch.tensor(targets, dtype=torch.float32, device=device)

    def detach_state(self) -> None:
        """Take recipe and state away again."""
        for key in [key for key in self._buffers if key.startswith(PREFIX)]:
            del self._buffers[key]
            self._non_persistent_buffers_set.discard(key)
        for key in ("fp8_recipe", "fp8_name", "fp8_warm", "fp8_family", "fp8_routes", "fp8_shifts", "fp8_high"):
            self.__dict__.pop(key, None)
        for key in (*FLEETING, "fp8_scaled", "fp8_held", "fp8_calibrated"):
            self.__dict__.pop(key, None)
        moved()

    def fp8_state(self) -> State:
        """The tensors that a commit updates."""
        return State(self.fp8_history, self.fp8_pending, self.fp8_scale, self.fp8_target)

    def fp8_sync_step(self) -> None:
        """Read from the state whether warm-up is over, and whether the layer fell back to high precision."""
        self.fp8_warm = self.fp8_recipe.warmup_steps == 0 or int(self.fp8_step) >= self.fp8_recipe.warmup_steps
        high = int(self.fp8_fallback[0])
        self.fp8_held = high == HELD
        self.fp8_high = self.fp8_held or (self.fp8_recipe.alarm.policy == "fallback" and high > 0)

    @property
    def fp8_on(self) -> bool:
        """Whether the layer computes in 8 bits now: not while it warms up or has fallen back to high precision."""
        return self.fp8_warm and not self.fp8_high

    def fp8_carrier(self, index: int, device: torch.device) -> int | None:
        """The k of the carrier that a role's tensor on a device travels as, or None: codes of the role's own format."""
        route = self.fp8_routes[index]
        if route == "exact" or (route == "auto" and not carriers.pays(device)):
            return None
        return self.fp8_shifts[index]

    def fp8_quantize(self, x: Tensor, index: int, *, transpose: bool = False, exact: bool = False) -> Coded:
        """The input or the weight in 8 bits, by the recipe; what was seen is noted in training mode.

        transpose  keep the transposed codes too
        exact      in the role's own format also where the layer computes with a carrier
        """
        observe((self,), index, x)
        if index != WEIGHT or exact or not self.training or not may_keep(x):
            return self._quantize(x, index, transpose=transpose, exact=exact)
        self.fp8_kept.watch(x, self.fp8_name)
        coded = self.fp8_kept.find(x, transpose=transpose)
        if coded is None:
            coded = self._quantize(x, index, transpose=transpose)
            self.fp8_kept.keep(x, coded)
        return coded

    def _quantize(self, x: Tensor, index: int, *, transpose: bool, exact: bool = False) -> Coded:
        recipe = self.fp8_recipe
        if self.training and not torch.compiler.is_compiling():
            watch_stages(RANKS_OWN)
            tell_running()
        return quantize_role(
            x.detach(),
            (recipe.input, recipe.weight)[index],
            recipe.target(index),
            recipe.power_of_two,
            self.fp8_scale[index : index + 1],
            (self.fp8_pending[index : index + 1], self.fp8_counters[index]) if self.training else None,
            transpose=transpose,
            carrier=None if exact else self.fp8_carrier(index, x.device),
            clamp=recipe.clamp(index),
        )

    def fp8_watch(self, x: Tensor, w: Tensor) -> None:
        """Warm-up: note what is seen, so that histories fill, and compute nothing with it."""
        if self.training:
            self.fp8_quantize(local(x), INPUT)
            self.fp8_quantize(local(w), WEIGHT)

    def fp8_keep_plain(self) -> None:
        """The state is each rank's own until a commit: DTensors that were made of it are plain tensors again."""
        for key, value in self._buffers.items():
            if key.startswith(PREFIX) and is_dtensor(value):
                self._buffers[key] = local(value)
                moved()

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """parallelize_module makes DTensors of all buffers of a layer, and then registers its hook."""
        self.fp8_keep_plain()
        return super().register_forward_pre_hook(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()`, `.cuda()`: the state moves between devices and keeps its dtypes."""
        before = {key: value for key, value in self._buffers.items() if key.startswith(PREFIX)}
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        was = before.get("fp8_scale")
        if was is not None and was.is_meta and not self.fp8_scale.is_meta:
            self._start(self.fp8_scale.device)
        moved()
        return self

    def _start(self, device: Any) -> None:
        """An empty state on a device: what comes off the meta device holds anything."""
        state = new_state(self.fp8_recipe.window, device) | {"fp8_target": self._targets(device)}
        for key, value in state.items():
            self._buffers[key] = value
        self._buffers["fp8_counted"] = torch.zeros_like(self.fp8_counters)
        self.fp8_sync_step()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """A checkpoint of the unconverted model loads too: missing state is no missing key."""
        history = state_dict.get(f"{prefix}fp8_history")
        if isinstance(history, Tensor) and history.ndim == 2:
            state_dict[f"{prefix}fp8_history"] = fit_window(history, self.fp8_recipe.window)
        made_for = state_dict.pop(f"{prefix}fp8_target", None)  # may be this layer's buffer, filled in place
        made_for = local(made_for).tolist() if isinstance(made_for, Tensor) and not made_for.is_meta else None
        own: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, own, *rest)
        missing_keys.extend(key for key in own if not key[len(prefix) :].startswith(PREFIX))
        weight = next(self.parameters(recurse=False))
        if self.fp8_scale.is_meta and not weight.is_meta:  # assigned, from a checkpoint without scaling state
            self._start(weight.device)
        if not self.fp8_scale.is_meta:
            if self.fp8_target.is_meta:
                self._buffers["fp8_target"] = self._targets(self.fp8_scale.device)
            if self.fp8_counted.is_meta:
                self._buffers["fp8_counted"] = torch.empty_like(self.fp8_counters)
            with torch.no_grad():
                self.fp8_counted.copy_(self.fp8_counters)
                self.fp8_target.copy_(self._targets(self.fp8_target.device))
            if self.fp8_recipe.interval == 1 or made_for != self.fp8_target.tolist():
                self._follow_histories()
            self.fp8_sync_step()
        self.fp8_kept.drop(allowed=False)
        moved()

    @torch.no_grad()
    def _follow_histories(self) -> None:
        """Scales are what the recipe makes of the histories: those of another recipe's checkpoint are made again.

        With an interval they are older, and stay if they were made for the same targets
        """
        recipe = self.fp8_recipe
        amax = get_algorithm(recipe.algorithm, recipe.decay)(self.fp8_history)  # [3]
        target = torch.where(self.fp8_target > 0, self.fp8_target, 1.0)
        scale = scale_from_amax(amax, target, power_of_two=recipe.power_of_two)  # [3]
        moves = (amax > 0) & (self.fp8_target > 0) & (scale != self.fp8_scale)
        if bool(moves.any()):
            self.fp8_scale.copy_(torch.where(moves, scale, self.fp8_scale))
            warnings.warn(
                f"the checkpoint's scales are not those that {recipe.name!r} makes of its amax histories (another "
                f"format, target, margin, algorithm, window or interval); they were made again from the histories",
                RecipeWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without what only holds for this layer's own tensors."""
        return {key: value for key, value in self.__dict__.items() if key not in FLEETING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.fp8_kept = Kept()
        copies[self] = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8={self.fp8_recipe.name!r}"


def moved() -> None:
    """The state, or what a commit does with it, is another than it was."""
    global generation
    generation += 1


def keep_dtypes(module: nn.Module, before: dict[str, Tensor | None]) -> None:
    """After `_apply`: the buffers keep the dtypes and values that they had before, on the device they are on now."""
    for key, value in before.items():
        after = module._buffers[key]
        if value is not None and after is not None and after.dtype != value.dtype:
            module._buffers[key] = value.to(after.device)


def quantize_role(
    x: Tensor,
    role: Role,
    target: float,
    power_of_two: bool,
    scale: Tensor,
    observer: tuple[Tensor, Tensor] | None,
    *,
    transpose: bool = False,
    carrier: int | None = None,
    clamp: float | None = None,
    propagate: bool = False,
) -> Coded:
    """A tensor of a role in 8 bits.

    scale      fp32 [1], the delayed or static scale, in units of the role's format; 0 takes x's own amax
    observer   (pending fp32 [1], counters int64 [4]) to note x in, or None
    transpose  keep the transposed codes too
    carrier    the k of a carrier, or None
    clamp      where values are cut, in units of the scale (nn/clamp.py), or None
    propagate  an Inf or NaN in x makes the scale of its block NaN: codes would hide an Inf from who looks for one in
               the gradients, as a GradScaler does
    """
    given, how, fmt = role_arguments(x, role, target, power_of_two, scale, transpose=transpose, carrier=carrier)
    if clamp is not None and x.numel():
        limit = clamps.limit(scale, clamp)  # [1] fp32
        codes, codes_t, used, _, counts = torch.ops.fp8kernels.quantize(x.float().clamp(-limit, limit), given, *how)
        if observer is not None and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()):
            clamps.note(x, clamps.beyond(x, limit), counts, observer)
        amax = clamps.magnitude(x)
    elif observer is None:
        codes, codes_t, used, amax, _ = torch.ops.fp8kernels.quantize(x, given, *how)
    else:
        codes, used, codes_t, amax = torch.ops.fp8kernels.quantize_observed(x, given, *observer, *how)
    if propagate:
        used = used + 0.0 * amax
    return Coded(codes, used, fmt, codes_t if transpose else None)


def role_arguments(
    x: Tensor, role: Role, target: float, power_of_two: bool, scale: Tensor, *, transpose: bool, carrier: int | None
) -> tuple[Tensor, tuple[Any, ...], str]:
    """What the ops that quantize a tensor of x's shape take: scales, how to round; and the format of the codes."""
    fmt, block = get_format(role.fmt), get_block(role.block)
    if role.scaling == "current":
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        given = torch.zeros(block.grid(rows, x.shape[-1]), dtype=torch.float32, device=x.device)
    else:
        given = scale.reshape(1, 1)
    how = (fmt.name, block.name, target, 0, power_of_two, True, transpose, carrier)
    return given, how, fmt.name if carrier is None else E4M3.name
