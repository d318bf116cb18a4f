"""linear on CPU cores: the compiled quantize and gemm of csrc, with the codes between them in a scratch buffer.

method  one call from Python in place of two, and no tensors for codes, scales, amax and counts of x
limits  what kernels/quantize/cpu.py and kernels/gemm/cpu.py take; x of few rows, because the scratch is kept
equal   the bits of kernels/quantize/cpu.py followed by kernels/gemm/cpu.py
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from ..compiled import load
from ..gemm import Operand
from ..gemm.cpu import SUMS
from ..quantize import Rounding
from ..quantize.cpu import INPUT_TYPES

_cpu, MISSING = load("_cpu")

MOST_ROWS = 32  # of x; from here on two calls of Python are a small part of the product
_local = threading.local()  # .workspace: a uint8 tensor that grows to the largest product a thread has made


def why_not(
    x: Tensor, scale: Tensor | None, how: Rounding, w: Operand, bias: Tensor | None, out_dtype: torch.dtype
) -> str | None:
    """Why these arguments cannot run here, or None; what the two verbs refuse is refused here too."""
    if _cpu is None:
        return MISSING
    if not (x.is_cpu and w.codes.is_cpu and w.scale.is_cpu and (scale is None or scale.is_cpu)):
        return "a tensor is not on the CPU"
    rows, depth = x.shape
    if not 0 < rows <= MOST_ROWS or not depth or not w.codes.shape[0]:
        return f"x is [{rows}, {depth}]: this kernel takes 1 to {MOST_ROWS} rows that are not empty"
    if w.codes.shape[1] != depth:
        return f"x {list(x.shape)} and w {list(w.codes.shape)} do not multiply"
    if x.dtype not in INPUT_TYPES or x.layout != torch.strided or x.is_conj():
        return f"x is {x.dtype}, {x.layout}: this kernel takes strided fp32, bf16 and fp16"
    if w.codes.dtype != torch.uint8 or not w.codes.is_contiguous() or w.scale.dtype != torch.float32:
        return "w is not contiguous uint8 with fp32 scales"
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        return f"scale is {scale.dtype} of shape {list(scale.shape)}: it is one fp32 number, or None"
    if out_dtype not in SUMS or not (bias is None or (bias.is_cpu and bias.dtype in SUMS)):
        return "bias and out are fp32 or bf16 on the CPU"
    if how.carrier is not None or not how.saturate or how.margin:
        return "this kernel saturates, without carrier and margin"
    step = math.gcd(depth // how.block.grid(rows, depth)[1], depth // w.scale.shape[1])
    if step % 2 and step != depth:
        return f"the scales change every {step} elements of K: this kernel takes even numbers, or all of K"
    return None


def linear(
    x: Tensor, scale: Tensor | None, how: Rounding, w: Operand, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """decode(quantize(x))[M, K] @ decode(w)[N, K].T + bias.

    scale    the one scale of x, 0 or None where each block takes the scale of its own amax
    returns  [M, N] of out_dtype
    """
    (rows, depth), cols = x.shape, w.codes.shape[0]
    if x.stride(1) != 1 and depth > 1:
        x = x.contiguous()
    w_scale = w.scale.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    out = torch.empty(rows, cols, dtype=out_dtype)
    left = (
        x.data_ptr(), INPUT_TYPES[x.dtype], rows, depth, x.stride(0) if rows > 1 else depth,
        *how.block.grid(rows, depth), 0 if scale is None else scale.data_ptr(), how.fmt.code_id, how.target,
        how.power_of_two,
    )  # fmt: skip
    right = (w.codes.data_ptr(), depth, 1, w.fmt.code_id, w_scale.data_ptr(), *w_scale.shape, cols)
    while True:
        workspace = getattr(_local, "workspace", None)
        needed = _cpu.linear(
            left,
            right,
            0 if bias is None else bias.data_ptr(),
            bias is not None and bias.dtype == torch.bfloat16,
            out.data_ptr(),
            out_dtype == torch.bfloat16,
            torch.get_num_threads(),
            0 if workspace is None else workspace.data_ptr(),
            0 if workspace is None else workspace.numel(),
        )
        if needed == 0:
            return out
        _local.workspace = torch.empty(needed, dtype=torch.uint8)
