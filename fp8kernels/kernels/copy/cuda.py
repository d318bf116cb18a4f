"""copy on an NVIDIA GPU: csrc/copy/copy.cu, one byte a thread."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiled import load

_cuda, MISSING = load("_cuda", " (built without nvcc?)")


def why_not(x: Tensor) -> str | None:
    """Why x cannot be copied here, or None."""
    if _cuda is None:
        return MISSING
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    if x.device.type != "cuda":
        return f"x is on {x.device}: this kernel takes CUDA tensors"
    return None


def copy(x: Tensor) -> Tensor:
    """A contiguous copy of x: any shape, strides and dtype."""
    x = x.resolve_conj().resolve_neg().contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = _cuda.copy(x.data_ptr(), out.data_ptr(), x.numel() * x.element_size(), stream)
    if error:
        raise RuntimeError(f"copy did not start: {_cuda.error_string(error)}")
    return out
