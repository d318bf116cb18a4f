"""The verb fake_quantize: quantize and dequantize in one, with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import Format, get_format
from ..scaling.block import Block, get_block
from . import check
from .library import LIBRARY, register
from .quantize import given_scale, run_quantize


def fake_quantize(
    x: Tensor,
    fmt: Format | str,
    *,
    block: Block | str = "tensor",
    scale: Tensor | float | None = None,
    target: float | None = None,
    margin: int = 0,
    power_of_two: bool = False,
    clip_gradient: bool = False,
) -> Tensor:
    """The numbers that x's codes stand for, in x's own dtype, as a differentiable function of x.

    Arguments as for `quantize`; overflow saturates.

    gradient  straight through; with `clip_gradient` it is zero where x overflowed the format
    source    Bengio et al. 2013, arXiv 1308.3432 (straight-through estimator)
    """
    fmt, block = get_format(fmt), get_block(block)
    check.float_tensor(x, "fake_quantize")
    grid = block.grid(*check.matrix_shape(x))
    given = torch.zeros(grid, dtype=torch.float32, device=x.device) if scale is None else given_scale(scale, grid, x)
    target = fmt.target if target is None else float(target)
    out: Tensor = torch.ops.fp8kernels.fake_quantize(
        x, given, fmt.name, block.name, target, margin, power_of_two, clip_gradient
    )[0]
    return out


def _fake_quantize(
    x: Tensor, scale: Tensor, fmt: str, block: str, target: float, margin: int, power_of_two: bool, clip: bool
) -> tuple[Tensor, Tensor]:
    out = run_quantize(x, scale, fmt, block, target, margin, power_of_two, True, False)
    decoded = torch.ops.fp8kernels.dequantize(out.codes, out.scale, fmt, x.dtype).reshape(x.shape)
    if not clip:
        return decoded, x.new_empty(0, dtype=torch.bool)
    unit = torch.ops.fp8kernels.dequantize(out.codes, torch.ones_like(out.scale), fmt, torch.float32)
    return decoded, (unit.abs() < get_format(fmt).max).reshape(x.shape)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if args[-1] else 0, dtype=torch.bool)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.clip = inputs[-1]
    if ctx.clip:
        ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    if ctx.clip:
        grad = torch.where(ctx.saved_tensors[0], grad, 0.0)
    return grad, None, None, None, None, None, None, None


register(
    "fake_quantize(Tensor x, Tensor scale, str fmt, str block, float target, int margin, bool power_of_two, bool clip)"
    " -> (Tensor, Tensor)",
    _fake_quantize,
    _fake,
)
torch.library.register_autograd("fp8kernels::fake_quantize", _backward, setup_context=_setup_context, lib=LIBRARY)
