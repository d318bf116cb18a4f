"""The alarm's policy "fallback": a layer that keeps saturating computes in high precision until it would not saturate.

    at every commit   fraction = saturated / elements since the last one, MAX over the ranks, -1 where nothing was seen
    8-bit             fraction > limit in any role, `steps` commits in a row      ->  high precision
    high precision    fraction <= limit / 2 in all roles, `recover` in a row      ->  8-bit

In high precision a layer still notes what rounding would have done (high.py), so the counters say whether it would
saturate. Decided is on the device, in the layers' state `fp8_fallback`, by the same numbers on every rank. The host
acts on it at once where the state is on a CPU. From a GPU it is copied, and acted on at the next commit: by then it has
arrived, so nothing waits, and all ranks change in the same step.

A layer can also be asked to fall back for another reason (`ask_for_fallback`): at its next commit, by the same way, so
that all ranks follow when one was asked.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from dataclasses import replace

import torch
from torch import Tensor

from ..formats import E4M3, get_format
from ..scaling.delayed import HELD, ROLES
from . import state as states
from .sharded import TOGETHER
from .state import ScaledLayer

LOG = logging.getLogger("fp8kernels")
UNSEEN = -1.0  # the fraction of a role without elements in this step
ASKED = float("inf")  # the fractions of a layer that was asked to fall back

_asked: weakref.WeakKeyDictionary[ScaledLayer, str] = weakref.WeakKeyDictionary()  # until the commit that counts it
_reasons: weakref.WeakKeyDictionary[ScaledLayer, str] = weakref.WeakKeyDictionary()  # from there until it is acted on
_told: weakref.WeakSet[ScaledLayer] = weakref.WeakSet()  # layers whose fall was warned of


class FallbackWarning(UserWarning):
    """A layer keeps saturating and computes in high precision from now on."""


def allow_fallback(found: list[ScaledLayer]) -> None:
    """Give the layers' alarms the policy "fallback"; a state that says so already is followed.

    raises   ValueError where FSDP gathers a layer's weight as codes, so that there is none in high precision
    """
    for layer in found:
        if TOGETHER in layer.__dict__:
            raise ValueError(
                f"layer {layer.fp8_name!r} cannot fall back: all_gather_codes sends its weight to other ranks as 8-bit "
                f"codes; take another policy"
            )
    for layer in found:
        alarm = layer.fp8_recipe.alarm
        if alarm.policy != "fallback":
            layer.fp8_recipe = layer.fp8_recipe.replace(alarm=replace(alarm, policy="fallback"))
            if not layer.fp8_counters.is_meta:
                layer.fp8_counted.copy_(layer.fp8_counters)  # what saturated before it was asked for is no evidence
        if not layer.fp8_scale.is_meta:
            layer.fp8_sync_step()
    states.moved()


def ask_for_fallback(layer: ScaledLayer, reason: str) -> None:
    """Have a layer with that policy compute in high precision from its next commit on, for `recover` or more."""
    _asked[layer] = reason


def asked(found: list[ScaledLayer]) -> dict[str, str]:
    """The reasons of layers that were asked and not committed since, by the layers' names: no state has them."""
    return {layer.fp8_name: _asked[layer] for layer in found if layer in _asked}


class Fallback:
    """The layers of one device with that policy; `count` before ranks reduce, `decide` after it, before scales move."""

    def __init__(self, layers: list[ScaledLayer]) -> None:
        device = layers[0].fp8_scale.device
        alarms = [layer.fp8_recipe.alarm for layer in layers]
        self.layers = layers
        self.counters = [layer.fp8_counters for layer in layers]
        self.counted = [layer.fp8_counted for layer in layers]
        self.state = [layer.fp8_fallback for layer in layers]
        self.pending, self.scale = [layer.fp8_pending for layer in layers], [layer.fp8_scale for layer in layers]
        self.fractions = torch.full((len(layers), len(ROLES)), UNSEEN, dtype=torch.float32, device=device)
        self.limit = torch.tensor([[a.fraction] for a in alarms], dtype=torch.float32, device=device)  # [L, 1]
        self.steps = torch.tensor([[alarm.steps, alarm.recover] for alarm in alarms], device=device)  # [L, 2]
        self.routes: list[tuple[str, ...]] = []
        self.excused = torch.zeros_like(self.fractions, dtype=torch.bool)
        self.decided: Tensor | None = None  # fp32 [L, 1 + 3 * 3], on the host or on its way there
        self.event: torch.cuda.Event | None = None
        for layer, (high, _) in zip(layers, torch.stack(self.state).tolist(), strict=True):
            _follow(layer, bool(high), None)

    def count(self) -> None:
        """Write into `fractions`, fp32 [L, 3], how much of each tensor saturated since the last commit."""
        self._act()
        routes = [layer.fp8_routes for layer in self.layers]
        if routes != self.routes:
            rows = [[may_leave_its_carrier(layer, index) for index in range(len(ROLES))] for layer in self.layers]
            self.routes, self.excused = routes, torch.tensor(rows, device=self.fractions.device)
        step = torch.stack(self.counters) - torch.stack(self.counted)  # [L, 3, 4]
        torch._foreach_copy_(self.counted, self.counters)
        elements, saturated = step[..., 0], step[..., 1]
        fractions = torch.where(self.excused, 0.0, saturated.float() / elements.clamp(min=1))
        self.fractions.copy_(torch.where(elements > 0, fractions, UNSEEN))
        if _asked and not _capturing(self.fractions):  # a graph would ask at each replay
            for row, layer in enumerate(self.layers):
                if layer in _asked:
                    _reasons[layer] = _asked.pop(layer)
                    self.fractions[row] = ASKED

    def decide(self) -> None:
        """Take the evidence in; the scales must still be those that the step was computed with."""
        old = torch.stack(self.state)
        new = decisions(old, self.fractions, self.limit, self.steps)
        torch._foreach_copy_(self.state, list(new))
        evidence = [self.fractions, torch.stack(self.pending), torch.stack(self.scale)]
        decided = torch.cat([new[:, :1].float(), *evidence], 1)
        if _capturing(decided):
            return  # a replay runs no Python: there nothing acts on it
        self.decided, self.event = to_host(decided)
        if self.event is None:
            self._act()

    def _act(self) -> None:
        """Let the layers compute as was decided last."""
        if self.decided is None or _capturing(self.fractions):
            return
        if self.event is not None:
            self.event.synchronize()
        for layer, (high, *evidence) in zip(self.layers, self.decided.tolist(), strict=True):
            _follow(layer, bool(high), evidence)
        self.decided = self.event = None


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """x where the host can read it; from a GPU once the event has happened."""
    if not x.is_cuda:
        return x, None
    with torch.cuda.device(x.device):
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event


def decisions(state: Tensor, fractions: Tensor, limit: Tensor, steps: Tensor) -> Tensor:
    """The next state of many layers.

    state      int64 [L, 2]: is the layer in high precision (0, 1, or HELD: for good), commits in a row that speak for a
               change
    fractions  fp32 [L, 3], UNSEEN where a role was not seen, ASKED where the layer was asked to fall back
    limit      fp32 [L, 1]
    steps      int64 [L, 2], in a row until a layer falls back, and until it returns
    returns    int64 [L, 2]
    """
    high, in_a_row = state[:, 0] > 0, state[:, 1]
    saturates = (fractions > limit).any(1)
    quiet = (fractions <= limit / 2).all(1)  # what was not seen says nothing against it
    in_a_row = torch.where(torch.where(high, quiet, saturates), in_a_row + 1, 0)
    changes = in_a_row >= torch.where(high, steps[:, 1], steps[:, 0])
    changes |= ~high & (fractions == ASKED).any(1)
    new = torch.stack([(high ^ changes).to(torch.int64), torch.where(changes, 0, in_a_row)], 1)
    moves = (fractions > UNSEEN).any(1, keepdim=True) & (state[:, :1] != HELD)
    return torch.where(moves, new, state)


def fallbacks(found: list[ScaledLayer]) -> list[Fallback]:
    """The layers with the policy "fallback", one Fallback for each device."""
    members: dict[torch.device, list[ScaledLayer]] = {}
    for layer in found:
        if layer.fp8_recipe.alarm.policy == "fallback":
            members.setdefault(layer.fp8_scale.device, []).append(layer)
    return [Fallback(layers) for layers in members.values()]


def may_leave_its_carrier(layer: ScaledLayer, index: int) -> bool:
    """Whether a role has another route to take first; telemetry/alarm.py sends it there."""
    return layer.fp8_routes[index] == "auto" and layer.fp8_carrier(index, layer.fp8_scale.device) is not None


def largest(layer: ScaledLayer, index: int) -> tuple[str, float]:
    """What a role's tensor travels as, and the largest value of that in units of its scale."""
    role = layer.fp8_recipe.roles()[index]
    fmt = get_format(role.fmt if role is not None else layer.fp8_recipe.input.fmt)
    clamp = layer.fp8_recipe.clamp(index)
    if clamp is not None:
        return f"{fmt.name} clamped at its target", clamp
    shift = layer.fp8_carrier(index, layer.fp8_scale.device)
    return (fmt.name, fmt.max) if shift is None else (f"{fmt.name}'s carrier", E4M3.max * 2.0**-shift)


def _follow(layer: ScaledLayer, high: bool, evidence: list[float] | None) -> None:
    """Set the layer's precision; a change is logged, and the first fall of a layer is warned of."""
    reason = _reasons.pop(layer, None)
    if high == layer.fp8_high or layer.fp8_held:
        return
    layer.fp8_high = high
    message = _message(layer, high, evidence, reason)
    LOG.info(message)
    if high and layer not in _told:
        _told.add(layer)
        warnings.warn(message, FallbackWarning, stacklevel=2)


def _message(layer: ScaledLayer, high: bool, evidence: list[float] | None, reason: str | None) -> str:
    alarm, name = layer.fp8_recipe.alarm, layer.fp8_name or type(layer).__name__
    what = "falls back to high precision" if high else "computes in 8 bits again"
    if evidence is None:
        return f"{name}: {what}, as its state says"
    roles = len(ROLES)
    fractions, amax, scale = (evidence[start : start + roles] for start in range(0, len(evidence), roles))
    if high and ASKED in fractions:
        return f"{name}: {what}, as it was asked to: {reason or 'another rank says why'}"
    worst = max(range(roles), key=lambda index: fractions[index])
    fmt, top = largest(layer, worst)
    newest = (
        f"{fractions[worst]:.3%} of {ROLES[worst]} in the last one: amax {amax[worst]:.4g} against scale "
        f"{scale[worst]:.4g} * {top:g} ({fmt}) = {scale[worst] * top:.4g}"
    )
    if high:
        return (
            f"{name}: {what}: for {alarm.steps} steps in a row more than {alarm.fraction:.3%} of a tensor saturates, "
            f"{newest}. It returns after {alarm.recover} steps in a row with at most half of that"
        )
    return (
        f"{name}: {what}: for {alarm.recover} steps in a row at most {alarm.fraction / 2:.3%} would saturate, {newest}"
    )
