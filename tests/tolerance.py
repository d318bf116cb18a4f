"""The ways to compare, each with its reason; a tolerance is derived, never tuned."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a last place of 1
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # subnormal


def exact(got: Tensor, want: Tensor) -> None:
    """The same numbers, NaN where NaN is; the sign of zero is free."""
    assert got.shape == want.shape, f"{list(got.shape)} against {list(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan())
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ: {got[~same][0]} against {want[~same][0]}"


def gemm_bound(x: Tensor, w: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """How far out[M, N] = x @ w.T + bias, summed in fp32, may be from the float64 x[M, K] and w[N, K].

    (K + 2) u |x| @ |w|.T + u_out |out|, Higham 2002, section 3.1: K products are summed in any order, two factors of
    scale round once each; the bias and the output round once. Results below the normal range round in units of the
    smallest subnormal number instead, which the last terms add.
    """
    steps = x.shape[1] + 2
    u = UNIT[torch.float32]
    out = x @ w.T if bias is None else x @ w.T + bias.double()
    sums = steps * (u * (x.abs() @ w.abs().T) + SMALLEST[torch.float32])  # [M, N]
    return sums + (UNIT[out_dtype] + u) * (out.abs() + sums) + SMALLEST[out_dtype]


def bounded(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """|got - want| <= bound; NaN where `want` is NaN, the same infinity where it is infinite or beyond got's dtype."""
    assert got.shape == want.shape, f"{list(got.shape)} against {list(want.shape)}"
    largest = torch.finfo(got.dtype).max
    out = got.double()
    bound = torch.where(want.isfinite(), bound, 0.0)
    fits = (out - want).abs() <= bound
    fits |= (out == want) | (out.isnan() & want.isnan())
    fits |= out.isinf() & (out.sign() == want.sign()) & (want.abs() + bound > largest)
    if not fits.all():
        first = tuple((~fits).nonzero()[0].tolist())
        raise AssertionError(
            f"{int((~fits).sum())} of {fits.numel()} beyond the bound, the first at {first}: "
            f"{got[first]} against {want[first]}, bound {bound[first]:g}"
        )
