"""linear: quantize x and multiply with codes, in one call of the dispatcher; for layers that hold codes only.

At batch 1 the product of a small layer takes less time than two trips through the dispatcher.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..formats import get_format
from ..kernels.compiled import EMULATED
from ..kernels.gemm import Operand
from ..kernels.linear import cpu
from ..kernels.triton_jit import INTERPRETED
from ..scaling.block import get_block
from . import check
from .gemm import run_gemm
from .library import register
from .quantize import rounding_of, run_quantize
from .table import BACKEND_VARIABLE

IN_ONE_CALL = not (EMULATED or INTERPRETED)  # else other kernels come first on CPU tensors too


def _linear(
    x: Tensor,
    x_scale: Tensor,
    x_fmt: str,
    x_block: str,
    target: float,
    power_of_two: bool,
    w: Tensor,
    w_scale: Tensor,
    w_fmt: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """decode(quantize(x))[..., K] @ decode(w)[N, K].T + bias: quantize and gemm, each by the kernel of its own table.

    On CPU cores, where those two would run as well, few rows take the one call of kernels/linear: the same bits.

    x_scale  fp32 [1, 1] with x_block "tensor": a static scale, or 0. Other blocks take each block's own amax
    """
    if x.is_cpu and IN_ONE_CALL and os.environ.get(BACKEND_VARIABLE, "cpu") == "cpu":
        how = rounding_of(x_fmt, x_block, target, 0, power_of_two, True, None)
        scale = x_scale if x_block == "tensor" else None
        args = (x.reshape(check.matrix_shape(x)), scale, how, Operand(w, w_scale, get_format(w_fmt)), bias, out_dtype)
        if cpu.why_not(*args) is None:
            return cpu.linear(*args).view(*x.shape[:-1], w.shape[0])
    if x_block != "tensor":
        x_scale = torch.zeros(get_block(x_block).grid(*check.matrix_shape(x)), dtype=torch.float32, device=x.device)
    q = run_quantize(x, x_scale, x_fmt, x_block, target, 0, power_of_two, True, False)
    return run_gemm(q.codes.view(x.shape), q.scale, x_fmt, w, w_scale, w_fmt, bias, out_dtype)


def _fake(
    x: Tensor,
    x_scale: Tensor,
    x_fmt: str,
    x_block: str,
    target: float,
    power_of_two: bool,
    w: Tensor,
    w_scale: Tensor,
    w_fmt: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype)


register(
    "linear(Tensor x, Tensor x_scale, str x_fmt, str x_block, float target, bool power_of_two, "
    "Tensor w, Tensor w_scale, str w_fmt, Tensor? bias, ScalarType out_dtype) -> Tensor",
    _linear,
    _fake,
)
