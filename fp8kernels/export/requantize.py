"""Weights as E4M3 codes with scales that every server reads alike, and what that rounding costs.

transformers casts scales to the dtype of the model, vLLM and SGLang keep fp32: a scale that bf16 holds exactly is the
same number in all three, and so are the decoded weights. Scales are rounded up, so that no amax saturates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import E4M3, get_format
from ..ops.quantize import quantize
from ..scaling.block import Block, get_block
from ..scaling.rules import scale_from_amax

# vLLM and SGLang decode a weight with one scale in fp16 and round it again (requantize_with_max_scale). Every E4M3 code
# comes back as itself from a scale of at least 2**-15: the smallest value, 2**-9, is then fp16's smallest, 2**-24
LEAST_SCALE = 2.0**-15
LOWEST_AMAX = 16.0  # where amax lands at least for that; ten binades above the smallest normal value, as many bits


def bf16_exact(scale: Tensor) -> Tensor:
    """The smallest numbers >= `scale` that bf16 holds; fp32 in, fp32 out, positive and finite, any shape."""
    near = scale.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(
        torch.bfloat16
    )  # the next larger one: bits of positive floats are ordered
    return torch.where(near.float() < scale, above, near).float()


def weight_amax(weight: Tensor, block: str) -> Tensor:
    """The largest magnitude of each block of a weight.

    weight   [N, K] fp32, bf16 or fp16
    block    "tensor", "row" or "128x128"; blocks at the edges may be smaller than the others
    returns  fp32 [1, 1], [N, 1] or [ceil(N / 128), ceil(K / 128)]
    """
    padded, kind = _padded(weight, get_block(block))
    rows, columns = kind.grid(*padded.shape)
    height, width = kind.patch(*padded.shape)
    return padded.abs().view(rows, height, columns, width).amax(dim=(1, 3)).float()


def weight_scale(amax: Tensor, target: float, *, power_of_two: bool = False) -> Tensor:
    """The scale, exact in bf16, that puts `amax` at most at `target`; fp32 of the same shape."""
    return bf16_exact(scale_from_amax(amax, target, power_of_two=power_of_two))


def fp16_safe(scale: Tensor, amax: Tensor) -> Tensor:
    """A scale that servers may decode with in fp16: raised to 2**-15 where that leaves `amax` at 16 or more.

    scale    fp32, exact in bf16; smaller ones belong to weights with an amax below 0.0137
    returns  fp32 of the same shape, exact in bf16
    """
    raised = (scale < LEAST_SCALE) & (amax >= LOWEST_AMAX * LEAST_SCALE)
    return torch.where(raised, LEAST_SCALE, scale)


def encode(weight: Tensor, scale: Tensor, block: str) -> Tensor:
    """E4M3 codes of a weight under given scales.

    weight   [N, K] fp32, bf16 or fp16
    scale    fp32, as `weight_amax` has its blocks
    returns  uint8 [N, K]
    error    |w - code * scale| <= max(2**-4 * |w|, 2**-10 * scale) below the largest value times the scale
    """
    padded, kind = _padded(weight, get_block(block))
    codes: Tensor = quantize(padded, E4M3, block=kind, scale=scale).codes
    return codes[: weight.shape[0], : weight.shape[1]].contiguous()


def decode(codes: Tensor, scale: Tensor, block: str, fmt: str = E4M3.name) -> Tensor:
    """code * scale in fp32 [N, K], also where blocks do not divide the weight."""
    rows, columns = codes.shape
    kind = get_block(block)
    height, width = kind.patch(rows, columns)
    grown = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return get_format(fmt).decode(codes) * grown


def sqnr_db(weight: Tensor, decoded: Tensor) -> float:
    """10 log10 of signal over rounding noise, in dB; Inf where nothing is lost."""
    exact = weight.double()
    noise = float((exact - decoded.double()).square().sum())
    signal = float(exact.square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def _padded(weight: Tensor, block: Block) -> tuple[Tensor, Block]:
    """The weight with zeros behind its last rows and columns, so that the block divides it."""
    rows, columns = weight.shape
    down = -rows % block.rows if block.rows else 0
    right = -columns % block.cols if block.cols else 0
    return (F.pad(weight, (0, right, 0, down)) if down or right else weight), block
