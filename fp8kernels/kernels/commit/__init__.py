"""commit: once per optimizer step, what was pending enters the histories and the histories become scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...scaling.rules import DECAY, Algorithm


@dataclass(frozen=True)
class ScaleRule:
    """How a window of amax becomes a scale; the same for all tensors of one commit."""

    algorithm: str | Algorithm = "max"
    margin: int = 0
    power_of_two: bool = False
    decay: float = DECAY


class State(NamedTuple):
    """The delayed-scaling state of T tensors (the roles of one layer).

    history  fp32 [T, window], slot 0 the newest, 0 where empty
    pending  fp32 [T], the largest amax since the last commit, 0 where the tensor was not seen
    scale    fp32 [T], 0 while the history is empty
    target   fp32 [T], on the same device; 0 where a scale is held (static): then nothing but pending changes
    """

    history: Tensor
    pending: Tensor
    scale: Tensor
    target: Tensor
