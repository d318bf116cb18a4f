"""gemm on CPU cores: the compiled kernels of csrc/gemm (AVX-512 BF16, AVX2 or plain C++, chosen at run time).

method  codes are decoded while they are packed for the registers, so no decoded matrix exists; x of few rows streams
        w instead. README.md tells the ideas and what each brought
limits  CPU tensors, fp32 or bf16 out, no epilogue; neighbouring elements of K that share both scales come in even
        numbers, unless that is all of K
equal   within (K + 2) * 2**-24 * |x| @ |w|.T + u_out * |out| of the reference, the same bits for any number of threads
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from ..compiled import load
from . import PLAIN, Epilogue, Operand

_cpu, MISSING = load("_cpu")

SUMS = (torch.float32, torch.bfloat16)  # of out and bias
_local = threading.local()  # .workspace: a uint8 tensor that grows to the largest product a thread has made


def why_not(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if _cpu is None:
        return MISSING
    if epilogue is not PLAIN and not epilogue.is_plain:
        return "there is an epilogue: this kernel writes plain products"
    tensors = [("x", x.codes), ("x's scale", x.scale), ("w", w.codes), ("w's scale", w.scale)]
    for name, tensor in tensors if bias is None else [*tensors, ("bias", bias)]:
        if not tensor.is_cpu:
            return f"{name} is on {tensor.device}: this kernel takes CPU tensors"
    for name, operand in (("x", x), ("w", w)):
        if operand.codes.dtype != torch.uint8 or operand.scale.dtype != torch.float32:
            return f"{name} is {operand.codes.dtype} with {operand.scale.dtype} scales: it takes uint8 with fp32"
    if out_dtype not in SUMS:
        return f"out would be {out_dtype}: this kernel makes fp32 and bf16"
    if bias is not None and bias.dtype not in SUMS:
        return f"bias is {bias.dtype}: this kernel takes fp32 and bf16"
    depth = x.codes.shape[1]
    step = math.gcd(depth // x.scale.shape[1], depth // w.scale.shape[1]) if depth else 0
    if step % 2 and step != depth:
        return f"the scales change every {step} elements of K: this kernel takes even numbers, or all of K"
    return None


def gemm(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN) -> Tensor:
    """x[M, K] @ w[N, K].T + bias, summed in fp32; see reference.py for every argument.

    Codes whose rows or columns are contiguous are read where they lie; others are copied first.
    """
    (m, k), n = x.codes.shape, w.codes.shape[0]
    out = torch.empty(m, n, dtype=out_dtype)
    bias = None if bias is None else bias.detach().contiguous()
    x, w = _readable(x), _readable(w)
    while True:
        workspace = getattr(_local, "workspace", None)
        needed = _cpu.gemm(
            _described(x),
            _described(w),
            (m, n, k),
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


def _readable(operand: Operand) -> Operand:
    """The operand with one stride of its codes being 1, and contiguous scales."""
    codes = operand.codes
    if 1 not in codes.stride():
        codes = codes.contiguous()
    return Operand(codes, operand.scale.detach().contiguous(), operand.fmt)


def _described(operand: Operand) -> tuple[int, ...]:
    """What csrc/gemm/gemm.h wants of an operand; the tensors stay alive with the caller."""
    codes, scale, fmt = operand
    return (codes.data_ptr(), *codes.stride(), fmt.code_id, scale.data_ptr(), *scale.shape)
