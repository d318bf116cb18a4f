"""norm_backward on an NVIDIA GPU: the compiled kernels of csrc/norm_backward.

method  one read of dy and x, one write of dx. A thread has the same columns in every row and sums their dweight and
        dbias in registers; each block writes one row of partial sums, which a second kernel adds in their order
limits  sm_80 and newer; CUDA tensors of fp32, bf16 or fp16; rows of at most 16,384 numbers. Rows that do not start
        every 16 bytes are read element by element
equal   not to the bit: sums are fp32 in an order of their own. The same bits in every run
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from ..compiled import load
from ..norm_quantize import Norm
from ..quantize.cpu import INPUT_TYPES
from ..quantize.cuda import rows_in_memory

_cuda, _ = load("_cuda")

LONGEST_ROW = 16384  # elements: kLongestNormRow of csrc/norm_backward/norm_backward.h


def why_not(dy: Tensor, x: Tensor, rstd: Tensor, mean: Tensor | None, norm: Norm) -> str | None:
    """Why these arguments cannot run here, or None."""
    tensors = {"dy": dy, "x": x, "rstd": rstd, "mean": mean, "weight": norm.weight, "bias": norm.bias}
    reason = cuda.why_not(tensors)
    return unfit(dy, x, rstd, mean, norm) if reason is None else reason


def unfit(dy: Tensor, x: Tensor, rstd: Tensor, mean: Tensor | None, norm: Norm) -> str | None:
    """What of the arguments, wherever they are, the kernels do not take; or None."""
    for name, tensor in (("dy", dy), ("x", x), ("weight", norm.weight), ("bias", norm.bias)):
        if tensor is not None and tensor.dtype not in INPUT_TYPES:
            return f"{name} is {tensor.dtype}: this kernel takes fp32, bf16 and fp16"
    for name, statistic in (("rstd", rstd), ("mean", mean)):
        if statistic is not None and statistic.dtype != torch.float32:
            return f"{name} is {statistic.dtype}: it is fp32"
    if dy.shape != x.shape:
        return f"dy is {list(dy.shape)}, x {list(x.shape)}: they have one shape"
    if x.numel() == 0:
        return f"x is {list(x.shape)}: it has no elements"
    if x.shape[1] > LONGEST_ROW:
        return f"x is {list(x.shape)}: this kernel takes rows of {LONGEST_ROW} elements at most"
    return None


def norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, mean: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias; see reference.py for every argument."""
    dy, x = rows_in_memory(dy), rows_in_memory(x)
    rstd, mean = rstd.contiguous(), None if mean is None else mean.contiguous()
    weight = None if norm.weight is None else norm.weight.detach().contiguous()
    rows, cols = x.shape
    dx = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if norm.bias is None else torch.empty(cols, dtype=norm.bias.dtype, device=x.device)
    arguments = (
        rows,
        cols,
        *_matrix(dy),
        *_matrix(x),
        rstd.data_ptr(),
        _address(mean),
        _address(weight),
        0 if weight is None else INPUT_TYPES[weight.dtype],
        norm.offset,
        dx.data_ptr(),
        _address(dweight),
        _address(dbias),
        0 if dbias is None else INPUT_TYPES[dbias.dtype],
        cuda.processors(x.device),
    )
    workspace = torch.empty(_cuda.norm_backward_workspace(arguments), dtype=torch.uint8, device=x.device)
    with cuda.on(x.device):
        error = _cuda.norm_backward(arguments, workspace.data_ptr(), cuda.stream(x.device))
    cuda.check(error, "norm_backward")
    return dx, dweight, dbias


def _matrix(x: Tensor) -> tuple[int, int, int]:
    """Address, type and elements from row to row."""
    return x.data_ptr(), INPUT_TYPES[x.dtype], x.stride(0)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
