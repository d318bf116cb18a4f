"""What commit means, one layer after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...scaling.rules import get_algorithm, scale_from_amax
from . import ScaleRule, State


def why_not(states: Sequence[State], rule: ScaleRule) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def commit(states: Sequence[State], rule: ScaleRule) -> None:
    """Roll every history that has something pending, make its scale, and clear what was pending; all in place.

    A tensor that was not seen (pending 0) keeps its history and its scale, so committing twice changes nothing.
    """
    for state in states:
        seen = (state.pending > 0) & state.pending.isfinite() & (state.target > 0)  # [T]
        rolled = torch.cat([state.pending[:, None], state.history[:, :-1]], dim=1)  # [T, window]
        state.history.copy_(torch.where(seen[:, None], rolled, state.history))
        amax = get_algorithm(rule.algorithm, rule.decay)(state.history)  # [T]
        target = torch.where(state.target > 0, state.target, 1.0)
        scale = scale_from_amax(amax, target, margin=rule.margin, power_of_two=rule.power_of_two)  # [T]
        state.scale.copy_(torch.where(seen, scale, state.scale))
        state.pending.zero_()
