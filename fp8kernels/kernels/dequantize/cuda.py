"""dequantize on an NVIDIA GPU: the compiled kernel of csrc/dequantize/dequantize.cu.

method  256 values in shared memory, a copy in every bank; a look-up, a product and a conversion an element
limits  sm_80 and newer; CUDA tensors; codes whose rows are not contiguous are copied first
equal   to the reference to the bit: one fp32 product, rounded once to the type of out
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from .. import cuda
from ..compiled import load
from .cpu import OUTPUT_TYPES

_cuda, _ = load("_cuda")


def why_not(codes: Tensor, scale: Tensor, fmt: Format, out_dtype: torch.dtype) -> str | None:
    """Why these arguments cannot run here, or None."""
    reason = cuda.why_not({"codes": codes, "scale": scale})
    return unfit(codes, scale, out_dtype) if reason is None else reason


def unfit(codes: Tensor, scale: Tensor, out_dtype: torch.dtype) -> str | None:
    """What of the arguments, wherever they are, the kernel does not take; or None."""
    if codes.dtype != torch.uint8 or scale.dtype != torch.float32:
        return f"codes are {codes.dtype} and scale is {scale.dtype}: they are uint8 and fp32"
    if codes.layout != torch.strided:
        return f"codes have layout {codes.layout}: this kernel takes strided tensors"
    if out_dtype not in OUTPUT_TYPES:
        return f"out_dtype is {out_dtype}: this kernel gives fp32, bf16 and fp16"
    return None


def dequantize(codes: Tensor, scale: Tensor, fmt: Format, out_dtype: torch.dtype) -> Tensor:
    """code * scale, rounded once to `out_dtype`; see reference.py for every argument.

    raises   ValueError if the grid of scale does not divide codes; RuntimeError if the kernel did not start
    """
    return dequantize_into(codes, scale, fmt, torch.empty(codes.shape, dtype=out_dtype, device=codes.device))


def dequantize_into(codes: Tensor, scale: Tensor, fmt: Format, out: Tensor) -> Tensor:
    """The same into `out`, fp32, bf16 or fp16 [M, K], contiguous."""
    rows, cols = codes.shape
    if out.numel() == 0:
        return out
    grid_rows, grid_cols = scale.shape
    if grid_rows == 0 or grid_cols == 0 or rows % grid_rows or cols % grid_cols:
        raise ValueError(f"scale {list(scale.shape)} does not divide codes {list(codes.shape)} into equal blocks")
    if codes.stride(1) != 1 and cols > 1:
        codes = codes.contiguous()
    scale = scale.contiguous()
    with cuda.on(codes.device):
        error = _cuda.dequantize(
            codes.data_ptr(),
            rows,
            cols,
            codes.stride(0) if rows > 1 else cols,
            grid_rows,
            grid_cols,
            scale.data_ptr(),
            out.data_ptr(),
            OUTPUT_TYPES[out.dtype],
            fmt.code_id,
            cuda.processors(codes.device),
            cuda.stream(codes.device),
        )
    cuda.check(error, "dequantize")
    return out
