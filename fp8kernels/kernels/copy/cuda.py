"""copy on an NVIDIA GPU: csrc/copy/copy.cu, one byte a thread."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from ..compiled import load

_cuda, _ = load("_cuda")


def why_not(x: Tensor) -> str | None:
    """Why x cannot be copied here, or None."""
    return cuda.why_not({"x": x})


def copy(x: Tensor) -> Tensor:
    """A contiguous copy of x: any shape, strides and dtype."""
    x = x.resolve_conj().resolve_neg().contiguous()
    out = torch.empty_like(x)
    with cuda.on(x.device):
        error = _cuda.copy(x.data_ptr(), out.data_ptr(), x.numel() * x.element_size(), cuda.stream(x.device))
    cuda.check(error, "copy")
    return out
