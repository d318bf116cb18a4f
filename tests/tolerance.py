"""The ways to compare, each with its reason; a tolerance is derived, never tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kernels.formats import Format
from fp8kernels.kernels.act_quantize.reference import activate
from fp8kernels.kernels.decode_attention import HeadCodes
from fp8kernels.kernels.decode_attention.reference import decode_attention as attend
from fp8kernels.kernels.gemm import Epilogue

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a last place of 1
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # subnormal


def exact(got: Tensor, want: Tensor) -> None:
    """The same numbers, NaN where NaN is; the sign of zero is free."""
    assert got.shape == want.shape, f"{list(got.shape)} against {list(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan())
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ: {got[~same][0]} against {want[~same][0]}"


@dataclass(frozen=True)
class Accumulator:
    """How a tensor core adds: `addends` products and the running sum are aligned to the largest of them, cut off below
    `bits` bits, added, and the sum is cut again."""

    addends: int
    bits: int

    def error(self, count: int) -> float:
        """The error of a sum of `count` products, as a share of the sum of their magnitudes.

        Each instruction cuts addends + 2 numbers, each by less than 2**(1 - bits) of the largest, which is at most the
        sum of the magnitudes and the error made so far.
        """
        instructions = -(-count // self.addends)
        return math.expm1(instructions * math.log1p((self.addends + 2) * 2.0 ** (1 - self.bits)))


ACCUMULATORS = {
    "fp32": None,  # rounds each addition to nearest, as CPUs do
    # Fasi, Higham, Mikaitis, Pranesh 2021, PeerJ CS 7:e330: an A100 adds 8 products at a time, aligned and truncated,
    # and keeps at least the 24 bits of fp32. Newer ones add more at a time, which makes the bound smaller
    "bf16 tensor core": Accumulator(addends=8, bits=24),
    # DeepSeek-V3, arXiv 2412.19437, sections 3.3.2 and 3.5.2: Hopper aligns 32 products, and of each and of the sum
    # uses the highest 14 bits
    "fp8 tensor core": Accumulator(addends=32, bits=14),
}
PROMOTED = 128  # products after which our kernels, and cuBLASLt without fast accumulation, move such a sum to fp32


def gemm_bound(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulator: str = "fp32",
    *,
    promoted: int = PROMOTED,
) -> Tensor:
    """How far out[M, N] = x @ w.T + bias, summed in fp32, may be from the float64 x[M, K] and w[N, K].

    (K + 2) u |x| @ |w|.T + u_out |out|, Higham 2002, section 3.1: K products are summed in any order, two factors of
    scale round once each; the bias and the output round once. Results below the normal range round in units of the
    smallest subnormal number instead, which the last terms add. A tensor core adds the error of its accumulator, over
    runs of at most `promoted` products where it keeps fewer bits than fp32.
    """
    depth = x.shape[1]
    u = UNIT[torch.float32]
    out = x @ w.T if bias is None else x @ w.T + bias.double()
    unit = (depth + 2) * u
    inside = ACCUMULATORS[accumulator]
    if inside is not None:
        unit += inside.error(min(depth, promoted) if inside.bits < 24 else depth)
    sums = unit * (x.abs() @ w.abs().T) + (depth + 2) * SMALLEST[torch.float32]  # [M, N]
    return sums + (UNIT[out_dtype] + u) * (out.abs() + sums) + SMALLEST[out_dtype]


STEEPEST = 1.13  # the largest slope of any activation: gelu has 1.129, silu 1.0998
ACTIVATION_UNITS = 12  # of fp32 and |x|: an exponential within 2**-22 and its argument 8, a division 4, at most


def epilogue_bound(
    x: Tensor, w: Tensor, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue, accumulator: str = "fp32"
) -> Tensor:
    """How far activation(x @ w.T + bias) + residual, computed in fp32, may be from its float64 value.

    The error of the sum through the steepest slope, that of the activation itself, one rounding of the sum with the
    residual and one of the output.
    """
    u = UNIT[torch.float32]
    total = x @ w.T if bias is None else x @ w.T + bias.double()  # [M, N]
    error = gemm_bound(x, w, bias, torch.float32, accumulator)
    out = total
    if epilogue.activation != "none":
        out = activate(total, epilogue.activation)
        error = STEEPEST * error + ACTIVATION_UNITS * u * (total.abs() + error)
    if epilogue.residual is not None:
        out = out + epilogue.residual.double()
    return error + (u + UNIT[out_dtype]) * (out.abs() + error) + SMALLEST[out_dtype]


ATTENTION_TILE, ATTENTION_SPLIT = 64, 512  # tokens: kTile and kAttentionSplit of csrc/decode_attention


def attention_bound(
    q: Tensor, keys: HeadCodes, values: HeadCodes, fmt: Format, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """decode_attention in float64 [B, H, Q, D], and how far one with sums in fp32 and a running maximum may be from it.

    A score is D products and four factors: (D + 6) u of |q| |k|, and the maximum has the same error; so a weight is
    wrong by exp of twice that, and by 4 u of its own power. The maximum moves once a tile and once a split; each move
    rounds its argument, of the size of the largest score, a power and a product. Sums of T weights, with values and
    without, add T u each. Weights below the normal range are lost.
    """
    u = UNIT[torch.float32]
    want = attend(q.double(), keys, values, fmt, scaling, mask)
    tokens, width = keys.codes.shape[2:]
    if tokens == 0:
        return want, torch.zeros_like(want)
    k, v = (
        (fmt.decode(each.codes).double() * each.scale.double()[:, :, None, None]).repeat_interleave(
            q.shape[1] // keys.codes.shape[1], 1
        )
        for each in (keys, values)
    )  # [B, H, T, D]
    largest = (q.double().abs() @ k.abs().transpose(-1, -2) * abs(scaling)).amax(-1, keepdim=True)  # [B, H, Q, 1]
    moves = tokens / ATTENTION_TILE + tokens / ATTENTION_SPLIT + 2
    weight = torch.expm1(2 * (width + 6) * u * largest) + 4 * u + moves * u * (4 * largest + 4)
    if mask is None:
        mask = torch.ones(q.shape[2], tokens, dtype=torch.bool).tril(tokens - q.shape[2])
    scores = (q.double() @ k.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)  # [B, H, Q, T]
    sums = scores.softmax(-1).nan_to_num(0.0) @ v.abs()  # [B, H, Q, D]; a query that sees no token has no weights
    error = 2 * (weight + (tokens + 4) * u) * sums * (1 + weight) + tokens * 2.0**-126 * v.amax()
    return want, error + (UNIT[q.dtype] + u) * (want.abs() + error) + SMALLEST[q.dtype]


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
