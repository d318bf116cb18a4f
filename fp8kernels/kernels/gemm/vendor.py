"""gemm by the vendor's library on NVIDIA GPUs: cuBLASLt, or CUTLASS for row scales on some, through torch._scaled_mm.

method  the library multiplies E4M3 and E5M2 codes on the tensor cores; N and K are padded here to multiples of 16. A
        tensor with one scale has it in every row where the other has row scales
limits  sm_89 and newer; tensor and row scales; one operand E4M3; no activation, residual or codes. The scales are
        multiplied in fp32: their products, and those with the sums, have to lie in its range
equal   within the bound of docs/NUMERICS.md for FP8 tensor cores: without fast accumulation (kernels.gemm:
        fast_accumulation) sums move to fp32 every 128 of K on sm_90, the only GPUs that the library has this choice for
source  https://docs.nvidia.com/cuda/cublas (cublasLtMatmul, FP8); pytorch, aten/src/ATen/native/cuda/ScaledBlas.cpp
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ...formats import E5M2
from . import PLAIN, Epilogue, Operand, fast_accumulation

MULTIPLE = 16  # of N and of K that the library takes
AT_LEAST = (8, 9)
ROWWISE_IN_CUBLAS = (12, 9)  # CUDA version from which row scales are cuBLASLt's on sm_90; CUTLASS writes bf16 only
OUT = (torch.bfloat16, torch.float16, torch.float32)


def why_not(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.codes.is_cpu:
        return "x is on the CPU: this is the library for NVIDIA GPUs, CPU tensors are for the cpu kernel"
    for name, tensor in (
        ("x", x.codes),
        ("x's scale", x.scale),
        ("w", w.codes),
        ("w's scale", w.scale),
        ("bias", bias),
    ):
        if tensor is not None and (not tensor.is_cuda or tensor.device != x.codes.device):
            return f"{name} is on {tensor.device}: the library takes tensors on one CUDA device"
    if epilogue is not PLAIN and not epilogue.is_plain:
        return "there is an epilogue: the library adds a bias and nothing else"
    return unfit(x, w, bias, out_dtype) or why_not_device(
        x.codes.get_device(), out_dtype, rowwise=x.scale.shape[0] > 1 or w.scale.shape[0] > 1
    )


def unfit(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> str | None:
    """Why the library does not take these formats, scales and dtypes on any device, or None."""
    for name, operand in (("x", x), ("w", w)):
        if operand.fmt.carrier is None:
            return f"{name} is {operand.fmt.name}: the library takes e4m3 and e5m2 (HiF8 through its carrier)"
        if operand.codes.dtype != torch.uint8 or operand.scale.dtype != torch.float32:
            return f"{name} is {operand.codes.dtype} with {operand.scale.dtype} scales: it takes uint8 with fp32"
        rows = operand.codes.shape[0]
        if operand.scale.shape[1] != 1 or operand.scale.shape[0] not in (1, rows):
            return f"{name} has a grid {list(operand.scale.shape)} of scales: this takes one for all or one a row"
    if x.fmt is E5M2 and w.fmt is E5M2:
        return "both operands are e5m2: the library takes that with e4m3 only"
    if out_dtype not in OUT:
        return f"out would be {out_dtype}: the library writes bf16, fp16 and fp32"
    if bias is not None and out_dtype != torch.float32 and bias.dtype != out_dtype:
        return f"bias is {bias.dtype} and out {out_dtype}: the library adds a bias of out's dtype"
    return None


@functools.cache
def why_not_device(device: int, out_dtype: torch.dtype, *, rowwise: bool) -> str | None:
    """Why a device's library does not write that dtype under such scales, or None."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm: the line is written for NVIDIA's library"
    return why_not_capability(torch.cuda.get_device_capability(device), torch.version.cuda, out_dtype, rowwise=rowwise)


def why_not_capability(
    capability: tuple[int, int], cuda: str | None, out_dtype: torch.dtype, *, rowwise: bool
) -> str | None:
    """The same by what decides it: the compute capability and the CUDA version of torch."""
    if capability < AT_LEAST:
        return f"the GPU is sm_{capability[0]}{capability[1]}: FP8 needs sm_{AT_LEAST[0]}{AT_LEAST[1]} or newer"
    if rowwise and out_dtype != torch.bfloat16:
        version = tuple(int(part) for part in (cuda or "0.0").split(".")[:2])
        if capability[0] != 9 or version < ROWWISE_IN_CUBLAS:
            return f"out would be {out_dtype} under row scales: the library writes bf16 there but for sm_90, CUDA 12.9"
    return None


def gemm(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN) -> Tensor:
    """x[M, K] @ w[N, K].T + bias; see reference.py for every argument."""
    m, n = x.codes.shape[0], w.codes.shape[0]
    added = bias.detach() if bias is not None and out_dtype != torch.float32 else None  # fp32 takes none: added below
    extra = -n % MULTIPLE
    if x.scale.shape[0] == w.scale.shape[0] == 1:
        x_scale, w_scale = x.scale, w.scale  # [1, 1]
    else:
        x_scale = x.scale.expand(m, 1).contiguous()  # [M, 1]
        w_scale = F.pad(w.scale.expand(n, 1), (0, 0, 0, extra), value=1.0).t()  # [1, N padded]
    out = torch._scaled_mm(
        padded(x, 0),
        padded(w, extra).t(),
        scale_a=x_scale,
        scale_b=w_scale,
        bias=added if added is None else F.pad(added, (0, extra)),
        out_dtype=out_dtype,
        use_fast_accum=fast_accumulation(),
    )[:, :n]  # [M, N]
    if bias is not None and added is None:
        out.add_(bias.detach())
    return out.contiguous()


def padded(operand: Operand, extra_rows: int) -> Tensor:
    """The codes as torch's 8-bit dtype, K innermost and a multiple of 16; what is added is code 0, which is zero."""
    codes, extra = operand.codes, -operand.codes.shape[1] % MULTIPLE
    codes = F.pad(codes, (0, extra, 0, extra_rows)) if extra or extra_rows else codes.contiguous()
    carrier = operand.fmt.carrier
    assert carrier is not None
    return codes.view(carrier)
