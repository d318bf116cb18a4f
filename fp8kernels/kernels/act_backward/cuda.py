"""act_backward on an NVIDIA GPU: the compiled kernel of csrc/act_backward.

method  one read of dy, x and other, one write of each gradient; a warp has a piece of a row at hand and the next one on
        its way
limits  sm_80 and newer; CUDA tensors of fp32, bf16 or fp16. Rows that do not start every 16 bytes are read element by
        element
equal   not to the bit: exp, erf and tanh are those of the GPU, within 2 units in the last place. The same bits in
        every run
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from ..compiled import load
from ..gemm import ACTIVATIONS
from ..quantize.cpu import INPUT_TYPES
from ..quantize.cuda import rows_in_memory

_cuda, _ = load("_cuda")

NONE = (0, 0, 0)  # a matrix that is not there: address, type, elements from row to row


def why_not(dy: Tensor, x: Tensor, other: Tensor | None, activation: str) -> str | None:
    """Why these arguments cannot run here, or None."""
    reason = cuda.why_not({"dy": dy, "x": x, "other": other})
    return unfit(dy, x, other) if reason is None else reason


def unfit(dy: Tensor, x: Tensor, other: Tensor | None) -> str | None:
    """What of the arguments, wherever they are, the kernel does not take; or None."""
    for name, tensor in (("dy", dy), ("x", x), ("other", other)):
        if tensor is not None and tensor.dtype not in INPUT_TYPES:
            return f"{name} is {tensor.dtype}: this kernel takes fp32, bf16 and fp16"
        if tensor is not None and tensor.shape != x.shape:
            return f"{name} is {list(tensor.shape)}, x {list(x.shape)}: they have one shape"
    if x.numel() == 0:
        return f"x is {list(x.shape)}: it has no elements"
    return None


def act_backward(dy: Tensor, x: Tensor, other: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and other; see reference.py for every argument."""
    dy, x = rows_in_memory(dy), rows_in_memory(x)
    other = None if other is None else rows_in_memory(other)
    rows, cols = x.shape
    dx = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    dother = None if other is None else torch.empty(rows, cols, dtype=other.dtype, device=x.device)
    with cuda.on(x.device):
        error = _cuda.act_backward(
            rows,
            cols,
            ACTIVATIONS.index(activation),
            *((m.data_ptr(), INPUT_TYPES[m.dtype], m.stride(0)) if m is not None else NONE for m in (dy, x, other)),
            dx.data_ptr(),
            0 if dother is None else dother.data_ptr(),
            cuda.processors(x.device),
            cuda.stream(x.device),
        )
    cuda.check(error, "act_backward")
    return dx, dother
