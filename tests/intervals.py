"""Where codes and gradients of the fused producers may lie: float64 values, and how far fp32 may be from them.

u = 2**-24. Bounds are of first order; SECOND_ORDER covers what that drops at the sizes that are tested. Sums may be
taken in any order, so a bound holds for every backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tolerance import ACTIVATION_UNITS, SMALLEST, UNIT
from torch import Tensor

from fp8kernels.kernels.act_quantize.reference import activate
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.kernels.quantize import Quantized, Rounding
from fp8kernels.kernels.quantize.reference import patches, spread

U = UNIT[torch.float32]
SECOND_ORDER = 1.01  # (K u) ** 2 and its like, relative to K u, for K up to 100,000
RSQRT_UNITS = 4  # of fp32: the addition of eps, and a reciprocal root within two last places


class Normal(NamedTuple):
    """A norm in float64, row by row, and the errors of fp32: z = (x - mean) * rstd, y = z * weight + bias."""

    y: Tensor
    z: Tensor
    rstd: Tensor
    mean: Tensor
    y_error: Tensor
    z_error: Tensor
    rstd_error: Tensor
    mean_error: Tensor


def normal(x: Tensor, norm: Norm) -> Normal:
    """x [M, K]; rstd and mean are [M, 1].

    The variance of K numbers, by two passes or by Welford's, is within (K + 4) u κ + (K u κ)**2 of itself, with
    κ**2 = mean(x**2) / variance (Chan, Golub, LeVeque 1983, The American Statistician 37, table 1). A mean square has
    κ = 1, and half of its error reaches rstd.
    """
    x = x.double()
    depth = x.shape[1]
    square = x.square().mean(1, keepdim=True)  # [M, 1]
    mean = x.mean(1, keepdim=True) if norm.center else torch.zeros_like(square)  # [M, 1]
    mean_error = depth * U * x.abs().mean(1, keepdim=True) if norm.center else torch.zeros_like(square)
    centered = x - mean  # [M, K]
    variance = centered.square().mean(1, keepdim=True)  # [M, 1]
    wrong = (depth + 4) * U * (square * variance).sqrt() + (
        depth * U
    ) ** 2 * square  # of the variance, with κ multiplied in
    rstd = (variance + norm.eps).rsqrt()  # [M, 1]
    rstd_relative = 0.5 * wrong / (variance + norm.eps) + RSQRT_UNITS * U
    z = centered * rstd  # [M, K]
    z_error = rstd * (mean_error + U * centered.abs()) + z.abs() * (rstd_relative + U)
    y, y_error = z, z_error
    if norm.weight is not None:
        weight = norm.weight.double() + norm.offset
        y, y_error = y * weight, y_error * weight.abs() + 2 * U * (y * weight).abs()
    if norm.bias is not None:
        y = y + norm.bias.double()
        y_error = y_error + U * y.abs()
    errors = [SECOND_ORDER * e for e in (y_error, z_error, rstd * rstd_relative, mean_error)]
    return Normal(y, z, rstd, mean, *errors)


def norm_gradients(dy: Tensor, x: Tensor, norm: Norm) -> tuple[list[Tensor], list[Tensor]]:
    """float64 dx, dweight and dbias, and how far fp32 may be from them before the last rounding."""
    n, dy = normal(x, norm), dy.double()
    rows, depth = x.shape
    weight = torch.ones(depth).double() if norm.weight is None else norm.weight.double() + norm.offset
    g = dy * weight  # [M, K]
    of_row = {"keepdim": True, "dim": 1}
    gz, g_mean = (g * n.z).mean(**of_row), g.mean(**of_row) * norm.center
    dx = n.rstd * (g - n.z * gz - g_mean)
    gz_error = (g.abs() * n.z_error).mean(**of_row) + (depth + 2) * U * (g * n.z).abs().mean(**of_row)
    g_error = (depth + 2) * U * g.abs().mean(**of_row) * norm.center
    inside = 4 * U * (g.abs() + (n.z * gz).abs() + g_mean.abs())
    inside = inside + n.z_error * gz.abs() + n.z.abs() * gz_error + g_error
    dx_error = n.rstd * inside + dx.abs() * n.rstd_error / n.rstd
    dweight_error = (dy.abs() * n.z_error).sum(0) + (rows + 2) * U * (dy * n.z).abs().sum(0)
    values = [dx, (dy * n.z).sum(0), dy.sum(0)]
    return values, [SECOND_ORDER * e for e in (dx_error, dweight_error, (rows + 2) * U * dy.abs().sum(0))]


def active(x: Tensor, other: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """float64 activation(x) * other, and how far fp32 may be from it."""
    x = x.double()
    factor = torch.ones_like(x) if other is None else other.double()
    y = activate(x, activation) * factor
    return y, ACTIVATION_UNITS * U * (x * factor).abs() + U * y.abs()


def act_gradients(dy: Tensor, x: Tensor, other: Tensor | None, activation: str) -> tuple[list[Tensor], list[Tensor]]:
    """float64 dx and dother by autograd, and how far fp32 may be from them before the last rounding.

    A slope is a sum of products of numbers below 1 and of x, each within a few units: 16 units of 1 + |x|. In the tanh
    of gelu_tanh the argument is cubic in x.
    """
    dy = dy.double()
    x64 = x.double().requires_grad_()
    other64 = torch.ones_like(dy) if other is None else other.double()
    a = activate(x64, activation)
    slope = torch.autograd.grad(a.sum(), x64)[0]
    x64, a = x64.detach().abs(), a.detach()
    reach = 1 + x64 + (x64**3 if activation == "gelu_tanh" else 0)
    g = dy * other64
    dx_error = g.abs() * 16 * U * reach + 3 * U * (g * slope).abs()
    dother_error = dy.abs() * ACTIVATION_UNITS * U * x64 + 2 * U * (dy * a).abs()
    return [g * slope, dy * a], [dx_error, dother_error]


def rounded(value: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """The error after one more rounding, to dtype."""
    return error + UNIT[dtype] * (value.abs() + error) + SMALLEST[dtype]


def coded_between(q: Quantized, y: Tensor, error: Tensor, given: Tensor, how: Rounding) -> None:
    """Codes, scale, amax and counts are those of numbers within `error` of the float64 y [M, K].

    Rounding to codes keeps the order of values, so each code's value lies between those of y - error and y + error.
    """
    low, high = (y.abs() - error).clamp(min=0), y.abs() + error
    smallest, largest = (patches(t, how.block).amax(dim=(1, 3)) for t in (low, high))  # [R, C]
    assert (q.amax.double() >= smallest * (1 - U)).all() and (q.amax.double() <= largest * (1 + U)).all()
    own = (given == 0) & (smallest > 0)
    wanted = q.amax.double() / how.target * 2.0**how.margin
    assert torch.equal(q.scale[given != 0], given[given != 0])
    if not how.power_of_two:
        torch.testing.assert_close(q.scale[own].double(), wanted[own], rtol=2 * U, atol=0)
    scale = spread(q.scale, *y.shape).double()  # [M, K]
    slack = error / scale + 2 * U * (y / scale).abs()  # one division, and fp32 instead of float64 here
    ends = [how.fmt.decode(how.fmt.encode((y / scale + side).float(), saturate=True)) for side in (-slack, slack)]
    value = how.fmt.decode(q.codes)
    wrong = (value < ends[0]) | (value > ends[1])
    first = [float(side[wrong][0]) for side in (ends[0], value, ends[1])] if wrong.any() else None
    assert first is None, f"{int(wrong.sum())} of {wrong.numel()} codes; low, value and high of the first: {first}"
    assert int(q.counts[0]) == y.numel()
    zero = value == 0
    assert int(q.counts[2]) <= int(zero.sum())
    assert int(q.counts[1]) <= int((value.abs() == how.fmt.max).sum())
