"""The state of delayed scaling: plain tensors of fixed shape, one row per role.

    forward, backward    pending = max(pending, amax), counters += counts; scales do not move
    commit, once a step  pending enters the history (slot 0), the history becomes the scale, pending is cleared

Both halves are harmless when repeated, so recomputed forwards, micro-batches, shared weights and modules called
twice need no care. A scale of 0 says "no history yet": the tensor then takes the scale of its own amax.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROLES = ("input", "weight", "grad")  # the rows of every state tensor
INPUT, WEIGHT, GRAD = range(len(ROLES))

PREFIX = "fp8_"  # of the state's names in a module and in its state_dict
HELD = 2  # of `fp8_fallback`: in high precision for good
COUNTERS = 4  # columns of the counters: elements, saturated, flushed to zero, not finite


def new_state(window: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The buffers of one layer, empty.

    fp8_history   fp32 [3, window], slot 0 the newest amax, 0 where empty
    fp8_pending   fp32 [3], the largest amax since the last commit
    fp8_scale     fp32 [3], 0 until the first commit
    fp8_counters  int64 [3, 4], since the layer was converted
    fp8_step      int64 [], commits in which the layer was seen
    fp8_fallback  int64 [2], whether the layer has fallen back to high precision (1; HELD: for good), and for how many
                  steps in a row there was reason to change that
    """
    roles = len(ROLES)
    return {
        "fp8_history": torch.zeros(roles, window, dtype=torch.float32, device=device),
        "fp8_pending": torch.zeros(roles, dtype=torch.float32, device=device),
        "fp8_scale": torch.zeros(roles, dtype=torch.float32, device=device),
        "fp8_counters": torch.zeros(roles, COUNTERS, dtype=torch.int64, device=device),
        "fp8_step": torch.zeros((), dtype=torch.int64, device=device),
        "fp8_fallback": torch.zeros(2, dtype=torch.int64, device=device),
    }


def fit_window(history: Tensor, window: int) -> Tensor:
    """A history [T, any] as [T, window]: the newest slots, and empty ones where there are fewer."""
    if history.shape[1] >= window:
        return history[:, :window]
    return torch.nn.functional.pad(history, (0, window - history.shape[1]))


def is_state(key: str) -> bool:
    """Whether a state_dict key belongs to the scaling state rather than to the model."""
    return key.rpartition(".")[2].startswith(PREFIX)


def without_state(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of the unconverted model: the same entries without the scaling state."""
    return {key: value for key, value in state_dict.items() if not is_state(key)}
