"""gemm on GPUs by torch's product of bf16: for what no other kernel takes, such as HiF8 where Triton is not installed.

method  the codes are decoded to bf16, which holds every value of every format; torch.mm adds their products in fp32,
        and scales and bias are applied in float64
limits  GPUs; tensor and row scales; no activation, residual or codes. A decoded operand takes two bytes an element
equal   within the bound of docs/NUMERICS.md for bf16 tensor cores
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ...formats import Format
from . import PLAIN, Epilogue, Operand

OUT = (torch.bfloat16, torch.float16, torch.float32)
AT_LEAST = (8, 0)  # compute capability whose tensor cores take bf16


def why_not(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.codes.is_cpu:
        return "x is on the CPU, whose torch has no product of bf16 that returns its fp32 sums"
    for name, tensor in (
        ("x", x.codes),
        ("x's scale", x.scale),
        ("w", w.codes),
        ("w's scale", w.scale),
        ("bias", bias),
    ):
        if tensor is not None and (not tensor.is_cuda or tensor.device != x.codes.device):
            return f"{name} is on {tensor.device}: this takes tensors on one CUDA device"
    if epilogue is not PLAIN and not epilogue.is_plain:
        return "there is an epilogue: this makes plain products"
    return unfit(x, w, out_dtype) or why_not_device(x.codes.get_device())


def unfit(x: Operand, w: Operand, out_dtype: torch.dtype) -> str | None:
    """Why these scales and dtypes cannot run on any device, or None."""
    for name, operand in (("x", x), ("w", w)):
        if operand.codes.dtype != torch.uint8 or operand.scale.dtype != torch.float32:
            return f"{name} is {operand.codes.dtype} with {operand.scale.dtype} scales: it takes uint8 with fp32"
        if operand.scale.shape[1] != 1:
            return f"{name} has a grid {list(operand.scale.shape)} of scales, which change along K: this scales sums"
    if out_dtype not in OUT:
        return f"out would be {out_dtype}: this makes bf16, fp16 and fp32"
    return None


@functools.cache
def why_not_device(device: int) -> str | None:
    """Why a device or this torch has no such product, or None."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < AT_LEAST:
        return f"the GPU is sm_{capability[0]}{capability[1]}: bf16 needs sm_{AT_LEAST[0]}{AT_LEAST[1]} or newer"
    return None


def gemm(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN) -> Tensor:
    """x[M, K] @ w[N, K].T + bias; see reference.py for every argument."""
    sums = torch.mm(decoded(x), decoded(w).t(), out_dtype=torch.float32)  # [M, N]
    return scaled(sums, x, w, bias, out_dtype)


def decoded(operand: Operand) -> Tensor:
    """The values of the codes, without their scales, in bf16; exact."""
    if operand.fmt.carrier is not None:
        return operand.codes.view(operand.fmt.carrier).to(torch.bfloat16)
    return F.embedding(operand.codes.int(), table(operand.fmt, operand.codes.device)[:, None])[..., 0]


@functools.cache
def table(fmt: Format, device: torch.device) -> Tensor:
    """The 256 values, kept on the device: a copy at every call would wait for it."""
    return fmt.table(torch.bfloat16, device)


def scaled(sums: Tensor, x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """sums * x_scale * w_scale + bias, in float64: the product of two scales may leave the range of fp32."""
    (m, n), down, across = sums.shape, x.scale.shape[0], w.scale.shape[0]
    x_scale = x.scale.double().repeat_interleave(m // down, 0)  # [M, 1]
    w_scale = w.scale.double().repeat_interleave(n // across, 0).t()  # [1, N]
    out = sums.double().mul_(x_scale).mul_(w_scale)
    if bias is not None:
        out.add_(bias.detach())
    return out.to(out_dtype)
