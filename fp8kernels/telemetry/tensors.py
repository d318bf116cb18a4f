"""What rounding does to one tensor of one layer: how far amax has left its scale behind, what that costs in bits.

Everything is computed on the tensor's device and read once, when the step is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import Format, get_format
from ..kernels.quantize.carrier import recoding, usable
from ..nn.state import Coded, ScaledLayer, quantize_role
from ..scaling.delayed import ROLES
from ..scaling.rules import scale_from_amax
from .precision import lost_bits

ROWS = 128  # a sample of a tensor with block scales is a multiple of this, the height of the highest block
ROUNDING = 2.0**-20  # what scale * target may fall short of the amax that the scale was made of

AMAX, SCALE, COUNT, NONZERO, PAST_TARGET, PAST_MAXIMUM, LOST, LOST_ALL, SIGNAL, NOISE = range(10)


@dataclass(frozen=True)
class TensorReading:
    """One tensor of one layer in one optimizer step, over all of its micro-batches.

    layer, role   names; the role is input, weight or grad
    fmt           the format that it is rounded to
    amax          largest |x| of the whole tensor, in units of x
    scale         in use in that step; of block and current scales, that of the tensor's own amax
    target        where the amax would land if the scale were fresh
    past_target   fraction of the elements with |x| > scale * target
    past_maximum  fraction of the elements that saturate: beyond the largest value, that of the carrier where there is
                  one, or beyond the role's clamp
    bits_lost     mean over the elements past the target of the mantissa bits that they have less than the format's
                  best; saturated ones lost all
    bits_lost_all the same mean over all elements that are not zero; what is flushed to zero lost all
    stale         amax / (scale * target)
    sqnr_db       of rounding it, in dB; None where that is not a number (zeros, Inf, or nothing is lost)
    high          whether the layer computed in high precision, so that all this is what rounding would have done
    """

    layer: str
    role: str
    fmt: str
    amax: float
    scale: float
    target: float
    past_target: float
    past_maximum: float
    bits_lost: float
    bits_lost_all: float
    stale: float
    sqnr_db: float | None
    high: bool

    def row(self, step: int) -> dict[str, Any]:
        """As a line of a run's layers.jsonl."""
        return {"step": step, **asdict(self)}


def measure(layer: ScaledLayer, index: int, x: Tensor, sample: int) -> Tensor | None:
    """Sums over a tensor that a layer is about to round, fp64 [10] on its device; None where there is nothing.

    sample  elements that are looked at, beside amax, which is that of all: every k-th one of a tensor with one scale,
            where k has no divisor in common with the row's length, so that all columns have their turn; the first rows
            of one with more scales
    """
    role = layer.fp8_recipe.roles()[index]
    if role is None or x.numel() == 0:
        return None
    fmt, target = get_format(role.fmt), layer.fp8_recipe.target(index)
    carrier = layer.fp8_carrier(index, x.device)
    low, high = torch.aminmax(x)
    amax = torch.maximum(-low, high).float()
    scale = _scale(layer, index, amax)
    if carrier is not None:
        scale = usable(scale, carrier)
    if _follows(layer, index):
        rows = x.reshape(-1, x.shape[-1])
        part = rows[: max(ROWS, sample // x.shape[-1] // ROWS * ROWS)]
    else:
        flat = x.reshape(-1)
        part = flat[:: stride(flat.numel(), x.shape[-1], sample)].reshape(1, -1)
    return _sums(part.float(), amax, scale, _Rounding(layer, index, fmt, target, carrier))


def stride(elements: int, columns: int, sample: int) -> int:
    """Every which element of a tensor is looked at: at most `sample` of them, from all columns."""
    k = -(-elements // sample)
    while k > 1 and math.gcd(k, columns) > 1:
        k += 1
    return k


def _follows(layer: ScaledLayer, index: int) -> bool:
    """Whether a tensor of the role always has the scales of its own amax."""
    role = layer.fp8_recipe.roles()[index]
    return role is not None and role.scaling == "current"


def _scale(layer: ScaledLayer, index: int, amax: Tensor) -> Tensor:
    """The scale in use, fp32 []; that of the tensor's own amax where it takes that."""
    recipe = layer.fp8_recipe
    own = scale_from_amax(amax, recipe.target(index), power_of_two=recipe.power_of_two)
    if _follows(layer, index):
        return own
    given = layer.fp8_scale[index]
    return torch.where(given > 0, given, own)


class _Rounding(NamedTuple):
    """How a layer rounds a tensor of a role, `of` being its index; with a carrier its k, else None."""

    layer: ScaledLayer
    of: int
    fmt: Format
    target: float
    carrier: int | None

    def apply(self, x: Tensor, scale: Tensor, carrier: int | None) -> Coded:
        """x fp32 [M, K], scale fp32 []."""
        recipe = self.layer.fp8_recipe
        role = recipe.roles()[self.of]
        assert role is not None
        given, clamp = scale.reshape(1), recipe.clamp(self.of)
        return quantize_role(x, role, self.target, recipe.power_of_two, given, None, carrier=carrier, clamp=clamp)


def _sums(x: Tensor, amax: Tensor, scale: Tensor, how: _Rounding) -> Tensor:
    """x fp32 [M, K], a sample of the tensor. Squares are those of x / scale, which fp32 holds."""
    fmt, carrier = how.fmt, how.carrier
    coded = how.apply(x, scale, None)
    codes, y = coded.codes, x / scale
    size = y.abs()
    if _follows(how.layer, how.of):
        beyond = saturated = torch.zeros_like(x, dtype=torch.bool)
    else:
        clamp = how.layer.fp8_recipe.clamp(how.of)
        beyond = size > how.target * (1 + ROUNDING)
        saturated = size >= fmt.overflow_at if clamp is None else size > clamp * (1 + ROUNDING)
    if carrier is not None:
        saturated = saturated | recoding(fmt, carrier, x.device).above[codes.long()]
        coded = how.apply(x, scale, carrier)
    lost = lost_bits(fmt, x.device)  # [256]
    best = lost.max()
    number = histogram(codes)  # fp64 [256], of all elements; those that are zero or NaN have no bits to lose
    empty = (x == 0).sum() + number[fmt.nan_code]
    past, over = beyond.sum(dtype=torch.float64), saturated.sum(dtype=torch.float64)
    cut = best * over - lost @ histogram(codes, saturated)  # what saturated ones lose more than their code says
    decoded = torch.ops.fp8kernels.dequantize(coded.codes, coded.scale, coded.fmt, torch.float32)
    sums = [
        amax.double(),
        scale.double(),
        torch.tensor(x.numel(), dtype=torch.float64, device=x.device),
        x.numel() - empty,
        past,
        over,
        lost @ histogram(codes, beyond) + cut,
        lost @ number - best * empty + cut,
        y.square().sum().double(),
        (decoded.div_(scale).sub_(y)).square_().sum().double(),
    ]
    return torch.stack(sums)


def histogram(codes: Tensor, only: Tensor | None = None) -> Tensor:
    """fp64 [256]: how often each code stands in uint8 codes, or in those of them that a mask of their shape selects."""
    if codes.is_cuda:  # there bincount and masks wait for the device, and histc is refused where torch is deterministic
        return sorted_histogram(codes, only)
    return torch.bincount((codes if only is None else codes[only]).reshape(-1), minlength=256).double()


def sorted_histogram(codes: Tensor, only: Tensor | None) -> Tensor:
    """`histogram` by sorting: nothing waits, nothing is added up in an order that may change."""
    chosen = codes.int() if only is None else torch.where(only, codes.int(), -1)
    ordered, values = chosen.reshape(-1).sort().values, torch.arange(256, dtype=torch.int32, device=codes.device)
    upto, below = (torch.searchsorted(ordered, values, right=right) for right in (True, False))
    return (upto - below).double()


def merge(parts: Sequence[Tensor]) -> Tensor:
    """The sums of one tensor that was seen several times: in micro-batches, in calls, in recomputed forwards."""
    stacked = torch.stack(list(parts))  # [n, 10]
    out = stacked.sum(0)
    out[AMAX], out[SCALE] = stacked[:, AMAX].max(), stacked[:, SCALE].max()
    return out


def reading(layer: ScaledLayer, index: int, sums: list[float], *, high: bool) -> TensorReading:
    """The sums as one reads them; `high` says that the layer computed in high precision."""
    role = layer.fp8_recipe.roles()[index]
    assert role is not None
    target = layer.fp8_recipe.target(index)
    reach = sums[SCALE] * target
    return TensorReading(
        layer=layer.fp8_name or type(layer).__name__,
        role=ROLES[index],
        fmt=role.fmt,
        amax=sums[AMAX],
        scale=sums[SCALE],
        target=target,
        past_target=sums[PAST_TARGET] / sums[COUNT],
        past_maximum=sums[PAST_MAXIMUM] / sums[COUNT],
        bits_lost=sums[LOST] / max(sums[PAST_TARGET], 1.0),
        bits_lost_all=sums[LOST_ALL] / max(sums[NONZERO], 1.0),
        stale=sums[AMAX] / reach if not _follows(layer, index) else 1.0,
        sqnr_db=_decibels(sums[SIGNAL], sums[NOISE]),
        high=high,
    )


def _decibels(signal: float, noise: float) -> float | None:
    ratio = signal / noise if noise > 0 else math.inf
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else None
