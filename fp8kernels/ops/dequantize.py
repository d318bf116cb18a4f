"""The verb dequantize: codes and scales back to numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import get_format
from ..scaling.qtensor import QTensor
from . import check
from .library import register
from .table import choose


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale, one fp32 product rounded once to `dtype`.

    q        QTensor of any shape, also empty or transposed
    returns  fp32, bf16 or fp16, the shape of the codes
    raises   TypeError for other dtypes
    """
    check.one_of("dequantize", "dtype", dtype, check.FLOATS)
    return q.dequantize(dtype)


def _dequantize(codes: Tensor, scale: Tensor, fmt: str, out_dtype: torch.dtype) -> Tensor:
    if not codes.numel():
        return codes.new_empty(codes.shape, dtype=out_dtype)
    matrix = codes.reshape(check.matrix_shape(codes))  # [M, K]
    args = (matrix, scale, get_format(fmt), out_dtype)
    out: Tensor = choose("dequantize", *args).run(*args)
    return out.reshape(codes.shape)


def _fake(codes: Tensor, scale: Tensor, fmt: str, out_dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=out_dtype)


register("dequantize(Tensor codes, Tensor scale, str fmt, ScalarType out_dtype) -> Tensor", _dequantize, _fake)
