"""act_backward in Triton: NVIDIA GPUs from sm_80 on, AMD's gfx950, and CPU tensors in Triton's interpreter.

method  one pass: dy, x and other are read once, dx and dother written once
limits  tensors whose rows are not contiguous are copied first
equal   to the reference up to the error of exp and erf, and the rounding to the dtypes of x and other
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..act_quantize.triton_jit import why_not_other
from ..gemm import ACTIVATIONS
from ..quantize.tile.triton_jit import Source, activate, sigmoid
from ..quantize.triton_jit import INPUT_TYPES, pow2, row_stride, tile_at, with_plain_rows
from ..triton_jit import jit, round_to, to_fp32, triton
from ..triton_jit import why_not as why_not_here

if triton is not None:
    import triton.language as tl

WARPS = 4
TILE = 1024  # elements, 8 a thread of each of up to three tensors


def why_not(dy: Tensor, x: Tensor, other: Tensor | None, activation: str) -> str | None:
    """Why these arguments cannot run here, or None."""
    reason = why_not_here({"dy": dy, "x": x})
    if reason is not None:
        return reason
    for name, tensor in (("dy", dy), ("x", x)):
        if tensor.dtype not in INPUT_TYPES:
            return f"{name} is {tensor.dtype}: this kernel takes fp32, bf16 and fp16"
    return why_not_other(x, other)


def act_backward(dy: Tensor, x: Tensor, other: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and other; see reference.py for every argument."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dother = None if other is None else torch.empty(other.shape, dtype=other.dtype, device=x.device)
    if x.numel() == 0:
        return dx, dother
    dy, x = with_plain_rows(dy), with_plain_rows(x)
    source = Source(x, row_stride(x))
    if other is not None:
        other = with_plain_rows(other)
        source = source._replace(other=other, other_stride=row_stride(other))
    rows, cols = x.shape
    dy_stride = row_stride(dy)
    if {cols} == {dy_stride, source.stride, source.other_stride or cols}:
        rows, cols = 1, rows * cols  # one long row
    width = min(TILE, pow2(cols))
    height = min(TILE // width, pow2(rows))
    with torch.cuda.device_of(x):
        act_backward_kernel[(triton.cdiv(rows, height) * triton.cdiv(cols, width),)](
            dy, dy_stride, source, dx, dother, rows, cols,
            ACTIVATION=ACTIVATIONS.index(activation), TILE_ROWS=height, TILE_COLS=width, num_warps=WARPS,
        )  # fmt: skip
    return dx, dother


@jit
def act_backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, dy_stride, source, dx_ptr, dother_ptr, rows, cols,
    ACTIVATION: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """One program a tile."""
    row, col, mask = tile_at(tl.program_id(0), rows, cols, TILE_ROWS, TILE_COLS)
    dy = to_fp32(tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0))
    x = to_fp32(tl.load(source.x + row[:, None] * source.stride + col[None, :], mask=mask, other=0.0))
    out = row[:, None] * cols + col[None, :]
    if source.other is not None:
        at = row[:, None] * source.other_stride + col[None, :]
        other = to_fp32(tl.load(source.other + at, mask=mask, other=0.0))
        dother = dy * activate(x, ACTIVATION)
        tl.store(dother_ptr + out, round_to(dother, dother_ptr.dtype.element_ty), mask=mask)
        dy = dy * other
    tl.store(dx_ptr + out, round_to(dy * slope(x, ACTIVATION), dx_ptr.dtype.element_ty), mask=mask)


@jit
def slope(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The derivative of the activation at x, fp32; ACTIVATION is the place in kernels.gemm.ACTIVATIONS."""
    if ACTIVATION == 1:
        y = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == 2:
        s = sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == 3:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * density
    else:  # x * sigmoid(u), by the product rule
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        s = sigmoid(u)
        y = s + x * s * (1.0 - s) * (1.5957691216057308 + 0.2140644488 * x * x)
    return y
