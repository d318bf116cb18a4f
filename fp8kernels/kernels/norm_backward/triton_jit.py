"""norm_backward in Triton: NVIDIA GPUs from sm_80 on, AMD's gfx950, and CPU tensors in Triton's interpreter.

method  programs that stay and take row after row: dy and x are read once, dx is written once, and the sums of dweight
        and dbias stay in registers until the end; one row of partial sums a program is then added up by torch
limits  rows of up to LARGEST_ROW elements; tensors whose rows are not contiguous are copied first
equal   to the reference up to the order of the sums and the rounding to the dtypes of x, weight and bias
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm_quantize import Norm
from ..norm_quantize.triton_jit import mean_of, rows_at, why_not_norm, with_vectors
from ..quantize.tile.triton_jit import Source
from ..quantize.triton_jit import INPUT_TYPES, pow2, row_stride, with_plain_rows
from ..triton_jit import jit, processors, round_to, to_fp32, triton
from ..triton_jit import why_not as why_not_here

if triton is not None:
    import triton.language as tl

LARGEST_ROW = {"RMSNorm": 16384, "LayerNorm": 8192}  # elements that stay in registers with the sums over rows
TILE = 2048  # elements, where rows are shorter than that
PROGRAMS = 2  # for each multiprocessor: each leaves a row of partial sums


def why_not(dy: Tensor, x: Tensor, rstd: Tensor, mean: Tensor | None, norm: Norm) -> str | None:
    """Why these arguments cannot run here, or None."""
    reason = why_not_here({"dy": dy, "x": x, "rstd": rstd, "mean": mean})
    if reason is not None:
        return reason
    for name, tensor in (("dy", dy), ("x", x)):
        if tensor.dtype not in INPUT_TYPES:
            return f"{name} is {tensor.dtype}: this kernel takes fp32, bf16 and fp16"
    kind = "LayerNorm" if norm.center or norm.bias is not None else "RMSNorm"
    if x.shape[1] > LARGEST_ROW[kind]:
        return (
            f"rows have {x.shape[1]} elements: this kernel keeps one in registers, up to {LARGEST_ROW[kind]} ({kind})"
        )
    return why_not_norm(x, norm)


def norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, mean: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias; see reference.py for every argument."""
    rows, cols = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = pow2(max(cols, 1))
    height = min(max(1, TILE // width), pow2(max(rows, 1)))
    groups = triton.cdiv(rows, height)
    programs = min(groups, PROGRAMS * processors(x.device))
    dweight = None if norm.weight is None else torch.empty(programs, cols, dtype=torch.float32, device=x.device)
    dbias = None if norm.bias is None else torch.empty(programs, cols, dtype=torch.float32, device=x.device)
    if x.numel() != 0:
        dy, x = with_plain_rows(dy), with_plain_rows(x)
        source = with_vectors(Source(x, row_stride(x), rstd=rstd, mean=mean), norm)
        with torch.cuda.device_of(x):
            norm_backward_kernel[(programs,)](
                dy, row_stride(dy), source, dx, dweight, dbias, rows, cols, groups,
                TILE_ROWS=height, TILE_COLS=width, num_warps=16 if width > 4096 else 8,
            )  # fmt: skip
    return dx, total(dweight, norm.weight), total(dbias, norm.bias)


def total(partial: Tensor | None, vector: Tensor | None) -> Tensor | None:
    """The partial sums [programs, K] added up, in the dtype of the vector that they are the gradient of."""
    return None if partial is None or vector is None else partial.sum(0).to(vector.dtype)


@jit
def norm_backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, dy_stride, source, dx_ptr, dweight_ptr, dbias_ptr, rows, cols, groups,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - z * mean(g * z)) with g = dy * weight, row by row; and the sums over rows."""
    dweight = tl.zeros([TILE_COLS], tl.float32)
    dbias = tl.zeros([TILE_COLS], tl.float32)
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        row, col, mask = rows_at(group, rows, cols, TILE_ROWS, TILE_COLS)
        dy = to_fp32(tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0))
        x = to_fp32(tl.load(source.x + row[:, None] * source.stride + col[None, :], mask=mask, other=0.0))
        rstd = tl.load(source.rstd + row, mask=row < rows, other=0.0)[:, None]
        if source.mean is not None:
            x = tl.where(mask, x - tl.load(source.mean + row, mask=row < rows, other=0.0)[:, None], 0.0)
        z = x * rstd
        if source.weight is not None:
            dweight += tl.sum(dy * z, axis=0)
        if source.bias is not None:
            dbias += tl.sum(dy, axis=0)
        if source.weight is not None:
            weight = to_fp32(tl.load(source.weight + col, mask=col < cols, other=0.0)) + source.offset
            dy = dy * weight[None, :]
        dx = dy - z * mean_of(tl.sum(dy * z, axis=1), cols)[:, None]
        if source.mean is not None:
            dx = dx - mean_of(tl.sum(dy, axis=1), cols)[:, None]
        out = row[:, None] * cols + col[None, :]
        tl.store(dx_ptr + out, round_to(dx * rstd, dx_ptr.dtype.element_ty), mask=mask)
    at = tl.arange(0, TILE_COLS)
    partial = tl.program_id(0) * cols + at
    if source.weight is not None:
        tl.store(dweight_ptr + partial, dweight, mask=at < cols)
    if source.bias is not None:
        tl.store(dbias_ptr + partial, dbias, mask=at < cols)
