"""dequantize on CPU cores: the compiled kernels of csrc/dequantize (AVX-512 or plain C++, chosen at run time).

method  where many codes share a scale, the 256 products are made once and looked up; else decode and multiply
limits  CPU tensors; codes whose rows are not contiguous are copied first
equal   to the reference to the bit: one fp32 product, rounded once to the type of out
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ..compiled import load

_cpu, MISSING = load("_cpu")

OUTPUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # OutputType of csrc/dequantize/dequantize.h


def why_not(codes: Tensor, scale: Tensor, fmt: Format, out_dtype: torch.dtype) -> str | None:
    """Why these arguments cannot run here, or None."""
    if _cpu is None:
        return MISSING
    if not (codes.is_cpu and scale.is_cpu):
        return f"codes are on {codes.device} and scale on {scale.device}: this kernel takes CPU tensors"
    if codes.dtype != torch.uint8 or scale.dtype != torch.float32:
        return f"codes are {codes.dtype} and scale is {scale.dtype}: they are uint8 and fp32"
    if codes.layout != torch.strided:
        return f"codes have layout {codes.layout}: this kernel takes strided tensors"
    if out_dtype not in OUTPUT_TYPES:
        return f"out_dtype is {out_dtype}: this kernel gives fp32, bf16 and fp16"
    return None


def dequantize(codes: Tensor, scale: Tensor, fmt: Format, out_dtype: torch.dtype) -> Tensor:
    """code * scale, rounded once to `out_dtype`; see reference.py for every argument.

    raises   ValueError if the grid of scale does not divide codes
    """
    return dequantize_into(codes, scale, fmt, torch.empty(codes.shape, dtype=out_dtype))


def dequantize_into(codes: Tensor, scale: Tensor, fmt: Format, out: Tensor) -> Tensor:
    """The same into `out`, fp32, bf16 or fp16 [M, K], contiguous; a large fresh tensor costs more than filling it."""
    rows, cols = codes.shape
    if out.numel() == 0:
        return out
    grid_rows, grid_cols = scale.shape
    if grid_rows == 0 or grid_cols == 0 or rows % grid_rows or cols % grid_cols:
        raise ValueError(f"scale {list(scale.shape)} does not divide codes {list(codes.shape)} into equal blocks")
    if codes.stride(1) != 1 and cols > 1:
        codes = codes.contiguous()
    scale = scale.contiguous()
    _cpu.dequantize(
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
        torch.get_num_threads(),
    )
    return out
