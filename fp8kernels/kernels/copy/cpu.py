"""copy on CPU cores: csrc/copy/copy.cpp, a memcpy on every thread."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiled import load

_cpu, MISSING = load("_cpu")


def why_not(x: Tensor) -> str | None:
    """Why x cannot be copied here, or None."""
    if _cpu is None:
        return MISSING
    if x.device.type != "cpu" or x.layout != torch.strided:
        return f"x is a {x.layout} tensor on {x.device}: this kernel takes strided CPU tensors"
    return None


def copy(x: Tensor) -> Tensor:
    """A contiguous copy of x: any shape, strides and dtype."""
    x = x.resolve_conj().resolve_neg().contiguous()
    out = torch.empty_like(x)
    _cpu.copy(x.data_ptr(), out.data_ptr(), x.numel() * x.element_size(), torch.get_num_threads())
    return out
