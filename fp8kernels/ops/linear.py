"""linear: quantize x and multiply with codes, in one call of the dispatcher; for layers that hold codes only.

At batch 1 the product of a small layer takes less time than two trips through the dispatcher.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..formats import get_format
from ..kernels.gemm import Operand
from ..kernels.quantize import Rounding
from ..scaling.block import get_block
from .library import register
from .table import choose


@functools.lru_cache(maxsize=256)  # a model has few
def _rounding(fmt: str, block: str, target: float, power_of_two: bool) -> Rounding:
    return Rounding(get_format(fmt), get_block(block), target, 0, power_of_two)


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

    x_scale  fp32 [1, 1] with x_block "tensor": a static scale, or 0. Other blocks take each block's own amax
    """
    depth = x.shape[-1]
    matrix = x.reshape(x.numel() // depth if depth else 0, depth)  # [M, K]
    if not matrix.numel() or not w.shape[0]:
        out = x.new_zeros((*x.shape[:-1], w.shape[0]), dtype=out_dtype)
        return out if bias is None else out + bias.to(out_dtype)
    how = _rounding(x_fmt, x_block, target, power_of_two)
    if x_block != "tensor":
        x_scale = torch.zeros(how.block.grid(*matrix.shape), device=x.device)
    codes = choose("quantize", matrix, x_scale, how).run(matrix, x_scale, how)
    args = (Operand(codes.codes, codes.scale, how.fmt), Operand(w, w_scale, get_format(w_fmt)), bias, out_dtype)
    product: Tensor = choose("gemm", *args).run(*args)  # [M, N]
    return product.view(*x.shape[:-1], w.shape[0])


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
