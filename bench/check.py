"""What a bench asserts before it times anything, and tests/gpu too. The bounds are those of tests/tolerance.py."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fp8kernels.formats import E4M3
from fp8kernels.kernels.act_quantize.reference import activate
from fp8kernels.kernels.gemm import Operand
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.kernels.norm_quantize.reference import normalise
from fp8kernels.kernels.quantize import Quantized, Rounding
from fp8kernels.kernels.quantize.reference import quantize

from .device import ROOT

sys.path.append(str(ROOT / "tests"))
import tolerance

ENDS = 128  # rows at the top and at the bottom of a large result that are compared with float64
U = tolerance.UNIT[torch.float32]


def assert_same(ours: Tensor, expected: Tensor, what: str) -> None:
    """Equal bits; NaN equals NaN, whatever its sign and payload, as processors make different ones."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype, f"{what}: another shape or dtype"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    differs = ours.contiguous().view(bits) != expected.contiguous().view(bits)
    if ours.is_floating_point():
        differs &= ~(ours.isnan() & expected.isnan())
    different = int(differs.sum())
    assert different == 0, f"{what}: {different} of {ours.numel()} elements differ from the reference"


def assert_quantized(ours: Quantized, expected: Quantized, what: str) -> None:
    """Codes, transposed codes, scale, amax and counts, to the bit."""
    assert (ours.codes_t is None) == (expected.codes_t is None), f"{what}: transposed codes missing, or not asked for"
    for name in ("codes", "codes_t", "scale", "amax", "counts"):
        if getattr(expected, name) is not None:
            assert_same(getattr(ours, name), getattr(expected, name), f"{what} {name}")


def checked_rows(rows: int, device: str) -> Tensor:
    """The rows that a check compares with float64: all on a CPU; on a GPU, whose matrices are large, both ends."""
    every = torch.arange(rows, device=device)
    return every if device == "cpu" or rows <= 2 * ENDS else torch.cat([every[:ENDS], every[-ENDS:]])


def accumulator(x: Operand, w: Operand) -> str:
    """How the products of these operands are summed at worst: a name in tolerance.ACCUMULATORS."""
    if not x.codes.is_cuda:
        return "fp32"
    native = x.fmt.carrier is not None and w.fmt.carrier is not None
    return "fp8 tensor core" if native else "bf16 tensor core"


def assert_product(
    out: Tensor, x: Operand, w: Operand, what: str, bias: Tensor | None = None, *, promoted: int | None = None
) -> None:
    """`out` against the float64 product of the decoded operands, within the bound of docs/NUMERICS.md.

    promoted   products after which a short sum moves to fp32, where it is not the usual number of them
    """
    left, right = decoded(x), decoded(w)
    exact = left @ right.T if bias is None else left @ right.T + bias.double()  # [M, N]
    run = tolerance.PROMOTED if promoted is None else promoted
    bound = tolerance.gemm_bound(left, right, bias, out.dtype, accumulator(x, w), promoted=run)
    try:
        tolerance.bounded(out, exact, bound)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def decoded(operand: Operand) -> Tensor:
    """The operand's numbers in float64."""
    rows, cols = operand.codes.shape
    scale = operand.scale.double()
    spread = scale.repeat_interleave(rows // scale.shape[0], 0).repeat_interleave(cols // scale.shape[1], 1)
    return operand.fmt.decode(operand.codes).double() * spread


def ternary(operand: Operand, seed: int) -> Operand:
    """-1, 0 and 1 in the operand's place, with scales of 1: sums of such products are exact in any accumulator."""
    rows, cols = operand.codes.shape
    random = torch.Generator(operand.codes.device).manual_seed(seed)
    picks = torch.randint(0, 3, (rows, cols), generator=random, device=operand.codes.device)
    three = operand.fmt.encode(torch.tensor([-1.0, 0.0, 1.0], device=operand.codes.device))
    return operand._replace(codes=three[picks], scale=torch.ones_like(operand.scale))


def ternary_product(x: Operand, w: Operand) -> Tensor:
    """x @ w.T of ternary operands in fp32, exact while |sum| < 2**24."""
    return x.fmt.decode(x.codes) @ w.fmt.decode(w.codes).T  # [M, N]


def assert_between(ours: Quantized, y: Tensor, slack: Tensor, how: Rounding, what: str) -> None:
    """The codes of numbers within `slack` of the float64 y [M, K]: no code lies outside what y ± slack rounds to."""
    scale = ours.scale if how.carrier is None else ours.scale * 2.0**how.carrier
    low, high = (quantize((y + sign * slack).float(), scale, how).codes for sign in (-1, 1))
    fmt = how.fmt if how.carrier is None else E4M3
    got, least, most = (fmt.decode(codes) for codes in (ours.codes, low, high))
    known = y.isfinite() & slack.isfinite()
    outside = torch.where(known, (got < least) | (got > most), got.isfinite() & y.isnan())
    assert not outside.any(), (
        f"{what}: {int(outside.sum())} of {outside.numel()} codes lie outside the rounding of y ± slack, the first is "
        f"{got[outside][0]} for y = {y[outside][0]} ± {slack[outside][0]}, scaled between {least[outside][0]} and "
        f"{most[outside][0]}"
    )


def norm_exact(x: Tensor, norm: Norm, through: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """y of a norm in float64, and how far an fp32 evaluation may be from it.

    A sum of K terms in any order is within (K - 1) u of the sum of their magnitudes; a product, a root or a sum rounds
    once more, which 8 u covers. The mean moves every centered element, the mean square moves rstd by half of its own
    error. `through` is a dtype that y is rounded to before it is quantized.
    """
    wide = x.double()
    y, rstd, mean = normalise(wide, norm)
    depth = x.shape[1] + 8
    offset = 0.0 if mean is None else wide.abs().mean(1, keepdim=True)  # [M, 1]
    centered = wide if mean is None else wide - mean[:, None]
    weight = 1.0 if norm.weight is None else norm.weight.double() + norm.offset
    bias = 0.0 if norm.bias is None else norm.bias.double().abs()
    moved = centered.abs() + offset * (1 + centered.abs() * rstd[:, None])  # the mean's error, also inside rstd
    slack = depth * U * moved * rstd[:, None] * torch.as_tensor(weight).abs() + 4 * U * (y.abs() + bias)
    return y, rounded(y, slack, through)


def rounded(y: Tensor, slack: Tensor, through: torch.dtype) -> Tensor:
    """How far a number that is within `slack` of y may be from it once it is rounded to a dtype."""
    return slack + tolerance.UNIT[through] * (y.abs() + slack) + tolerance.SMALLEST[through]


EXPONENTIAL = 8  # units of fp32, times (1 + |x|): exp through 2**(x * log2 e) loses |x| of them, the rest is rounding


def activation_exact(
    x: Tensor, other: Tensor | None, kind: str, through: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """y of activation(x) * other in float64, and how far an fp32 evaluation may be from it.

    silu is x / (1 + exp(-x)), gelu x times a function between 0 and 1 that is known to a few units of 1. `through` is a
    dtype that activation(x), and then the product with `other`, is rounded to.
    """
    wide = x.double()
    factor = torch.ones_like(wide) if other is None else other.double()
    inner = activate(wide, kind)
    relative = EXPONENTIAL * U * (1 + wide.abs()) * inner.abs()
    absolute = EXPONENTIAL * U * wide.abs() if kind.startswith("gelu") else 0.0
    y = inner * factor
    slack = (relative + absolute) * factor.abs() + 4 * U * y.abs()
    for _ in range(1 if other is None else 2):
        slack = rounded(y, slack, through)
    return y, slack


def assert_near(ours: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """|ours - expected| <= relative * the largest magnitude of each row (of all, for a vector)."""
    wide = expected.double()
    size = wide.abs().amax(-1, keepdim=True)
    worst = float(((ours.double() - wide).abs() / size.clamp_min(1e-300)).max())
    assert worst <= relative, f"{what}: {worst:.2e} of the largest, at most {relative:.2e} is rounding"
