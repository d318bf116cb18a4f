"""DTensors, told from other tensors without importing torch.distributed.tensor where there are none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(x: object) -> bool:
    """Whether a tensor is spread over the ranks of a device mesh."""
    if type(x) is Tensor or type(x) is nn.Parameter or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # half a second that a process without any does not spend

    return isinstance(x, DTensor)


def local(x: Any) -> Any:
    """What this rank holds of x: its part of a DTensor, all of any other tensor."""
    return x.to_local() if is_dtensor(x) else x


def whole(x: Any) -> Any:
    """All of x: a DTensor is gathered, which every rank of its mesh has to ask for; any other tensor is itself."""
    return x.full_tensor() if is_dtensor(x) else x
