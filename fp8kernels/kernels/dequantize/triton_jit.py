"""dequantize in Triton: NVIDIA GPUs from sm_80 on, AMD's gfx950, and CPU tensors in Triton's interpreter.

method  tiles that read one byte, write two or four, and decode by integer arithmetic in between
limits  codes whose rows are not contiguous are copied first
equal   to the reference to the bit: one fp32 product, rounded once to the type of out
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ..quantize.triton_jit import pow2, row_stride, tile_at, with_plain_rows
from ..triton_jit import decode, jit, round_to, triton
from ..triton_jit import why_not as why_not_here

if triton is not None:
    import triton.language as tl

OUTPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4
TILE = 2048  # elements, 16 a thread: each reads 16 bytes at once


def why_not(codes: Tensor, scale: Tensor, fmt: Format, out_dtype: torch.dtype) -> str | None:
    """Why these arguments cannot run here, or None."""
    reason = why_not_here({"codes": codes, "scale": scale})
    if reason is not None:
        return reason
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
    return dequantize_into(codes, scale, fmt, torch.empty(codes.shape, dtype=out_dtype, device=codes.device))


def dequantize_into(codes: Tensor, scale: Tensor, fmt: Format, out: Tensor) -> Tensor:
    """The same into `out`, fp32, bf16 or fp16 [M, K], contiguous."""
    rows, cols = codes.shape
    if out.numel() == 0:
        return out
    grid_rows, grid_cols = scale.shape
    if grid_rows == 0 or grid_cols == 0 or rows % grid_rows or cols % grid_cols:
        raise ValueError(f"scale {list(scale.shape)} does not divide codes {list(codes.shape)} into equal blocks")
    codes = with_plain_rows(codes)
    stride = row_stride(codes)
    if grid_rows == grid_cols == 1 and stride == cols:
        rows, cols, stride = 1, rows * cols, rows * cols  # one long row
    patch_rows, patch_cols = rows // grid_rows, cols // grid_cols
    # a tile lies within one patch from left to right, so that a row of it has one scale
    width = min(TILE, pow2(cols) if grid_cols == 1 else patch_cols & -patch_cols)
    height = min(TILE // width, pow2(rows))
    with torch.cuda.device_of(codes):
        dequantize_kernel[(triton.cdiv(rows, height) * triton.cdiv(cols, width),)](
            codes, scale.contiguous(), out, rows, cols, stride, patch_rows, patch_cols,
            FMT=fmt.code_id, TILE_ROWS=height, TILE_COLS=width, num_warps=WARPS,
        )  # fmt: skip
    return out


@jit
def dequantize_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, scale_ptr, out_ptr, rows, cols, stride, patch_rows, patch_cols,
    FMT: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """One program a tile."""
    row, col, mask = tile_at(tl.program_id(0), rows, cols, TILE_ROWS, TILE_COLS)
    codes = tl.load(codes_ptr + row[:, None] * stride + col[None, :], mask=mask, other=0)
    across = cols // patch_cols
    first = tl.program_id(0) % tl.cdiv(cols, TILE_COLS) * TILE_COLS // patch_cols
    scale = tl.load(scale_ptr + row // patch_rows * across + first, mask=row < rows, other=1.0)  # [TILE_ROWS]
    y = decode(codes, FMT) * scale[:, None]
    tl.store(out_ptr + row[:, None] * cols + col[None, :], round_to(y, out_ptr.dtype.element_ty), mask=mask)
