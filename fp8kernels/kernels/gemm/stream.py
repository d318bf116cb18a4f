"""gemm for few rows of x, as when one token after the other is made: the compiled kernels of csrc/gemm_stream.

method  w is read once, decoded in registers and multiplied as fp16, which holds every value of the three formats; K is
        cut over blocks until all multiprocessors read. See README.md
limits  sm_80 and newer; 64 rows of x at most, any formats, one scale for each tensor or row; codes of w that are
        K-major. Rows that do not start every 16 bytes are read word by word
equal   within the bound of docs/NUMERICS.md; the same bits in every run
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import Quantized
from . import PLAIN, Epilogue, Operand
from .cuda import LARGEST, NUMBERS, elsewhere, launched, scales

MOST_ROWS = 64  # of x: kStreamRows of csrc/gemm_stream/stream.h; beyond it the tensor cores are the limit, not memory


def why_not(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> str | None:
    """Why these arguments cannot run here, or None."""
    reason = elsewhere(x, w, bias, epilogue)
    return reason or unfit(x, w, bias, out_dtype, epilogue)


def unfit(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue) -> str | None:
    """What of the arguments, wherever they are, the kernel does not take; or None."""
    if x.codes.shape[0] > MOST_ROWS:
        return f"x has {x.codes.shape[0]} rows: this kernel takes {MOST_ROWS} at most"
    for name, operand in (("x", x), ("w", w)):
        if operand.codes.dtype != torch.uint8 or operand.scale.dtype != torch.float32:
            return f"{name} is {operand.codes.dtype} with {operand.scale.dtype} scales: it takes uint8 with fp32"
        if max(operand.codes.shape) > LARGEST:
            return f"{name} is {list(operand.codes.shape)}: this kernel takes sizes up to {LARGEST}"
    if w.codes.stride(1) != 1 and w.codes.shape[1] > 1:
        return f"w's codes have strides {list(w.codes.stride())}: this kernel reads rows whose elements are neighbours"
    if scales(x, w) != "rows":
        return (
            f"the scales are {list(x.scale.shape)} and {list(w.scale.shape)}: "
            "this kernel takes one for each tensor or row"
        )
    residual = None if epilogue.residual is None else epilogue.residual.dtype
    for name, dtype in (("out", out_dtype), ("bias", None if bias is None else bias.dtype), ("residual", residual)):
        if dtype is not None and dtype not in NUMBERS:
            return f"{name} is {dtype}: this kernel takes fp32, bf16 and fp16"
    if epilogue.rounding is not None and (epilogue.scale is None or epilogue.rounding.block.name != "tensor"):
        return "codes of the result need one scale that is given, as in delayed scaling"
    return None


def gemm(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> Tensor | Quantized:
    """activation(x[M, K] @ w[N, K].T + bias) + residual, or codes of it; see reference.py for every argument."""
    if x.codes.stride(1) != 1 and x.codes.shape[1] > 1:
        x = x._replace(codes=x.codes.contiguous())
    return launched("gemm_stream", x, w, bias, out_dtype, epilogue)
