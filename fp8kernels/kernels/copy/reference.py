"""What copy means."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(x: Tensor) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def copy(x: Tensor) -> Tensor:
    """A contiguous copy of x: any shape, strides and dtype."""
    return x.clone(memory_format=torch.contiguous_format)
